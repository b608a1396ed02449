"""Lanes of a stream: what each reads, that a state is all they go on from, how they mix and pack. No tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data import lanes, seek
from launcher.data.encoder import Group
from launcher.data.formats import Text
from launcher.data.lanes import WHOLE_FILE, Feed, Lane, LaneState, Rules
from launcher.data.sources import find
from launcher.errors import UserError
from launcher.recipe.schema import Source


class Plain:
    """A format whose records are {"text": ...}."""

    def read(self, record: Any, note: Any = None) -> Any:
        if "text" not in record:
            raise UserError("column text is missing.")
        return Text(record["text"])


def tokenise(pairs: Any) -> Iterator[Any]:
    """A byte is a token; trained from the second on."""
    for _, example in pairs:
        ids = np.frombuffer(example.text.encode(), np.uint8).astype(np.uint32)
        yield Group([(ids, np.ones(ids.size, np.uint8), 0)], 0, "" if ids.size else "empty")


def records(count: int, *, name: str = "a", longest: int = 40, seed: int = 0) -> list[dict[str, str]]:
    lengths = np.random.default_rng(seed).integers(8, longest, count)
    return [{"text": f"{name}{i:05d}".ljust(int(n), "x")} for i, n in enumerate(lengths)]


def jsonl(path: Path, found: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in found))
    return path


def feed(path: Path, *, share: float = 1.0, block: int = 200, name: str = "a") -> Feed:
    files = seek.open_files(find(Source(path=str(path))), seek.Shelf(path.parent / "scratch"))
    return Feed(name, files, Plain(), share, block)  # type: ignore[arg-type]


def rules(**changes: Any) -> Rules:
    usual: dict[str, Any] = {
        "lanes": 4, "seed": 3, "seq_len": 64, "packing": "best_fit", "overlong": "error", "buffer": 5, "by": "tokens",
        "vocab_size": 256,
    }  # fmt: skip
    return Rules(**{**usual, **changes})


def first_epoch(source: Feed, given: Rules) -> list[tuple[int, int]]:
    """(file, place) of every record that the lanes read in their first epoch."""
    found = []
    for number in range(given.lanes):
        reader = Lane(number, [source], given, tokenise)._readers[0]
        for read in reader._walk(reader.position):
            if read.after.epoch > 0 or len(found) > 10_000:
                break
            found.append((read.file, read.at))
    return found


def text_of(row: Any) -> list[str]:
    return [bytes(d.tokens.astype(np.uint8)).decode() for d in row]


def take(lane: Lane, count: int) -> list[list[str]]:
    return [text_of(lane.row()) for _ in range(count)]


def write_every_kind(folder: Path, found: list[dict[str, str]]) -> list[Path]:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.Table.from_pylist(found)
    parquet.write_table(table, folder / "a.parquet", row_group_size=37)
    (folder / "list.json").write_text(json.dumps(found))
    (folder / "a.txt").write_text("".join(record["text"] + "\n" for record in found))
    with open(folder / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text"])
        writer.writeheader()
        writer.writerows(found)
    jsonl(folder / "lines.json", found)
    parts = [jsonl(folder / "parts" / f"{i:02d}.jsonl", found[i::40]).parent for i in range(40)]
    whole = [folder / name for name in ("a.parquet", "list.json", "a.txt", "a.csv", "lines.json")]
    return [jsonl(folder / "a.jsonl", found), *whole, parts[0]]


def test_in_an_epoch_each_record_is_read_by_one_lane_whatever_the_file_and_the_block(tmp_path: Path) -> None:
    for path in write_every_kind(tmp_path, records(200)):
        for block in (7, 500, 1 << 20, *([WHOLE_FILE] if path.is_dir() else [])):
            seen = Counter(first_epoch(feed(path, block=block), rules()))
            assert len(seen) == 200, (path.name, block)
            assert set(seen.values()) == {1}, (path.name, block)


def test_files_of_lines_with_long_lines_blank_lines_no_last_newline_and_a_byte_order_mark(tmp_path: Path) -> None:
    found = [{"text": "a" * n} for n in (5, 3000, 8, 1, 700, 2)]
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\n".join(json.dumps(r).encode() for r in found))
    for block in (1, 10, 100, 5000):
        assert len(set(first_epoch(feed(path, block=block), rules()))) == len(found)


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_l4_a_lane_goes_on_from_the_state_of_any_row_as_if_nothing_had_been(tmp_path: Path, packing: str) -> None:
    a, b = jsonl(tmp_path / "a.jsonl", records(60)), jsonl(tmp_path / "b.jsonl", records(25, name="b", longest=150))
    feeds = [feed(a, share=0.7), feed(b, share=0.3, name="b")]
    given = rules(packing=packing, overlong="split")
    whole = Lane(2, feeds, given, tokenise)
    expected = take(whole, 40)
    for stop in (0, 1, 7, 23):
        cut = Lane(2, feeds, given, tokenise)
        take(cut, stop)
        arrays = {name: array.copy() for name, array in cut.state().arrays().items()}
        resumed = Lane(2, feeds, given, tokenise, LaneState.from_arrays(arrays))
        assert take(resumed, 40 - stop) == expected[stop:]
        assert resumed.state().arrays()["words"].tobytes() == whole.state().arrays()["words"].tobytes()


def test_taking_a_state_copies_no_token_and_later_rows_do_not_change_it(tmp_path: Path) -> None:
    lane = Lane(0, [feed(jsonl(tmp_path / "a.jsonl", records(200)))], rules(), tokenise)
    lane.row()
    state = lane.state()
    before = {name: array.tobytes() for name, array in state.arrays().items()}
    assert state.buffer[0].tokens is lane._buffer[0].tokens
    take(lane, 30)
    assert {name: array.tobytes() for name, array in state.arrays().items()} == before


def test_a_lane_resumed_far_inside_a_file_reads_what_is_there_and_not_what_was_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "a.jsonl", records(20_000))
    source, given, read = feed(path, block=4000), rules(buffer=1), []
    state = LaneState((lanes.Position(0, 0, path.stat().st_size - 50_000),), (0.0,))

    class Counted:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def read(self, count: int) -> bytes:
            read.append(count)
            return self._file.read(count)  # type: ignore[no-any-return]

    opened = seek.open_bytes
    monkeypatch.setattr(seek, "open_bytes", lambda name: Counted(opened(name)))
    Lane(1, [source], given, tokenise, state).row()
    assert 0 < sum(read) < 100_000 < path.stat().st_size / 5


def test_what_is_read_is_mixed_by_tokens_or_by_documents_as_the_shares_say(tmp_path: Path) -> None:
    a, b = jsonl(tmp_path / "a.jsonl", records(300)), jsonl(tmp_path / "b.jsonl", records(300, name="b", longest=12))
    for by in ("tokens", "documents"):
        counts = {"tokens": Counter[int](), "documents": Counter[int]()}
        for number in range(4):
            lane = Lane(number, [feed(a, share=0.75), feed(b, share=0.25, name="b")], rules(by=by), tokenise)
            for document in (d for _ in range(60) for d in lane.row()):
                counts["tokens"][document.source] += document.tokens.size
                counts["documents"][document.source] += 1
        assert counts[by][0] / counts[by].total() == pytest.approx(0.75, abs=0.02)


def test_best_fit_fills_rows_and_no_row_is_longer_than_seq_len(tmp_path: Path) -> None:
    lane = Lane(0, [feed(jsonl(tmp_path / "a.jsonl", records(3000)))], rules(seq_len=128, buffer=50), tokenise)
    sizes = [sum(d.tokens.size for d in lane.row()) for _ in range(200)]
    assert max(sizes) <= 128
    assert sum(sizes) / (128 * len(sizes)) > 0.97


def test_concat_fills_every_row_and_loses_no_token(tmp_path: Path) -> None:
    found = records(50, longest=200)
    lane = Lane(0, [feed(jsonl(tmp_path / "a.jsonl", found))], rules(lanes=1, packing="concat", buffer=1), tokenise)
    rows = [lane.row() for _ in range(40)]
    assert {sum(d.tokens.size for d in row) for row in rows} == {64}
    laid = "".join(text for row in rows for text in text_of(row))
    whole = "".join(record["text"] for record in found)
    assert laid == (whole * (len(laid) // len(whole) + 1))[: len(laid)]


def test_a_source_with_fewer_records_than_lanes_is_gone_through_by_all_of_them(tmp_path: Path) -> None:
    source = feed(jsonl(tmp_path / "a.jsonl", records(3)))
    for number in range(16):
        assert take(Lane(number, [source], rules(lanes=16), tokenise), 3)


def test_documents_longer_than_a_row_are_refused_dropped_cut_or_split_and_counted(tmp_path: Path) -> None:
    found = [*records(20), {"text": "long" * 50}]
    source = feed(jsonl(tmp_path / "a.jsonl", found))
    with pytest.raises(UserError, match=r"a\.jsonl: line 21 \(byte \d+\): 200 tokens .*data\.seq_len = 64"):
        take(Lane(0, [source], rules(lanes=1), tokenise), 20)
    for overlong, dropped, changed in (
        ("drop", {"longer than seq_len"}, set()),
        ("truncate", set(), {"truncated to seq_len"}),
        ("split", set(), {"split at seq_len"}),
    ):
        lane = Lane(0, [source], rules(lanes=1, overlong=overlong), tokenise)
        take(lane, 20)
        assert (set(lane.state().dropped), set(lane.state().changed)) == (dropped, changed)
        assert "line 21" in next(iter(lane.state().first.values()))


def test_a_document_of_which_cutting_leaves_nothing_counts_once_as_dropped(tmp_path: Path) -> None:
    source = feed(jsonl(tmp_path / "a.jsonl", [*records(20), {"text": "long" * 50}]))

    def untrained(pairs: Any) -> Iterator[Group]:
        for group in tokenise(pairs):
            ((ids, weights, side),) = group.documents
            yield Group([(ids, weights * (ids.size <= 64), side)], group.hash)

    for overlong, reason in (("truncate", "truncated to seq_len"), ("split", "split at seq_len")):
        lane = Lane(0, [source], rules(lanes=1, overlong=overlong), untrained)
        take(lane, 20)
        assert set(lane.state().dropped) == {f"no trained token left when {reason}"}
        assert not lane.state().changed


def test_a_split_document_keeps_every_piece_and_rows_of_which_nothing_is_trained_are_left_out(tmp_path: Path) -> None:
    source = feed(jsonl(tmp_path / "a.jsonl", [{"text": "Q" * 160 + "A" * 20}]))

    def answers(pairs: Any) -> Iterator[Group]:
        for group in tokenise(pairs):
            ((ids, weights, side),) = group.documents
            yield Group([(ids, weights * (ids == ord("A")), side)], 0)

    lane = Lane(0, [source], rules(lanes=1, overlong="split", packing="none", buffer=1), answers)
    assert take(lane, 2) == [["Q" * 32 + "A" * 20]] * 2
    assert lane.state().dropped["no trained token in their row"] == 4
    lane = Lane(0, [source], rules(lanes=1, overlong="split", seq_len=170, buffer=1), answers)
    assert [len(text) for row in take(lane, 3) for text in row] == [170, 170, 170]
    assert lane.state().dropped == {}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "cut', "line 31 .*not JSON"),
        ("[1]", "line 31 .*a record is an object"),
        ('{"prompt": "x"}', "line 31 .*column text is missing"),
    ],
)
def test_a_bad_record_in_mid_stream_is_named_by_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", records(30))
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl: {said}"):
        take(Lane(0, [feed(path)], rules(lanes=1), tokenise), 40)


def test_an_id_that_the_model_has_not_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*records(30), {"text": "\x7fabcd"}])
    with pytest.raises(UserError, match=r"line 31 .*token id 127, but the model has 127 ids"):
        take(Lane(0, [feed(path)], rules(lanes=1, vocab_size=127), tokenise), 40)


def test_a_source_of_which_nothing_can_be_learnt_ends_the_stream_with_its_reasons(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": ""}] * 40)
    with pytest.raises(UserError, match=r"a: nothing is left to learn from \(empty: \d+\)"):
        Lane(0, [feed(path)], rules(lanes=1), tokenise).row()
