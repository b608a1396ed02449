"""What each mistake in a recipe's text or arguments is answered with: the key, the place, what is allowed, the fix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.recipe.check import load
from tests.recipe.make import GOOD, write


@dataclass
class Bad:
    """A mistake and parts of its answer.

    text: appended to a good recipe of five lines, or the whole recipe when it starts with `model:` or is no mapping
    """

    text: str = ""
    arguments: tuple[str, ...] = ()
    key: str = ""
    where: str = ""
    says: tuple[str, ...] = ()
    whole: bool = False


def arg(argument: str, key: str, *says: str) -> Bad:
    return Bad(arguments=(argument,), key=key, says=says)


def line(text: str, key: str, *says: str, at: int = 6) -> Bad:
    return Bad(text=text, key=key, where=f"recipe.yaml:{at}", says=says)


def whole(text: str, key: str, where: str, *says: str) -> Bad:
    return Bad(text=text, key=key, where=where, says=says, whole=True)


CASES = {
    # keys nobody knows
    "misspelt key": line(
        "optimizer:\n  weight_decya: 0.1\n", "optimizer.weight_decya", "Did you mean optimizer.weight_decay?", at=7
    ),
    "misspelt section": line("optimiser: {lr: 1e-3}\n", "optimiser", "expected a section", "Did you mean optimizer?"),
    "key of another section": line("checkpoint: {lr: 1e-3}\n", "checkpoint.lr", "Did you mean optimizer.lr?"),
    "key without its section": line("max_grad_norm: 1\n", "max_grad_norm", "Did you mean train.max_grad_norm?"),
    "another trainer's name": line(
        "checkpoint: {save_steps: 5}\n", "checkpoint.save_steps", "Did you mean checkpoint.every_steps?"
    ),
    "another trainer's name of an adapter's key": arg(
        "adapter.lora_r=8", "adapter.lora_r", "Did you mean adapter.rank?"
    ),
    "another trainer's stage": line("zero_stage: 2\n", "zero_stage", "Did you mean strategy.kind?"),
    "accumulation": arg(
        "train.gradient_accumulation_steps=4", "train.gradient_accumulation_steps", "train.global_batch_size"
    ),
    "key inside a list item": arg("data.train.0.formt=auto", "data.train.0.formt", "Did you mean data.train.0.format?"),
    "key two levels down": arg(
        "strategy.offload.param=cpu", "strategy.offload.param", "Did you mean strategy.offload.params?"
    ),
    "key like nothing": arg("train.qqqq=1", "train.qqqq", "this one is unknown", "There are: global_batch_size"),
    "dash for underscore": arg("train.max-steps=5", "train.max-steps", "Did you mean train.max_steps?"),
    # types
    "text for a number": arg("train.max_steps=many", "train.max_steps", "expected a whole number"),
    "quoted number": line(
        'optimizer: {lr: "1e-5"}\n', "optimizer.lr", "expected a number", "Write 1e-5, without quotes"
    ),
    "number with commas": arg('train.seed="1,000"', "train.seed", "Write 1000"),
    "fraction for a whole number": arg("train.max_steps=2.5", "train.max_steps", "expected a whole number"),
    "whole float": arg("train.max_steps=1e3", "train.max_steps", "Write 1000."),
    "truth value for a number": arg("train.max_steps=true", "train.max_steps", "expected a whole number"),
    "number for a truth value": arg("model.compile=1", "model.compile", "expected true or false", "Write true"),
    "quoted truth value": arg("model.compile='false'", "model.compile", "Write false, without quotes"),
    "number for a word": arg("run.name=2024", "run.name", "expected text", "Put it in quotes: '2024'."),
    "commit that looks like a number": arg("model.revision=1e10", "model.revision", "expected text", "in quotes"),
    "word that is not allowed": arg(
        "strategy.kind=fsdp", "strategy.kind", "expected ddp, fsdp2, zero1, zero2 or zero3", "Did you mean 'fsdp2'?"
    ),
    "quoted literal truth": arg("model.liger='true'", "model.liger", "auto, true or false", "without quotes"),
    "one for true": arg("model.liger=1", "model.liger", "auto, true or false"),
    "word not allowed in a list": arg(
        "logging.trackers=[tensorbord]", "logging.trackers.0", "Did you mean 'tensorboard'?"
    ),
    "null where a value must be": arg("train.seed=null", "train.seed", "train.seed = null", "expected a whole number"),
    "null section": line("strategy:\n", "strategy", "the name of a preset, or a mapping with the keys kind"),
    "list for a section": line(
        "strategy: [ddp, {a: null}]\n", "strategy", "= [ddp, {a: null}]: expected the name of a preset, or a mapping"
    ),
    "word for a mapping": arg(
        "strategy.offload=cpu", "strategy.offload", "a mapping with the keys optimizer, params, nvme_path"
    ),
    "word for a list": arg("run.tags=a", "run.tags", "a list of words", "Write [a]."),
    "path for the list of sources": arg("data.train=x.jsonl", "data.train", "Write [{path: x.jsonl}]."),
    "path for a source": arg("data.train=[x.jsonl]", "data.train.0", "a mapping with the keys path"),
    "number in a mapping of words": arg(
        "data.train.0.columns={prompt: 5}", "data.train.0.columns.prompt", "expected text"
    ),
    "not finite": arg("optimizer.lr=.inf", "optimizer.lr", "a finite number"),
    "not a number": arg("optimizer.weight_decay=.nan", "optimizer.weight_decay", "a finite number"),
    "word among numbers": arg("optimizer.betas=[0.9, x]", "optimizer.betas.1", "expected a number"),
    # missing
    "no batch size": whole(
        GOOD.replace("global_batch_size: 8, ", ""),
        "train.global_batch_size",
        "recipe.yaml:5",
        "rows in one optimizer step",
    ),
    "question marks": arg("data.seq_len='???'", "data.seq_len", "longest row, in tokens", "no default"),
    "source without a path": arg("data.eval=[{format: text}]", "data.eval.0.path", "hub dataset id"),
    "no section at all": whole(
        "model: {name: org/model}\ntrain: {global_batch_size: 8, max_steps: 1}\n", "data.seq_len", "", "longest row"
    ),
    # YAML
    "yes": line("model: yes\n".replace("model", "checkpoint"), "checkpoint", "true or false", "Write true or false"),
    "off as a value": line("checkpoint: {async_save: off}\n", "checkpoint.async_save", "Write true or false"),
    "No in a list": line("run: {tags: [No]}\n", "run.tags.0", 'in quotes: "No"'),
    "hours and minutes": line("cluster: {time_limit_min: 12:00:00}\n", "cluster.time_limit_min", "as 720 for 12 hours"),
    "leading zeros": line("run: {name: 007}\n", "run.name", 'Write 7, or "007" in quotes'),
    "duplicate key": whole(
        GOOD.replace("max_steps: 10", "max_steps: 1, max_steps: 2"), "train.max_steps", "recipe.yaml:5", "each key once"
    ),
    "duplicate section": line("train: {seed: 1}\n", "train", "each key once", "already given in recipe.yaml:5"),
    "tag": line("run: {name: !!python/name:os.system x}\n", "run.name", "without a YAML tag"),
    "merge key": line("run: {<<: {name: x}}\n", "run.<<", "extends"),
    "alias to itself": line("run: {tags: &a [*a]}\n", "run.tags.0", "an alias that does not hold itself"),
    "list as key": line("run: {[a]: b}\n", "run", "a word as key"),
    "broken YAML": line("run: {name: x\n", "recipe", "valid YAML", at=7),
    "tab": line("run:\n\tname: x\n", "recipe", "valid YAML", at=7),
    "two documents": line("---\nrun: {}\n", "recipe", "valid YAML"),
    "a list as recipe": whole("- a\n- b\n", "recipe", "recipe.yaml:1", "keys and values"),
    "a word as recipe": whole("hello\n", "recipe", "recipe.yaml:1", "keys and values"),
    # presets and extends
    "unknown preset": line(
        "strategy: fsdp3\n",
        "strategy",
        "a preset of strategy (ddp, fsdp2, fsdp2-offload, hsdp, zero1, zero2, zero2-offload, zero3, ",
        "Did you mean 'fsdp2'?",
    ),
    "hub id as model preset": whole(
        GOOD.replace("{name: org/model}", "org/model"), "model", "recipe.yaml:1", "write model: {name: org/model}"
    ),
    "preset is a list": line("strategy: {preset: [ddp]}\n", "strategy.preset", "the name of a preset"),
    "base that is not there": line(
        "extends: recpe.yaml\n", "extends", "a recipe file, relative to", "Did you mean 'recipe.yaml'?"
    ),
    "two bases": line("extends: [a.yaml, b.yaml]\n", "extends", "A recipe extends one other."),
    "itself as base": line("extends: recipe.yaml\n", "extends", "no circle"),
    # interpolation
    "environment variable": line(
        'run: {name: "${oc.env:HOME}"}\n', "run.name", "reads nothing from outside", "cluster.env"
    ),
    "key that is not there": line('run: {name: "${model.nam}"}\n', "run.name", "the name of another key"),
    "interpolation in a circle": line(
        'run: {name: "${run.dir}", dir: "${run.name}"}\n', "run.name", "the name of another key"
    ),
    "missing behind interpolation": line(
        'checkpoint: {every_steps: "${train.epochs.x}"}\n', "checkpoint.every_steps", "the name of another key"
    ),
    "wrong type behind interpolation": line('train.seed: "x"\n', "train.seed", "unknown"),
    # arguments
    "deletion": arg("~train.max_steps", "~train.max_steps", "write train.max_steps=null"),
    "addition": arg("+train.seed=1", "+train.seed", "Write train.seed=1, without a sign"),
    "option": arg("--train.seed=1", "--train.seed", "Write train.seed=1, without a sign"),
    "no equals sign": arg("train.seed", "train.seed", "KEY=VALUE"),
    "nothing after equals": arg("train.seed=", "train.seed", "a value after =", "train.seed=null"),
    "second recipe": arg("other.yaml", "other.yaml", "extends"),
    "spaces around equals": arg("train.seed = 1", "train.seed ", "KEY=VALUE"),
    "broken value": arg("run.tags=[a", "run.tags", "valid YAML", "Quote the value."),
    "index out of reach": arg(
        "data.train.3.path=x.jsonl", "data.train.3", "an index from 0 to 1", "Write data.train.1"
    ),
    "yes as argument": arg("model.compile=yes", "model.compile", "Write true or false"),
    "extends as argument": arg("extends=base.yaml", "extends", "in the recipe's file"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named_with_its_place_and_what_is_allowed(here: Path, name: str):
    case = CASES[name]
    write(here, case.text if case.whole else GOOD + case.text)
    with pytest.raises(RecipeError) as error:
        load("recipe.yaml", case.arguments)
    found = [problem for problem in error.value.problems if problem.key == case.key]
    assert found, str(error.value)
    text = str(found[0])
    for part in case.says:
        assert part in text
    if case.arguments and found[0].where:
        assert found[0].where == f"argument {case.arguments[0]}"
    elif not case.arguments:
        assert found[0].where == case.where


def test_a_number_below_zero_is_not_told_to_become_text(here: Path):
    """In quotes it would be refused in turn: no size or name begins so."""
    write(here, GOOD)
    with pytest.raises(RecipeError, match=r"cluster\.kubernetes\.shm = -1: expected text\.$"):
        load("recipe.yaml", ["cluster.kubernetes.shm=-1"])


def test_a_section_of_the_wrong_shape_below_keys_of_it_above_is_no_crash(here: Path):
    write(here, GOOD.replace("{global_batch_size: 8, max_steps: 10}", "[a]"), name="base.yaml")
    write(here, "extends: base.yaml\ntrain: {max_steps: 3}\n")
    with pytest.raises(RecipeError, match=r"train\.global_batch_size = \(missing\)"):
        load("recipe.yaml", ["train.epochs=2"])


def test_one_mistake_makes_one_problem(here: Path):
    several = {"no section at all", "interpolation in a circle", "wrong type behind interpolation"}
    for name, case in CASES.items():
        write(here, case.text if case.whole else GOOD + case.text)
        with pytest.raises(RecipeError) as error:
            load("recipe.yaml", case.arguments)
        if name not in several and not (case.whole and "model" not in case.text) and case.key != "recipe":
            assert len(error.value.problems) == 1, f"{name}: {error.value}"


def test_all_problems_are_told_at_once_in_the_order_of_the_sections(here: Path):
    text = (
        GOOD.replace("8", "7") + "lr: 1\ncluster: {nodes: 0, time_limit_min: 1:30}\nstrategy: {kind: zero, shard: -1}\n"
    )
    write(here, text)
    with pytest.raises(RecipeError) as error:
        load("recipe.yaml", ["optimizer.lr=-1", "run.name=a/b"])
    keys = [problem.key for problem in error.value.problems]
    assert keys == [
        "lr", "run.name", "optimizer.lr", "strategy.kind", "strategy.shard", "cluster.time_limit_min", "cluster.nodes",
    ]  # fmt: skip
    assert error.value.key == "lr"
    assert str(error.value).startswith("recipe.yaml: 7 problems\n  line 6: lr = 1: expected a section")


def problems(here: Path, text: str, *overrides: str) -> dict[str, str]:
    """Key and text of every problem."""
    write(here, text)
    with pytest.raises(RecipeError) as error:
        load("recipe.yaml", overrides)
    return {problem.key: str(problem) for problem in error.value.problems}


def test_an_empty_recipe_is_told_all_that_it_needs_in_one_round(here: Path):
    found = problems(here, "# nothing yet\n")
    assert list(found) == ["model.name", "data.seq_len", "data.train", "train.global_batch_size", "train.max_steps"]
    needed = ["model.name=a/b", "data.seq_len=8", "data.train=[{path: chat.jsonl}]", "train.global_batch_size=1"]
    load("recipe.yaml", [*needed, "train.max_steps=1"])


def test_what_was_meant_by_an_unknown_key_is_not_called_missing(here: Path):
    found = problems(here, "model: {name: a/b}\ndataset: x\ntrain: {epoch: 1, batch_size: 8}\ndata: {max_length: 8}\n")
    assert set(found) == {"dataset", "train.epoch", "train.batch_size", "data.max_length"}


def test_a_base_that_cannot_be_read_may_hold_all_that_is_not_given(here: Path):
    assert set(problems(here, "extends: nowhere.yaml\noptimizer: {lr: -1}\n")) == {"extends", "optimizer.lr"}


@pytest.mark.parametrize("text", ["nan", "NaN", ".nan", "inf", "-inf", ".inf", "Infinity", "1e999"])
@pytest.mark.parametrize("key", ["optimizer.lr", "optimizer.betas", "train.epochs", "data.train.0.weight"])
def test_a_number_that_is_not_finite_is_refused_as_that(here: Path, key: str, text: str):
    given = f"{key}=[{text}, 0.9]" if key == "optimizer.betas" else f"{key}={text}"
    ((_, said),) = problems(here, GOOD, given).items()
    assert said.endswith("expected a finite number.")


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("train.max_steps=5,6", ""),
        ("train.max_steps=1,0000", ""),
        ("train.max_steps=nan", ""),
        ("train.max_steps='5.5'", ""),
        ("train.max_steps=10,000", "Write 10000, without commas."),
        ("train.max_steps='10'", "Write 10, without quotes."),
        ("train.max_steps='1e3'", "Write 1000, without quotes."),
        ("optimizer.lr='1e-5'", "Write 1e-5, without quotes."),
        ("optimizer.lr=1,5", ""),
    ],
)
def test_a_number_is_suggested_only_where_it_is_plain_which(here: Path, given: str, fix: str):
    ((_, said),) = problems(here, GOOD, given).items()
    assert said.endswith(f"number. {fix}" if fix else "number.")


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.max_steps=-1", "optimizer.warmup_steps=5"],
        ["train.max_steps=x", "optimizer.warmup_steps=5"],
        ["train.epochs=x", "train.max_steps=null"],
        ["train.micro_batch_size=0"],
        ["cluster.nproc_per_node=x", "train.global_batch_size=7", "strategy.shard=3"],
        ["optimizer.betas=[x, 0.9]"],
        ["strategy.offload.params=x", "strategy.offload.optimizer=cpu"],
        ["data.eval_fraction=x", "train.eval_every_steps=2"],
    ],
    ids=" ".join,
)
def test_nothing_is_said_that_only_follows_from_another_mistake(here: Path, overrides: list[str]):
    assert len(problems(here, GOOD, *overrides)) == 1


def test_a_recipe_that_is_not_there_names_the_nearest_one(here: Path):
    write(here, name="chat-sft.yaml")
    with pytest.raises(RecipeError, match=r"chat-stf.yaml: expected a recipe file.*Did you mean 'chat-sft.yaml'\?"):
        load("chat-stf.yaml")
    with pytest.raises(RecipeError, match=r"Did you mean 'tiny-cpu'\?"):
        load("tiny-cpus")


def test_a_file_that_is_not_text_is_a_problem_not_a_traceback(here: Path):
    (here / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(RecipeError, match=r"not UTF-8 text"):
        load("binary.yaml")
    (here / "nul.yaml").write_bytes(b"model: {name: \x00}\n")
    with pytest.raises(RecipeError, match="valid YAML"):
        load("nul.yaml")


def test_an_empty_recipe_lists_what_must_be_given(here: Path):
    (here / "empty.yaml").write_text("# nothing yet\n")
    with pytest.raises(RecipeError) as error:
        load("empty.yaml")
    assert {problem.key for problem in error.value.problems} >= {
        "model.name",
        "data.seq_len",
        "train.global_batch_size",
    }
