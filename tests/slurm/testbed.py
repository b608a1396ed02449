"""A throw-away Slurm of several nodes on one machine: real daemons, up in seconds, of which nothing is left behind.

Each node is a set of Linux namespaces: its own network (one cable to a private bridge), host name, boot id, process
tree, /etc/hosts, /dev/shm and /var/tmp. All other paths are shared by all, as a cluster's file system is. GPUs are
devices that Slurm counts and nobody opens. It needs root; on Debian it installs what is missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from tests.jobs.make import descendants

PACKAGES = {
    "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "munged": "munge", "ip": "iproute2", "nsenter": "util-linux",
}  # fmt: skip
FREEZER = Path(
    "/sys/fs/cgroup/freezer"
)  # how Slurm follows processes under cgroup v1; a machine with v2 alone has none
_PREFIX = "slt"  # of our bridges; interface names hold 15 characters
_OWNER = "tests of launcher, process"  # what a bridge says of itself: whose it is, and where the files are
_LOCK = Path(tempfile.gettempdir()) / "launcher-tests-slurm.lock"

# What makes a cluster of seconds out of one of minutes, and several of them possible on one machine.
_CONF = {
    "ClusterName": "testbed", "SlurmUser": "root", "SlurmdUser": "root", "MpiDefault": "none",
    "CommunicationParameters": "NoCtldInAddrAny",  # slurmctld listens on the bridge alone
    "SlurmdParameters": "config_overrides",  # nodes are what is written here, not what this machine is
    "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core", "TaskPlugin": "task/none",
    "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2",
    "PropagateResourceLimits": "NONE", "GresTypes": "gpu", "JobRequeue": "1", "EnforcePartLimits": "ALL",
    "SlurmdTimeout": "10", "KillWait": "10", "MinJobAge": "86400", "ReturnToService": "2",
    "PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE",
}  # fmt: skip


class Unavailable(Exception):
    """No Slurm can be started here; the text says why."""


@dataclass(slots=True)
class Node:
    """One machine of the cluster.

    name, address: as Slurm knows it
    port: this machine's end of its cable
    """

    name: str
    address: str
    port: str
    process: subprocess.Popen[str] | None = None  # waits for the node's first process, and takes it along
    first: int = 0  # that process, which all others of the node die with


class Slurm:
    """A running cluster. `environment` is what its commands need."""

    def __init__(self, folder: Path, tag: str, third: int, nodes: int) -> None:
        self.folder = folder
        self.bridge = f"{_PREFIX}{tag}"
        self.network = f"198.18.{third}"  # of the block for benchmarks, RFC 2544: no real network has it
        self.environment = {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}
        self.nodes = {
            f"node{i + 1}": Node(f"node{i + 1}", f"{self.network}.{10 + i}", f"{self.bridge}n{i + 1}")
            for i in range(nodes)
        }
        self.daemons: list[subprocess.Popen[str]] = []

    def command(self, *words: str | Path, check: bool = True) -> str:
        """What a Slurm command prints, `scontrol show nodes` say."""
        return output(*words, check=check, env={**os.environ, **self.environment})

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of a job as `scontrol` tells them, ended ones too; empty if there is no such job."""
        text = self.command("scontrol", "show", "job", "-o", job_id, check=False)
        return dict(re.findall(r"(\S+?)=(\S*)", text)) if "JobId=" in text else {}

    def wait_for(self, job_id: str, *states: str, timeout_s: float = 180) -> dict[str, str]:
        """Poll until a job is in one of these states, `RUNNING` say; its fields."""

        def there() -> dict[str, str] | None:
            fields = self.job(job_id)
            return fields if fields.get("JobState") in states else None

        return _until(f"job {job_id} {' or '.join(states)}", there, timeout_s, lambda: self.account_of(job_id))

    def account_of(self, job_id: str) -> str:
        """All that tells why a job is not where it should be, for the message of a test."""
        fields = self.job(job_id)
        told = [self.command("scontrol", "show", "job", job_id, check=False), self.command("sinfo", "-N", check=False)]
        for key in ("StdOut", "StdErr"):
            if (log := Path(fields.get(key, ""))).is_file():
                told.append(f"--- {log}\n{_tail(log)}")
        return "\n".join(told)

    def cut(self, node: str, how: Literal["link", "daemon"] = "link") -> None:
        """Take a node out of Slurm's sight. What runs there goes on: without a network (link), or with one (daemon)."""
        if how == "link":
            output("ip", "link", "set", self.nodes[node].port, "down")
        else:
            pid = (self.folder / "spool" / f"{node}.pid").read_text().strip()
            self.inside(node, "kill", "-KILL", pid)

    def give_up(self, node: str) -> None:
        """Have Slurm take a node that was cut off for lost at once, as it does by itself half a minute later."""
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def heal(self, node: str) -> None:
        """Bring a node back.

        A node that Slurm had given up may still run the old copy of a requeued job. The new copy has the same ids, so
        it would be killed along with the old one; the node takes no jobs until that one has gone.
        """
        lost = "DOWN" in self._state_of(node)
        if lost:
            self.command("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=healing")
        output("ip", "link", "set", self.nodes[node].port, "up")
        if not self.runs(node, "slurmd"):
            self._start_slurmd(node)
        if lost:
            _until(f"{node} free of old jobs", lambda: not self.runs(node, "slurmstepd"), 120)
            self.command("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait_ready(node)

    def inside(self, node: str, *words: str | Path, check: bool = True) -> str:
        """What a command prints that runs on a node, outside of any job."""
        return output("nsenter", f"--target={self.nodes[node].first}", "--all", "--", *words, check=check)

    def wait_ready(self, *nodes: str) -> None:
        """Until all these nodes (default: all) take jobs."""
        ready = re.compile(r"State=(IDLE|MIXED|ALLOCATED) ")
        for name in nodes or self.nodes:
            _until(f"{name} ready", lambda name=name: ready.search(self._state_of(name)), 60, self.logs)

    def up(self, *, gpus: int, cpus: int) -> None:
        """Start everything; whoever calls takes it down again, whatever happens."""
        output("ip", "link", "add", self.bridge, "type", "bridge")
        output("ip", "link", "set", self.bridge, "alias", f"{_OWNER} {os.getpid()}, {self.folder}", "up")
        output("ip", "addr", "add", f"{self.network}.1/24", "dev", self.bridge)
        self._configure(gpus=gpus, cpus=cpus)
        munge = self.folder / "munge"
        self._daemon(
            "munged", "munged", "-F", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        _until("munged", (munge / "socket").exists, 20, self.logs)
        # slurmctld listens where its own host name leads, so it has a name of its own
        hosts = self.folder / "etc" / "hosts"
        control = f"hostname head && mount --bind {hosts} /etc/hosts && exec slurmctld -D -i"
        self._daemon("slurmctld", "unshare", "--mount", "--uts", "bash", "-c", control)
        for node in self.nodes.values():
            self._start_node(node)
        for node in self.nodes:
            self._start_slurmd(node)
        self.wait_ready()

    def down(self) -> None:
        """End all processes, those of running jobs too, and remove what was made."""
        for node in self.nodes.values():
            if node.process is not None:
                if node.first:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(node.first, 9)  # the kernel ends all others of its process tree before it lets it go
                else:
                    node.process.kill()
                node.process.wait()
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        _remove_network(self.bridge)

    def _configure(self, *, gpus: int, cpus: int) -> None:
        folder = self.folder
        for name in ("etc", "munge", "ctld", "dev", "spool", "log"):
            (folder / name).mkdir()
        key = folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        for number in range(gpus):  # Slurm insists on devices, so these are further ones of /dev/null
            os.mknod(folder / "dev" / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        everyone = ",".join(self.nodes)
        devices = f"NodeName={everyone} Name=gpu Type=fake File={folder}/dev/gpu[0-{gpus - 1}]\n" if gpus else ""
        gres = f"Gres=gpu:fake:{gpus} " if gpus else ""
        conf = {
            **_CONF,
            "SlurmctldHost": f"head({self.network}.1)",
            "AuthInfo": f"socket={folder}/munge/socket,cred_expire=5",  # a requeued job waits for longer than that
            "ProctrackType": "proctrack/cgroup" if FREEZER.is_dir() else "proctrack/linuxproc",
            "StateSaveLocation": folder / "ctld", "SlurmctldPidFile": folder / "ctld.pid",
            "SlurmctldLogFile": folder / "log" / "slurmctld.log", "SlurmdSpoolDir": folder / "spool" / "%n",
            "SlurmdPidFile": folder / "spool" / "%n.pid", "SlurmdLogFile": folder / "log" / "slurmd-%n.log",
        }  # fmt: skip
        lines = [f"{key}={value}" for key, value in conf.items()]
        for node in self.nodes.values():
            lines.append(f"NodeName={node.name} NodeAddr={node.address} CPUs={cpus} RealMemory=16000 {gres}")
        lines.append("PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=120")
        lines.append("PartitionName=urgent Nodes=ALL PriorityTier=10")
        hosts = "".join(f"{node.address} {node.name}\n" for node in self.nodes.values())
        texts = {
            "slurm.conf": "\n".join(lines) + "\n",
            "gres.conf": "AutoDetect=off\n" + devices,
            "cgroup.conf": "CgroupPlugin=cgroup/v1\n",  # without it no job starts; it loads where there is only v2, too
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",  # no name server can be reached from a node
            "hosts": f"127.0.0.1 localhost\n{self.network}.1 head\n{hosts}",
        }
        for name, text in texts.items():
            (folder / "etc" / name).write_text(text)

    def _start_node(self, node: Node) -> None:
        """Its namespaces and its cable. The first process waits for ever, and for orphans, as an init does."""
        etc = self.folder / "etc"
        boot_id = etc / f"boot_id-{node.name}"
        boot_id.write_text(f"{uuid.uuid4()}\n")
        setup = [
            f"hostname {node.name}",
            f"mount --bind {etc / 'hosts'} /etc/hosts",
            f"mount --bind {etc / 'nsswitch.conf'} /etc/nsswitch.conf",
            f"mount --bind {boot_id} /proc/sys/kernel/random/boot_id",
            "mount -t tmpfs tmpfs /dev/shm",
            "mount -t tmpfs tmpfs /var/tmp",
            "ip link set lo up",
        ]
        if FREEZER.is_dir():  # its own part of the hierarchy, or nodes of one name would share what Slurm makes there
            part = FREEZER / self.bridge / node.name
            part.mkdir(parents=True)
            setup.append(f"mount --bind {part} {FREEZER}")
        kinds = ("--net", "--uts", "--mount", "--pid", "--ipc")
        script = " && ".join([*setup, "echo ready && { sleep infinity & wait; }"])
        node.process = self._start(
            node.name, "unshare", *kinds, "--fork", "--kill-child", "--mount-proc", "bash", "-c", script,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert node.process.stdout is not None
        if node.process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{node.name} could not be set up: {_tail(self.folder / 'log' / f'{node.name}.out')}")
        node.first = descendants(node.process.pid)[0]
        output("ip", "link", "add", node.port, "type", "veth", "peer", "name", "eth0", "netns", str(node.first))
        output("ip", "link", "set", node.port, "master", self.bridge, "up")
        self.inside(node.name, "ip", "addr", "add", f"{node.address}/24", "dev", "eth0")
        self.inside(node.name, "ip", "link", "set", "eth0", "up")

    def _start_slurmd(self, node: str) -> None:
        """In the node, with an environment as bare as a boot's: what jobs see must come with the job."""
        paths = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        conf = f"SLURM_CONF={self.environment['SLURM_CONF']}"
        command = ("nsenter", f"--target={self.nodes[node].first}", "--all", "--", "env", "-i", paths, conf, "slurmd")
        with (self.folder / "log" / f"slurmd-{node}.out").open("a") as log:
            subprocess.run(
                [*command, "-N", node], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", check=True
            )

    def _daemon(self, name: str, *words: str) -> None:
        self.daemons.append(self._start(name, *words))

    def _start(self, name: str, *words: str, stdout: int | None = None) -> subprocess.Popen[str]:
        """A process that dies with this one, should this one be killed before it can tidy up."""
        with (self.folder / "log" / f"{name}.out").open("a") as log:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", "--", *words], text=True, stdin=subprocess.DEVNULL,
                stdout=stdout or log, stderr=log, cwd="/", start_new_session=True, umask=0o022,
                env={"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", **self.environment},
            )  # fmt: skip

    def _state_of(self, node: str) -> str:
        return self.command("scontrol", "show", "node", node, check=False)

    def runs(self, node: str, name: str) -> bool:
        """Whether a node has a process of that name; Slurm names its programs after the package at times."""
        for pid in descendants(self.nodes[node].first):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().startswith(name):
                    return True
        return False

    def logs(self) -> str:
        """The ends of what the daemons have written."""
        return "\n".join(f"--- {log}\n{_tail(log)}" for log in sorted((self.folder / "log").iterdir()))


@contextlib.contextmanager
def slurm(*, nodes: int = 4, gpus: int = 2, cpus: int = 8) -> Iterator[Slurm]:
    """A cluster while this lasts: partition `main`, and `urgent`, whose jobs preempt those of `main`.

    Raises:
        Unavailable: not here; the text says why.
    """
    # short, because the name of a socket holds 108 characters; and munge trusts no folder that others may write to
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)
    cluster = None
    try:
        install()
        with _one_at_a_time():
            _sweep()
            cluster = Slurm(folder, uuid.uuid4().hex[:6], _free_network(), nodes)
            try:
                cluster.up(gpus=gpus, cpus=cpus)
            except Exception as error:
                error.add_note(cluster.logs())  # they go with the cluster
                raise
        yield cluster
    finally:
        if cluster is not None:
            cluster.down()
        shutil.rmtree(folder)


def install() -> None:
    """Have Slurm here, from Debian's packages if need be.

    Raises:
        Unavailable: that cannot be.
    """
    if os.geteuid() != 0:
        raise Unavailable("a Slurm of several nodes needs root, for its network namespaces")
    with _one_at_a_time():
        if missing := sorted({package for tool, package in PACKAGES.items() if _which(tool) is None}):
            _install(missing)
    kinds = ("--net", "--uts", "--mount", "--pid", "--ipc", "--fork")
    links = "ip link add name br0 type bridge && ip link add name cable0 type veth && mount -t tmpfs tmpfs /var/tmp"
    try:
        output("unshare", *kinds, "sh", "-c", links)
    except RuntimeError as error:
        raise Unavailable(
            f"this machine lets nobody make namespaces and links, as most containers do: {error}"
        ) from None


def _install(packages: Sequence[str]) -> None:
    names = ", ".join(packages)
    if shutil.which("apt-get") is None:
        raise Unavailable(f"{names} not installed, and this is no Debian")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # start no service
    try:
        output("apt-get", "update", "-q", env=quiet)
        output("apt-get", "install", "-yq", "--no-install-recommends", *packages, env=quiet)
    except RuntimeError as error:
        raise Unavailable(f"{names} could not be installed: {error}") from None


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[IO[bytes]]:
    """Several test processes may want a cluster at once: two must not install, nor choose the same network."""
    with _LOCK.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def _sweep() -> None:
    """Remove what test processes left that were killed: bridges and files. All else of theirs died with them."""
    for link in re.findall(rf"^\d+: ({_PREFIX}[0-9a-f]{{6}}):", output("ip", "-o", "link"), re.MULTILINE):
        owner = re.search(rf"{_OWNER} (\d+), (/\S+)", output("ip", "link", "show", link, check=False))
        if owner is not None and not Path(f"/proc/{owner[1]}").exists():
            _remove_network(link)
            shutil.rmtree(owner[2], ignore_errors=True)


def _remove_network(bridge: str) -> None:
    """A bridge, and the control groups of the same name, which hold no process any more. Cables went with the nodes."""
    output("ip", "link", "del", bridge, check=False)
    top = FREEZER / bridge
    for folder in sorted(top.rglob("*"), reverse=True) if top.is_dir() else ():
        if folder.is_dir():
            folder.rmdir()
    if top.is_dir():
        top.rmdir()


def _free_network() -> int:
    taken = output("ip", "-4", "route")
    return next(third for third in range(1, 255) if f"198.18.{third}." not in taken)


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def output(*words: str | Path, check: bool = True, env: Mapping[str, str] = os.environ, **more: Any) -> str:
    """What a command prints, on both streams; an error with all of it where it fails and `check` is set."""
    command = [str(word) for word in words]
    env = {**env, "PATH": f"{env['PATH']}:/usr/sbin:/sbin"}  # of `ip` and the daemons, which not every PATH has
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, **more)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}")
    return done.stdout.strip()


def _until(what: str, holds: Callable[[], Any], timeout_s: float, why: Callable[[], str] = str) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := holds()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}\n{why()}")
        time.sleep(0.1)
    return value


def _tail(file: Path, lines: int = 40) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-lines:])


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m tests.slurm.testbed [COMMAND ...]`: a cluster for a command, or for a shell, while that lasts."""
    import sys

    words = list(arguments if arguments is not None else sys.argv[1:]) or [os.environ.get("SHELL", "bash")]
    with slurm() as cluster:
        sys.exit(subprocess.run(words, env={**os.environ, **cluster.environment}).returncode)


if __name__ == "__main__":
    main()
