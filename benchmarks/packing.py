"""Packing: time, rows over the lower bound, and the ratio to TRL's packer. Run: python benchmarks/packing.py [--quick]

TRL is not a dependency. To compare, put it beside this environment, without its own dependencies:
    pip install --no-deps --target /tmp/trl trl && PYTHONPATH=/tmp/trl python benchmarks/packing.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from numpy.typing import NDArray

from launcher.data.packing import lower_bound, pack

CAPACITIES = (4096, 16384)


def log_normal(count: int, capacity: int) -> NDArray[np.int64]:
    """Lengths of median 300 and sigma 1, clipped to 1 and the row."""
    return np.clip(np.random.default_rng(0).lognormal(np.log(300), 1, count), 1, capacity).astype(np.int64)


def best(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """(shortest time in seconds, result)"""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - begin)
    return min(times), result


def ours(count: int, repeats: int) -> None:
    """Assign a whole set to rows."""
    for capacity in CAPACITIES:
        lengths = log_normal(count, capacity)
        pack(lengths[:5000], capacity)  # compiles, or loads the compiled code
        seconds, (offsets, _) = best(lambda lengths=lengths, capacity=capacity: pack(lengths, capacity), repeats)
        ratio = (offsets.size - 1) / lower_bound(lengths, capacity)
        print(f"launcher  {count:>9,} documents into {capacity:>6}: {seconds:.3f} s, rows / lower bound {ratio:.6f}")


def beside_trl(count: int) -> None:
    """The same documents through both; TRL lays the tokens of each row end to end, which our store never needs."""
    try:
        from datasets import Dataset, disable_caching, disable_progress_bars
        from trl.data_utils import pack_dataset
    except ImportError as error:
        print(f"trl       not compared: {error}. See the top of this file for how to put it beside this environment.")
        return
    disable_caching()
    disable_progress_bars()
    capacity = CAPACITIES[0]
    lengths = log_normal(count, capacity)
    tokens = np.random.default_rng(1).integers(0, 30_000, lengths.sum(), dtype=np.int32)
    starts = np.cumsum(lengths) - lengths
    table = Dataset.from_dict({"input_ids": np.split(tokens, starts[1:])})
    bound = lower_bound(lengths, capacity)

    def laid() -> NDArray[np.int32]:
        _, order = pack(lengths, capacity)
        taken = lengths[order]
        shift = np.repeat(starts[order] - (np.cumsum(taken) - taken), taken)
        return tokens[shift + np.arange(tokens.size)]

    def say(who: str, seconds: float, rows: int) -> None:
        print(f"{who:<24} {count:>9,} documents into {capacity:>6}: {seconds:.3f} s, {rows / bound:.6f}")

    assigned, (offsets, _) = best(lambda: pack(lengths, capacity), 3)
    say("launcher", assigned, offsets.size - 1)
    moved, _ = best(laid, 3)
    say("launcher, tokens laid", moved, offsets.size - 1)
    theirs, packed = best(lambda: pack_dataset(table, capacity, strategy="bfd"), 1)
    say("trl bfd, tokens laid", theirs, len(packed))
    print(
        f"launcher is {theirs / assigned:.0f} times as fast as trl; {theirs / moved:.1f} times when it lays tokens, too"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 documents instead of 1,000,000")
    quick = parser.parse_args().quick
    ours(100_000 if quick else 1_000_000, repeats=1 if quick else 3)
    beside_trl(20_000 if quick else 200_000)


if __name__ == "__main__":
    main()
