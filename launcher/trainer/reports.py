"""What the ranks tell each other once a step, and what becomes of it a step later: figures, stop, save, not finite."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.trainer.evaluation import EvalLosses
from launcher.trainer.failures import NonFiniteError
from launcher.trainer.metrics import EVAL_PREFIX, MetricsWriter, console_line, flops_per_step, memory_gib, peak_flops
from launcher.trainer.rows import StepRows
from launcher.trainer.trackers import Tracker

MOST_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True, slots=True)
class Signals:
    """What the ranks agreed on: checkpoint and stop, or checkpoint and go on."""

    stop: bool = False
    save: bool = False


class HostCopy:
    """Numbers on their way from a reduction to the host, without holding up what the device does next.

    On a GPU a stream of its own waits for the reduction and copies: reading on the main stream would wait for the step
    that has been queued since.

    Args:
        vector: [n] float64 on the device, being reduced by `work`
        own: [m], further numbers of this rank
    """

    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, vector: Tensor, own: Tensor, work: Any) -> None:
        self._parts, self._work = (vector, own), work  # kept alive until they are read
        self._event: torch.cuda.Event | None = None
        if vector.device.type != "cuda":
            return
        if vector.device not in self._streams:
            self._streams[vector.device] = torch.cuda.Stream(vector.device)
        stream = self._streams[vector.device]
        stream.wait_stream(torch.cuda.current_stream(vector.device))
        with torch.cuda.stream(stream):
            work.wait()  # the stream waits, not the host
            both = torch.cat([vector, own.to(vector.device, torch.float64)])
            self._host = torch.empty(both.shape, dtype=torch.float64, pin_memory=True)
            self._host.copy_(both, non_blocking=True)
            self._event = stream.record_event()

    def read(self) -> list[float]:
        """The reduced numbers, then this rank's own."""
        if self._event is not None:
            self._event.synchronize()
            return self._host.tolist()  # type: ignore[no-any-return]
        self._work.wait()
        return torch.cat([part.double() for part in self._parts]).tolist()  # type: ignore[no-any-return]


@dataclass(slots=True)
class Pending:
    """A reduction under way and what belongs to it.

    step: updates finished after the step it reports
    numbers: loss, not finite, stop, save, each summed over the ranks; norm of the gradient, the same on every rank
    at: seconds of training time when the step had been sent to the device; evaluations do not count
    """

    step: int
    numbers: HostCopy
    lr: float
    rows: StepRows
    at: float


@dataclass(slots=True)
class Figures:
    """Where rank 0 puts the figures of logged steps; other ranks have none.

    every: steps between two logged ones
    sources: names of the training sources
    """

    metrics: MetricsWriter
    trackers: list[Tracker]
    module: Any
    device: torch.device
    world_size: int
    attempt: int
    every: int
    total_steps: int
    sources: list[str] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    _tokens: int = 0
    _mix: Counter[str] = field(default_factory=Counter)  # tokens of each source since the last logged step
    _whole_mix: Counter[str] = field(default_factory=Counter)  # and since this attempt began
    _flops: float = 0.0
    _wait_s: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    def step(self, report: Pending, loss: float, norm: float) -> None:
        """Count a finished step; write it if it is due."""
        self._tokens += report.rows.tokens
        self._mix.update(dict(zip(self.sources, report.rows.source_tokens, strict=False)))
        peak = peak_flops(self.device)
        if peak:
            self._flops += flops_per_step(self.module, tokens=report.rows.tokens, cost=report.rows.cost)
        self._wait_s += report.rows.wait_s
        if report.step % self.every and report.step != self.total_steps:
            return
        elapsed = max(report.at - self._since, 1e-9)
        self.write({
            "step": report.step, "loss": loss, "lr": report.lr, "grad_norm": norm,
            "tokens": report.rows.tokens, "tokens_per_s": self._tokens / elapsed,
            "mfu": self._flops / elapsed / (peak * self.world_size) if peak else None,
            "memory_gib": memory_gib(self.device), "data_wait_s": self._wait_s,
            **({"mix": _shares(self._mix)} if len(self.sources) > 1 else {}),
        })  # fmt: skip
        print(console_line(self.last, total_steps=self.total_steps), flush=True)
        self._whole_mix.update(self._mix)
        self._mix.clear()
        self._tokens, self._flops, self._wait_s, self._since = 0, 0.0, 0.0, report.at

    def evaluation(self, step: int, losses: EvalLosses) -> None:
        """Write an evaluation."""
        sets = losses.sets
        self.write({"step": step, "eval_loss": losses.total} | {EVAL_PREFIX + name: sets[name] for name in sets})
        apart = ", ".join(f"{name} {loss:.4f}" for name, loss in sets.items()) if len(sets) > 1 else ""
        print(
            f"step {step}/{self.total_steps}  evaluation loss {losses.total:.4f}{apart and f' ({apart})'}", flush=True
        )

    def say_mix(self) -> None:
        """Print what of each source this attempt has learnt, where there are several."""
        if len(self.sources) > 1 and (shares := _shares(self._whole_mix)):
            tokens = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            print(f"mix of the {sum(self._whole_mix.values()):,} tokens of this attempt: {tokens}", flush=True)

    def write(self, values: dict[str, Any]) -> None:
        """One line, everywhere; a number that is not finite is null in JSON."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        if "loss" in values:
            self.last = {**values, "loss": values["loss"] if values["loss"] is not None else math.nan}
            self.last["grad_norm"] = values["grad_norm"] if values["grad_norm"] is not None else math.nan
        self.metrics.write({**values, "time": time.time(), "attempt": self.attempt})
        for tracker in self.trackers:
            tracker.log(values)

    def close(self) -> None:
        """Close every receiver."""
        self.metrics.close()
        for tracker in self.trackers:
            tracker.close()


def _shares(tokens: Counter[str]) -> dict[str, float]:
    """Of all tokens, that of each source."""
    whole = sum(tokens.values())
    return {name: count / whole for name, count in tokens.items()} if whole else {}


class Reports:
    """The one reduction a step.

    Args:
        figures: on rank 0
        stop_on_nonfinite: raise, one step late, when a step's update was dropped; else when MOST_SKIPPED_IN_A_ROW were
    """

    def __init__(self, figures: Figures | None, *, device: torch.device, stop_on_nonfinite: bool) -> None:
        self.figures, self._device, self._stop = figures, device, stop_on_nonfinite
        self.skipped = self._skipped_in_a_row = 0
        self._paused_s = 0.0

    def pause(self, seconds: float) -> None:
        """Leave `seconds`, of an evaluation, out of the rates."""
        self._paused_s += seconds

    def send(
        self, rows: StepRows, *, loss: Tensor, nonfinite: Tensor, norm: Tensor, lr: float, stop: bool, save: bool
    ) -> Pending:
        """Start the reduction of a step; nobody waits for it.

        Args:
            loss: 0-d float64 on the device, this rank's share of the global batch's loss
            nonfinite: 0-d float64 on the device
        """
        flags = torch.tensor([float(stop), float(save)], dtype=torch.float64).to(self._device, non_blocking=True)
        vector = torch.cat([torch.stack([loss, nonfinite]), flags])
        numbers = HostCopy(vector, norm.view(1), dist.all_reduce(vector, async_op=True))
        return Pending(rows.step + 1, numbers, lr, rows, time.perf_counter() - self._paused_s)

    def read(self, report: Pending | None) -> Signals:
        """Take the figures of a step whose successor is under way already.

        Raises:
            NonFiniteError: on every rank alike.
        """
        if report is None:
            return Signals()
        loss, nonfinite, stop, save, norm = report.numbers.read()
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if nonfinite else 0
        if nonfinite:
            self._not_finite(report.step, loss)
        if self.figures is not None:
            self.figures.step(report, loss, norm)
        return Signals(stop > 0, save > 0)

    def _not_finite(self, step: int, loss: float) -> None:
        text = f"step {step}: loss {loss} or its gradient is not finite; the weights were left as they were"
        if self._stop:
            raise NonFiniteError(f"{text}. Set train.on_nonfinite=skip to go on, or lower optimizer.lr.")
        self.skipped += 1
        if self.figures is not None:
            print(f"warning: {text} ({self.skipped} skipped so far)", flush=True)
        if self._skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"step {step}: loss or gradient was not finite in {MOST_SKIPPED_IN_A_ROW} steps in a row, so skipping "
                "does not help. Lower optimizer.lr, or look at the data."
            )
