"""Packages that are known not to fit each other, and how to tell before a run does."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from launcher import doctor, versions
from launcher.jobs.devices import count_gpus
from launcher.jobs.finding import Finding

_IMPORT_TIMEOUT_S = 180


def clashes() -> Iterator[Finding]:
    """Of the packages that are installed."""
    yield from liger()
    yield from bitsandbytes()


def liger() -> Iterator[Finding]:
    """Liger patches modules of transformers, so that the two must be of one time."""
    own, theirs = versions.of_package("liger-kernel"), versions.of_package("transformers")
    if own is None or theirs is None:
        return
    fix = "Run pip install -U liger-kernel, or set model.liger=false."
    wanted = _wanted_transformers(metadata.requires("liger-kernel") or [])
    if wanted and not doctor.within(theirs, wanted):
        text = f"{own} wants transformers {wanted}, {theirs} is installed"
        yield Finding("packages", "liger-kernel with transformers", "note", text, fix)
    elif count_gpus()[0] and (why := _import_error("liger_kernel.transformers")):
        text = f"{own} cannot be imported beside transformers {theirs}: {why}"
        yield Finding("packages", "liger-kernel with transformers", "note", text, fix)


def _wanted_transformers(requirements: list[str]) -> str:
    """The bounds that a package declares for transformers, whichever extra asks for them; empty without any."""
    found = (re.match(r"transformers\b\s*\(?([^;)]*)", line) for line in requirements)
    return next((match[1].strip() for match in found if match and match[1].strip()), "")


def _import_error(module: str) -> str:
    """The last line of what an import says in a process of its own; empty where it goes well."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"the import took more than {_IMPORT_TIMEOUT_S} s"
    return (done.stderr.strip().splitlines() or ["it died"])[-1] if done.returncode else ""


def bitsandbytes() -> Iterator[Finding]:
    """It brings a library for each CUDA that it knows, and fails at the first use without the one of torch."""
    own, cuda = versions.of_package("bitsandbytes"), versions.installed()["cuda"]
    spec = importlib.util.find_spec("bitsandbytes") if own else None
    if spec is None or spec.origin is None or cuda is None:
        return
    wanted = "".join(cuda.split(".")[:2])
    there = cudas_of(Path(spec.origin).parent)
    if wanted not in there:
        known = f"it has those for {', '.join(there)}" if there else "it has none for GPUs"
        text = f"{own} has no library for CUDA {cuda}, which torch is built for; {known}"
        fix = "Run pip install -U bitsandbytes; python -m bitsandbytes then says whether it loads."
        yield Finding("packages", "bitsandbytes", "note", text, fix)
    else:
        yield Finding("packages", "bitsandbytes", "ok", f"{own}, with a library for CUDA {cuda}")


def cudas_of(folder: Path) -> list[str]:
    """CUDA versions that bitsandbytes has a library for, as `128`."""
    names = (re.fullmatch(r"libbitsandbytes_cuda(\d+)\.so", file.name) for file in folder.glob("*.so"))
    return sorted(match[1] for match in names if match)
