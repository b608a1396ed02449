"""What of the facts of nodes keeps a job from training, or may: one function a subject, each with the way out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from launcher import versions
from launcher.jobs.facts import Facts
from launcher.jobs.finding import Finding
from launcher.plan import Plan
from launcher.plan.disk import checkpoint_bytes
from launcher.recipe.schema import Recipe
from launcher.run.directory import RunDirectory
from launcher.run.ledger import valid_checkpoints
from launcher.versions import few

_MIB, _GIB = 1 << 20, 1 << 30
_SHM = 256 * _MIB  # what NCCL shares between the ranks of a node takes some ten MiB a pair; containers give 64
_OPEN_FILES = 512  # of one rank, beside a connection to each other one
_CLOCK_S = 2.0
_LOCKED = 64 * _MIB  # less than this cannot even hold the buffers of one InfiniBand queue
_PYTHON_MEMORY = _GIB  # of a rank with torch and its libraries, roughly


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a job wants of each node.

    checkpoint: bytes of one, None where no formula knows the model
    kept: checkpoints that lie there already and count
    keep_last: checkpoints that are kept in the end
    pinned: bytes that DeepSpeed page-locks on the fullest node
    host: bytes of host memory on the fullest node, pinned ones among them
    gpus: GPUs on each node; None: the CPU will do
    compiles: torch.compile or triton will build kernels on the node
    """

    nodes: int = 1
    nproc_per_node: int = 1
    checkpoint: int | None = None
    kept: int = 0
    keep_last: int = 2
    pinned: int = 0
    host: int = 0
    gpus: int | None = None
    compiles: bool = False

    @staticmethod
    def of(recipe: Recipe, plan: Plan, run: RunDirectory | None) -> Needs:
        """What a recipe wants; a run that exists has checkpoints already."""
        on_cpu = recipe.cluster.accelerator == "cpu"
        host = plan.memory.host if plan.memory else None
        on_host = host.state + host.reader + host.checkpoint + host.activations if host else 0
        return Needs(
            nodes=plan.nodes,
            nproc_per_node=plan.nproc_per_node,
            checkpoint=checkpoint_bytes(recipe, plan.parameters) if plan.parameters else None,
            kept=len(valid_checkpoints(run)) if run is not None and run.exists() else 0,
            keep_last=recipe.checkpoint.keep_last,
            pinned=host.state if host and not on_cpu and recipe.strategy.kind.startswith("zero") else 0,
            host=on_host + plan.nproc_per_node * _PYTHON_MEMORY if on_host else 0,
            gpus=plan.nproc_per_node if recipe.cluster.accelerator == "cuda" else None,
            compiles=not on_cpu and (bool(recipe.model.compile) or recipe.model.liger is True),
        )


def judge(nodes: Sequence[Facts], needs: Needs | None) -> list[Finding]:
    """What the facts of one node, or of all nodes of a job in their order, come to; bad ones first.

    needs: of the job; None: there is none, as in `launcher doctor`
    """
    found = [finding for check in _OF_ALL for finding in check(dict(zip(labels(nodes), nodes, strict=True)), needs)]
    of_each = {
        label: [finding for check in _OF_ONE for finding in check(node, needs)]
        for label, node in zip(labels(nodes), nodes, strict=True)
    }
    return worst_first([*found, *by_node(of_each)])


def by_node(found: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """The findings of several nodes, each once, with the nodes that it is true of unless that is all of them."""
    said: dict[Finding, list[str]] = {}
    for label, findings in found.items():
        for finding in findings:
            said.setdefault(finding, []).append(label)
    return [_named(finding, on if len(on) < len(found) else []) for finding, on in said.items()]


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Bad ones, then notes, then what is well."""
    return sorted(findings, key=lambda finding: ("bad", "note", "ok").index(finding.state))


def labels(nodes: Sequence[Facts]) -> list[str]:
    """A name for each node: its host, and its number where hosts have one name."""
    hosts = [str(node["host"]) for node in nodes]
    return [host if hosts.count(host) == 1 else f"{host} (node {i})" for i, host in enumerate(hosts)]


def _named(finding: Finding, on: list[str]) -> Finding:
    where = f"{few(on)}: " if on else ""
    return Finding(finding.group, finding.name, finding.state, where + finding.text, finding.fix)


def size(count: int) -> str:
    """Bytes for people."""
    for unit, name in ((1 << 40, "TiB"), (_GIB, "GiB"), (_MIB, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def _ok(name: str, text: str) -> Finding:
    return Finding("node", name, "ok", text)


def _note(name: str, text: str, fix: str) -> Finding:
    return Finding("node", name, "note", text, fix)


def _bad(name: str, text: str, fix: str) -> Finding:
    return Finding("node", name, "bad", text, fix)


def _gpus(node: Facts, needs: Needs | None) -> Iterator[Finding]:
    gpus, wanted = node["gpus"], needs.gpus if needs else None
    if wanted and gpus["count"] < wanted:
        yield _bad(
            "GPUs",
            f"{gpus['count']} GPUs ({gpus['how']}), cluster.nproc_per_node = {wanted}",
            f"Use nodes with {wanted}, or cluster.nproc_per_node={max(1, gpus['count'])}.",
        )
    elif gpus["models"] and len(gpus["models"]) < gpus["count"]:
        yield _bad(
            "GPUs",
            f"{gpus['count']} GPUs ({gpus['how']}), but the driver answers for {len(gpus['models'])}",
            "One has failed (see dmesg for Xid): leave this node out, or have it restarted.",
        )


def _leftovers(node: Facts, needs: Needs | None) -> Iterator[Finding]:
    gpus = node["gpus"]
    for process in gpus["processes"]:
        yours = process["owner"] == "yours"
        whose = "your" if yours else f"{process['owner']}'s" if process["owner"] else "somebody's"
        held = "memory" if process["mib"] is None else size(process["mib"] * _MIB)
        fix = f"If nothing needs it, end it: kill {process['pid']}." if yours else "Ask them, or use another node."
        text = f"{whose} process {process['pid']} ({process['name']}) holds {held} of GPU {process['gpu']}"
        yield _note("leftovers", text, fix)
    known = {process["gpu"] for process in gpus["processes"]}
    for gpu in gpus["used"]:
        if gpu["gpu"] not in known:
            text = f"{size(gpu['mib'] * _MIB)} of GPU {gpu['gpu']} is taken by a process that is not seen from here"
            yield _note("leftovers", text, "Look on the host, outside the container: nvidia-smi.")
    if gpus["models"] and not (gpus["processes"] or gpus["used"]):
        yield _ok("leftovers", "nobody holds memory of the GPUs")


def _network(node: Facts, needs: Needs | None) -> Iterator[Finding]:
    found = node["network"]
    if found is None:
        return
    speed = f", {found['mbit_per_s']:,} Mbit/s" if found["mbit_per_s"] else ""
    yield _ok("network", f"{found['interface'] or 'an interface'} ({found['address']}{speed}) is how the nodes talk")


def _hcas(node: Facts, needs: Needs | None) -> Iterator[Finding]:
    down = [f"{port['name']} port {port['port']}" for port in node["hcas"] if port["state"] != "ACTIVE"]
    active = [port for port in node["hcas"] if port["state"] == "ACTIVE"]
    if down and active:
        fix = "NCCL leaves it out; name those to use in NCCL_IB_HCA, or have the cable looked at."
        yield _note("InfiniBand", f"{', '.join(down)} is not active", fix)
    elif active:
        names = ", ".join(f"{port['name']} ({port['rate']})" for port in active)
        yield _ok("InfiniBand", names)


def _disk(node: Facts, needs: Needs | None) -> Iterator[Finding]:
    disk = node["disk"]
    there = f"{size(disk['free'])} free on {disk['mount']} ({disk['type']})"
    if disk["total"] == 0:  # no disk, as /proc: whether it can be written is seen when it is
        yield _ok("disk", f"{disk['mount']} ({disk['type']}) tells no size")
        return
    if needs is None or needs.checkpoint is None:
        yield _ok("disk", there)
        return
    one = needs.checkpoint
    least = one * (1 if needs.kept else 2)  # the one before goes when the next is whole
    in_the_end = one * max(1, needs.keep_last + 1 - needs.kept)
    fix = "Free space, or choose another run.dir."
    if disk["free"] < least:
        text = (
            f"{there}; a checkpoint takes {size(one)}, and while one is written the one before is kept: {size(least)}"
        )
        yield _bad("disk", text, fix)
    elif disk["free"] < in_the_end:
        text = (
            f"{there}; {needs.keep_last} checkpoints (checkpoint.keep_last) and the next take {size(in_the_end)} more"
        )
        yield _note("disk", text, f"{fix[:-1]}, or lower checkpoint.keep_last.")
    else:
        yield _ok("disk", f"{there}, a checkpoint takes {size(one)}")


def _clock(node: Facts, needs: Needs | None) -> Iterator[Finding]:
    clock = node["clock"]
    if clock is None:
        return
    if "error" in clock:
        yield _bad(
            "ports",
            f"node 0 cannot be reached on a port of the kernel's choice ({clock['error']})",
            "Ranks meet on such ports: let the firewall pass those of net.ipv4.ip_local_port_range between the nodes.",
        )
        return
    offset, trip = clock["offset_s"], clock["round_trip_s"]
    if offset is None:
        return
    if abs(offset) > _CLOCK_S + trip:
        way = "ahead of" if offset > 0 else "behind"
        text = f"its clock is {abs(offset):.0f} s {way} node 0's"
        yield _note("clock", text, "Times in logs and the ledger will not fit together: start chrony or ntpd.")
    else:
        within = abs(offset) + trip / 2
        yield _ok("clock", f"{within:.3f} s from node 0's at most; a message there and back takes {trip * 1e3:.2f} ms")


def _locked_memory(node: Facts, needs: Needs | None) -> Iterator[Finding]:
    limit = node["limits"]["memlock"]
    fabric = any(port["state"] == "ACTIVE" for port in node["hcas"])
    wanted = max(needs.pinned if needs else 0, _LOCKED if fabric and (needs is None or needs.nodes > 1) else 0)
    if limit is None or limit >= wanted:
        yield _ok("locked memory", "no limit" if limit is None else f"at most {size(limit)}")
        return
    why = f"offloading pins {size(wanted)}" if needs and needs.pinned == wanted else "InfiniBand's buffers need more"
    yield _note(
        "locked memory",
        f"at most {size(limit)} may be page-locked (ulimit -l), {why}",
        "Set memlock to unlimited in /etc/security/limits.conf, for Slurm in slurmd's unit (LimitMEMLOCK=infinity), "
        "for containers with --ulimit memlock=-1.",
    )


def _open_files(node: Facts, needs: Needs | None) -> Iterator[Finding]:
    limit = node["limits"]["nofile"]
    wanted = _OPEN_FILES + 4 * (needs.nodes * needs.nproc_per_node if needs else 1)
    if limit is None or limit >= wanted:
        yield _ok("open files", "no limit" if limit is None else f"at most {limit:,}")
    else:
        fix = "Raise it before the job: ulimit -n 65536 (cluster.setup takes such lines), or nofile in limits.conf."
        yield _note("open files", f"at most {limit:,} (ulimit -n), this job may need {wanted:,}", fix)


def _shared_memory(node: Facts, needs: Needs | None) -> Iterator[Finding]:
    if node["shm"] is None:
        fix = "Mount a tmpfs there; in a pod, an emptyDir with medium Memory."
        yield _note("/dev/shm", "is not there: NCCL shares memory between the ranks of a node by it", fix)
    elif node["shm"] < _SHM and node["gpus"]["count"] > 1:
        fix = "Start the container with --shm-size=8g or --ipc=host; in a pod, mount an emptyDir with medium Memory."
        yield _note("/dev/shm", f"holds {size(node['shm'])}, less than NCCL takes for the GPUs of a node", fix)
    else:
        yield _ok("/dev/shm", size(node["shm"]))


def _memory(node: Facts, needs: Needs | None) -> Iterator[Finding]:
    memory = node["memory"]
    most = memory["limit"] or memory["total"]
    if most is None:
        return
    text = f"{size(most)} for this process's control group" if memory["limit"] else size(most)
    if needs and needs.host > most:
        fix = "Ask for more memory (Slurm: --mem=0; a pod: resources.limits.memory), or offload less."
        yield _note("host memory", f"{text}, the job plans with {size(needs.host)} on a node", fix)
    elif memory["limit"] and memory["limit"] < _PYTHON_MEMORY * (needs.nproc_per_node if needs else 1):
        fix = "Ask for more memory (Slurm: --mem=0; a pod: resources.limits.memory)."
        yield _note("host memory", f"{text}, and each rank takes about {size(_PYTHON_MEMORY)} before any data", fix)
    else:
        yield _ok("host memory", text)


def _host_name(node: Facts, needs: Needs | None) -> Iterator[Finding]:
    address = node["name"]
    several = needs is not None and needs.nodes > 1
    if address is None:
        text = f"{node['host']}, this host's name, has no address"
        yield _note("host name", text, "Add it to /etc/hosts; programs that look themselves up else wait and fail.")
    elif several and address.startswith("127.") and node["network"] is None:
        fix = "Give the name its address in /etc/hosts, or set cluster.network_interface."
        yield _note("host name", f"{node['host']} leads to {address}, where no other node finds it", fix)
    else:
        yield _ok("host name", f"{node['host']} is {address}")


def _headers(node: Facts, needs: Needs | None) -> Iterator[Finding]:
    if not (needs.compiles if needs else node["gpus"]["count"]):
        return
    if not node["headers"]:
        number = ".".join(str(node["versions"].get("python") or "3").split(".")[:2])
        fix = (
            f"Install Python's headers: apt install python{number}-dev (dnf: python{number}-devel), or conda's python."
        )
        yield _note("Python.h", "is missing: triton, and so torch.compile and Liger, compile against it", fix)
    elif node["compiler"] is None:
        yield _note("compiler", "no C compiler: triton, and so torch.compile and Liger, need one", "Install gcc.")
    else:
        yield _ok("Python.h", "is there, for what triton compiles")


_OF_ONE = (
    _gpus, _leftovers, _network, _hcas, _clock, _disk, _memory, _shared_memory, _locked_memory, _open_files, _host_name,
    _headers,
)  # fmt: skip


def _versions(nodes: dict[str, Facts], needs: Needs | None) -> Iterator[Finding]:
    for name, text in versions.differences({label: node["versions"] for label, node in nodes.items()}):
        if name in versions.MUST_AGREE:
            yield _bad("versions", text, "Install one version on all nodes.")
        else:
            yield _note("versions", text, "It may go well; one version everywhere is safer.")


def _same_gpus(nodes: dict[str, Facts], needs: Needs | None) -> Iterator[Finding]:
    counts = {label: {"GPUs": str(node["gpus"]["count"])} for label, node in nodes.items()}
    for _, text in versions.differences(counts):
        mixed = any(node["gpus"]["count"] == 0 for node in nodes.values())
        if mixed:
            yield _bad("GPUs", text, "Ranks would train on CPUs and GPUs at once: use nodes of one kind.")
        else:
            yield _note("GPUs", text, "Only cluster.nproc_per_node of each node are used.")
    models = {
        label: {"GPU": ", ".join(dict.fromkeys(node["gpus"]["models"]))}
        for label, node in nodes.items()
        if node["gpus"]["models"]
    }
    for _, text in versions.differences(models):
        yield _note("GPUs", text, "The slowest sets the pace of all.")


def _same_network(nodes: dict[str, Facts], needs: Needs | None) -> Iterator[Finding]:
    rates: dict[str, dict[str, str | None]] = {}
    for label, node in nodes.items():
        network = node["network"] or {}
        active = [port["rate"] for port in node["hcas"] if port["state"] == "ACTIVE"]
        speed = f"{network['mbit_per_s']:,} Mbit/s" if network.get("mbit_per_s") else None
        rates[label] = {"InfiniBand": f"{len(active)} x {active[0]}" if active else "none", "network": speed}
    for _, text in versions.differences(rates):
        yield _note("network", text, "The slowest link sets the pace of all.")


def _same_disk(nodes: dict[str, Facts], needs: Needs | None) -> Iterator[Finding]:
    kinds: dict[str, dict[str, str | None]] = {label: {"disk": node["disk"]["type"]} for label, node in nodes.items()}
    for _, text in versions.differences(kinds):
        fix = "Put run.dir on a file system that all nodes share."
        yield _note("disk", f"the run's folder lies on different file systems: {text.removeprefix('disk ')}", fix)


_OF_ALL = (_versions, _same_gpus, _same_network, _same_disk)
