"""Packing: time on one core, rows over the lower bound, and ratios to other trainers' packers.

Run: python benchmarks/packing.py [--quick] [--alone]. TRL, Axolotl, LLaMA-Factory and ms-swift are fetched from PyPI
into a folder that is thrown away, without what they depend on; of each only the function that packs is taken out of its
file and run as it is. What cannot be fetched is left out and said.
"""

from __future__ import annotations

import argparse
import ast
import bisect
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from numpy.typing import NDArray

from launcher.data.packing import lower_bound, pack, repack

CAPACITIES = (4096, 16384)
GOAL_S, GOAL_ROWS = 0.3, 1.0005
GOALS = {"trl's loop": 40, "axolotl": 2}
BATCH = 1000  # TRL, LLaMA-Factory and ms-swift pack so many documents at a time, unless told otherwise
AXOLOTL_GROUP, AXOLOTL_ROW = 100_000, 200  # its sample_packing_group_size and sample_packing_bin_size

Packer = Callable[[NDArray[np.int64], int], tuple[float, int]]  # lengths, capacity -> (seconds, rows)


def log_normal(count: int, capacity: int) -> NDArray[np.int64]:
    """Lengths of median 300 and sigma 1, clipped to 1 and the row."""
    return np.clip(np.random.default_rng(0).lognormal(np.log(300), 1, count), 1, capacity).astype(np.int64)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds on a core, result); what else the machine does is not counted."""
    begin = time.process_time()
    result = function()
    return time.process_time() - begin, result


def ours(lengths: NDArray[np.int64], capacity: int, *, repeats: int) -> tuple[float, int]:
    """(seconds, rows) of the whole set at once."""
    pack(np.full(200_001, 2), 64)  # compiles, or loads the compiled code
    results = [timed(lambda: pack(lengths, capacity)) for _ in range(repeats)]
    return min(seconds for seconds, _ in results), results[0][1][0].size - 1


def fetch(name: str, folder: Path) -> str:
    """Unpack a package's wheel into `folder`; its version.

    Raises:
        RuntimeError: PyPI has none, or cannot be reached.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", str(folder), name], capture_output=True, text=True, timeout=300
    )
    wheels = list(folder.glob(f"{name.replace('-', '_')}-*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no wheel came"])[-1])
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)
    return wheels[0].name.split("-")[1]


def definitions(file: Path, names: tuple[str, ...], known: dict[str, Any]) -> dict[str, Any]:
    """Functions and classes of a file by name, run without the rest of it."""
    tree = ast.parse(file.read_text())
    wanted = [node for node in tree.body if getattr(node, "name", None) in names]
    exec(compile(ast.Module(wanted, []), str(file), "exec"), known)
    return known


def trl(folder: Path) -> dict[str, Packer]:
    """Its best-fit-decreasing: the loop that assigns documents alone, and all of it, which also lays the tokens."""
    import pyarrow
    import pyarrow as pa
    import pyarrow.compute as pc

    file = folder / "trl" / "data_utils.py"
    known: dict[str, Any] = {
        "np": np, "pyarrow": pyarrow, "pa": pa, "pc": pc, "defaultdict": defaultdict, "deque": deque,
        "Literal": Literal,
    }  # fmt: skip
    whole = definitions(file, ("_SegmentTree", "_pack_bfd", "_check_if_columns_can_be_packed"), known)["_pack_bfd"]
    body = next(n for n in ast.parse(file.read_text()).body if getattr(n, "name", "") == "_pack_bfd").body  # type: ignore[attr-defined]
    first = next(i for i, n in enumerate(body) if ast.unparse(n).startswith("segment_tree = "))
    last = next(i for i, n in enumerate(body) if isinstance(n, ast.For))
    alone = ast.parse("def loop(lengths, seq_length):\n    return bins")
    alone.body[0].body[:0] = body[first : last + 1]  # type: ignore[attr-defined]
    exec(compile(ast.fix_missing_locations(alone), str(file), "exec"), known)

    def loop(lengths: NDArray[np.int64], capacity: int) -> tuple[float, int]:
        ordered = pc.make_struct(lengths, np.arange(lengths.size)).sort("descending", by=0)
        seconds, bins = timed(lambda: known["loop"](ordered, capacity))
        return seconds, len(bins)

    def laid(lengths: NDArray[np.int64], capacity: int) -> tuple[float, int]:
        ids = np.zeros(int(lengths.sum()), dtype=np.int32)
        offsets = np.append(0, np.cumsum(lengths))
        table = pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, ids)})
        parts = [table.slice(i, BATCH) for i in range(0, lengths.size, BATCH)]
        seconds, batches = timed(lambda: [whole(part, capacity) for part in parts])
        return seconds, sum(len(batch) for batch in batches)

    return {"trl's loop": loop, "trl, tokens laid": laid}


def axolotl(folder: Path) -> dict[str, Packer]:
    """First fit in groups, compiled."""
    import numba

    file = folder / "axolotl" / "utils" / "samplers" / "multipack.py"
    first_fit = definitions(file, ("pack_group",), {"np": np, "numba": numba})["pack_group"]
    first_fit(np.full(10, 3), 0, 8, 10, AXOLOTL_ROW, True)  # compiles

    def packed(lengths: NDArray[np.int64], capacity: int) -> tuple[float, int]:
        groups = [lengths[i : i + AXOLOTL_GROUP] for i in range(0, lengths.size, AXOLOTL_GROUP)]
        seconds, rows = timed(lambda: [first_fit(g, 0, capacity, len(g), AXOLOTL_ROW, True) for g in groups])
        return seconds, sum(len(group) for group in rows)

    return {"axolotl": packed}


def llamafactory(folder: Path) -> dict[str, Packer]:
    """Greedy knapsack in batches."""
    file = folder / "llamafactory" / "data" / "processor" / "processor_utils.py"
    knapsack = definitions(file, ("greedy_knapsack", "search_for_fit"), {"bisect": bisect})["greedy_knapsack"]

    def packed(lengths: NDArray[np.int64], capacity: int) -> tuple[float, int]:
        batches = [lengths[i : i + BATCH].tolist() for i in range(0, lengths.size, BATCH)]
        seconds, rows = timed(lambda: [knapsack(batch, capacity) for batch in batches])
        return seconds, sum(len(batch) for batch in rows)

    return {"llama-factory": packed}


def ms_swift(folder: Path) -> dict[str, Packer]:
    """The package `binpacking` in batches."""
    fetch("binpacking", folder)
    sys.path.insert(0, str(folder))
    file = folder / "swift" / "dataset" / "packing.py"
    matched = definitions(file, ("calculate_matched_group",), {})["calculate_matched_group"]

    def packed(lengths: NDArray[np.int64], capacity: int) -> tuple[float, int]:
        pairs = list(enumerate(lengths.tolist()))
        batches = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
        seconds, rows = timed(lambda: [matched(batch, capacity)[0] for batch in batches])
        return seconds, sum(len(batch) for batch in rows)

    return {"ms-swift": packed}


PEERS = {"trl": trl, "axolotl": axolotl, "llamafactory": llamafactory, "ms-swift": ms_swift}


def peers(folder: Path) -> dict[str, Packer]:
    """Every packer that can be had, by name; says what is not compared."""
    found: dict[str, Packer] = {}
    for name, load in PEERS.items():
        try:
            print(f"{name} {fetch(name, folder)}", flush=True)
            found |= load(folder)
        except (RuntimeError, OSError, ImportError, LookupError, StopIteration, subprocess.TimeoutExpired) as error:
            print(f"{name}: not compared: {error}", flush=True)
    return found


def compare(count: int, others: dict[str, Packer], *, repeats: int) -> None:
    """One line a packer and a row length."""
    for capacity in CAPACITIES:
        lengths = log_normal(count, capacity)
        bound = lower_bound(lengths, capacity)
        seconds, rows = ours(lengths, capacity, repeats=repeats)
        print(f"{count:,} documents into rows of {capacity:,}, seconds on one core")
        print(f"  {'launcher':<18} {seconds:7.3f} s  rows / bound {rows / bound:.6f}  (goals {GOAL_S} s, {GOAL_ROWS})")
        for name, packer in others.items():
            theirs, their_rows = packer(lengths, capacity)
            goal = f"  (goal {GOALS[name]}x)" if name in GOALS else ""
            ratio = f"{theirs / seconds:7.1f} times as long{goal}"
            print(f"  {name:<18} {theirs:7.3f} s  rows / bound {their_rows / bound:.6f}  {ratio}", flush=True)


def several(count: int) -> None:
    """`data.repack: 4`: how much worse the other packings are than the first, and what they share with it."""
    capacity = CAPACITIES[0]
    lengths = log_normal(count, capacity)
    seconds, packings = timed(lambda: repack(lengths, capacity, times=4, seed=0))
    rows = [{tuple(row) for row in np.split(order, offsets[1:-1])} for offsets, order in packings[:2]]
    ratio = (packings[0][0].size - 1) / lower_bound(lengths, capacity)
    same = len(rows[0] & rows[1]) / len(rows[0])
    print(
        f"4 packings of {count:,} into {capacity:,}: {seconds:.3f} s, rows / bound {ratio:.6f}, {same:.1%} rows alike"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="250,000 documents instead of 1,000,000")
    parser.add_argument("--alone", action="store_true", help="fetch nothing, compare with nobody")
    args = parser.parse_args()
    count = 250_000 if args.quick else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        compare(count, {} if args.alone else peers(Path(folder)), repeats=1 if args.quick else 5)
    several(250_000)


if __name__ == "__main__":
    main()
