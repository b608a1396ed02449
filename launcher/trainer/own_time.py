"""The time a rank spends in layers that wait for nobody, from which a slow rank is told without a collective.

The forward passes of some linear layers are measured, inside of whatever FSDP2 and DeepSpeed hook around them: weights
are gathered before they begin, and a call costs a microsecond where a hook would cost ten. Times are for a position of
the batch, so ranks with shorter rows are compared fairly.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from launcher.trainer.beat import is_watched

_BLOCKS = 4  # of which a layer is measured


def own_time(engine: Any, *, compiled: bool) -> OwnTime | None:
    """Measures the model of an engine from now on; None where nobody reads it, or it has no layer to measure."""
    layers = measured_layers(engine.module.blocks(), engine.module, compiled=compiled) if is_watched() else []
    return OwnTime(layers, engine.device) if layers else None


class OwnTime:
    """Measures from the moment it is made.

    On a GPU pairs of events on the stream are read a step later, when they have long happened: nothing is waited for.
    """

    def __init__(self, layers: list[nn.Module], device: torch.device) -> None:
        self._seconds, self._positions = 0.0, 0  # of this step
        self._steps: list[float] = []
        self._free: list[torch.cuda.Event] = []
        self._fresh: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = []
        self._before: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = []
        for layer in layers:
            measured = self._on_gpu if device.type == "cuda" else self._on_host
            layer.forward = functools.partial(measured, layer, layer.forward)

    def step(self) -> None:
        """A step is done, and the device has done the one before."""
        for begin, end, positions in self._before:
            if end.query():
                self._seconds += begin.elapsed_time(end) / 1e3
                self._positions += positions
            self._free += (begin, end)
        self._before, self._fresh = self._fresh, []
        if self._positions:
            self._steps.append(self._seconds / self._positions)
        self._seconds, self._positions = 0.0, 0

    def taken(self) -> float:
        """Seconds for a position, in the median of the steps since the last call; 0 if nothing was measured.

        A step that the host's scheduler or a page fault held up says nothing about the rank.
        """
        steps, self._steps = self._steps, []
        return statistics.median(steps) if steps else 0.0

    def _on_host(self, layer: nn.Module, forward: Callable[..., Any], states: Tensor, *args: Any, **more: Any) -> Any:
        if not layer.training:
            return forward(states, *args, **more)
        begin = time.perf_counter()
        output = forward(states, *args, **more)
        self._seconds += time.perf_counter() - begin
        self._positions += states.numel() // states.shape[-1]
        return output

    def _on_gpu(self, layer: nn.Module, forward: Callable[..., Any], states: Tensor, *args: Any, **more: Any) -> Any:
        if not layer.training:
            return forward(states, *args, **more)
        begin = self._recorded()
        output = forward(states, *args, **more)
        self._fresh.append((begin, self._recorded(), states.numel() // states.shape[-1]))
        return output

    def _recorded(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def measured_layers(blocks: list[nn.Module], whole: nn.Module, *, compiled: bool) -> list[nn.Module]:
    """The layers to measure: the largest linear one of some blocks.

    Where blocks are compiled, into which no hook may reach, it is the last layer of the model that lies outside of them
    and is no head: its final norm. Layers that a batch may pass over, as experts in lists, are not taken.
    """
    if compiled:
        inside = {id(module) for block in blocks for module in block.modules()}
        outside = [m for m in whole.modules() if id(m) not in inside and not list(m.children())]
        norms = [m for m in outside if "norm" in type(m).__name__.lower()]
        return norms[-1:]
    every = max(1, len(blocks) // _BLOCKS)
    found = []
    for block in blocks[every // 2 :: every][:_BLOCKS]:
        passed_over = {id(m) for some in block.modules() if isinstance(some, nn.ModuleList) for m in some.modules()}
        linear = [m for m in block.modules() if isinstance(m, nn.Linear) and id(m) not in passed_over]
        if linear:
            found.append(max(linear, key=lambda m: m.in_features * m.out_features))
    return found
