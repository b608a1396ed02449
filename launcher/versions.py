"""Which versions a job must have alike on all its nodes: read without importing anything, and compared by node."""

from __future__ import annotations

import importlib.util
import platform
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from launcher import __version__

MUST_AGREE = ("launcher", "torch", "cuda", "nccl", "transformers", "deepspeed")  # else ranks fail, hang or drift apart
SHOULD_AGREE = ("python", "driver")  # nodes of a cluster are often a little apart in these, and it goes well
_DRIVER = Path("/proc/driver/nvidia/version")
_NAMED = 4  # nodes that are named before they are only counted


def installed() -> dict[str, str | None]:
    """Versions on this machine by the names above; None where there is none."""
    return {
        "launcher": __version__,
        "python": platform.python_version(),
        "torch": of_package("torch"),
        "cuda": _cuda_of_torch(),
        "nccl": _nccl(),
        "transformers": of_package("transformers"),
        "deepspeed": of_package("deepspeed"),
        "driver": driver(),
    }


def of_training() -> dict[str, str | None]:
    """Versions of what does the arithmetic, which a checkpoint's manifest keeps; read in milliseconds."""
    packages = ("torch", "transformers", "deepspeed", "peft")
    return {
        "launcher": __version__,
        "python": platform.python_version(),
        **{name: of_package(name) for name in packages},
    }


def of_package(name: str) -> str | None:
    """The version that its metadata tell; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def driver(file: Path = _DRIVER) -> str | None:
    """Version of NVIDIA's kernel module, `580.95.05`; None where none is loaded."""
    try:
        found = re.search(r"(?:Module|for x86_64|for aarch64)\s+(\d+(?:\.\d+)+)", file.read_text())
    except OSError:
        return None
    return found[1] if found else None


def _cuda_of_torch() -> str | None:
    """The CUDA that torch was built for, from a file beside it: importing torch would take a second."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", text, flags=re.MULTILINE)
    return found[1] if found else None


def _nccl() -> str | None:
    """NCCL's package, which torch's wheels bring along; None too where it is part of torch or of the system."""
    return next((found for cuda in (13, 12, 11) if (found := of_package(f"nvidia-nccl-cu{cuda}"))), None)


def differences(by_node: Mapping[str, Mapping[str, str | None]]) -> Iterator[tuple[str, str]]:
    """(name, text) of each version that is not the same on all nodes: `torch 2.13.0 on node0, 2.12.1 on node3`.

    by_node: what `installed` told on each
    """
    names = dict.fromkeys(name for versions in by_node.values() for name in versions)
    for name in names:
        nodes_of: dict[str | None, list[str]] = {}
        for node, versions in by_node.items():
            nodes_of.setdefault(versions.get(name), []).append(node)
        if len(nodes_of) > 1:
            parts = sorted(nodes_of.items(), key=lambda item: -len(item[1]))
            yield name, f"{name} " + ", ".join(f"{version or 'missing'} on {few(on)}" for version, on in parts)


def few(nodes: list[str]) -> str:
    """The names of nodes, or of one of them and how many they are."""
    if len(nodes) <= _NAMED:
        return " and ".join([", ".join(nodes[:-1]), nodes[-1]] if len(nodes) > 1 else nodes)
    return f"{nodes[0]} and {len(nodes) - 1} others"
