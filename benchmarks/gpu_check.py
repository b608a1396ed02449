"""Proves on one GPU what this project promises of GPUs; prints one table, writes JSON, ends with 1 if a check failed.

Attention keeps documents apart in every back end (loss and gradient), Liger's kernels compute what they replace, the
engines agree in bf16, checkpoints pass between engines bit by bit, recomputation changes no gradient, compilation no
loss; and how fast and how large whole training steps are for models of the shape of Qwen3 0.6B and 1.7B.

Needs torch 2.11, transformers 5.17, accelerate and peft or newer; deepspeed, liger-kernel, flash-attn and xxhash where
installed, else the checks that want them say so. One process, no launcher, no data. About 8 minutes on an H200.

    python benchmarks/gpu_check.py [--out gpu-check.json] [--quick] [--cpu] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "deepspeed", "liger-kernel", "triton", "flash-attn", "flash-attn-3",
    "flash-attn-4", "numpy", "xxhash",
)  # fmt: skip
LIMIT_S = 240  # of one check in a process of its own
NAMES = ("attention", "attention-speed", "liger", "parity", "checkpoint", "activations", "compile", "faults", "speed")


def main() -> int:
    """Check, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer steps and cases")
    parser.add_argument("--cpu", action="store_true", help="tiny models on the CPU: does the check itself run?")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--together", action="store_true", help="all checks in this process; a crash then ends all")
    options = parser.parse_args()
    begin = time.perf_counter()
    if why := not options.cpu and no_gpu():
        print(f"gpu-check: {why} --cpu tries the check itself on tiny models.", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for name in options.only:
        found = checked(name, options) if options.together else checked_apart(name, options)
        for row in found:
            print(line(row), flush=True)
        rows += found
    seconds = time.perf_counter() - begin
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "failed", "skipped")}
    print(", ".join(f"{n} {status}" for status, n in counts.items()) + f", {seconds:.0f} s")
    if options.out:
        options.out.write_text(json.dumps({**about(options), "seconds": seconds, "rows": rows}, indent=1) + "\n")
    return int(counts["failed"] > 0)


def no_gpu() -> str:
    """Why there can be no check, or nothing."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch. Use the Python that has it: make gpu-check PYTHON=..."
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU here."


def line(row: dict[str, Any]) -> str:
    return f"{row['status']:<8}{row['check']:<16}{row['case']:<34}{row['text']}"


def checked(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one check here; what it raises, a missing package first of all, is a row."""
    rows: list[dict[str, Any]] = []
    try:
        for row in run(name, options):
            rows.append(row.as_dict())
    except ImportError as error:
        rows.append(_all(name, "skipped", str(error)))
    except Exception as error:
        text = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        rows.append(_all(name, "failed", text))
    return rows


def _all(name: str, status: str, text: str) -> dict[str, Any]:
    return {"check": name, "case": "all", "status": status, "text": text, "figures": {}}


def run(name: str, options: argparse.Namespace) -> Any:
    import torch

    from benchmarks import gpu_checks
    from benchmarks.gpu_parts import Place
    from launcher.trainer import distributed

    device = torch.device("cpu") if options.cpu else torch.device("cuda", 0)
    if options.cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    distributed.join(device, distributed.Ranks(0, 0, 1, 1, 0))
    torch.manual_seed(0)
    return gpu_checks.CHECKS[name](Place(device, options.quick or options.cpu))


def checked_apart(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one check in a process of its own, because a broken kernel spoils the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "rows.json", Path(folder) / "log"
        words = [sys.executable, __file__, "--together", "--only", name, "--out", str(out)]
        words += [f"--{flag}" for flag in ("quick", "cpu") if getattr(options, flag)]
        why = ""
        with log.open("w") as handle:
            try:
                rc = subprocess.run(words, stdout=handle, stderr=subprocess.STDOUT, timeout=LIMIT_S).returncode
                why = f"its process ended with {rc}"
            except subprocess.TimeoutExpired:
                why = f"not done after {LIMIT_S} s"
        if out.exists():
            rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
            return rows
        said = [text for text in log.read_text(errors="replace").splitlines() if text.strip()][-3:]
        return [_all(name, "failed", f"{why}: {' | '.join(said)}")]


def about(options: argparse.Namespace) -> dict[str, Any]:
    """When, on what, and with which versions."""
    import torch

    hardware: dict[str, Any] = {"cpu": platform.machine(), "cores": os.cpu_count()}
    if not options.cpu:
        properties = torch.cuda.get_device_properties(0)
        hardware |= {
            "gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
        }  # fmt: skip
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "quick": options.quick, "cpu_only": options.cpu,
        "hardware": hardware, "python": platform.python_version(), "versions": versions,
    }  # fmt: skip


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a process group's threads may abort an orderly shutdown
