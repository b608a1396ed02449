"""What is counted of stores made by hand: lengths, shares, duplicates over sources, pairs; the text and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.cli.data import told
from launcher.data.packing import one_a_row
from launcher.data.prepare import Prepared
from launcher.data.stats import draw, histogram, statistics
from launcher.data.store import Encoded, Index, Side, Store, write_part, write_store
from launcher.recipe.schema import Recipe

KEYS = ("rows", "documents", "tokens", "trained_tokens", "packing_efficiency", "groups")


def entry(folder: Path, name: str, documents: list[tuple[int, int, Side, int]]) -> dict[str, Any]:
    """A store of documents (record, length, side, hash), one a row, as data.json tells of it."""
    encoded = Encoded()
    for record, length, side, text in documents:
        ids, weights = np.arange(length, dtype=np.uint32), np.ones(length, np.uint8)
        encoded.add(ids, weights, file=0, record=record, side=side, hash=text)
    part, path = folder / name / "part", folder / name / "store"
    write_part(part, encoded, vocab_size=100)
    packed = one_a_row(len(documents))
    write_store(path, parts=[part], files=["f"], index=Index.gather([part]), packings=[packed], seq_len=32)
    counts = {key: Store.open(path).manifest[key] for key in KEYS}
    own = {"name": name, "path": f"{name}.jsonl", "format": "text", "store": str(path)}
    rows = counts["rows"]
    return own | counts | {"dropped": {"empty": 1}, "changed": {}, "epoch_rows": 2 * rows, "share": 0.5}


@pytest.fixture
def found(tmp_path: Path) -> tuple[Prepared, dict[str, Any]]:
    plain = [(i, 4 + i, Side.plain, i // 2) for i in range(8)]  # each text twice
    pairs = [(0, 8, Side.chosen, 0), (0, 6, Side.rejected, 0), (1, 30, Side.chosen, 9), (1, 3, Side.rejected, 9)]
    sources = [entry(tmp_path, "plain", plain), entry(tmp_path, "pairs", pairs)]
    total: dict[str, Any] = {key: sum(s[key] for s in sources) for key in ("rows", "documents", "tokens")}
    total |= {"trained_tokens": sum(s["trained_tokens"] for s in sources), "packing_efficiency": 0.3}
    total |= {"groups": {"plain": 8, "pairs": 2, "labelled": 0}, "dropped": {"empty": 2}, "changed": {}}
    held = {**sources[0], "name": "held"}
    prepared = Prepared(
        train={**total, "sources": sources}, eval={**held, "sets": [held]}, leaked={"held": 3}, global_batch_size=2,
        steps_per_epoch=6, total_rows=12, total_steps=6, vocab_size=100, tokenizer={}, built=True,
    )  # fmt: skip
    return prepared, statistics(Recipe(), prepared)


def test_counts_are_those_of_the_stores(found):
    _, counts = found
    plain, pairs = counts["train"]["sources"]
    assert (plain["documents"], plain["tokens"], plain["trained_tokens"]) == (8, 60, 52)
    assert (plain["epochs"], plain["share"]) == (2.0, 0.5)
    assert plain["trained_share"] == pytest.approx(52 / 60)
    assert plain["lengths"] == {
        "mean": 7.5, "min": 4, "p1": 4, "p5": 4, "p25": 5, "p50": 7, "p75": 9, "p95": 10, "p99": 10, "max": 11,
    }  # fmt: skip
    assert pairs["groups"]["pairs"] == 2
    assert counts["leaked"] == {"held": 3}
    assert counts["eval"]["sets"][0]["name"] == "held"


def test_duplicates_count_records_within_a_source_and_over_all(found):
    _, counts = found
    plain, pairs = counts["train"]["sources"]
    assert (plain["duplicates"], pairs["duplicates"]) == (4, 0)  # the two documents of a pair are one record
    assert counts["train"]["duplicates"] == 5  # the text 0 is in both sources


def test_a_histogram_counts_every_document_once():
    lengths = [np.array([1, 2, 3, 900]), np.array([5, 5000])]
    edges, counts = histogram(lengths)
    assert edges == sorted(set(edges))
    assert edges[0] == 1
    assert edges[-1] == 5001
    assert [sum(c) for c in counts] == [4, 2]
    assert histogram([np.array([7, 7])]) == ([7, 8], [[2]])
    assert histogram([np.zeros(0, int)]) == ([1, 2], [[0]])


def test_the_text_has_a_line_for_each_source_all_and_each_set(found):
    _, counts = found
    lines = "\n".join(told(counts)).splitlines()
    table = lines[: lines.index("")]
    assert [line.split()[0] for line in table] == ["source", "plain", "pairs", "all", "eval:"]
    assert sum(int(line.split()[-1]) for line in lines if line.startswith("  ")) == 12
    assert "groups  8 plain documents, 2 pairs, 0 labelled" in lines


def test_a_picture_is_drawn(found, tmp_path: Path):
    prepared, counts = found
    draw(counts, prepared, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
