"""Which level wins, where each value came from, and how text becomes values."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.recipe.compose import compose
from tests.recipe.make import GOOD, loaded, value, write


def test_each_level_wins_over_the_one_below(here: Path, monkeypatch: pytest.MonkeyPatch):
    write(here, "nodes: 5\nnproc_per_node: 6\n", name="cluster/mine.yaml")
    base = (
        GOOD
        + "optimizer: {lr: 1e-3, eps: 1e-3, weight_decay: 0.3}\ncluster: {nodes: 2}\nrun: {name: base, dir: base}\n"
    )
    write(here, base, name="base.yaml")
    recipe = write(
        here, "extends: base.yaml\noptimizer: {lr: 2e-3, eps: 2e-3}\nrun: {name: mine}\ncluster: {nodes: 3}\n"
    )

    composed = compose(recipe, ["optimizer.lr=3e-3"])
    assert value(composed, "optimizer.min_lr_ratio") == 0.0
    assert value(composed, "optimizer.weight_decay") == 0.3
    assert value(composed, "optimizer.eps") == 2e-3
    assert value(composed, "optimizer.lr") == 3e-3
    assert (value(composed, "run.name"), value(composed, "run.dir")) == ("mine", "base")
    assert value(composed, "cluster.nodes") == 3

    monkeypatch.setenv("LAUNCHER_CLUSTER", "mine")
    composed = compose(recipe)
    assert (value(composed, "cluster.nodes"), value(composed, "cluster.nproc_per_node")) == (5, 6)
    composed = compose(recipe, ["cluster.nodes=7"])
    assert (value(composed, "cluster.nodes"), value(composed, "cluster.nproc_per_node")) == (7, 6)


def test_origins_name_the_file_and_line_the_argument_or_the_default(here: Path):
    write(here, "kind: fsdp2\nshard: 1\n", name="strategy/mine.yaml")
    write(here, "run:\n  tags: [a, b]\n", name="base.yaml")
    recipe = write(here, "extends: base.yaml\n" + GOOD + "strategy: mine\n")
    composed = compose("recipe.yaml", ["train.seed=3", "data.train.1.path=more.jsonl"])
    origins = {key: str(origin) for key, origin in composed.origins.items()}
    assert origins["model.name"] == "recipe.yaml:2"
    assert origins["data.train.0.path"] == "recipe.yaml:4"
    assert origins["data.train.1.path"] == "argument data.train.1.path=more.jsonl"
    assert origins["data.train.1.weight"] == "default"
    assert origins["train.seed"] == "argument train.seed=3"
    assert origins["strategy.shard"] == "strategy/mine.yaml:2"
    assert origins["strategy.offload.params"] == "default"
    assert origins["run.tags.1"] == "base.yaml:2"
    assert origins["data.eval"] == "default"
    assert composed.path == Path(recipe.name)


def test_every_leaf_has_an_origin(here: Path):
    from launcher.recipe.schema import to_dict
    from launcher.recipe.tree import leaves

    composed = loaded(here, "run.tags=[a]", "data.train.0.columns={prompt: q}")
    assert {key for key, _ in leaves(to_dict(composed.recipe))} == set(composed.origins)


def test_a_value_too_secret_for_a_log_is_not_in_an_origin(here: Path):
    write(here)
    with pytest.raises(RecipeError) as error:
        loaded(here, "cluster.env=[WANDB_API_KEY=abc123]")
    assert "abc123" not in str(error.value)
    assert "WANDB_API_KEY=..." in str(error.value)


def test_extends_is_relative_to_the_file_that_says_it(here: Path):
    write(here, GOOD, name="base/base.yaml")
    write(here, "extends: ../base/base.yaml\ntrain: {seed: 4}\n", name="mine/middle.yaml")
    composed = compose(write(here, "extends: middle.yaml\n", name="mine/top.yaml"))
    assert value(composed, "train.seed") == 4
    assert value(composed, "train.global_batch_size") == 8
    assert str(composed.origins["train.global_batch_size"]) == "base/base.yaml:5"


def test_extends_in_a_circle_is_an_error_that_shows_the_circle(here: Path):
    write(here, "extends: b.yaml\n" + GOOD, name="a.yaml")
    write(here, "extends: a.yaml\n", name="b.yaml")
    with pytest.raises(RecipeError, match=r"no circle \(a.yaml -> b.yaml -> a.yaml\)"):
        compose("a.yaml")


def test_a_list_is_replaced_whole_and_a_mapping_joined(here: Path):
    write(here, GOOD + "run: {tags: [a, b]}\n", name="base.yaml")
    composed = compose(write(here, "extends: base.yaml\nrun: {tags: [c]}\ndata: {seq_len: 64}\n"))
    assert value(composed, "run.tags") == ["c"]
    assert value(composed, "data.train.0.path") == "chat.jsonl"


@pytest.mark.parametrize(
    ("argument", "key", "expected"),
    [
        ("train.max_steps=5", "train.max_steps", 5),
        ("train.max_grad_norm=null", "train.max_grad_norm", None),
        ("train.max_grad_norm=~", "train.max_grad_norm", None),
        ("optimizer.lr=1e-5", "optimizer.lr", 1e-5),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("optimizer.lr=.5", "optimizer.lr", 0.5),
        ("optimizer.betas=[0.9, 0.99]", "optimizer.betas", [0.9, 0.99]),
        ("optimizer.betas.1=0.5", "optimizer.betas", [0.9, 0.5]),
        ("model.liger=true", "model.liger", True),
        ("model.liger=auto", "model.liger", "auto"),
        ("model.compile=False", "model.compile", False),
        ("run.name='5'", "run.name", "5"),
        ("run.tags=[a, 'no', b c]", "run.tags", ["a", "no", "b c"]),
        ("run.name=a=b", "run.name", "a=b"),
        ("model.revision=2024-01-01", "model.revision", "2024-01-01"),
        ("strategy.offload={optimizer: cpu, params: cpu}", "strategy.offload.params", "cpu"),
        ("data.train.0.path=./chat.jsonl", "data.train.0.path", "./chat.jsonl"),
        ("data.train.0.columns={prompt: q}", "data.train.0.columns", {"prompt": "q"}),
        ("data.train.1.path=chat.jsonl", "data.train.1.path", "chat.jsonl"),
        ("data.train=[{path: other.jsonl}]", "data.train.0.path", "other.jsonl"),
        ("data.train.0.path=*.jsonl", "data.train.0.path", "*.jsonl"),
        ("data.seq_len=1_024", "data.seq_len", 1024),
        ("data.seq_len=0x40", "data.seq_len", 64),
        ("checkpoint.every_minutes=12", "checkpoint.every_minutes", 12.0),
    ],
)
def test_an_argument_is_typed_as_yaml(here: Path, argument: str, key: str, expected: object):
    found = value(compose(write(here), [argument]), key)
    assert found == expected
    assert type(found) is type(expected)


def test_the_last_of_two_equal_arguments_wins(here: Path):
    composed = compose(write(here), ["train.seed=1", "train.seed=2"])
    assert value(composed, "train.seed") == 2


@pytest.mark.parametrize(
    ("text", "argument", "taken_away"),
    [
        (GOOD, "train.epochs=2", "train.max_steps"),
        (GOOD, "model.config={model_type: llama}", "model.name"),
        (GOOD + "optimizer: {warmup_ratio: 0.1}\n", "optimizer.warmup_steps=2", "optimizer.warmup_ratio"),
    ],
)
def test_one_of_two_keys_given_above_takes_away_the_other_given_below(
    here: Path, text: str, argument: str, taken_away: str
):
    composed = compose(write(here, text), [argument])
    assert value(composed, taken_away) is None
    assert str(composed.origins[taken_away]) == f"argument {argument}"


def test_evaluation_data_above_take_away_the_fraction_below_and_the_other_way_round(here: Path):
    fraction = write(here, GOOD.replace("seq_len", "eval_fraction: 0.1\n  seq_len"))
    assert value(compose(fraction, ["data.eval=[{path: e.jsonl}]"]), "data.eval_fraction") == 0.0
    named = write(here, GOOD.replace("seq_len", "eval: [{path: e.jsonl}]\n  seq_len"))
    assert value(compose(named, ["data.eval_fraction=0.1"]), "data.eval") == []


def test_both_of_two_exclusive_keys_at_one_level_stay_and_are_an_error(here: Path):
    with pytest.raises(RecipeError, match=r"either train\.max_steps or train\.epochs"):
        loaded(here, "train.epochs=2", "train.max_steps=3")


def test_interpolation_takes_the_value_of_another_key_with_its_type(here: Path):
    text = GOOD + 'checkpoint: {every_steps: "${train.max_steps}"}\nrun: {name: "run-${train.seed}"}\n'
    composed = loaded(here, "train.max_steps=7", text=text)
    assert value(composed, "checkpoint.every_steps") == 7
    assert value(composed, "run.name") == "run-0"
    assert str(composed.origins["run.name"]) == "recipe.yaml:7"


def test_interpolation_of_a_whole_list_makes_a_copy_of_it(here: Path):
    composed = compose(write(here, GOOD.replace("seq_len", 'eval: "${data.train}"\n  seq_len')))
    assert value(composed, "data.eval.0.path") == "chat.jsonl"


def test_shell_lines_keep_their_own_dollar_braces(here: Path):
    composed = compose(
        write(here, GOOD + 'cluster: {setup: ["export X=${HOME:-/tmp}"]}\nrun: {name: "${train.seed}x"}\n')
    )
    assert value(composed, "cluster.setup") == ["export X=${HOME:-/tmp}"]


def test_what_show_prints_is_read_back_to_the_same_recipe(here: Path):
    from launcher.recipe.read import dump
    from launcher.recipe.schema import to_dict

    words = [
        "1e-5",
        "007",
        "0x1f",
        "no",
        "on",
        "12:00:00",
        "null",
        "~",
        "1_000",
        ".inf",
        "a: b",
        "",
        "2024-01-01",
        "#x",
    ]
    composed = compose(write(here), [f"run.tags={words}", "optimizer.lr=1e-5"])
    assert value(composed, "run.tags") == words
    again = compose(write(here, dump(to_dict(composed.recipe)), name="again.yaml"))
    assert again.recipe == composed.recipe


def test_load_names_the_run_after_the_file_and_makes_existing_paths_absolute(here: Path):
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text("{}")
    (here / "model" / "tokenizer.json").write_text("{}")
    (here / "chat.jinja").write_text("{{ messages }}")
    text = GOOD.replace("org/model", "model, tokenizer: ./model").replace(
        "seq_len", "chat_template: chat.jinja\n  seq_len"
    )
    composed = loaded(
        here, "data.eval=[{path: org/eval}]", "data.train.1.path=*.jsonl", "data.cache_dir=cache", text=text
    )
    assert composed.recipe.run.name == "recipe"
    assert composed.recipe.run.dir == str(here / "runs")
    assert composed.recipe.model.name == composed.recipe.model.tokenizer == str(here / "model")
    assert composed.recipe.data.train[0].path == str(here / "chat.jsonl")
    assert composed.recipe.data.train[1].path == str(here / "*.jsonl")
    assert composed.recipe.data.eval[0].path == "org/eval"
    assert composed.recipe.data.chat_template == str(here / "chat.jinja")
    assert composed.recipe.data.cache_dir == str(here / "cache")


def test_omegaconf_is_imported_only_for_a_recipe_with_interpolation(here: Path):
    import subprocess
    import sys

    code = "import sys; from launcher.recipe.check import load; load(sys.argv[1]); print('omegaconf' in sys.modules)"
    write(here, GOOD + 'run: {name: "x${train.seed}"}\n', name="with.yaml")
    for name, expected in ((write(here).name, "False"), ("with.yaml", "True")):
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
