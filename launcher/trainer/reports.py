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

from launcher.run.left_out import LeftOut
from launcher.trainer.evaluation import EvalLosses
from launcher.trainer.guards import Guards, Judged
from launcher.trainer.metrics import EVAL_PREFIX, MetricsWriter, console_line, flops_per_step, memory_gib, peak_flops
from launcher.trainer.rows import StepRows
from launcher.trainer.trackers import Tracker


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


class Reduction:
    """The one reduction of a step, under way.

    Args:
        vector: [n] float64 on the device, summed over the ranks in place
    """

    def __init__(self, vector: Tensor) -> None:
        self.vector, self.work = vector, dist.all_reduce(vector, async_op=True)


@dataclass(slots=True)
class Pending:
    """A reduction under way and what belongs to it.

    step: updates finished after the step it reports
    numbers: loss, not finite, stop, save, each summed over the ranks; then what is the same on every rank: norm of the
        gradient, and whether the update was dropped because something is not finite
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

    def step(self, report: Pending, loss: float, norm: float, judged: Judged, counts: dict[str, int]) -> None:
        """Count a finished step; write it if it is due, or if there is something to say of it.

        Args:
            counts: what the guards have counted so far, see `Guards.counts`
        """
        self._tokens += report.rows.tokens
        self._mix.update(dict(zip(self.sources, report.rows.source_tokens, strict=False)))
        peak = peak_flops(self.device)
        if peak:
            self._flops += flops_per_step(self.module, tokens=report.rows.tokens, cost=report.rows.cost)
        self._wait_s += report.rows.wait_s
        if report.step % self.every and report.step != self.total_steps and judged.reason is None:
            return
        elapsed = max(report.at - self._since, 1e-9)
        self.write({
            "step": report.step, "loss": loss, "lr": report.lr, "grad_norm": norm,
            "tokens": report.rows.tokens, "tokens_per_s": self._tokens / elapsed,
            "mfu": self._flops / elapsed / (peak * self.world_size) if peak else None,
            "memory_gib": memory_gib(self.device), "data_wait_s": self._wait_s,
            **({"mix": _shares(self._mix)} if len(self.sources) > 1 else {}),
            **({judged.reason: True, "skipped": judged.skipped} if judged.reason else {}), **counts,
        })  # fmt: skip
        print(console_line(self.last, total_steps=self.total_steps), flush=True)
        self._whole_mix.update(self._mix)
        self._mix.clear()
        self._tokens, self._flops, self._wait_s, self._since = 0, 0.0, 0.0, report.at

    def left_out(self, rows: StepRows, lr: float, batch: LeftOut, counts: dict[str, int]) -> None:
        """Write a step that makes no update, and say why."""
        self.write({
            "step": batch.step, "loss": None, "lr": lr, "grad_norm": None, "tokens": rows.tokens, "tokens_per_s": 0.0,
            "mfu": None, "memory_gib": memory_gib(self.device), "data_wait_s": rows.wait_s, "left_out": True,
            **counts,
        })  # fmt: skip
        what = "its loss was a spike" if batch.reason == "spike" else "its loss or gradient was not finite"
        print(f"step {batch.step}/{self.total_steps}  left out: {what} in attempt {batch.attempt}", flush=True)

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
        guards: what judges each step's figures, alike on every rank
    """

    def __init__(self, figures: Figures | None, *, device: torch.device, guards: Guards) -> None:
        self.figures, self.guards, self._device = figures, guards, device
        self._paused_s = 0.0

    def pause(self, seconds: float) -> None:
        """Leave `seconds`, of an evaluation, out of the rates."""
        self._paused_s += seconds

    def reduce(self, *, loss: Tensor, nonfinite: Tensor, stop: bool, save: bool) -> Reduction:
        """Start the reduction of a step; nobody waits for it.

        Args:
            loss: 0-d float64 on the device, this rank's share of the global batch's loss
            nonfinite: 0-d on the device
        """
        flags = torch.tensor([float(stop), float(save)], dtype=torch.float64).to(self._device, non_blocking=True)
        return Reduction(torch.cat([torch.stack([loss, nonfinite.to(loss)]), flags]))

    def gate(self, step: int, *, loss: Tensor, stop: bool, save: bool) -> StepGate:
        """The same reduction for an update that must wait for it.

        Args:
            step: of the update, from 1
        """
        return StepGate(self, self.guards.limit(step), loss=loss, stop=stop, save=save)

    def sent(
        self, rows: StepRows, reduction: Reduction, *, nonfinite: Tensor, norm: Tensor, lr: float
    ) -> Pending:  # fmt: skip
        """A reduction with what belongs to it, on its way to the host.

        Args:
            nonfinite: 0-d on the device, of this rank
        """
        own = torch.stack([norm.to(self._device, torch.float64).view(()), nonfinite.to(self._device, torch.float64)])
        numbers = HostCopy(reduction.vector, own, reduction.work)
        return Pending(rows.step + 1, numbers, lr, rows, time.perf_counter() - self._paused_s)

    def read(self, report: Pending | None) -> Signals:
        """Take the figures of a step whose successor is under way already.

        Raises:
            NonFiniteError, SpikeError, RollBack: on every rank alike, see `Guards.judge`.
        """
        if report is None:
            return Signals()
        loss, nonfinite, stop, save, norm, own_nonfinite = report.numbers.read()
        bad = bool(own_nonfinite if self.guards.drops_spikes else nonfinite)
        judged = self.guards.judge(report.step, loss, nonfinite=bad)
        if self.figures is not None:
            if judged.reason:
                self._say(report.step, loss, judged)
            self.figures.step(report, loss, norm, judged, self.guards.counts())
        return Signals(stop > 0, save > 0)

    def _say(self, step: int, loss: float, judged: Judged) -> None:
        if judged.reason == "spike":
            what = f"loss {loss:.4f} is a spike (above {self.guards.limit(step):.4f})"
            count = f"{self.guards.spikes} spike{'s' * (self.guards.spikes != 1)}"
        else:
            what, count = f"loss {loss:g} or its gradient is not finite", f"{self.guards.skipped} skipped"
        then = "the weights were left as they were" if judged.skipped else "it was learnt from (train.on_spike = warn)"
        print(f"warning: step {step}: {what}; {then} ({count} so far)", flush=True)


class StepGate:
    """Lets an update through when the loss of the global batch is no spike; given to `Engine.clip_and_step`.

    The step's one reduction is started here, before the update, and the device waits for it; on a GPU the host does
    not. So the update of the very step is dropped, on every rank alike.

    Args:
        limit: what the loss must not be above
    """

    reduction: Reduction

    def __init__(self, reports: Reports, limit: float, *, loss: Tensor, stop: bool, save: bool) -> None:
        self._reports, self._limit, self._loss, self._flags = reports, limit, loss, {"stop": stop, "save": save}

    def __call__(self, bad: Tensor) -> tuple[Tensor, Tensor]:
        """See `launcher.trainer.engines.Gate`."""
        self.reduction = self._reports.reduce(loss=self._loss, nonfinite=bad, **self._flags)
        self.reduction.work.wait()
        loss, nonfinite = self.reduction.vector[0], self.reduction.vector[1]
        return nonfinite > 0, (nonfinite > 0) | (loss > self._limit)
