"""A run that goes on in another shape: another recipe, other ranks, another strategy, other portions, other data."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.data.prepare import prepare, write_data_json
from launcher.errors import UserError
from launcher.jobs.changes import RULES, Change, changes, identity, rule_of, table
from launcher.jobs.contents import remember
from launcher.jobs.opening import open_run
from launcher.plan import make_plan
from launcher.recipe.schema import Data, Model, Optimizer, Recipe, Source, Train, from_dict, to_dict
from launcher.run.data import VERSION
from launcher.run.directory import MARKER, RunDirectory
from launcher.run.files import read_lines
from launcher.run.ledger import start_attempt, valid_checkpoints
from launcher.strategy.explained import dotted
from launcher.trainer.checkpoint.reader import Reader, read_manifest
from launcher.trainer.main import run_rank
from launcher.trainer.metrics import read_metrics
from tests.data.make import tiny_tokenizer, write_jsonl
from tests.ranks import run_ranks
from tests.trainer import make
from tests.trainer.checkpoint import test_engines

CONFIG = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
          "num_attention_heads": 1, "vocab_size": 32}  # fmt: skip
TIED = {**make.LLAMA, "tie_word_embeddings": True}
DROPOUT = {**make.LLAMA, "attention_dropout": 0.1}  # random numbers are part of what must come back


# F22: the launch side, without a rank


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The files that a recipe names."""
    folder = tmp_path / "files"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "template.jinja").write_text("{{ messages }}")
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    return folder


def recipe_of(files: Path, **changed: Any) -> Recipe:
    recipe = Recipe(
        model=Model(config=dict(CONFIG), tokenizer=str(files / "tokenizer")),
        data=Data(train=[Source(path=str(files / "a.jsonl"))], seq_len=32, chat_template=str(files / "template.jinja")),
        train=Train(global_batch_size=4, max_steps=10),
        optimizer=Optimizer(lr=1.0, schedule="linear"),
    )
    for key, value in changed.items():
        section, _, name = key.partition("__")
        setattr(getattr(recipe, section), name, value)
    return recipe


@pytest.fixture
def run(tmp_path: Path, files: Path) -> RunDirectory:
    """A run of that recipe with a checkpoint at step 5, written by other versions."""
    recipe = recipe_of(files)
    made, values = RunDirectory(tmp_path / "r"), to_dict(recipe)
    made.create(values, make_plan(recipe).to_dict(), identity(values))
    remember(made, recipe)
    made.data_file.write_text(json.dumps({"version": VERSION, "train": {"epoch_rows": 10}, "total_steps": 10}))
    start_attempt(made, target="local", job_id=None, nodes=["here"], reason="run")
    made.checkpoint(5, 1).mkdir(parents=True)
    manifest = {"schedule_steps": 10, "versions": {"launcher": "0.4.9", "torch": None}}
    (made.checkpoint(5, 1) / "manifest.json").write_text(json.dumps(manifest))
    (made.checkpoint(5, 1) / MARKER).touch()
    return made


def go_on(run: RunDirectory, recipe: Recipe, *, force: bool = False) -> list[str]:
    """What is said when the run goes on with the recipe."""
    said: list[str] = []
    open_run(run, recipe, make_plan(recipe), force=force, say=said.append)
    return said


def test_F22_differences_that_are_safe_are_listed_each_with_its_effect(run: RunDirectory, files: Path) -> None:
    """Resume with another learning rate, strategy and number of ranks: each difference is listed with what it does."""
    recipe = recipe_of(files, optimizer__lr=2.0, train__micro_batch_size=2)
    recipe.strategy.kind, recipe.cluster.nproc_per_node = "zero2", 2
    said = go_on(run, recipe)
    assert said == [
        "changed train.micro_batch_size: 1 -> 2: the same samples in each step, in other portions; losses within 1e-6",
        "changed optimizer.lr: 1.0 -> 2.0: applies from step 6 on; the samples stay the same",
        "changed strategy.kind: fsdp2 -> zero2: the same samples in the same order; weights and moments bit for bit; "
        "losses within 1e-5, as sums are taken in another order",
        "changed cluster.nproc_per_node: 1 -> 2: the same samples in the same order; weights and moments bit for bit; "
        "losses within 1e-5, as sums are taken in another order",
        said[4],
        "learning rate of step 6: 0.5 -> 1",
    ]
    assert said[4].startswith("changed version of launcher: 0.4.9 -> ")
    (line,) = [line for line in read_lines(run.ledger_file) if line["kind"] == "change"]
    assert (line["step"], line["forced"]) == (5, [])
    assert line["changes"][1]["what"] == "optimizer.lr"
    assert len(go_on(run, recipe)) == 1, "what is no change any more is said again"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model__tokenizer": "other"}, "model.tokenizer: "),
        ({"data__seq_len": 64}, "data.seq_len: 32 -> 64: other rows"),
        ({"data__packing": "none"}, "data.packing: best_fit -> none: other rows"),
        ({"data__train": [Source(path="b.jsonl")]}, "data.train: "),
        ({"train__seed": 1}, "train.seed: 0 -> 1: another order of the samples"),
        ({"train__global_batch_size": 8}, "train.global_batch_size: 4 -> 8: other samples in each step"),
    ],
)
def test_F22_unsafe_differences_are_refused_and_what_is_forced_stands_in_the_ledger(
    run: RunDirectory, files: Path, changed: dict[str, Any], words: str
) -> None:
    """Resume with other data, tokenizer or packing length: refused with each difference, unless forced."""
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="go on with --force") as caught:
        go_on(run, recipe_of(files, **changed))
    assert words in str(caught.value)
    assert before == {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    assert any(words in line for line in go_on(run, recipe_of(files, **changed), force=True))
    assert not run.data_file.exists(), "the rows are to be prepared anew"
    (line,) = [line for line in read_lines(run.ledger_file) if line["kind"] == "change"]
    assert line["forced"] == [next(iter(changed)).replace("__", ".")]


@pytest.mark.parametrize("changed", [{"model__config": {**CONFIG, "hidden_size": 16}}, {"model__dtype": "bf16"}])
def test_F22_another_model_is_refused_whatever_is_forced(run: RunDirectory, files: Path, changed: Any) -> None:
    """Resume with another model: its parameters cannot take the checkpoint's, so it is refused with --force, too."""
    with pytest.raises(UserError, match="has checkpoints of another model"):
        go_on(run, recipe_of(files, **changed), force=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tokenizer/tokenizer.json", "model.tokenizer: tokenizer.json: 2 bytes, sha256 "),
        ("template.jinja", "data.chat_template: template.jinja: 14 bytes, sha256 "),
    ],
)
def test_F22_other_content_under_the_same_name_is_refused(
    run: RunDirectory, files: Path, name: str, words: str
) -> None:
    """Resume with a tokenizer or chat template that was edited in place: found by its hash, refused unless forced."""
    (files / name).write_text("changed!")
    with pytest.raises(UserError, match="other tokens for the same text") as caught:
        go_on(run, recipe_of(files))
    assert words in str(caught.value)
    go_on(run, recipe_of(files), force=True)
    assert len(go_on(run, recipe_of(files))) == 1, "forced once, it is what the run goes on with"


@pytest.mark.parametrize(
    ("schedule", "asks"), [("linear", True), ("cosine", True), ("wsd", False), ("constant", False)]
)
def test_F22_another_length_asks_for_the_curve_of_the_learning_rate_where_it_would_jump(
    run: RunDirectory, files: Path, schedule: str, asks: bool
) -> None:
    """Resume with more steps: a rate that would jump is refused with both rates until it is said which is meant."""
    run.write_recipe(to_dict(recipe_of(files, optimizer__schedule=schedule)))
    longer = recipe_of(files, optimizer__schedule=schedule, train__max_steps=20)
    if not asks:
        assert any(line.startswith("changed train.max_steps: 10 -> 20: moves the end") for line in go_on(run, longer))
        return
    for force in (False, True):
        with pytest.raises(UserError, match=r"step 6 would jump from 0.5 to 0\.\d+") as caught:
            go_on(run, longer, force=force)
    assert "optimizer.schedule_steps=10: goes on with the old one: 0.5 at step 6" in str(caught.value)
    longer.optimizer.schedule_steps = 10
    assert not [line for line in go_on(run, longer) if line.startswith("learning rate")]
    longer.optimizer.schedule_steps = 20
    assert any(line.startswith("learning rate of step 6: 0.5 -> 0.") for line in go_on(run, longer))


def test_F22_every_key_of_the_schema_has_a_rule_and_every_rule_a_key() -> None:
    """No difference is without an effect in words: each key of the schema has a rule, and docs/resume.md shows all."""
    recipe = Recipe(model=Model(name="m"), data=Data(train=[Source(path="a")], seq_len=4), train=Train())
    keys = list(dotted(to_dict(recipe)))
    for key in keys:
        kind, words = rule_of(key)
        assert kind
        assert Change(key, 1, 2).effect(3)
        assert words
    for name in RULES:
        assert any(key == name or key.startswith(f"{name}.") for key in keys), f"{name} is no key any more"
    page = (Path(__file__).parents[2] / "docs" / "resume.md").read_text()
    assert table() in page, "docs/resume.md: paste what `python -m launcher.jobs.changes` prints"


def test_F22_a_recipe_of_an_older_version_differs_in_what_it_says_alone() -> None:
    """Resume with a newer launcher: keys that did not exist then count as their defaults."""
    new = to_dict(recipe_of(Path("x")))
    old = json.loads(json.dumps(new))
    del old["checkpoint"]["rehearse"], old["optimizer"]["schedule_steps"], old["cluster"]["restart"]
    assert changes(old, new) == []
    new["checkpoint"]["rehearse"] = False
    assert [str(change) for change in changes(old, new)] == ["checkpoint.rehearse: true -> false"]


# the others: real ranks


def attempts_of(rank: int, world_size: int, jobs: list[tuple[str, int, dict[str, Any]]]) -> None:
    """An attempt of each of these runs up to that step with those changes of the recipe; its rows are written down."""
    from launcher.data.batches import Batches

    built: dict[int, list[list[int]]] = {}
    original = Batches.step

    def watched(self: Any, step: int) -> Any:
        data = original(self, step)
        built[step] = [micro.rows for micro in data.micro]
        return data

    Batches.step = watched  # type: ignore[method-assign]
    try:
        for path, step, changed in jobs:
            run, box = RunDirectory(Path(path)), [0]
            if rank == 0:
                data = json.loads(run.data_file.read_text())
                run.data_file.write_text(json.dumps({**data, "total_steps": step}))
                recipe = from_dict(run.read_recipe())
                for key, value in changed.items():
                    *sections, last = key.split("__")
                    place: Any = recipe
                    for section in sections:
                        place = getattr(place, section)
                    setattr(place, last, value)
                run.write_recipe(to_dict(recipe))
                box = [start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")]
            dist.broadcast_object_list(box, src=0)
            built.clear()
            run_rank(path, box[0])
            with open(run.path / f"rows-{box[0]}-{rank}.json", "w") as file:
                json.dump(built, file)
            dist.barrier()
    finally:
        Batches.step = original  # type: ignore[method-assign]


def rows_by_step(run: RunDirectory) -> dict[int, list[int]]:
    """The rows that all ranks together learnt in each step, sorted; no step was taken twice."""
    found: dict[int, list[int]] = {}
    for file in run.path.glob("rows-*.json"):
        for step, micro in json.loads(file.read_text()).items():
            found.setdefault(int(step), []).extend(row for rows in micro for row in rows)
    return {step: sorted(rows) for step, rows in sorted(found.items())}


def losses(run: RunDirectory) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run.metrics_file)[0]}


def stored(run: RunDirectory) -> dict[str, torch.Tensor]:
    """Weights and moments of the newest checkpoint."""
    folder = valid_checkpoints(run)[-1].path
    manifest = read_manifest(folder)
    reader = Reader(folder, manifest)
    kinds = {name: manifest["kinds"] if entry["trainable"] else ["value"] for name, entry in manifest["params"].items()}
    return {f"{name} {kind}": reader.read(name, kind) for name in kinds for kind in kinds[name]}


def require_exact(run: RunDirectory, whole: RunDirectory) -> None:
    """Losses of every step, weights and moments are equal, bit for bit."""
    assert losses(run) == losses(whole)
    ours, theirs = stored(run), stored(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def made(folder: Path, kind: str = "ddp", **changed: Any) -> RunDirectory:
    """A run without an evaluation; saves of all steps are kept as long as it lasts."""
    changed = {"checkpoint__rehearse": False, "checkpoint__keep_last": 20, **changed}
    return make.make_run(folder, make.make_recipe(kind, **changed), total_steps=8, evaluation=False)


@pytest.mark.gloo
@pytest.mark.slow
def test_F23_four_ranks_then_two_eight_and_three_see_every_sample_once_in_the_same_order(tmp_path: Path) -> None:
    """World size 4 -> 2 -> 8 -> 3 with the same global batch: the same samples in each step, each once an epoch."""
    whole, moved = made(tmp_path / "whole"), made(tmp_path / "moved")
    run_ranks(attempts_of, 1, [(str(whole.path), 8, {})])
    for ranks, step in ((4, 2), (2, 4), (8, 6), (3, 8)):
        run_ranks(attempts_of, ranks, [(str(moved.path), step, {})], timeout_s=500)
    expected = rows_by_step(whole)
    assert {step: rows for step, rows in rows_by_step(moved).items() if step < 8} == expected
    seen = Counter(row for rows in expected.values() for row in rows)
    epoch = whole.read_json("data.json")["train"]["sources"][0]["rows"]
    assert set(seen) == set(range(epoch))
    assert set(seen.values()) <= {8 * 6 // epoch, -(-8 * 6 // epoch)}, "a sample was seen twice in an epoch"
    for step, loss in losses(whole).items():
        assert losses(moved)[step] == pytest.approx(loss, rel=1e-5)


@pytest.mark.gloo
@pytest.mark.slow
def test_F24_ddp_to_fsdp2_to_zero_1_2_3_to_a_single_rank_keeps_weights_and_moments_bit_for_bit(tmp_path: Path) -> None:
    """DDP -> FSDP2 -> ZeRO-1, 2, 3 -> a single rank: weights and moments are equal bit for bit after each load."""
    test_engines.travel(
        tmp_path, [*((kind, 2, {}) for kind in ("ddp", "fsdp2", "zero1", "zero2", "zero3")), ("ddp", 1, {})]
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """Runs of one rank: whole, and stopped at several steps and gone on with."""
    folder = tmp_path_factory.mktemp("alone")
    keys: dict[str, Any] = {"config": DROPOUT, "checkpoint__every_steps": 2, "train__micro_batch_size": 2}
    first = made(folder / "whole", **keys)
    epoch = first.read_json("data.json")["train"]["sources"][0]["rows"]
    boundary = -(-epoch // 6)  # the step in which the second epoch begins
    assert 1 < boundary < 7
    runs = {name: made(folder / name, **keys) for name in ("first", "boundary", "last", "killed at 1", "killed at 5")}
    stops = {"first": 1, "boundary": boundary, "last": 7}
    jobs = [(str(first.path), 8, {})]
    for name, step in stops.items():
        jobs += [(str(runs[name].path), step, {}), (str(runs[name].path), 8, {})]
    portions = [made(folder / name) for name in ("portions", "other portions")]
    jobs += [(str(portions[0].path), 6, {})]
    for step, micro in ((2, 6), (4, 4), (6, 3)):  # 1 forward, 2 with two empty slots, 2
        jobs += [(str(portions[1].path), step, {"train__micro_batch_size": micro})]
    run_ranks(attempts_of, 1, jobs)
    return {"whole": first, **runs, "portions": portions[0], "other portions": portions[1]}


@pytest.mark.gloo
@pytest.mark.slow
def test_F25_other_micro_batches_and_accumulation_learn_the_same_samples_in_each_step(alone: Any) -> None:
    """Micro-batch 1 -> 6 -> 4 -> 3 at the same global batch: the same samples in each step, losses within 1e-6."""
    whole, moved = alone["portions"], alone["other portions"]
    assert rows_by_step(moved) == rows_by_step(whole)
    for step, loss in losses(whole).items():
        assert losses(moved)[step] == pytest.approx(loss, rel=1e-6)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("where", ["first", "boundary", "last"])
def test_F26_a_resume_behind_the_first_step_at_an_epoch_s_border_and_before_the_last_is_exact(
    alone: Any, where: str
) -> None:
    """Resume behind the first step, where one epoch passes into the next, and before the last step: bit-exact."""
    require_exact(alone[where], alone["whole"])


def dies_inside_accumulation(rank: int, world_size: int, path: str, attempt: int, step: int) -> None:
    """Run a rank that is gone, without a word, after the second of a step's three micro-batches."""
    from launcher.trainer.engines.ddp import DdpEngine

    forward_backward, count = DdpEngine.forward_backward, [0]

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 3 * step + 3:
            os._exit(9)
        return forward_backward(self, *args, **kwargs)

    DdpEngine.forward_backward = counted  # type: ignore[method-assign]
    run_rank(path, attempt)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5])
def test_F26_a_resume_after_an_end_inside_accumulation_is_exact(alone: Any, step: int) -> None:
    """Killed between two micro-batches of a step, with a checkpoint before it or with none: the resume is bit-exact."""
    run = alone[f"killed at {step}"]
    attempt = start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
    with pytest.raises(RuntimeError, match="rank 0 died"):
        run_ranks(dies_inside_accumulation, 1, str(run.path), attempt, step)
    assert len(losses(run)) < 8
    run_ranks(attempts_of, 1, [(str(run.path), 8, {})])
    require_exact(run, alone["whole"])


@pytest.mark.gloo
@pytest.mark.slow
def test_F26_a_finished_run_resumes_to_done_and_does_nothing(alone: Any, tmp_path: Path) -> None:
    """Resume at the end of the run: done at once, no step, no checkpoint, no figure."""
    run = RunDirectory(tmp_path / "again")
    shutil.copytree(alone["whole"].path, run.path)
    before = {file.name for file in run.checkpoints.rglob("*")}, run.metrics_file.read_bytes()
    assert make.run_attempt(run, 1) == [("finished", 8)]
    assert ({file.name for file in run.checkpoints.rglob("*")}, run.metrics_file.read_bytes()) == before


PAIR: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # kind, keys, what is changed in the middle
    "workers": (
        "fsdp2", {"data__num_workers": 1, "config": DROPOUT}, {"data__num_workers": 4, "strategy__prefetch": 2},
    ),
    "tied": ("fsdp2", {"config": TIED}, {}),
    "bf16 weights and moments": ("fsdp2", {"model__dtype": "bf16"}, {}),
    "adapter": ("ddp", {"adapter__kind": "lora", "adapter__rank": 4, "adapter__dropout": 0.1, "config": TIED}, {}),
    "frozen weights stored": (
        "fsdp2", {"adapter__kind": "lora", "adapter__rank": 4, "checkpoint__store_frozen": True}, {},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunDirectory, RunDirectory]]:
    """(stopped after 3 steps and gone on with, whole) of two ranks."""
    folder, found = tmp_path_factory.mktemp("pairs"), {}
    jobs: list[tuple[str, int, dict[str, Any]]] = []
    for i, (name, (kind, keys, changed)) in enumerate(PAIR.items()):
        stopped, whole = (made(folder / f"{i}-{how}", kind, **keys) for how in ("stopped", "whole"))
        jobs += [(str(stopped.path), 3, {}), (str(stopped.path), 6, changed), (str(whole.path), 6, {})]
        found[name] = (stopped, whole)
    run_ranks(attempts_of, 2, jobs, timeout_s=500)
    return found


@pytest.mark.gloo
@pytest.mark.slow
def test_F27_another_number_of_data_workers_and_other_prefetching_change_nothing(pairs: Any) -> None:
    """Another number of processes that prepare, and of blocks gathered ahead: the resume is bit-exact."""
    require_exact(*pairs["workers"])
    assert rows_by_step(pairs["workers"][0]) == rows_by_step(pairs["workers"][1])
    assert rule_of("data.num_workers")[0] == rule_of("strategy.prefetch")[0] == "nothing"


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PAIR if name != "workers"])
def test_F29_tied_frozen_adapted_and_bf16_weights_resume_exactly(pairs: Any, name: str) -> None:
    """Tied weights, an adapter beside frozen weights (stored or not), bf16 weights and moments: bit-exact resume."""
    require_exact(*pairs[name])


# F33: data that spoil in mid run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def on_data(tokenizer: Path, file: Path, **data: Any) -> Recipe:
    values = {
        "model": {"config": {**CONFIG, "vocab_size": 400}, "tokenizer": str(tokenizer)},
        "data": {
            "train": [{"path": str(file)}], "seq_len": 64, "num_workers": 1, "cache_dir": str(file.parent / "c"), **data
        },
        "train": {"global_batch_size": 4, "max_steps": 3},
    }  # fmt: skip
    return from_dict(values)


def records(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Question {i}? ", "completion": f"Answer {i}."} for i in range(count)]


def test_F33_a_corrupt_record_is_named_with_its_file_number_and_line(tokenizer: Path, tmp_path: Path) -> None:
    """A corrupt data record: the file, the record's number and its line are named before any rank starts."""
    file = write_jsonl(tmp_path / "a.jsonl", records(9))
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:5], lines[5][:-7], *lines[6:]]))
    with pytest.raises(UserError, match=r"a\.jsonl: record 5 \(row 6\), line 6: not JSON"):
        prepare(on_data(tokenizer, file))


def test_F33_a_data_file_that_changed_in_mid_run_is_said_and_never_learnt_unsaid(
    tokenizer: Path, tmp_path: Path
) -> None:
    """A dataset file changed in mid run: the rows stay as prepared and it is said; prepared anew it is refused."""
    file, run = write_jsonl(tmp_path / "a.jsonl", records(9)), RunDirectory(tmp_path / "r")
    recipe = on_data(tokenizer, file)
    said = go_on(run, recipe)
    write_data_json(run, prepare(recipe))
    write_jsonl(file, records(10))
    assert said == []
    (line,) = go_on(run, recipe)
    assert line.startswith(f"changed data.train.0: {file}: ")
    assert line.endswith("rows stay as they were prepared; prepared anew they would be refused")
    with pytest.raises(UserError, match="the train data is no longer what the run began with"):
        write_data_json(run, prepare(recipe))


def test_F33_a_streamed_file_that_changed_in_mid_run_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    """A dataset file changed in mid run while it is streamed: refused, since places in it mean other samples now."""
    file, run = write_jsonl(tmp_path / "a.jsonl", records(9)), RunDirectory(tmp_path / "r")
    recipe = on_data(tokenizer, file, streaming=True)
    go_on(run, recipe)
    write_jsonl(file, records(10))
    with pytest.raises(UserError, match="the stream would read other samples at the places that it has reached"):
        go_on(run, recipe)
