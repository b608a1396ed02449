"""Dealing rows to ranks: how evenly their work comes out, and what it costs. Run: python benchmarks/deal.py [--quick]

Rows are full best-fit rows of log-normal documents, what they cost is what Llama-3-8B computes for them. Efficiency is
mean / largest over the ranks: of each rank's sum over the step, and of the sum over slots of the dearest micro-batch,
which is the step's time where a strategy meets at every micro-batch.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from numpy.typing import NDArray

from launcher.data.order import deal
from launcher.data.packing import pack
from launcher.plan.parameters import count, row_cost, weights

LLAMA_3_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
MEDIAN, SIGMA = 1000, 2.0  # a quarter of the work is attention at 32k, half of it at 128k
RANKS, SLOTS = 64, 4
GOALS = {32_768: 0.99, 131_072: 0.98}


def full_rows(seq_len: int, documents: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(tokens, squared lengths) of each row; documents beyond a row are cut."""
    drawn = np.random.default_rng(0).lognormal(np.log(MEDIAN), SIGMA, documents)
    lengths = np.clip(drawn, 1, seq_len).astype(np.int64)
    offsets, order = pack(lengths, seq_len)
    starts = offsets[:-2]  # without the last row, which is not full
    laid = lengths[order[: offsets[-2]]]
    return np.add.reduceat(laid, starts), np.add.reduceat(laid**2, starts)


def dearest_first(squares: NDArray[np.int64]) -> NDArray[np.int64]:
    """What 0.3 did: the row of most attention to the rank of least, while it has a place. [ranks, slots]"""
    dealt, load, taken = np.zeros((RANKS, SLOTS), np.int64), np.zeros(RANKS), np.zeros(RANKS, np.int64)
    for row in np.argsort(-squares, kind="stable").tolist():
        rank = int(np.argmin(np.where(taken < SLOTS, load, np.inf)))
        dealt[rank, taken[rank]] = row
        load[rank] += squares[row]
        taken[rank] += 1
    return dealt


def efficiencies(price: NDArray[np.float64], dealt: NDArray[np.int64]) -> tuple[float, float]:
    """(of ranks' sums, slot by slot)"""
    load, mean = price[dealt], price.sum() / RANKS
    return mean / load.sum(axis=1).max(), mean / load.max(axis=0).sum()


def balance(seq_len: int, *, documents: int, batches: int) -> None:
    """Global batches of a shuffled epoch, dealt in four ways."""
    config = count(LLAMA_3_8B, weights(LLAMA_3_8B) or [], seq_len)
    cost = row_cost({"parameters": asdict(config), "seq_len": seq_len})
    assert cost is not None
    tokens, squares = full_rows(seq_len, documents)
    shuffled = np.random.default_rng(1).permutation(tokens.size)
    found: dict[str, list[tuple[float, float]]] = {}
    for number in range(min(batches, tokens.size // (RANKS * SLOTS))):
        rows = shuffled[number * RANKS * SLOTS : (number + 1) * RANKS * SLOTS]
        t, q = tokens[rows], squares[rows]
        price = cost[0] * t + cost[1] * q
        how = {"ranks": RANKS, "slots": SLOTS, "micro_batch_size": 1, "cost": cost}
        for name, dealt in {
            "in order of arrival": np.arange(RANKS * SLOTS).reshape(RANKS, SLOTS),
            "dearest first (0.3)": dearest_first(q),
            "in lockstep (sharded)": deal(t, q, lockstep=True, **how)[:, :, 0],  # type: ignore[arg-type]
            "once a step (ddp)": deal(t, q, lockstep=False, **how)[:, :, 0],  # type: ignore[arg-type]
        }.items():
            assert np.array_equal(np.sort(dealt.ravel()), np.arange(RANKS * SLOTS)), "not the rows of the batch"
            found.setdefault(name, []).append(efficiencies(price, dealt))
    share = cost[1] * squares.sum(dtype=np.float64) / (cost[0] * tokens.sum() + cost[1] * squares.sum(dtype=np.float64))
    batches = len(found["once a step (ddp)"])
    print(f"{seq_len:,} tokens a row, {share:.0%} of the work attention, {RANKS} ranks x {SLOTS}, {batches} batches")
    for name, values in found.items():
        sums, slots = np.mean(values, axis=0)
        goal = f"  (goal {GOALS[seq_len]})" if name.startswith(("in lockstep", "once")) else ""
        print(f"  {name:<24} ranks' sums {sums:.4f}{goal:<14}  slot by slot {slots:.4f}")


def speed() -> None:
    """A step of 65,536 rows on 16,384 ranks, as each of them deals it."""
    random = np.random.default_rng(2)
    tokens, squares = random.integers(30_000, 32_768, 65_536), random.integers(10**7, 10**9, 65_536)
    for lockstep in (True, False):
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            deal(tokens, squares, ranks=16_384, slots=4, micro_batch_size=1, lockstep=lockstep)
            times.append(time.perf_counter() - begin)
        print(f"65,536 rows to 16,384 ranks, {'in lockstep' if lockstep else 'once a step'}: {min(times):.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the documents, 10 batches")
    quick = parser.parse_args().quick
    for seq_len in GOALS:
        balance(seq_len, documents=100_000 if quick else 1_000_000, batches=10 if quick else 100)
    speed()


if __name__ == "__main__":
    main()
