"""What ranks find out together before the first step: versions alike, links that carry, GPUs of one speed.

Seconds at most, some hundredths of one on a CPU. Random numbers, losses and memory peaks are left as they were: nothing
is drawn, and what is allocated is given back.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launcher import versions
from launcher.errors import UserError

if TYPE_CHECKING:
    from launcher.run.directory import RunDirectory
    from launcher.trainer.distributed import Ranks

VERSION = 1
SLOW = 0.8  # of the median speed: below it a rank is named
_TEXT_BYTES = 1024  # of one rank in a gather; its longest text takes about 300
_WORD = 64  # characters of a name or version that are compared; some hosts have names of 200
_REDUCED_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
_REDUCTIONS = 3  # after one that makes the connections
_SIDE = 4096  # of the square matrices
_PRODUCTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the ranks found.

    nodes: by rank, where it runs
    differences: (name, text) of versions that are not alike; where one of them must be, nothing was measured
    all_reduce_bytes, all_reduce_s: of the slowest rank's best; None: not measured
    matmul_tflops: by rank; empty on CPUs, whose cores ranks share
    slow: ranks below SLOW of the median
    seconds: that all of this took on the first rank
    """

    nodes: Sequence[str]
    versions: Mapping[str, str | None]
    differences: Sequence[tuple[str, str]] = ()
    all_reduce_bytes: int | None = None
    all_reduce_s: float | None = None
    matmul_tflops: Sequence[float] = ()
    slow: Sequence[int] = ()
    seconds: float = 0.0
    version: int = field(default=VERSION)

    @property
    def refusal(self) -> str | None:
        """Why the ranks must not train together; None where they may."""
        bad = [text for name, text in self.differences if name in versions.MUST_AGREE]
        if not bad:
            return None
        return f"the ranks' versions differ: {'; '.join(bad)}. Install one version on all nodes."

    @property
    def bus_gb_per_s(self) -> float | None:
        """What each rank sent and received at a time in the all-reduce, as nccl-tests count it (`busbw`)."""
        if self.all_reduce_s is None or self.all_reduce_bytes is None:
            return None
        ranks = len(self.nodes)
        return 2 * (ranks - 1) / ranks * self.all_reduce_bytes / self.all_reduce_s / 1e9

    def lines(self) -> Iterator[str]:
        """For rank 0 to say: one line of what was seen, one a warning."""
        if self.refusal:
            return
        hosts = len(set(self.nodes))
        count = f"{len(self.nodes)} rank{'s' * (len(self.nodes) > 1)} on {hosts} node{'s' * (hosts > 1)}"
        seen = [f"torch {self.versions.get('torch')}"]
        if (bus := self.bus_gb_per_s) is not None and self.all_reduce_bytes is not None:
            seen.append(f"all-reduce of {self.all_reduce_bytes >> 20} MiB at {bus:.3g} GB/s")
        if self.matmul_tflops:
            seen.append(f"products at {statistics.median(self.matmul_tflops):.3g} TFLOP/s")
        yield f"preflight: {count}: {', '.join(seen)} ({self.seconds:.2f} s)"
        for _, text in self.differences:
            yield f"warning: versions differ: {text}"
        for rank in self.slow:
            median = statistics.median(self.matmul_tflops)
            yield (
                f"warning: rank {rank} on {self.nodes[rank]} multiplies at {self.matmul_tflops[rank]:.3g} TFLOP/s, "
                f"the median is {median:.3g}: it slows all down. See nvidia-smi -q -d PERFORMANCE there, "
                "or leave the node out."
            )


def preflight(run: RunDirectory, attempt: int, *, ranks: Ranks, device: torch.device, node: str) -> None:
    """Examine, say and keep it in `job/attempt-N/preflight.json`; collective.

    Raises:
        UserError: versions differ that must not, on every rank alike.
    """
    report = examine(ranks=ranks, device=device, node=node)
    if ranks.rank == 0:
        for line in report.lines():
            print(line, flush=True)
        _keep(run, attempt, report)
    if report.refusal:
        raise UserError(report.refusal)


def examine(*, ranks: Ranks, device: torch.device, node: str) -> Report:
    """What the ranks find out together; every rank gets the same but for `seconds`. Collective."""
    begun = time.perf_counter()
    mine = _versions(device)
    known = _gather({"node": node, "group": ranks.node, **mine}, ranks)
    nodes = _nodes([(str(rank.pop("node")), int(rank.pop("group"))) for rank in known])
    report = Report(nodes=nodes, versions=mine, differences=tuple(versions.differences(_by_node(nodes, known))))
    if report.refusal:
        return report
    figures = _gather({"matmul": matmul_s(device), "all_reduce": all_reduce_s(device, ranks.world_size)}, ranks)
    give_back(device)
    matmuls = [rank["matmul"] for rank in figures]
    speeds = [] if None in matmuls else [2 * _SIDE**3 / seconds / 1e12 for seconds in matmuls]
    reductions = [rank["all_reduce"] for rank in figures if rank["all_reduce"] is not None]
    return Report(
        nodes=nodes,
        versions=mine,
        differences=report.differences,
        all_reduce_bytes=_REDUCED_BYTES[device.type] if reductions else None,
        all_reduce_s=max(reductions, default=None),
        matmul_tflops=speeds,
        slow=slow_ones(speeds),
        seconds=time.perf_counter() - begun,
    )


def slow_ones(speeds: Sequence[float]) -> list[int]:
    """Ranks that are slower than SLOW of the median."""
    return [rank for rank, speed in enumerate(speeds) if speed < SLOW * statistics.median(speeds)]


def all_reduce_s(device: torch.device, world_size: int) -> float | None:
    """Seconds of the quickest of some all-reduces; None on a rank alone. Collective."""
    if world_size == 1:
        return None
    tensor = torch.zeros(_REDUCED_BYTES[device.type] // 4, device=device)
    dist.all_reduce(tensor)
    _wait(device)
    seconds = []
    for _ in range(_REDUCTIONS):
        begun = time.perf_counter()
        dist.all_reduce(tensor)
        _wait(device)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def matmul_s(device: torch.device) -> float | None:
    """Seconds of one product of square matrices on this rank's GPU; None on a CPU.

    The numbers come from a formula, not from a generator: constant ones would draw less power than training does.
    """
    if device.type != "cuda":
        return None
    half = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    row = torch.arange(_SIDE, device=device, dtype=torch.float32)
    matrix = ((row[:, None] * 7 + row * 3) % 251 / 251 - 0.5).to(half)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        torch.mm(matrix, matrix)
    begin.record()
    for _ in range(_PRODUCTS):
        torch.mm(matrix, matrix)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / _PRODUCTS


def give_back(device: torch.device) -> None:
    """Leave the allocator as if nothing had been allocated, so that a run's peak is the run's own."""
    if device.type != "cuda":
        return
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _versions(device: torch.device) -> dict[str, str | None]:
    """As the launcher compares them, where torch is loaded by its own word."""
    own = {**versions.installed(), "torch": str(torch.__version__), "cuda": torch.version.cuda}
    if device.type == "cuda":
        own["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return own


def _nodes(places: Sequence[tuple[str, int]]) -> list[str]:
    """By rank, where it runs: the host's name, and the node's number where several have the same."""
    groups = {name: {group for other, group in places if other == name} for name, _ in set(places)}
    return [name if len(groups[name]) == 1 else f"{name} (node {group})" for name, group in places]


def _by_node(nodes: Sequence[str], known: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Versions by node; a rank that has others than those before it on its node stands for itself."""
    found: dict[str, dict[str, Any]] = {}
    for rank, (node, own) in enumerate(zip(nodes, known, strict=True)):
        if found.setdefault(node, own) != own:
            found[f"{node} (rank {rank})"] = own
    return found


def _gather(values: Mapping[str, Any], ranks: Ranks) -> list[dict[str, Any]]:
    """What each rank gave, by rank; one message, on the CPU side of the group."""
    if ranks.world_size == 1:
        return [dict(values)]
    mine = torch.frombuffer(bytearray(_text(values)), dtype=torch.uint8)
    rows = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    dist.all_gather(rows, mine)
    return [json.loads(bytes(row.tolist())) for row in rows]


def _text(values: Mapping[str, Any]) -> bytes:
    """Values as JSON of a fixed length, with words cut short."""
    short = {k: v.encode("ascii", "replace").decode()[:_WORD] if isinstance(v, str) else v for k, v in values.items()}
    return json.dumps(short).encode().ljust(_TEXT_BYTES)


def _keep(run: RunDirectory, attempt: int, report: Report) -> None:
    from launcher.run.files import write_atomic
    from launcher.trainer.trouble import Trouble

    file = run.job(attempt) / "preflight.json"
    with Trouble(file.name).said():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, to_json(report), durable=False)


def to_json(report: Report) -> str:
    """The report as docs/doctor.md describes it."""
    return json.dumps({**asdict(report), "bus_gb_per_s": report.bus_gb_per_s}, indent=2) + "\n"


def main() -> None:
    """One rank without a run: the environment says which, rank 0 prints the report."""
    from launcher.trainer.distributed import Ranks, choose_device, exit_now, join, leave
    from launcher.trainer.main import node_name

    ranks = Ranks.from_environment()
    device = choose_device(os.environ.get("LAUNCHER_ACCELERATOR", "auto"), ranks)
    join(device, ranks, timeout_s=120.0)
    report = examine(ranks=ranks, device=device, node=node_name())
    if ranks.rank == 0:
        print(to_json(report), flush=True)
    leave()
    exit_now(0)
