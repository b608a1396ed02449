"""What one node is, as far as training can trip over it: read in some hundredths of a second, torch not imported.

`launcher.jobs.preflight` judges what is gathered here, of one node or of all nodes of a job side by side.
"""

from __future__ import annotations

import os
import pwd
import queue
import re
import resource
import shutil
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher import versions
from launcher.jobs.devices import count_gpus
from launcher.jobs.network import interfaces
from launcher.recipe.schema import Recipe

Facts = dict[str, Any]  # plain values: they travel between nodes as JSON

_SMI_TIMEOUT_S = 30.0
_NAME_TIMEOUT_S = 3.0  # a resolver that does not answer is as good as none
_BUSY_MIB = 1024  # of a GPU's memory; a driver alone holds some hundred
_SYS = Path("/sys")


def facts(recipe: Recipe | None, folder: Path, *, address: str | None = None) -> Facts:
    """This node as it is now; nothing is changed.

    Args:
        recipe: says whether GPUs are of interest; None: they are, where there are any
        folder: where the run lies, or will
        address: by which the other nodes reach this one; None: there are none
    """
    begun = time.perf_counter()
    cpu = recipe is not None and recipe.cluster.accelerator == "cpu"
    count, how = (0, "cluster.accelerator=cpu") if cpu else count_gpus()
    smi = _Smi() if count else None  # answers while the rest is read
    name = _Resolved(socket.gethostname())  # asked for meanwhile too
    found: Facts = {
        "host": socket.gethostname(),
        "versions": versions.installed(),
        "network": network_of(address),
        "hcas": list(hcas()),
        "disk": disk(folder),
        "limits": limits(),
        "shm": size_of(Path("/dev/shm")),
        "memory": host_memory(),
        "headers": Path(sysconfig.get_path("include"), "Python.h").is_file(),  # what triton compiles against
        "compiler": next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None),
        "clock": None,  # what `launcher.jobs.probe` measures, where there is a node 0 to compare with
        "gpus": {"count": count, "how": how, "models": [], "used": [], "processes": []},
    }
    found["name"] = name.answer()
    if smi is not None:
        found["gpus"].update(smi.answer(os.environ.get("CUDA_VISIBLE_DEVICES")))
        found["versions"]["driver"] = found["versions"]["driver"] or found["gpus"].pop("driver", None)
    found["gpus"].pop("driver", None)
    found["seconds"] = round(time.perf_counter() - begun, 4)
    return found


def network_of(address: str | None) -> Facts | None:
    """The interface with an address, as other nodes compare it: its name and speed in Mbit/s."""
    if address is None:
        return None
    name = next((name for name, own in interfaces().items() if address in own), "")
    text = _read(_SYS / "class/net" / name / "speed") if name else ""
    speed = int(text) if text.isdecimal() and int(text) > 0 else None
    return {"interface": name, "address": address, "mbit_per_s": speed}


def hcas(folder: Path = _SYS / "class/infiniband") -> Iterator[Facts]:
    """Ports of InfiniBand and RoCE adapters: name, port, state as `ACTIVE`, rate as `400 Gb/sec (4X NDR)`, link."""
    for adapter in sorted(folder.glob("*")):
        for port in sorted(adapter.glob("ports/*")):
            yield {
                "name": adapter.name,
                "port": port.name,
                "state": _read(port / "state").partition(":")[2].strip(),
                "rate": _read(port / "rate"),
                "link": _read(port / "link_layer"),
            }


def disk(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> Facts:
    """Where the folder lies, or will: mount point, file system, free and total bytes."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    usage = shutil.disk_usage(there)
    point, kind = _mount_of(there.resolve(), _read(mounts))
    return {"folder": str(folder.absolute()), "mount": point, "type": kind, "free": usage.free, "total": usage.total}


def _mount_of(folder: Path, mountinfo: str) -> tuple[str, str]:
    """(mount point, file system) of the longest mount point above the folder; the last mounted there counts."""
    best = ("/", "unknown")
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        if len(fields := left.split()) > 4 and right:
            point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4])
            if folder.is_relative_to(point) and len(point) >= len(best[0]):
                best = (point, right.split()[0])
    return best


def limits() -> Facts:
    """Soft limits of this process; None: no limit."""

    def soft(kind: int) -> int | None:
        value = resource.getrlimit(kind)[0]
        return None if value == resource.RLIM_INFINITY else value

    return {"memlock": soft(resource.RLIMIT_MEMLOCK), "nofile": soft(resource.RLIMIT_NOFILE)}


def size_of(folder: Path) -> int | None:
    """Bytes of the file system that is mounted there, None if there is none."""
    try:
        return shutil.disk_usage(folder).total
    except OSError:
        return None


def host_memory(proc: Path = Path("/proc"), groups: Path = _SYS / "fs/cgroup") -> Facts:
    """Bytes of this host's memory and the least limit of this process's control groups (v2 or v1), None without one."""
    total = re.search(r"^MemTotal:\s+(\d+) kB", _read(proc / "meminfo"), flags=re.MULTILINE)
    found = [int(text) for file in _limit_files(proc, groups) if (text := _read(file)).isdecimal()]
    memory = int(total[1]) * 1024 if total else None
    limit = min(found, default=None)
    return {"total": memory, "limit": limit if limit is not None and (memory is None or limit < memory) else None}


def _limit_files(proc: Path, groups: Path) -> Iterator[Path]:
    """Files that may hold a limit, from this process's own group up to the root."""
    for line in _read(proc / "self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (groups / "memory", "memory.limit_in_bytes") if controllers else (groups, "memory.max")
        here = base / path.lstrip("/")
        yield from (folder / name for folder in (here, *here.parents) if folder.is_relative_to(base))


class _Resolved:
    """The address of a name, asked for in a thread: a resolver without an answer takes half a minute to say so."""

    def __init__(self, name: str) -> None:
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._until = time.monotonic() + _NAME_TIMEOUT_S
        threading.Thread(target=self._ask, args=(name,), name="resolve", daemon=True).start()

    def _ask(self, name: str) -> None:
        try:
            self._answers.put(socket.gethostbyname(name))
        except OSError:
            self._answers.put(None)

    def answer(self) -> str | None:
        try:
            return self._answers.get(timeout=max(0.0, self._until - time.monotonic()))
        except queue.Empty:
            return None


class _Smi:
    """What nvidia-smi says of GPUs and of who holds their memory; it takes some tenths of a second to a few."""

    _GPUS = ("index", "uuid", "name", "memory.used", "memory.total", "driver_version")
    _PROCESSES = ("gpu_uuid", "pid", "used_memory", "process_name")

    def __init__(self) -> None:
        self._until = time.monotonic() + _SMI_TIMEOUT_S
        self._gpus = self._start("gpu", self._GPUS)
        self._processes = self._start("compute-apps", self._PROCESSES)

    def _start(self, what: str, fields: Sequence[str]) -> subprocess.Popen[str] | None:
        command = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return None

    def answer(self, visible: str | None) -> Facts:
        """models, used and processes of the GPUs that ranks may use, and the driver; empty where it does not say."""
        gpus = [row for row in self._rows(self._gpus, len(self._GPUS)) if is_visible(row[0], row[1], visible)]
        numbers = {row[1]: int(row[0]) for row in gpus}
        processes = [
            {"gpu": numbers[uuid], "pid": int(pid), "mib": _number(mib), "name": name, "owner": _owner(int(pid))}
            for uuid, pid, mib, name in self._rows(self._processes, len(self._PROCESSES))
            if uuid in numbers and pid.isdecimal()
        ]
        return {
            "models": [row[2] for row in gpus],
            "used": [{"gpu": int(row[0]), "mib": used} for row in gpus if (used := _number(row[3]) or 0) > _BUSY_MIB],
            "processes": processes,
            "driver": gpus[0][5] if gpus else None,
        }

    def _rows(self, process: subprocess.Popen[str] | None, fields: int) -> list[list[str]]:
        if process is None:
            return []
        try:
            said, _ = process.communicate(timeout=max(0.1, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return []
        rows = [[cell.strip() for cell in line.split(",", fields - 1)] for line in said.splitlines()]
        return [row for row in rows if len(row) == fields]


def is_visible(index: str, uuid: str, visible: str | None) -> bool:
    """Whether CUDA_VISIBLE_DEVICES lets ranks use a GPU; MIG instances are taken for not told of."""
    if visible is None:
        return True
    named = [item.strip() for item in visible.split(",") if item.strip()]
    return any(item == index or (len(item) > 4 and uuid.startswith(item)) for item in named)


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _owner(pid: int) -> str:
    """Whose process it is: `yours`, a user's name, or empty where it cannot be seen from here, as in a container."""
    try:
        uid = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return ""
    if uid == os.getuid():
        return "yours"
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _read(file: Path) -> str:
    """Text of a small file of the kernel's, empty where it is not there."""
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
