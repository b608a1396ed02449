"""Start-up on a rank: opening a store of 100 million rows and reading the rows of one position.

Run: python benchmarks/store_open.py [--rows 100000000] [--ranks 64 16384]

The store is synthetic: its arrays have their full size, but of their files only what the read rows need is written; the
rest are holes, which read as zeros. A document a row, 1,024 parts. Each case opens and reads in a process of its own,
which has imported its libraries. Memory is what the process grows by: all of it that is resident, pages of mapped files
that the kernel takes back when it wants included, and private memory alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

POSITION, PARTS, LENGTH, SEED = 1_000_000, 1024, 100, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the slowest rank's figures as JSON")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        path, ranks, rank, batch = options.child
        print(json.dumps(read(Path(path), int(ranks), int(rank), int(batch))))
        return
    bests = []
    with tempfile.TemporaryDirectory(prefix="bench-store-") as name:
        for ranks in options.ranks:
            batch = max(ranks, 1024)
            path = Path(name) / str(ranks)
            begin = time.perf_counter()
            make(path, options.rows, batch)
            print(f"made a store of {options.rows:,} rows in {time.perf_counter() - begin:.1f} s")
            for rank in (0, ranks - 1):
                found = [child(path, ranks, rank, batch) for _ in range(options.repeats)]
                best = min(found, key=lambda one: one["seconds"])
                bests.append(best)
                print(
                    f"rank {rank} of {ranks:,}, global batch {batch:,}: opened and read position {POSITION:,} in "
                    f"{best['seconds']:.3f} s (open {best['open']:.3f}), {best['rss_mb']:.0f} MB more resident, "
                    f"{best['private_mb']:.0f} MB of it private; for its {best['rows']:.0f} rows it opened "
                    f"{best['parts']:.0f} of {PARTS:,} parts"
                )
    if options.out is not None:
        options.out.write_text(json.dumps(max(bests, key=lambda one: one["seconds"])))


def child(path: Path, ranks: int, rank: int, batch: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(path), str(ranks), str(rank), str(batch)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def read(path: Path, ranks: int, rank: int, batch: int) -> dict[str, float]:
    """What one rank does: open, and take its share of the step that holds the position."""
    from launcher.data.batches import Batches
    from launcher.data.store import Store

    def once(store: Store, rank: int) -> int:
        batches = Batches(
            store, seed=SEED, global_batch_size=batch, micro_batch_size=1, world_size=ranks, rank=rank,
            total_steps=store.rows // batch,
        )  # fmt: skip
        return sum(len(micro.rows) for micro in batches.step(POSITION // batch).micro)

    before, begin = memory(), time.perf_counter()
    store = Store.open(path / "packed" / "big")
    opened = time.perf_counter()
    rows = once(store, rank)
    ended, after = time.perf_counter(), memory()
    return {
        "seconds": ended - begin, "open": opened - begin, "rows": rows, "parts": len(store._parts),
        "rss_mb": after[0] - before[0], "private_mb": after[1] - before[1],
    }  # fmt: skip


def memory() -> tuple[float, float]:
    """Resident and private memory of this process, in MB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def make(path: Path, rows: int, batch: int) -> list[int]:
    """A store of so many rows, of which those of the step at `POSITION` are written. Returns these rows."""
    from launcher.data.order import global_batch_rows
    from launcher.data.store import VERSION

    step = POSITION // batch
    wanted = global_batch_rows(rows, seed=SEED, step=step, global_batch_size=batch)
    packed, tokens = path / "packed" / "big", path / "tokens"
    packed.mkdir(parents=True)
    per_part = -(-rows // PARTS)
    for part in range(PARTS):
        (tokens / f"part-{part:05d}").mkdir(parents=True)
        for name, kind in (("tokens", np.uint16), ("weights", np.uint8)):
            holes(tokens / f"part-{part:05d}" / f"{name}.npy", per_part * LENGTH, kind)
    columns = {
        "part": (np.int32, wanted // per_part), "start": (np.int64, wanted % per_part * LENGTH),
        "length": (np.int32, LENGTH), "file": (np.int32, 0), "record": (np.int32, wanted),
        "trained": (np.int32, LENGTH),
        "weight": (np.float64, LENGTH), "first": (np.float32, 1), "side": (np.uint8, 0), "hash": (np.uint64, wanted),
        "row_documents": (np.uint32, wanted), "row_tokens": (np.int64, LENGTH), "row_cost": (np.int64, LENGTH**2),
        "row_weight": (np.float64, LENGTH),
    }  # fmt: skip
    for name, (kind, value) in columns.items():
        holes(packed / f"{name}.npy", rows, kind)[wanted] = value
    offsets = holes(packed / "row_offsets.npy", rows + 1, np.int64)
    offsets[wanted], offsets[wanted + 1] = wanted, wanted + 1
    manifest = {
        "version": VERSION, "rows": rows, "documents": rows, "tokens": rows * LENGTH, "repack": 1, "isolate": True,
        "seq_len": LENGTH, "files": ["made"], "parts": [f"../../tokens/part-{part:05d}" for part in range(PARTS)],
    }  # fmt: skip
    (packed / "store.json").write_text(json.dumps(manifest))
    return [int(row) for row in wanted]


def holes(path: Path, size: int, kind: type) -> NDArray[np.generic]:
    """An array of zeros whose file takes no space until it is written to."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=(size,))


if __name__ == "__main__":
    main()
