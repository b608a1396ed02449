"""Going on with a run: what its checkpoints cannot take is refused, whatever is forced, before anything is written."""

from __future__ import annotations

import json

import pytest

from launcher.errors import UserError
from launcher.jobs.changes import identity
from launcher.jobs.opening import open_run, stored_recipe
from launcher.plan import make_plan
from launcher.recipe.schema import Adapter, Data, Model, Optimizer, Recipe, Source, Train, to_dict
from launcher.run.data import VERSION
from launcher.run.directory import MARKER, RunDirectory
from launcher.run.ledger import start_attempt
from launcher.run.state import write_state

CONFIG = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
          "num_attention_heads": 1, "vocab_size": 32}  # fmt: skip


def recipe(*, config: dict | None = None, adapter: Adapter | None = None, **train: object) -> Recipe:
    return Recipe(
        adapter=adapter or Adapter(),
        model=Model(config={**CONFIG, **(config or {})}, tokenizer="t"),
        data=Data(train=[Source(path="a.jsonl")], seq_len=32),
        train=Train(global_batch_size=4, **{"max_steps": 9, **train}),
        optimizer=Optimizer(schedule="constant"),
    )


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A run of that recipe with a checkpoint at step 5."""
    made, values = RunDirectory(tmp_path / "r"), to_dict(recipe())
    made.create(values, make_plan(recipe()).to_dict(), identity(values))
    made.data_file.write_text(json.dumps({"version": VERSION, "train": {"epoch_rows": 10}}))
    start_attempt(made, target="local", job_id=None, nodes=["here"], reason="run")
    made.checkpoint(5, 1).mkdir(parents=True)
    (made.checkpoint(5, 1) / MARKER).touch()
    return made


def go_on(run: RunDirectory, changed: Recipe, *, force: bool = True) -> list[str]:
    return [change.key for change in open_run(run, changed, make_plan(changed), force=force, say=lambda text: None)]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (recipe(config={"hidden_size": 16}), ["model.config.hidden_size: 8 -> 16", "run.name="]),
        (recipe(adapter=Adapter(kind="lora")), ["adapter.kind: full -> lora", "run.name="]),
        (recipe(max_steps=4), ["train.max_steps = 4", "5 steps"]),
        (recipe(max_steps=None, epochs=1.0), ["train.epochs = 1.0", "at step 3"]),  # 10 rows, 4 in a batch
    ],
)
def test_other_weights_and_an_end_before_the_step_reached_are_never_forced(run, changed, words):
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    with pytest.raises(UserError) as caught:
        go_on(run, changed)
    assert all(word in str(caught.value) for word in words), caught.value
    assert before == {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}


def test_what_checkpoints_can_take_is_forced_and_without_checkpoints_other_weights_too(run):
    assert go_on(run, recipe(seed=1)) == ["train.seed"]
    assert go_on(run, recipe(seed=1, max_steps=5)) == ["train.max_steps"]
    (run.checkpoint(5, 1) / MARKER).unlink()
    assert go_on(run, recipe(seed=1, max_steps=5, config={"hidden_size": 16})) == ["model.config.hidden_size"]


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (2, []),
        (3, ["train.global_batch_size = 4 on 3 ranks: 2 slots of each step stay empty (rows of weight 0, "]),
        (5, ["train.global_batch_size = 4 on 5 ranks: 1 slot of each step stays empty (rows of weight 0, "]),
    ],
)
def test_ranks_that_do_not_divide_the_global_batch_are_said(run, ranks, said):
    changed, heard = recipe(), []
    changed.cluster.nproc_per_node = ranks
    open_run(run, changed, make_plan(changed), force=False, say=heard.append)
    heard = [line for line in heard if not line.startswith("changed ")]
    assert len(heard) == len(said)
    assert all(line.startswith(begin) for line, begin in zip(heard, said, strict=True))


@pytest.mark.parametrize("change", ["run.name=other", "run.dir=/elsewhere", "run={name: other}"])
def test_a_change_of_place_is_refused_because_the_directory_is_the_place(run, change):
    with pytest.raises(UserError, match=r"place is its directory.*move the directory"):
        stored_recipe(run, [change])


def test_a_run_whose_data_another_version_prepared_is_refused_in_words_unless_it_is_forced_or_finished(run):
    old = {"version": 1, "train": {"rows": 10}, "global_batch_size": 4, "total_steps": 9, "total_rows": None}
    run.data_file.write_text(json.dumps(old))
    before = run.recipe_file.read_bytes()
    with pytest.raises(UserError, match=r"data.json: version 1, expected 2: .* Finish the run with that version"):
        go_on(run, recipe(max_steps=12), force=False)
    assert run.recipe_file.read_bytes() == before
    write_state(run, "finished", attempt=1, step=9)
    assert go_on(run, recipe(), force=False) == []
    assert go_on(run, recipe(max_steps=12), force=True) == ["train.max_steps"]
    assert not run.data_file.exists()
