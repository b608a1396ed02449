"""The figures of a run: metrics.jsonl, their units, how they are read back, and the picture of the loss.

One JSON object a line. A logged step has step (finished updates, from 1), loss (of that step's global batch), lr,
grad_norm (before clipping), tokens (of the global batch), tokens_per_s (over all ranks, since the last logged step),
mfu (share of the device's peak, null where unknown), memory_gib (peak of rank 0), data_wait_s (time rank 0 waited for
rows since the last logged step), time (Unix seconds), attempt; with several sources also mix (of the tokens since the
last logged step, the share of each source by name). A step whose figures were wrong has non_finite or spike, and
skipped; one without an update because its batch is left out has left_out. steps_skipped, steps_left_out and loss_spikes
count them so far and are absent while 0. An evaluation has step, eval_loss (over all sets), and
eval_loss/NAME of each set. A number that is not finite is null. A resumed run repeats steps: the last line of a step
counts.
"""

from __future__ import annotations

import functools
import io
import json
import os
import resource
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch

from launcher.run.files import write_atomic
from launcher.trainer.trouble import Trouble

EVAL_PREFIX = "eval_loss/"  # before the name of an evaluation set

_LONGEST_LINE_BYTES = 1 << 16

# dense bf16 peak of one device in FLOP/s, from the makers' data sheets
_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "A100": 312e12,
    "L40S": 362e12,
}


class MetricsWriter:
    """Appends lines, one write a line, so that a kill never leaves half of two lines mixed.

    Nothing here raises when the disk is full: lines wait in memory, the oldest go when there are too many, and the rest
    of one that was written in part comes first when space returns. A part that a killed attempt left is cut off.

    Args:
        limit: lines that may wait
    """

    def __init__(self, path: Path, *, limit: int = 20_000) -> None:
        self._path, self._limit = path, limit
        self._waiting: deque[bytes] = deque()
        self._in_part = False  # the first of those that wait is the rest of a line
        self._lost = 0
        self._trouble = Trouble(path.name)
        self._handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        _cut_torn_line(self._handle)

    def write(self, values: dict[str, Any]) -> None:
        """Append one line, and before it those that wait."""
        self._waiting.append((json.dumps(values) + "\n").encode())
        self._flush()
        if len(self._waiting) > self._limit:
            del self._waiting[int(self._in_part)]
            self._lost += 1

    def sync(self) -> None:
        """Make the lines durable, as far as there is space."""
        self._flush()
        with self._trouble.said():
            os.fsync(self._handle)

    def close(self) -> None:
        """Sync and close; lines that are lost now are counted aloud."""
        self.sync()
        if lost := self._lost + len(self._waiting):
            print(f"warning: {self._path}: {lost} lines could not be written and are lost", flush=True)
        os.close(self._handle)

    def _flush(self) -> None:
        with self._trouble.said():
            while self._waiting:
                line = self._waiting[0]
                written = os.write(self._handle, line)
                self._in_part = written < len(line)
                if self._in_part:
                    self._waiting[0] = line[written:]
                else:
                    self._waiting.popleft()


def _cut_torn_line(handle: int) -> None:
    """End the file after its last whole line."""
    size = os.fstat(handle).st_size
    tail = os.pread(handle, _LONGEST_LINE_BYTES, max(0, size - _LONGEST_LINE_BYTES))
    if tail and not tail.endswith(b"\n"):
        os.ftruncate(handle, size - (len(tail) - 1 - tail.rfind(b"\n")))


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(logged steps, evaluations), ascending by step, the last line of a step alone; a torn line is skipped."""
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue  # the process was killed in mid-write
        (evaluations if "eval_loss" in values else steps)[values["step"]] = values
    return [steps[s] for s in sorted(steps)], [evaluations[s] for s in sorted(evaluations)]


def flops_per_step(module: Any, *, tokens: int, cost: float) -> float:
    """Floating point operations of one global batch, recomputation not counted.

    A token costs 6 for every trained parameter but the input embedding, 4 for a frozen one, which needs no gradient of
    its own; causal attention 6 x layers x heads x head_dim x sum of squared document lengths (the convention of
    NVIDIA's Megatron Bridge; a tied embedding is also the head and counts).

    Args:
        cost: sum of the squared document lengths
    """
    config = module.lm.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return _matrix_flops_per_token(module) * tokens + 6.0 * config.num_hidden_layers * heads * head_dim * cost


@functools.lru_cache(maxsize=1)
def _matrix_flops_per_token(module: Any) -> float:
    """Of all parameters but the input embedding, which is looked up; counted once a run."""
    total = sum(_flops_per_token(p) for p in module.parameters())
    if getattr(module.lm.config.get_text_config(), "tie_word_embeddings", False):
        return total
    return total - _flops_per_token(module.lm.get_input_embeddings().weight)


def _flops_per_token(p: torch.nn.Parameter) -> float:
    numel = getattr(p, "ds_numel", p.numel())  # ZeRO-3 leaves an empty tensor where it has put a parameter in parts
    return (6.0 if p.requires_grad else 4.0) * numel


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device, None where unknown (a CPU, another GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in sorted(_PEAKS.items(), key=lambda item: -len(item[0])) if word in name), None)


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: of the GPU, or resident where there is none."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def plot_loss(metrics: Path, png: Path, *, title: str) -> None:
    """Draw training and evaluation loss over steps.

    Raises:
        OSError: the picture cannot be written; an older one is left as it was.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, evaluations = read_metrics(metrics)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], linewidth=1, label="training")
    if evaluations:
        axes.plot([e["step"] for e in evaluations], [e["eval_loss"] for e in evaluations], "o-", label="evaluation")
    names = sorted({key for e in evaluations for key in e if key.startswith(EVAL_PREFIX)})
    for name in names if len(names) > 1 else ():
        some = [e for e in evaluations if e.get(name) is not None]
        label = name.removeprefix(EVAL_PREFIX)
        axes.plot([e["step"] for e in some], [e[name] for e in some], ".--", linewidth=0.8, label=label)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    pyplot.close(figure)
    write_atomic(png, picture.getvalue())


def console_line(values: dict[str, Any], *, total_steps: int) -> str:
    """`step 12/400  loss 3.2100  lr 2.0e-04  norm 1.2  1.2k tok/s`"""
    rate = values["tokens_per_s"]
    shown = f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.0f}"
    mfu = f"  mfu {values['mfu']:.1%}" if values["mfu"] is not None else ""
    return (
        f"step {values['step']}/{total_steps}  loss {values['loss']:.4f}  lr {values['lr']:.1e}  "
        f"norm {values['grad_norm']:.2f}  {shown} tok/s{mfu}"
    )
