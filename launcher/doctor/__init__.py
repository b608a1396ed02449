"""What this machine has for training: packages against the declared ranges, GPUs, compilers, DeepSpeed's operators.

Clashes between packages are in `known`, the machine as a node of a job in `here`, several side by side in `nodes`. Each
finding says what to do about it. Heavy libraries are asked for their versions without being imported; torch is imported
where there are GPUs, torch and DeepSpeed where DeepSpeed is installed.
"""

from __future__ import annotations

import ctypes.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from launcher import versions
from launcher.errors import UserError
from launcher.jobs.devices import count_gpus
from launcher.jobs.finding import Finding
from launcher.versions import of_package as _version

PROJECT = "train-launcher"
PURPOSES = {  # extra -> what needs it; without it the rest works
    "deepspeed": "zero1, zero2 and zero3 need it",
    "gpu": "model.liger needs it",
    "flash-attn": "flash_attention_2 needs it",
    "trackers": "logging.trackers=[tensorboard] needs it",
    "cloud": "data at s3:// and gs:// need it",
}
OPS = {  # operator of DeepSpeed -> what it is for
    "cpu_adam": "strategy.offload to nvme needs it, to cpu is faster with it",
    "async_io": "strategy.offload to nvme needs it",
    "quantizer": "strategy.zero.quantized_weights needs it, on GPUs",
}
LEAST_DRIVER = {"11": 450, "12": 525, "13": 580}  # by CUDA's number: NVIDIA's minor version compatibility
_REQUIREMENT = re.compile(r"^([\w.-]+)(?:\[[^]]*\])?\s*\(?([^;)]*)\)?(?:;\s*extra\s*==\s*['\"]([\w-]+)['\"])?$")
_BOUND = re.compile(r"(>=|<)\s*([0-9.]+)")


def examine() -> Iterator[Finding]:
    """Everything that is this machine's own, as it is now; nothing is built or changed."""
    from launcher.doctor.known import clashes

    yield from packages()
    yield from clashes()
    yield from devices()
    if _version("deepspeed") is not None:
        yield from tools()
        yield from operators()


def packages() -> Iterator[Finding]:
    """Installed versions against the ranges that the project declares."""
    try:
        declared = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        fix = "Install the project: pip install -e ."
        yield Finding("packages", PROJECT, "bad", "its metadata is not installed, so no range is known", fix)
        return
    order = [None, "train", *PURPOSES]
    found = [match for line in declared if (match := _REQUIREMENT.match(line)) and match[3] in order]
    for match in sorted(found, key=lambda match: order.index(match[3])):
        wanted = ",".join(sorted(match[2].strip().split(","), reverse=True))  # >=2.11,<3
        yield _package(match[1], wanted, match[3])


def _package(name: str, wanted: str, extra: str | None) -> Finding:
    installed = _version(name)
    fix = f"Run pip install '{PROJECT}{f'[{extra}]' if extra else ''}'."
    if installed is None and extra in PURPOSES:
        return Finding("packages", name, "note", f"not installed: {PURPOSES[extra]}", fix)
    if installed is None:
        return Finding("packages", name, "bad", f"not installed: training needs {wanted}", fix)
    if not within(installed, wanted):
        return Finding("packages", name, "bad", f"{installed}, expected {wanted}", f"Run pip install '{name}{wanted}'.")
    return Finding("packages", name, "ok", f"{installed} ({wanted})")


def within(installed: str, wanted: str) -> bool:
    """Whether a version keeps the bounds `>=` and `<` of a requirement; what follows the numbers is not looked at."""
    bounds = {sign: _numbers(number) for sign, number in _BOUND.findall(wanted)}
    has = _numbers(installed)
    return bounds.get(">=", ()) <= has and ("<" not in bounds or has < bounds["<"])


def _numbers(text: str) -> tuple[int, ...]:
    leading = re.match(r"[0-9]+(\.[0-9]+)*", text)
    numbers = [int(number) for number in leading[0].split(".")] if leading else []
    while numbers and numbers[-1] == 0:  # 3 and 3.0 are one version
        numbers.pop()
    return tuple(numbers)


def devices() -> Iterator[Finding]:
    """GPUs as ranks would find them, and cores."""
    gpus, how = count_gpus()
    cores = len(os.sched_getaffinity(0))
    yield Finding("devices", "cores", "ok", f"{cores} for this process")
    if not gpus:
        yield Finding("devices", "GPUs", "note", f"none ({how})", "Training runs on the CPU here.")
        return
    seen = _gpus_of_torch() if _version("torch") is not None else gpus
    if seen >= gpus:
        yield Finding("devices", "GPUs", "ok", f"{gpus} ({how})")
    else:
        text = f"{gpus} ({how}), but torch {_version('torch')} sees {seen}"
        yield Finding("devices", "GPUs", "bad", text, _why_unseen(versions.installed()))


def _why_unseen(have: Mapping[str, str | None]) -> str:
    """What to do where the driver has GPUs and torch has not."""
    cuda, driver = have["cuda"], have["driver"]
    get = "https://pytorch.org/get-started/locally"
    if cuda is None:
        return f"This torch was built without CUDA: install a torch with CUDA, {get}."
    least = LEAST_DRIVER.get(cuda.partition(".")[0])
    if least and driver and _numbers(driver) < (least,):
        return (
            f"Driver {driver} is too old for CUDA {cuda}, which needs {least}: update it, or take another torch, {get}."
        )
    return f"Install a torch with CUDA for this driver: {get}. In a container, start it with its GPUs (--gpus all)."


def _gpus_of_torch() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def tools() -> Iterator[Finding]:
    """What a build of DeepSpeed's operators needs."""
    beside = str(Path(sys.executable).parent)  # ninja of an environment that was not activated
    path = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])
    for name, fix in (("g++", "Install a C++ compiler."), ("ninja", "Run pip install ninja.")):
        found = shutil.which(name, path=path)
        why = "not found: no operator of DeepSpeed can be built"
        yield Finding("tools", name, "ok", found) if found else Finding("tools", name, "note", why, fix)
    if library := ctypes.util.find_library("aio"):
        yield Finding("tools", "libaio", "ok", library)
    else:
        fix = "Install libaio-dev (libaio-devel)."
        yield Finding("tools", "libaio", "note", f"not found: {OPS['async_io']}", fix)


def operators() -> Iterator[Finding]:
    """Which of DeepSpeed's compiled operators are ready here."""
    from launcher.trainer.ops import BUILD, op_is_built

    _say_device()
    for name in _wanted_operators():
        if op_is_built(name):
            yield Finding("operators", name, "ok", "built")
        else:
            yield Finding("operators", name, "note", f"not built: {OPS[name]}", f"Run {BUILD} on this machine.")


def build_operators(tell: Callable[[str], None]) -> Iterator[Finding]:
    """Build what is missing; only DeepSpeed's Adam has to succeed, the others need more than a compiler.

    tell: is given a line before each build, which takes about a minute
    """
    if _version("deepspeed") is None:
        fix = f"Run pip install '{PROJECT}[deepspeed]'."
        yield Finding("operators", "deepspeed", "bad", "not installed: there is nothing to build", fix)
        return
    from launcher.trainer.ops import build_op, op_is_built

    _say_device()
    for name in _wanted_operators():
        if op_is_built(name):
            yield Finding("operators", name, "ok", "built before")
            continue
        tell(f"building {name}, a minute or two ...")
        try:
            yield Finding("operators", name, "ok", f"built in {build_op(name)}")
        except UserError as error:
            yield Finding("operators", name, "bad" if name == "cpu_adam" else "note", str(error))


def _say_device() -> None:
    """DeepSpeed warns when it has to find out by itself that there is no GPU."""
    if not count_gpus()[0]:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _wanted_operators() -> list[str]:
    return [name for name in OPS if name != "quantizer" or count_gpus()[0]]
