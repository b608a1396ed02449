"""DeepSpeed's compiled operators: whether one is ready on this machine, building one, loading one without a compiler.

DeepSpeed itself compiles an operator when it is first used, on the node, for a minute or more, on all ranks at once.
Here that happens only when somebody asks for it: `launcher doctor --build-ops`. Nothing heavy is imported at start.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launcher.errors import UserError

OPS = {
    "cpu_adam": "CPUAdamBuilder",  # DeepSpeedCPUAdam, the update in host memory
    "async_io": "AsyncIOBuilder",  # reads and writes of nvme offload
    "pin_memory": "PinMemoryBuilder",  # page-locked buffers for those
    "quantizer": "QuantizerBuilder",  # ZeRO++ on a GPU
}
NEEDS = {"async_io": "pin_memory"}  # operator -> the one whose symbols it uses
BUILD = "launcher doctor --build-ops"
STAMP = "built-for.json"  # beside the library: what it was compiled for


def op_is_built(name: str) -> bool:
    """Whether the operator can be used here without compiling: it was built with DeepSpeed, or by `build_op` for these
    versions and for a processor of which this one has all features."""
    if name in NEEDS and not op_is_built(NEEDS[name]):
        return False
    if _came_with_deepspeed(name):
        return True
    folder = build_folder(name)
    try:
        stamp = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return False
    wanted = _built_for()
    features = set(stamp.pop("features", []))
    return (
        (folder / f"{name}.so").exists()
        and features <= set(wanted.pop("features"))
        and all(stamp.get(key) == value for key, value in wanted.items())
    )


def build_op(name: str) -> Path:
    """Compile the operator, or do nothing when it is built; the folder it lies in.

    Raises:
        UserError: something it needs is missing here, or the compiler failed.
    """
    folder = build_folder(name)
    if op_is_built(name):
        return folder
    if why := _missing(name):
        raise UserError(f"{BUILD}: {name} cannot be built: {why}")
    if name in NEEDS:
        build_op(NEEDS[name])
        load_op(NEEDS[name])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # torch's own lock file outlives a build that was killed, and waits for ever
        (folder / "lock").unlink(missing_ok=True)
        (folder / STAMP).unlink(missing_ok=True)
        try:
            with _tools_on_path():
                _builder(name).jit_load(verbose=False)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{BUILD}: {name} cannot be built: " + "\n  ".join(lines[-10:])) from error
        (folder / STAMP).write_text(json.dumps(_built_for()))
    return folder


def load_op(name: str) -> Any:
    """The built operator, put where DeepSpeed looks before it compiles.

    Raises:
        UserError: it is not built.
    """
    if name in NEEDS:
        load_op(NEEDS[name])
    builder = _builder(name)
    if name not in type(builder)._loaded_ops:
        if not op_is_built(name):
            raise UserError(f"DeepSpeed's {name} is not built for this machine. Run `{BUILD}` on it.")
        if _came_with_deepspeed(name):
            return builder.load()
        type(builder)._loaded_ops[name] = _import_library(name, build_folder(name) / f"{name}.so")
    return builder.load()  # loaded already; DeepSpeed lets others see the symbols of pin_memory here


def build_folder(name: str) -> Path:
    """Where torch builds and looks for an extension of this name: below TORCH_EXTENSIONS_DIR, else in the cache."""
    import torch

    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        flavour = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
        root = f"{cache}/torch_extensions/py{sys.version_info[0]}{sys.version_info[1]}{sys.abiflags}_{flavour}"
    return Path(root) / name


def _came_with_deepspeed(name: str) -> bool:
    """Whether DeepSpeed was installed with DS_BUILD_..., which put the operator into the package."""
    _choose_accelerator()
    try:
        from deepspeed.git_version_info import accelerator_name, installed_ops
    except ImportError:
        return False
    from deepspeed.accelerator import get_accelerator

    return bool(installed_ops.get(name)) and accelerator_name == get_accelerator()._name


def _builder(name: str) -> Any:
    _choose_accelerator()
    return getattr(importlib.import_module("deepspeed.ops.op_builder"), OPS[name])()


def _choose_accelerator() -> None:
    """Before DeepSpeed is imported, which else asks for each kind of device and warns where it finds none: a GPU where
    torch has one, else the CPU."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def _built_for() -> dict[str, Any]:
    import torch

    try:
        deepspeed = version("deepspeed")
    except PackageNotFoundError:
        deepspeed = None
    return {
        "torch": torch.__version__, "deepspeed": deepspeed, "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "machine": platform.machine(), "features": _features(),
    }  # fmt: skip


def _features() -> list[str]:
    """Instruction sets of this processor; the compiler is told to use them all (-march=native)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return next(
        (sorted(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), []
    )


def _missing(name: str) -> str | None:
    """What a build needs and this machine lacks, with the way to get it."""
    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed. Run pip install 'train-launcher[deepspeed]'."
    for tool, fix in (("g++", "Install a C++ compiler."), ("ninja", "Run pip install ninja.")):
        with _tools_on_path():
            found = shutil.which(tool)
        if found is None:
            return f"{tool} is not found. {fix}"
    builder = _builder(name)
    if builder.sources() and builder.is_compatible(verbose=False):
        return None
    if name == "async_io":
        return (
            "libaio and its header are not found. Install libaio-dev (libaio-devel), or name its folders in "
            "CFLAGS=-I... and LDFLAGS=-L... ."
        )
    return "DeepSpeed has it for GPUs only, or finds no CUDA toolkit (CUDA_HOME)."


@contextlib.contextmanager
def _tools_on_path() -> Iterator[None]:
    """Inside, what is installed beside this Python is found too: ninja in an environment that was not activated."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _import_library(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
