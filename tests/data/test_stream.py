"""Streams as prepare and a rank open them: what is found before ranks start, and what the lanes of ranks add up to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data import stream
from launcher.data.prepare import prepare
from launcher.data.stream import Lanes, listed, look, told
from launcher.data.tokenizer import TokenizerSpec, describe_tokenizer, load_tokenizer
from launcher.errors import UserError
from launcher.recipe.schema import Source
from tests.data.make import tiny_tokenizer, write_jsonl
from tests.trainer.make import LLAMA, make_recipe

TEXTS = [{"text": f"{i} upon a time " * (1 + i % 5)} for i in range(120)]
CHATS = [
    {"messages": [{"role": "user", "content": f"who {i}?"}, {"role": "assistant", "content": f"I am {i}"}]}
    for i in range(40)
]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def recipe(words: Path, *sources: Source, **changes: Any) -> Any:
    usual: dict[str, Any] = {
        "model__tokenizer": str(words), "train__global_batch_size": 6, "train__micro_batch_size": 2,
        "data__streaming": True, "data__shuffle_buffer": 12, "data__train": list(sources),
        "data__cache_dir": str(words / "cache"),
    }  # fmt: skip
    return make_recipe(**{**usual, **changes})


def entry(made: Any, **options: Any) -> dict[str, Any]:
    spec = TokenizerSpec(made.model.tokenizer)
    found = look(made, tokenizer=describe_tokenizer(spec, load_tokenizer(spec)), **{"model_vocab_size": 400, **options})
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def two(folder: Path) -> tuple[Source, Source]:
    a, b = write_jsonl(folder / "texts.jsonl", TEXTS), write_jsonl(folder / "chats.jsonl", CHATS)
    return Source(path=str(a), weight=3.0), Source(path=str(b), weight=1.0)


def test_the_rows_of_a_global_batch_are_the_same_on_any_number_of_ranks(words: Path, tmp_path: Path) -> None:
    made = recipe(words, *two(tmp_path))
    given = entry(made)
    assert [(s["name"], s["format"], s["share"]) for s in given["sources"]] == [
        ("texts", "text", 0.75), ("chats", "messages", 0.25),
    ]  # fmt: skip
    batches: dict[int, list[dict[int, bytes]]] = {}
    for ranks in (1, 2, 4, 9):
        mine = [Lanes(made, given, rank=rank, ranks=ranks) for rank in range(ranks)]
        batches[ranks] = []
        for step in range(4):
            rows: dict[int, bytes] = {}
            laid = [lanes.lay(lanes.rows(), step=step, micro_batch_size=2) for lanes in mine]
            assert len({len(micro) for micro in laid}) == 1
            for micro in (micro for rank in laid for micro in rank):
                assert micro.weights.shape == micro.input_ids.shape
                for slot, row in enumerate(micro.rows):
                    filled = micro.input_ids[slot][: np.flatnonzero(micro.input_ids[slot])[-1] + 1]
                    rows[row] = filled.tobytes()
            assert sorted(rows) == list(range(step * 6, step * 6 + 6))
            batches[ranks].append(rows)
    assert batches[1] == batches[2] == batches[4] == batches[9]


def test_lanes_resumed_on_another_number_of_ranks_go_on_where_they_were(words: Path, tmp_path: Path) -> None:
    made = recipe(words, *two(tmp_path))
    given = entry(made)
    whole = Lanes(made, given, rank=0, ranks=1)
    for _ in range(3):
        whole.rows()
    states = {number: lane.arrays() for number, lane in whole.state().items()}
    expected = [[d.at for d in row] for row in whole.rows()]
    for rank in range(4):
        lanes = Lanes(made, given, rank=rank, ranks=4, states=states)
        assert [[d.at for d in row] for row in lanes.rows()] == expected[rank::4]


def test_what_lanes_lost_is_added_up_by_reason(words: Path, tmp_path: Path) -> None:
    records = [{"text": ""}, {"text": "long " * 200}, *TEXTS]
    made = recipe(words, Source(path=str(write_jsonl(tmp_path / "a.jsonl", records))), data__overlong="drop")
    lanes = Lanes(made, entry(made), rank=0, ranks=1)
    for _ in range(4):
        lanes.rows()
    losses = told(lanes.state())
    assert set(losses.dropped) == {"empty", "longer than seq_len"}
    assert "a.jsonl: line 2 (byte " in losses.first["longer than seq_len"]


def pair() -> dict[str, Any]:
    return {"prompt": "who?", "chosen": "I", "rejected": "you"}


@pytest.mark.parametrize(
    ("records", "changes", "said"),
    [
        ([{"text": "x"}, {"text": None}], {}, r"a.jsonl: line 2 \(byte 14\): .*text"),
        ([pair()], {}, r"a.jsonl: line 1 .*answers to compare or to judge .*data.streaming=false"),
        ([], {}, r"a.jsonl: holds no records"),
        ([{"text": "<|im_start|> x"}], {"model_vocab_size": 2}, r"holds token id \d+, but the model has 2 ids"),
        ([{"question": 1}], {}, r"a.jsonl: .*question"),
    ],
)
def test_mistakes_of_the_first_records_are_found_before_ranks_start(
    words: Path, tmp_path: Path, records: list[Any], changes: dict[str, Any], said: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(UserError, match=said):
        entry(recipe(words, Source(path=str(path))), **changes)


def test_records_that_are_counted_and_files_that_are_gone_are_refused(words: Path, tmp_path: Path) -> None:
    for i in range(3):
        write_jsonl(tmp_path / f"{i}.jsonl", TEXTS[i * 9 : i * 9 + 9])
    with pytest.raises(UserError, match=r"0\.jsonl#5: .*data\.streaming"):
        entry(recipe(words, Source(path=f"{tmp_path}/0.jsonl#5")))
    made = recipe(words, Source(path=f"{tmp_path}/*.jsonl"))
    given = entry(made)
    (tmp_path / "1.jsonl").unlink()
    assert entry(made)["fingerprint"] != given["fingerprint"]
    with pytest.raises(UserError, match="holds 2 files, 3 when the data were prepared"):
        Lanes(made, given, rank=0, ranks=2)


def test_warnings_name_their_source(words: Path, tmp_path: Path) -> None:
    values = json.loads((words / "tokenizer.json").read_text())
    values["model"]["vocab"].pop("\u0122")
    (tmp_path / "poor.json").write_text(json.dumps(values))
    texts, _ = two(tmp_path)
    warnings = entry(recipe(words, texts, model__tokenizer=str(tmp_path / "poor.json")))["warnings"]
    lacks = "the tokenizer has no token for 1 of 256 bytes and drops them from texts"
    assert warnings == [f"{texts.path}: {lacks}"]


def test_strict_is_refused_because_what_a_stream_loses_shows_only_later(words: Path, tmp_path: Path) -> None:
    made = recipe(words, *two(tmp_path), model__config={**LLAMA, "vocab_size": 400}, train__max_steps=7)
    prepared = prepare(made)
    assert (prepared.total_steps, prepared.steps_per_epoch, prepared.train["lanes"]) == (7, None, 6)
    with pytest.raises(UserError, match="strict: nobody knows what a stream will drop"):
        prepare(made, strict=True)


@pytest.fixture
def elsewhere() -> Iterator[Any]:
    """A store of another kind, in memory."""
    import fsspec

    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def test_files_of_a_hub_dataset_are_read_where_they_lie(
    words: Path, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as parquet

    lines = "".join(json.dumps(record) + "\n" for record in TEXTS[:60])
    elsewhere.pipe("/web/part-0.jsonl", lines.encode())
    with elsewhere.open("/web/part-1.parquet", "wb") as file:
        parquet.write_table(pa.Table.from_pylist(TEXTS[60:]), file, row_group_size=16)
    files = ["memory://web/part-0.jsonl", "memory://web/part-1.parquet"]

    class Builder:
        class config:
            data_files = {"train": files}  # noqa: RUF012

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, **options: Builder)
    source = Source(path="who/web")
    assert [str(file) for file in listed(source).files] == files
    made = recipe(words, source, train__global_batch_size=2)
    lanes = Lanes(made, entry(made), rank=0, ranks=1)
    seen = {(d.file, d.at) for _ in range(60) for row in lanes.rows() for d in row}
    assert {at for file, at in seen if file == 1} == set(range(60))
    assert len({at for file, at in seen if file == 0}) == 60
    with pytest.raises(UserError, match="no files of split 'test'"):
        stream.listed(Source(path="who/web", split="test"))
