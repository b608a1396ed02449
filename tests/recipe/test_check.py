"""What must hold between the sections of a recipe, and what does not have to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import Problem, RecipeError
from launcher.recipe.check import load
from launcher.recipe.names import known_keys
from tests.recipe.make import GOOD, loaded, write

CONFIG = "{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4}"
RANDOM = f"model: {{config: {CONFIG}, tokenizer: org/tokenizer}}\n" + GOOD.partition("\n")[2]


def problems(folder: Path, *overrides: str, text: str = GOOD) -> list[Problem]:
    """What is wrong with the recipe, nothing if it is good."""
    try:
        loaded(folder, *overrides, text=text)
    except RecipeError as error:
        return list(error.problems)
    return []


CASES: dict[str, tuple[list[str], str, list[str]]] = {
    # overrides, the key complained of, what the complaint says
    "batch does not divide": (
        ["train.global_batch_size=60", "cluster.nodes=2", "cluster.nproc_per_node=8"],
        "train.global_batch_size",
        ["60: expected a multiple of 16 (1 row x 16 ranks). Nearest: 64."],
    ),
    "batch divides only with a smaller micro-batch": (
        ["train.global_batch_size=12", "train.micro_batch_size=4", "cluster.nproc_per_node=2"],
        "train.global_batch_size",
        ["a multiple of 8 (4 rows x 2 ranks)", "or train.micro_batch_size=3."],
    ),
    "micro-batch larger than a rank's share": (
        ["train.global_batch_size=4", "train.micro_batch_size=8"],
        "train.global_batch_size",
        ["a multiple of 8", "Nearest: 8; or train.micro_batch_size=4."],
    ),
    "shard does not divide the world": (
        ["strategy.shard=12", "cluster.nodes=2", "cluster.nproc_per_node=8", "train.global_batch_size=16"],
        "strategy.shard",
        ["12: expected a divisor of the world size 16 (2 nodes x 8). Use 8 or 16."],
    ),
    "shard larger than the world": (["strategy.shard=4"], "strategy.shard", ["the world size 1 (1 node x 1). Use 1."]),
    "replicate does not divide the world": (
        ["strategy.replicate=3", "cluster.nproc_per_node=4"],
        "strategy.replicate",
        ["Use 2 or 4."],
    ),
    "replicate does not divide the world, and shard leaves one number for it": (
        ["strategy.replicate=3", "strategy.shard=2", "cluster.nproc_per_node=4"],
        "strategy.replicate",
        ["Use 2."],
    ),
    "shard does not divide the world, and replicate leaves one number for it": (
        ["strategy.replicate=2", "strategy.shard=3", "cluster.nproc_per_node=8"],
        "strategy.shard",
        ["Use 4."],
    ),
    "mesh does not fill the world": (
        ["strategy.replicate=2", "strategy.shard=2", "cluster.nproc_per_node=8"],
        "strategy.replicate",
        ["expected 4, so that replicate x shard is the world size 8"],
    ),
    "ddp with another replicate": (
        ["strategy.kind=ddp", "strategy.replicate=2", "cluster.nproc_per_node=4"],
        "strategy.replicate",
        ["null or the world size 4"],
    ),
    "ddp with shards": (
        ["strategy.kind=ddp", "strategy.shard=2", "cluster.nproc_per_node=2"],
        "strategy.shard",
        ["fsdp2"],
    ),
    "warm-up longer than the run": (["optimizer.warmup_steps=11"], "optimizer.warmup_steps", ["train.max_steps = 10"]),
    "both warm-ups": (
        ["optimizer.warmup_steps=1", "optimizer.warmup_ratio=0.1"],
        "optimizer.warmup_ratio",
        ["Keep one"],
    ),
    "evaluation without data": (
        ["train.eval_every_steps=5"],
        "train.eval_every_steps",
        ["no evaluation data", "data.eval_fraction"],
    ),
    "kept checkpoints that are never written": (
        ["checkpoint.every_steps=4", "checkpoint.keep_every_steps=6"],
        "checkpoint.keep_every_steps",
        ["a multiple of", "Nearest: 8."],
    ),
    "both lengths": (
        ["train.epochs=1", "train.max_steps=5"],
        "train.max_steps",
        ["either train.max_steps or train.epochs"],
    ),
    "no length": (["train.max_steps=null"], "train.max_steps", ["Give one of them."]),
    "pretrain with a part of the tokens": (
        ["objective.kind=pretrain", "data.train_on=last_assistant"],
        "data.train_on",
        ["pretrain learns every token"],
    ),
    "tags where there are none": (
        ["data.train.0.format=alpaca", "data.train.0.tags={role_tag: from}"],
        "data.train.0.tags",
        ["which has no tags"],
    ),
    "split of a file": (["data.train.0.split=train"], "data.train.0.split", ["only a hub dataset has a split"]),
    "subset of a file": (["data.train.0.subset=en"], "data.train.0.subset", ["only a hub dataset has a subset"]),
    "revision of a folder": (
        ["model.name=./m", "model.revision=main"],
        "model.revision",
        ["only a hub model has revisions"],
    ),
    "half precision twice": (["model.dtype=bf16", "train.precision=fp16"], "train.precision", ["auto or bf16"]),
    "fp16 on the CPU": (["cluster.accelerator=cpu", "train.precision=fp16"], "train.precision", ["on the CPU"]),
    "Liger on the CPU": (["cluster.accelerator=cpu", "model.liger=true"], "model.liger", ["need a GPU"]),
    "flash attention on the CPU": (
        ["cluster.accelerator=cpu", "model.attention=varlen"],
        "model.attention",
        ["auto, sdpa or eager"],
    ),
    "flex attention on the CPU, which has no backward pass": (
        ["cluster.accelerator=cpu", "model.attention=flex"],
        "model.attention",
        ["auto, sdpa or eager", "cluster.accelerator = cpu", "Write auto."],
    ),
    "GPU memory on the CPU": (
        ["cluster.accelerator=cpu", "cluster.gpu_memory_gib=8"],
        "cluster.gpu_memory_gib",
        ["null with"],
    ),
    "data file that is not there": (
        ["data.train.0.path=chta.jsonl"],
        "data.train.0.path",
        ["a file or folder that exists", "Did you mean 'chat.jsonl'?"],
    ),
    "data below a folder that is not there": (
        ["data.train.0.path=./no/x.jsonl"],
        "data.train.0.path",
        ["There is no no in"],
    ),
    "glob without a match": (["data.train.0.path=*.parquet"], "data.train.0.path", ["files that match"]),
    "data file of another kind": (["data.train.0.path=./recipe.yaml"], "data.train.0.path", [".jsonl", ".parquet"]),
    "folder without data": (["data.train.0.path=empty"], "data.train.0.path", ["a folder with data files"]),
    "path with too many parts for a hub id": (
        ["data.train.0.path=a/b/c"],
        "data.train.0.path",
        ["a path that exists, or a hub id"],
    ),
    "evaluation file that is not there": (["data.eval=[{path: e.jsonl}]"], "data.eval.0.path", ["that exists"]),
    "model folder that is not there": (["model.name=../nowhere"], "model.name", ["a folder that exists, or a hub id"]),
    "model folder without a config": (["model.name=./empty"], "model.name", ["a folder with config.json"]),
    "tokenizer folder without a tokenizer": (["model.tokenizer=./empty"], "model.tokenizer", ["tokenizer.json"]),
    "model that is no id": (["model.name=my model"], "model.name", ["hub id as org/name"]),
    "template that is not there": (["data.chat_template=chat.jinja"], "data.chat_template", ["a Jinja chat template"]),
    "run folder that is a file": (["run.dir=chat.jsonl"], "run.dir", ["a folder, this is a file"]),
    "run name with a folder": (["run.name=a/b"], "run.name", ["Put the path into run.dir."]),
    "model by name and by config": (
        ["model={name: a/b, config: {model_type: llama}, tokenizer: a/b}"],
        "model.name",
        ["either"],
    ),
    "config without a tokenizer": (["model.config={model_type: llama}"], "model.tokenizer", ["brings no tokenizer"]),
    "config without a type": (
        ["model.config={hidden_size: 8}", "model.tokenizer=a/b"],
        "model.config",
        ["model_type: llama"],
    ),
    "value of a secret": (["cluster.env=[KEY=secret]"], "cluster.env", ["the name of a variable"]),
    "no nodes": (["cluster.nodes=0"], "cluster.nodes", ["1 node or more"]),
    "empty sources": (["data.train=[]"], "data.train", ["at least one source"]),
    "offload of half the state": (["strategy.offload.params=cpu"], "strategy.offload.optimizer", ["set both"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_broken_rule_names_the_key_what_is_allowed_and_the_fix(here: Path, name: str):
    overrides, key, says = CASES[name]
    (here / "empty").mkdir()
    found = [problem for problem in problems(here, *overrides) if problem.key == key]
    assert found, problems(here, *overrides)
    for part in says:
        assert part in str(found[0])
    assert "secret" not in str(found[0])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.global_batch_size=64", "cluster.nodes=2", "cluster.nproc_per_node=8", "strategy.shard=8"],
        ["strategy.replicate=2", "strategy.shard=4", "cluster.nproc_per_node=8"],
        ["strategy.kind=ddp", "strategy.replicate=2", "strategy.shard=1", "cluster.nproc_per_node=2"],
        ["train.eval_every_steps=100", "data.eval_fraction=0.1"],  # longer than the run: it evaluates at the end
        ["checkpoint.every_steps=500", "train.max_steps=5"],  # likewise
        ["checkpoint.every_minutes=10", "checkpoint.every_steps=4", "checkpoint.keep_every_steps=6"],
        ["objective.kind=pretrain", "data.train.0.format=text"],
        ["objective.kind=pretrain", "data.train_on=all"],
        ["data.train.0.path=org/data", "data.train.0.split=train", "data.train.0.subset=en"],
        ["data.train.0.path=squad"],
        ["data.train.0.path=more"],
        ["data.train.0.path=m*/**/*.jsonl"],
        ["data.train.0.path=./chat.jsonl"],
        ["model.revision=main"],
        ["cluster.accelerator=cpu", "model.attention=sdpa", "train.precision=bf16"],
        ["cluster.env=[WANDB_API_KEY, HF_TOKEN]"],
        ["run.dir=not/yet/there"],
    ],
    ids=lambda overrides: " ".join(overrides) or "as it is",
)
def test_a_good_recipe_has_no_problem(here: Path, overrides: list[str]):
    (here / "more" / "deep").mkdir(parents=True)
    (here / "more" / "deep" / "b.jsonl").write_text("{}\n")
    assert problems(here, *overrides) == []


def test_a_problem_of_a_rule_points_at_the_line_of_its_key(here: Path):
    text = (
        GOOD.replace("global_batch_size: 8", "global_batch_size: 7")
        + "strategy: {shard: 3}\ncluster:\n  nproc_per_node: 2\n"
    )
    write(here, text)
    with pytest.raises(RecipeError) as error:
        load("recipe.yaml")
    assert str(error.value) == (
        "recipe.yaml: 2 problems\n"
        "  line 5: train.global_batch_size = 7: expected a multiple of 2 (1 row x 2 ranks). Nearest: 8.\n"
        "  line 6: strategy.shard = 3: expected a divisor of the world size 2 (1 node x 2). Use 2."
    )


def test_rules_still_run_when_another_section_is_broken(here: Path):
    keys = {
        problem.key
        for problem in problems(
            here, "optimizer.lr=x", "strategy.shard=3", "train.global_batch_size=7", "cluster.nproc_per_node=2"
        )
    }
    assert keys == {"optimizer.lr", "strategy.shard", "train.global_batch_size"}


def test_a_rule_is_left_out_when_a_key_it_reads_is_broken(here: Path):
    assert [problem.key for problem in problems(here, "cluster.nodes=x", "strategy.shard=3")] == ["cluster.nodes"]


def test_rows_longer_than_the_models_positions_are_refused(here: Path):
    text = RANDOM.replace("model_type", "max_position_embeddings: 64, model_type")
    (problem,) = problems(here, text=text)
    assert (problem.key, problem.fix) == ("data.seq_len", "Write 64.")
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 100}))
    (problem,) = problems(here, "model.name=./model")
    assert "at most the 100 positions" in problem.expected


def test_a_model_that_cannot_fit_the_gpu_is_refused_with_the_memory_it_needs(here: Path):
    big = RANDOM.replace("hidden_size: 64, intermediate_size: 128", "hidden_size: 4096, intermediate_size: 16384")
    keys = [problem.key for problem in problems(here, "cluster.gpu_memory_gib=8", text=big)]
    assert keys == ["cluster.gpu_memory_gib"]
    assert problems(here, "cluster.gpu_memory_gib=80", text=big) == []
    offload = "strategy.offload={params: cpu, optimizer: cpu}"
    assert problems(here, "cluster.gpu_memory_gib=8", offload, text=big) == []


def test_an_architecture_that_does_not_add_up_is_a_problem_of_the_config(here: Path):
    (problem,) = problems(here, text=RANDOM.replace("hidden_size: 64", "hidden_size: wide"))
    assert problem.key == "model.config.hidden_size"
    assert problem.where == "recipe.yaml:1"


def test_every_problem_rests_on_keys_that_exist(here: Path):
    (here / "empty").mkdir()
    for overrides, _, _ in CASES.values():
        for problem in problems(here, *overrides):
            named = {key.removeprefix("model.config.") for key in problem.because} - {"model_type"}
            assert named <= set(known_keys()), problem


def test_a_bare_word_is_a_hub_id_until_something_of_that_name_exists(here: Path):
    assert problems(here, "model.name=gpt2") == []
    (here / "gpt2").mkdir()
    (problem,) = problems(here, "model.name=gpt2")
    assert "config.json" in problem.expected


def test_a_tokenizer_may_be_one_tokenizer_file(here: Path):
    (here / "tokenizer.json").write_text("{}")
    assert loaded(here, "model.tokenizer=tokenizer.json").recipe.model.tokenizer == str(here / "tokenizer.json")


def test_a_tilde_is_the_home_folder(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(here))
    assert loaded(here, "data.train.0.path=~/chat.jsonl").recipe.data.train[0].path == str(here / "chat.jsonl")
    (problem,) = problems(here, "data.train.0.path=~/chta.jsonl")
    assert problem.fix == "Did you mean 'chat.jsonl'?"


def test_a_folder_above_the_model_says_where_the_model_is(here: Path):
    (here / "run" / "final").mkdir(parents=True)
    (here / "run" / "final" / "config.json").write_text("{}")
    (problem,) = problems(here, "model.name=./run")
    assert problem.fix.endswith("run/final?")


def test_a_runs_own_recipe_need_not_divide_and_is_not_changed_by_the_environment(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    """The global batch stays what it is when a run goes on with another number of ranks (L5)."""
    from launcher.recipe.read import dump
    from launcher.recipe.schema import to_dict

    stored = write(here, dump(to_dict(loaded(here, "objective.kind=pretrain").recipe)), name="runs/recipe/recipe.yaml")
    assert load(stored).recipe == load(stored, new=False).recipe
    with pytest.raises(RecipeError, match="a multiple of 3"):
        load(stored, ["cluster.nproc_per_node=3"])
    assert load(stored, ["cluster.nproc_per_node=3"], new=False).recipe.train.global_batch_size == 8
    with pytest.raises(RecipeError, match="a divisor"):
        load(stored, ["cluster.nproc_per_node=3", "strategy.shard=2"], new=False)
    monkeypatch.setenv("LAUNCHER_CLUSTER", "cpu2")
    assert load(stored).recipe.cluster.nproc_per_node == 2
    assert load(stored, new=False).recipe.cluster.nproc_per_node == 1


def test_a_huge_world_is_checked_at_once(here: Path):
    assert problems(here, "cluster.nodes=1000003", "cluster.nproc_per_node=8", "train.global_batch_size=8000024") == []


def test_a_shipped_chat_template_goes_by_its_name_and_a_wrong_name_is_told_the_right_ones(here: Path):
    assert loaded(here, "data.chat_template=chatml").recipe.data.chat_template == "chatml"
    with pytest.raises(RecipeError, match=r"one of .*chatml.*Did you mean 'chatml'\?"):
        loaded(here, "data.chat_template=chatlm")


def test_what_stands_behind_the_mark_of_a_path_stays_and_an_unknown_entry_names_the_nearest(here: Path):
    (here / "dataset_info.json").write_text('{"identity": {"file_name": "chat.jsonl"}}')
    sources = "[{path: 'dataset_info.json#identity'}, {path: 'chat.jsonl#5'}, {path: 'org/data#7'}, {path: 's3://b/x'}]"
    recipe = loaded(here, f"data.train={sources}").recipe
    paths = [f"{here}/dataset_info.json#identity", f"{here}/chat.jsonl#5", "org/data#7", "s3://b/x"]
    assert [source.path for source in recipe.data.train] == paths
    with pytest.raises(RecipeError, match=r"data set behind the #, as identity\. Did you mean 'identity'\?"):
        loaded(here, "data.train=[{path: 'dataset_info.json#identiti'}]")


def test_a_compressed_file_is_a_data_file(here: Path):
    (here / "chat.jsonl.gz").write_bytes(b"")
    assert loaded(here, "data.train=[{path: chat.jsonl.gz}]").recipe.data.train[0].path == str(here / "chat.jsonl.gz")


@pytest.mark.parametrize("format", ["sharegpt", "preference", "unpaired"])
def test_answers_to_compare_may_be_messages_with_tags(here: Path, format: str):
    loaded(here, f"data.train.0.format={format}", "data.train.0.tags={role_tag: who}")


@pytest.mark.parametrize("path", ["chat.jsonl", "chat.jsonl#5"])
def test_a_file_has_no_split(here: Path, path: str):
    with pytest.raises(RecipeError, match="only a hub dataset has a folder, this is a file"):
        loaded(here, f"data.train=[{{path: '{path}', folder: x}}]")


def test_a_chat_template_that_is_no_jinja_is_named_with_its_line(here: Path):
    for text, said in (("a\n{{ b | nofilter }}", "line 2: No filter named 'nofilter'"), ("{% for m", "line 1: ")):
        (here / "chat.jinja").write_text(text)
        (problem,) = problems(here, "data.chat_template=chat.jinja")
        assert problem.key == "data.chat_template"
        assert said in problem.expected
    blocks = "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}"
    (here / "chat.jinja").write_text(blocks)
    assert problems(here, "data.chat_template=chat.jinja") == []
