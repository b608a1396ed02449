"""Steers shim.c: faults of storage and clock in real processes, by rank and by path, also in ones that run already.

A test takes the fixture `shim` (tests/faults/conftest.py), starts processes with `shim.environment()` or ranks from the
fork server with the fixture `shimmed`, and says what is to happen:

    shim.rule("write", "fsync", path="checkpoints/", rank=1, nth=3, error="EIO")   # the third such call of rank 1 fails
    shim.rule("rename", times=-1, error="ESTALE")                                  # every one, for ever
    shim.rule("write", kill=True); shim.rule("write", stall_s=60, release=path)    # SIGKILL; stands still
    shim.rule("write", cut=True)                                                   # half of the bytes are written
    with shim.recorded(folder) as calls: ...                                       # for a crash simulator

Counts are over all processes that a rule applies to. A rank is a process with RANK in its environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OPS = {
    "open": 1, "write": 2, "fsync": 4, "rename": 8, "unlink": 16, "mkdir": 32, "rmdir": 64, "link": 128, "read": 256,
    "stat": 512, "list": 1024, "truncate": 2048, "create": 4096, "mmap": 8192,
}  # fmt: skip
CHANGES = ("create", "write", "fsync", "rename", "unlink", "mkdir", "rmdir", "link", "truncate")
_NAMES = {number: name for name, number in OPS.items()}
_COUNT, _FAIL, _KILL, _STALL, _CUT = range(5)
_RULES, _TEXT, _MAGIC = 16, 256, 0xFA017
_ANY_PROCESS = -1
_HEAD = struct.Struct("@IiiiqqqiIIId")  # struct record


class _Rule(ctypes.Structure):
    _fields_ = (
        ("active", ctypes.c_int32), ("ops", ctypes.c_int32), ("rank", ctypes.c_int32), ("action", ctypes.c_int32),
        ("error", ctypes.c_int32), ("times", ctypes.c_int32), ("nth", ctypes.c_int64), ("stall_s", ctypes.c_double),
        ("calls", ctypes.c_int64), ("hits", ctypes.c_int64), ("path", ctypes.c_char * _TEXT),
        ("release", ctypes.c_char * _TEXT),
    )  # fmt: skip


class _Control(ctypes.Structure):
    _fields_ = (
        ("rules", ctypes.c_int32), ("recording", ctypes.c_int32), ("clock_offset_ns", ctypes.c_int64),
        ("free_bytes", ctypes.c_int64), ("path", ctypes.c_char * _TEXT), ("record", ctypes.c_char * _TEXT),
        ("rule", _Rule * _RULES),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """One call that changed something, or should have.

    result: what it returned, or minus errno; inode: of the file or folder of a descriptor, 0 where there was none
    offset: where a write began; for `truncate` the new size; path2: the new name of a rename or link
    time: seconds of the monotonic clock
    """

    op: str
    rank: int | None
    pid: int
    result: int
    inode: int
    offset: int
    flags: int
    path: str
    path2: str
    data: bytes
    time: float


class Rule:
    """A fault that is waiting, or has struck."""

    def __init__(self, control: _Control, number: int) -> None:
        self._control, self._rule = control, control.rule[number]

    @property
    def calls(self) -> int:
        """How many calls it applied to so far."""
        return int(self._rule.calls)

    @property
    def hits(self) -> int:
        """How many of them it struck; one that stands still counts already."""
        return int(self._rule.hits)

    def remove(self) -> None:
        """It applies no more; a call that it holds up goes on."""
        if self._rule.active:
            self._rule.active = 0
            self._control.rules -= 1


class Shim:
    """The library and one control file; processes that have it in their environment obey, at once.

    Args:
        library: from `compiled`
        folder: where the control file lies; each pretended host may have its own, as for its clock
    """

    def __init__(self, library: Path, folder: Path) -> None:
        self.library, self.file, self._log = library, folder / "control", folder / "calls"
        with open(self.file, "w+b") as file:
            file.truncate(ctypes.sizeof(_Control))
            self._control = _Control.from_buffer(mmap.mmap(file.fileno(), 0))
        self.clear()

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment; its children inherit it."""
        return {"LD_PRELOAD": str(self.library), "FAULTS_CONTROL": str(self.file)}

    def rule(
        self, *ops: str, path: str | Path = "", rank: int | None = None, nth: int = 1, times: int = 1,
        error: str | None = None, kill: bool = False, cut: bool = False, stall_s: float = 0.0,
        release: Path | None = None,
    ) -> Rule:  # fmt: skip
        """Let something happen to these calls; with no fault named they are counted only.

        Args:
            ops: keys of `OPS`; `open` is every open, `create` those that may make a file
            path: part of the absolute path (of either path, of a rename)
            rank: of which rank; None: any process
            nth, times: which of the calls are hit: from the nth, so many, -1 for ever
            error: name of the errno, as ENOSPC; the call is then not made
            kill: SIGKILL before the call; cut: half of the bytes are written or read
            stall_s, release: the call waits so long, or until that file is there
        """
        number = next(i for i, rule in enumerate(self._control.rule) if not rule.active)
        rule = self._control.rule[number]
        ctypes.memset(ctypes.addressof(rule), 0, ctypes.sizeof(rule))
        rule.action = _KILL if kill else _CUT if cut else _STALL if stall_s else _FAIL if error else _COUNT
        rule.ops, rule.rank = sum(OPS[op] for op in ops), _ANY_PROCESS if rank is None else rank
        rule.error, rule.nth, rule.times, rule.stall_s = getattr(errno, error) if error else 0, nth, times, stall_s
        rule.path, rule.release = _text(path), _text(release or "")
        rule.active = 1
        self._control.rules += 1
        return Rule(self._control, number)

    def clear(self) -> None:
        """No faults, the right clock, nothing written down."""
        self._control.rules = self._control.recording = self._control.clock_offset_ns = 0
        self._control.free_bytes = -1
        for rule in self._control.rule:
            rule.active = 0

    def set_clock(self, offset_s: float) -> None:
        """Let the wall clock of these processes be so much ahead; CLOCK_MONOTONIC and times of files stay."""
        self._control.clock_offset_ns = int(offset_s * 1e9)

    def set_free_bytes(self, folder: Path, free: int | None) -> None:
        """What statvfs tells below `folder`; None: the truth."""
        self._control.path, self._control.free_bytes = _text(folder), -1 if free is None else free

    @contextlib.contextmanager
    def recorded(self, folder: Path) -> Iterator[list[Call]]:
        """Write down every change below `folder`, in the order in which they happened; the list is full at the end."""
        calls: list[Call] = []
        self._log.write_bytes(b"")
        self._control.path, self._control.record = _text(folder), _text(self._log)
        self._control.recording = 1
        try:
            yield calls
        finally:
            self._control.recording = 0
            calls.extend(_parse(self._log.read_bytes()))


def compiled(folder: Path) -> Path | None:
    """The library, made by this machine's C compiler in `folder`; None where there is none."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        return None
    library, source = folder / "shim.so", Path(__file__).with_suffix(".c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-pthread", "-o", str(library), str(source), "-ldl"], check=True
    )
    return library


def _text(value: str | Path) -> bytes:
    text = str(value).encode()
    assert len(text) < _TEXT, f"longer than the control file has room for: {value}"
    return text


def _parse(log: bytes) -> Iterator[Call]:
    at = 0
    while at < len(log):
        magic, op, rank, pid, result, inode, offset, flags, path, path2, size, time = _HEAD.unpack_from(log, at)
        assert magic == _MAGIC, f"the record of calls is damaged at byte {at}"
        at += _HEAD.size
        parts = []
        for length in (path, path2, size):
            parts.append(log[at : at + length])
            at += length
        yield Call(
            _NAMES[op], rank if rank >= 0 else None, pid, result, inode, offset, flags, parts[0].decode(),
            parts[1].decode(), parts[2], time,
        )  # fmt: skip
