"""What this machine offers to ranks: GPUs counted without torch, and cores shared out as threads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from launcher.errors import UserError

DEVICES = Path("/dev")


def accelerator(wanted: str, ranks: int) -> tuple[str, str]:
    """`cuda` or `cpu`, and the reason.

    wanted: cluster.accelerator; auto takes the GPUs where there are any
    ranks: cluster.nproc_per_node

    Raises:
        UserError: fewer GPUs than ranks.
    """
    if wanted == "cpu":
        return "cpu", "cluster.accelerator=cpu" + _crowding(ranks)
    gpus, how = count_gpus()
    if gpus == 0 and wanted == "auto":
        return "cpu", f"no GPU here ({how})" + _crowding(ranks)
    if gpus < ranks:
        fix = f"Use cluster.nproc_per_node={gpus}" if gpus else "Use cluster.accelerator=cpu"
        raise UserError(
            f"cluster.nproc_per_node = {ranks}: expected at most {gpus}, the GPUs of this machine ({how}). {fix}."
        )
    return "cuda", f"{gpus} GPUs ({how})"


def count_gpus(environment: Mapping[str, str] | None = None, devices: Path = DEVICES) -> tuple[int, str]:
    """GPUs that ranks can use, and how they were counted: CUDA_VISIBLE_DEVICES, else device files, else nvidia-smi."""
    visible = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    present, how = _present(devices)
    if visible is None:
        return present, how
    named = [item.strip() for item in visible.split(",") if item.strip()]
    until_negative = named[: named.index("-1")] if "-1" in named else named  # CUDA stops reading at -1
    count = min(len(until_negative), present) if present else 0
    return count, f"CUDA_VISIBLE_DEVICES={visible!r}, {how}"


def _present(devices: Path) -> tuple[int, str]:
    files = [file for file in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", file.name)]
    if files:
        return len(files), f"{devices}/nvidia*"
    tool = shutil.which("nvidia-smi")  # WSL has no device files
    if tool is None:
        return 0, f"no {devices}/nvidia*, no nvidia-smi"
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return 0, f"nvidia-smi failed: {error}"
    return sum(line.startswith("GPU ") for line in listed.splitlines()), "nvidia-smi -L"


def _crowding(ranks: int) -> str:
    """A warning where ranks on the CPU outnumber this process's cores."""
    cores = len(os.sched_getaffinity(0))
    return f"; warning: {ranks} ranks share {cores} core{'s' * (cores > 1)}" if ranks > cores else ""


def threads_per_rank(ranks: int) -> int:
    """OMP_NUM_THREADS where it is set, else this process's cores shared evenly."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdigit() and int(said) else max(1, len(os.sched_getaffinity(0)) // ranks)
