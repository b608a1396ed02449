"""What the ranks of this node are found doing when they stand still, and which of all ranks the others wait for.

Stacks come from faulthandler inside of each rank, whose handler needs no lock of Python's; from py-spy where that is
installed. The last collectives come from torch's flight recorder, by a thread of each rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher.run.heartbeat import PHASES, Beat, Pulse
from launcher.trainer.beat import DUMP_SIGNAL, answer_file, asking_file, stack_file

ANSWER_S = 5.0  # for a rank to write where it stands
_WOKEN_S = 5.0  # for one that was stopped
_PY_SPY_S = 15.0
_STATES = {"R": "running", "S": "asleep", "D": "in a system call that nothing can end", "T": "stopped", "Z": "dead"}
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$')
_WAITS = ("_engine_run_backward",)  # where a thread of torch's own waits for a collective


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Where one rank stands.

    step, phase, still_s: its last beat, and for how long there has been none
    state: of its process, a letter of /proc; empty: it has gone
    kernel: what it waits for in the kernel
    stack: its main thread, innermost frame first, as `function (file:line)`; empty: it could not be had
    waits: whether that thread stands in a collective, or behind one
    collectives: its last ones, oldest first, see `launcher.trainer.beat`; None: it did not answer
    """

    rank: int
    node: str
    pid: int
    step: int
    phase: str
    still_s: float
    state: str
    kernel: str = ""
    stack: list[str] = field(default_factory=list)
    waits: bool = False
    collectives: list[dict[str, Any]] | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Orders ranks by how far they have come."""
        return self.step, PHASES.index(self.phase)

    @property
    def last_collective(self) -> str:
        """The last one it came to; empty where that is not known."""
        return _named(self.collectives[-1]) if self.collectives else ""

    def doing(self) -> str:
        """`at step 7 in forward, in sleep (user.py:12)`"""
        inner = f", in {self.stack[0]}" if self.stack else ""
        return f"at step {self.step} in {self.phase}{inner}"


def collect(folder: Path, pulses: Sequence[tuple[Pulse, Beat, float]], node: str) -> list[Evidence]:
    """Ask every rank of this node; takes `ANSWER_S` at most.

    Args:
        folder: of the heartbeats
        pulses: of each rank its file, its last beat, and for how long there was no other
    """
    before = {pulse.rank: state_of(pulse.pid) for pulse, _, _ in pulses}
    sizes = {pulse.rank: _size(stack_file(folder, pulse.rank)) for pulse, _, _ in pulses}
    for pulse, _, _ in pulses:
        answer_file(folder, pulse.rank).unlink(missing_ok=True)
        if before[pulse.rank] not in ("", "T", "Z"):
            _ask(folder, pulse.rank, pulse.pid)
    asked = {pulse.rank for pulse, _, _ in pulses if before[pulse.rank] not in ("", "T", "Z")}
    deadline = time.monotonic() + ANSWER_S
    missing = set(asked)
    while missing and time.monotonic() < deadline:
        time.sleep(0.05)
        missing -= {rank for rank in missing if _has_answered(folder, rank, sizes[rank])}
    found = []
    for pulse, beat, still_s in pulses:
        now, first = state_of(pulse.pid), before[pulse.rank]
        stack = _main_thread(_text(stack_file(folder, pulse.rank))[sizes[pulse.rank] :])
        found.append(Evidence(
            rank=pulse.rank, node=node, pid=pulse.pid, step=beat.step, phase=beat.phase, still_s=still_s,
            state=first if first != "D" or now == "D" else now, kernel=_text(Path(f"/proc/{pulse.pid}/wchan")),
            stack=stack, waits=any(_waits(frame) for frame in stack), collectives=_answer(folder, pulse.rank),
        ))  # fmt: skip
    return found


def find_culprit(found: Sequence[Evidence]) -> tuple[Evidence | None, str]:
    """The rank that the others wait for, and how that is known; None where none stands out.

    What is surest comes first: a process that cannot run; one that has not come to a collective in which others are;
    one that does not answer while others do; one that is behind; one that stands elsewhere than in a collective.
    """
    if len(found) == 1:
        return found[0], _why_alone(found[0])
    behind = _behind(found)
    answered = [e for e in found if e.collectives is not None]
    last = max(e.place for e in found)
    tests = (
        ([e for e in found if e.state in ("", "T", "Z")], lambda e: f"its process is {_STATES.get(e.state, 'gone')}"),
        ([e for e in found if e.state == "D"], lambda e: f"its process is {_STATES['D']} ({e.kernel or 'kernel'})"),
        ([e for e in found if e.rank in behind], lambda e: f"it has not come to {behind[e.rank]}, where others wait"),
        (
            [e for e in found if answered and e.collectives is None],
            lambda e: "its threads do not answer: something holds Python's lock",
        ),
        ([e for e in found if e.place < last], lambda e: "the others are further on"),
        ([e for e in found if e.stack and not e.waits], lambda e: "it is in no collective"),
    )
    for suspects, why in tests:
        if suspects and len(suspects) < len(found):
            culprit = min(suspects, key=lambda e: (e.place, e.rank))
            also = [str(e.rank) for e in suspects if e is not culprit]
            return culprit, why(culprit) + (f" (so do ranks {', '.join(also)})" if also else "")
    return None, "no rank stands out"


def describe(evidence: Evidence, threads: str) -> str:
    """The text of a rank's stack file."""
    state = _STATES.get(evidence.state, evidence.state or "gone")
    lines = [
        f"rank {evidence.rank} on {evidence.node}, process {evidence.pid}: at step {evidence.step} in {evidence.phase}"
        f", without a beat for {evidence.still_s:.1f} s; its process is {state}; kernel: {evidence.kernel or '-'}",
        "",
        "last collectives (torch's flight recorder):",
        *(f"  {_named(one)}{'' if one['done'] else ', not done'}" for one in evidence.collectives or ()),
        *([] if evidence.collectives is not None else ["  no answer"]),
        "",
        "threads (faulthandler, innermost frame first):",
        threads.strip() or "  no answer",
    ]
    return "\n".join(lines) + "\n"


def write_stacks(folder: Path, found: Sequence[Evidence], logs: Path) -> None:
    """Leave what is known of each rank in `logs/RANK.stack.txt`."""
    logs.mkdir(parents=True, exist_ok=True)
    for evidence in found:
        text = describe(evidence, _text(stack_file(folder, evidence.rank)))
        (logs / f"{evidence.rank}.stack.txt").write_text(text + _py_spy(evidence))


def add_threads(folder: Path, evidence: Evidence, logs: Path) -> None:
    """Leave behind a stack file what a rank said later, once it could."""
    with open(logs / f"{evidence.rank}.stack.txt", "a") as file:
        file.write("\nthreads when it was let go on (faulthandler):\n" + _text(stack_file(folder, evidence.rank)))


def wake_stopped(folder: Path, found: Sequence[Evidence]) -> list[Evidence]:
    """Let stopped processes go on just so far that they say where they stood; the caller ends them at once."""
    stopped = [e for e in found if e.state == "T"]
    for evidence in stopped:
        with contextlib.suppress(ProcessLookupError):
            _ask(folder, evidence.rank, evidence.pid)  # which it can answer once it goes on
            os.kill(evidence.pid, signal.SIGCONT)
    deadline = time.monotonic() + _WOKEN_S
    silent = {e.rank for e in stopped}
    while silent and time.monotonic() < deadline:
        time.sleep(0.02)
        silent = {rank for rank in silent if not _has_answered(folder, rank, 0)}
    woken = {e.rank: _main_thread(_text(stack_file(folder, e.rank))) for e in stopped}
    return [
        replace(e, stack=woken[e.rank] or e.stack, collectives=_answer(folder, e.rank)) if e.rank in woken else e
        for e in found
    ]


def tracer_of(pid: int) -> int:
    """The process that traces this one, as a debugger does; 0: none."""
    match = re.search(r"^TracerPid:\s+(\d+)", _text(Path(f"/proc/{pid}/status")), re.MULTILINE)
    return int(match[1]) if match else 0


def awaited(found: Sequence[Evidence]) -> str:
    """The collective in which ranks wait: the oldest that is not done, else the function that a rank stands in."""
    waiting = [one for e in found if e.waits for one in e.collectives or () if not one["done"]]
    if waiting:
        return _named(min(waiting, key=lambda one: one["number"]))
    return next((frame.partition(" ")[0] for e in found if e.waits for frame in e.stack if _waits(frame)), "")


def _behind(found: Sequence[Evidence]) -> dict[int, str]:
    """Ranks that have not come to a collective of a group of theirs, to which another rank has; and which it is."""
    reached: dict[str, dict[int, dict[str, Any]]] = {}
    for evidence in found:
        for one in evidence.collectives or ():
            reached.setdefault(one["group"], {})[evidence.rank] = one
    behind: dict[int, str] = {}
    for ranks in reached.values():
        furthest: Mapping[str, Any] = max(ranks.values(), key=lambda one: one["number"])
        for rank, one in ranks.items():
            if one["number"] < furthest["number"]:
                behind.setdefault(rank, _named(furthest))
    return behind


def _why_alone(evidence: Evidence) -> str:
    if evidence.state in ("T", "D", "Z", ""):
        return f"its process is {_STATES.get(evidence.state, 'gone')}"
    return "it is the only rank"


def _named(collective: Mapping[str, Any]) -> str:
    """`gloo:all_reduce 153 of 4096 elements`"""
    sizes = [dims for dims in collective.get("sizes") or () if isinstance(dims, list)]
    elements = 0
    for dims in sizes:
        count = 1
        for dim in dims:
            count *= dim
        elements += count
    of = f" of {elements:,} element{'s' * (elements != 1)}" if elements else ""
    return f"{collective['name']} {collective['number']}{of}"


def _ask(folder: Path, rank: int, pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, DUMP_SIGNAL)
        handle = os.open(asking_file(folder, rank), os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(handle, b"?")
        finally:
            os.close(handle)


def _has_answered(folder: Path, rank: int, size: int) -> bool:
    """Whether both answers are there and whole; `size`: of the stack file before it was asked.

    The main thread comes last, and its outermost frame is a module, unless there are more frames than faulthandler
    writes.
    """
    text = _text(stack_file(folder, rank))[size:].rstrip()
    return answer_file(folder, rank).exists() and text.endswith((" in <module>", "\n  ..."))


def _answer(folder: Path, rank: int) -> list[dict[str, Any]] | None:
    with contextlib.suppress(OSError, ValueError):
        said = json.loads(answer_file(folder, rank).read_bytes())
        return said if isinstance(said, list) else []
    return None


def _main_thread(text: str) -> list[str]:
    """Frames of the last thread in faulthandler's text, which is the main one, innermost first."""
    last = re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.MULTILINE)[-1]
    found = (_FRAME.match(line) for line in last.splitlines())
    return [f"{m['function']} ({_short(m['file'])}:{m['line']})" for m in found if m]


def _short(file: str) -> str:
    """A path from its package on."""
    return file.rpartition("site-packages/")[2] if "site-packages/" in file else "/".join(file.split("/")[-3:])


def _waits(frame: str) -> bool:
    return "(torch/distributed/" in frame or frame.startswith(_WAITS)


def state_of(pid: int) -> str:
    """The letter of /proc for a process, `t` (traced) as T; empty if there is none."""
    rest = _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return {"t": "T", "I": "S"}.get(rest[0], rest[0]) if rest else ""


def _py_spy(evidence: Evidence) -> str:
    """What py-spy sees, which reads a stopped process too; empty where it is not installed."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None or evidence.state in ("", "Z"):
        return ""
    how = ["--nonblocking"] if evidence.state in ("T", "D") else ["--native"]
    command = [program, "dump", *how, "--pid", str(evidence.pid)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_PY_SPY_S,
            check=False, text=True, errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"\n{' '.join(command)}: {error}\n"
    return f"\n{' '.join(command)}:\n{done.stdout}"


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
