"""What the watch costs a step: beats and measured layers of a rank, as a share of a training step, on one CPU rank.

Two ways. What is added to a step is timed alone, many times over: every beat of a step, the hooks of each measured
layer, the pace. And whole steps with and without it alternate in one process, by processor time, which a busy machine
disturbs least; their difference is far below the noise where the first figure is right. Goal: below 0.5 % of a step.

    python benchmarks/watch.py [--pairs 20] [--steps 4] [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from launcher.run.heartbeat import ENVIRONMENT, GROUP
from launcher.trainer import beat as rank_side
from launcher.trainer.beat import PaceKeeper, beat
from launcher.trainer.own_time import OwnTime, measured_layers

ROUNDS = 20_000
POSITIONS, HIDDEN, BLOCKS = 256, 128, 4


class Block(nn.Module):
    """The matrix products of a decoder block of benchmarks/engine_overhead.py, of which hooks see the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 6 * HIDDEN), nn.Linear(3 * HIDDEN, HIDDEN)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states + self.attention(states)[..., :HIDDEN]
        gate, up = self.up(states).chunk(2, dim=-1)
        return states + self.down(nn.functional.silu(gate) * up)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="measurements of each, alternating")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of one measurement")
    parser.add_argument("--micro", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--quick", action="store_true", help="two pairs: does it run?")
    options = parser.parse_args()
    pairs, rounds = (2, 200) if options.quick else (options.pairs, ROUNDS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[ENVIRONMENT] = folder
        rank_side.begin(0)
        added = added_s(options.micro, rounds)
        whole, watched = steps_s(options.micro, pairs=pairs, steps=options.steps)
    step = statistics.median(whole)
    ratio = statistics.median(b / a for a, b in zip(whole, watched, strict=True))
    beat_us = 1e6 * one_beat_s(rounds)
    print(f"added to a step of {options.micro} micro-batches: {1e6 * added:.1f} us ({beat_us:.2f} us a beat)")
    share = f"{added / step:.3%} of a step of {1e3 * step:.2f} ms"
    print(f"that is {share}: {BLOCKS} blocks on {POSITIONS} positions")
    print(f"steps with it / without, median of {pairs} pairs by processor time: {ratio:.4f} (goal below 1.005)")


def one_beat_s(rounds: int) -> float:
    """Of one beat."""
    begin = time.process_time()
    for _ in range(rounds):
        beat("forward")
    return (time.process_time() - begin) / rounds


def added_s(micro: int, rounds: int) -> float:
    """What a step has on top: its beats and pace, and the hooks around layers that do nothing themselves."""
    bare, hooked, states = nn.Identity(), nn.Identity(), torch.zeros(1, POSITIONS, HIDDEN)
    keeper = PaceKeeper(OwnTime([hooked], torch.device("cpu")))
    calls = micro * BLOCKS

    def seconds(layer: nn.Module, *, watched: bool) -> float:
        begin = time.process_time()
        for step in range(rounds // calls):
            if watched:
                beats(step, micro)
                keeper.step(step, 0.0)
            for _ in range(calls):
                layer(states)
        return (time.process_time() - begin) / (rounds // calls)

    return statistics.median(seconds(hooked, watched=True) - seconds(bare, watched=False) for _ in range(5))


def beats(step: int, micro: int) -> None:
    """Those of `launcher.trainer.loop`."""
    beat("data", step)
    for _ in range(micro):
        beat("forward")
    beat("step")
    beat("report")


def steps_s(micro: int, *, pairs: int, steps: int) -> tuple[list[float], list[float]]:
    """Processor seconds of a step without and with the watch, in pairs."""
    bare, hooked = Stepper(), Stepper()
    blocks = list(hooked.model)
    keeper = PaceKeeper(OwnTime(measured_layers(blocks, hooked.model, compiled=False), torch.device("cpu")))
    done = 0
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs + 1):
        begin = time.process_time()
        for _ in range(steps):
            bare.step(micro)
        middle = time.process_time()
        for _ in range(steps):
            done += 1
            beats(done, micro)
            hooked.step(micro)
            keeper.step(done, 0.0)
        for times, seconds in zip(found, (middle - begin, time.process_time() - middle), strict=True):
            times.append(seconds / steps)
    assert done > GROUP or pairs < 3
    return found[0][1:], found[1][1:]  # the first pair warms up


class Stepper:
    """A model and its optimizer."""

    def __init__(self) -> None:
        self.model = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.states: Any = torch.randn(1, POSITIONS, HIDDEN)

    def step(self, micro: int) -> None:
        for _ in range(micro):
            self.model(self.states).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
