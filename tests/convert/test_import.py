"""Checkpoints of other tools: every bit of them is taken over, and the run goes on as their own tool would have."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.cli.import_checkpoint import command
from launcher.data.store import Store
from launcher.errors import UserError
from launcher.jobs.importing import import_checkpoint
from launcher.recipe.schema import to_dict
from launcher.run.data import VERSION
from launcher.run.directory import RunDirectory
from launcher.run.ledger import attempts, valid_checkpoints
from launcher.run.state import read_state
from tests import ranks
from tests.convert import sources
from tests.trainer import make
from tests.trainer.checkpoint import rigs

pytestmark = pytest.mark.gloo

TIED = {**make.LLAMA, "tie_word_embeddings": True}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
LORA = {"adapter__kind": "lora", "adapter__rank": 4, "adapter__alpha": 8.0, "adapter__targets": ["q_proj", "down_proj"]}
ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero1-bf16": {"zero_optimization": {"stage": 1}, **BF16},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero2-round-robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "zero2-tied": {"zero_optimization": {"stage": 2}, "tied": True},
    "zero3": {"zero_optimization": {"stage": 3, "sub_group_size": 5000}},
    "zero3-tied-offload": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        "tied": True,
    },
}


def taken(source: Path, folder: Path, name: str, *, weights_only: bool = False, **changes: Any) -> Any:
    """The run that an import made, and what was said."""
    recipe = sources.recipe(run__dir=str(folder), run__name=name, **changes)
    said: list[str] = []
    return import_checkpoint(source, recipe, weights_only=weights_only, say=said.append), said


def go_on(run: RunDirectory, store: Path) -> list[float]:
    """Losses of the steps that follow, by a real attempt of the run."""
    opened = Store.open(store)
    part = {"name": "made", "store": str(store), "rows": opened.rows, "epoch_rows": opened.rows}
    data = {
        "version": VERSION, "train": {"sources": [part]}, "eval": None, "vocab_size": make.VOCAB, "total_rows": None,
        "global_batch_size": 4, "total_steps": sources.STEPS,
    }  # fmt: skip
    run.data_file.write_text(json.dumps(data))
    assert make.run_attempt(run, 1) == [("finished", sources.STEPS)]
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def require_equal(run: RunDirectory, truth: dict[str, Any]) -> None:
    """The run's only checkpoint holds what the source's own library showed at the save, bit by bit."""
    (checkpoint,) = valid_checkpoints(run)
    assert (checkpoint.step, checkpoint.attempt) == (sources.SAVED, 1)
    stored = {key: tensor.numpy() for key, tensor in rigs.read_back(checkpoint.path).items()}
    assert {name for name, _ in stored} == {name for name, _ in truth["state"]}
    assert {kind for _, kind in stored} == {"value", "exp_avg", "exp_avg_sq"}
    for key, array in truth["state"].items():
        assert np.array_equal(stored[key], array), key
        assert array.any(), "nothing would be proven by zeros"


def require_goes_on(run: RunDirectory, truth: dict[str, Any], store: Path, *, rel: float = 1e-5) -> None:
    """The next two losses are those of the source."""
    losses = go_on(run, store)
    assert len(losses) == 2
    assert losses == pytest.approx(truth["losses"], rel=rel)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A store, and beside it what the sources save."""
    made: Path = tmp_path_factory.mktemp("sources")
    make.documents_store(made)
    return made


@pytest.fixture(scope="module")
def zero(folder: Path) -> dict[str, Any]:
    return ranks.run_ranks(sources.deepspeed, 2, folder, ZERO)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def fsdp2(folder: Path) -> dict[str, Any]:
    return ranks.run_ranks(sources.fsdp2, 2, folder)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def trainer(folder: Path) -> dict[str, Any]:
    """Per name: how transformers' Trainer went on from folder/name/checkpoint-3."""
    words = {"plain": {}, "sharded": {"shard": "30KB"}, "lora": {"adapter": True}}
    return ranks.run_ranks(sources.trainers, 1, folder, words)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", ZERO)
def test_deepspeed_checkpoints_of_every_stage_are_taken_over_bit_by_bit(folder, zero, case):
    changes: dict[str, Any] = {"config": TIED} if "tied" in case else {}
    if "bf16" in case:
        changes["train__precision"] = "bf16"
    run, said = taken(folder / case, folder, f"from-{case}", **changes)
    assert said[0] == f"DeepSpeed ZeRO-{case[4]} checkpoint global_step3 of 2 ranks, step 3"
    assert said[1].endswith("parameters, 3 optimizer updates")
    assert said[2].startswith("which rows it has seen is not known")
    require_equal(run, zero[case])
    require_goes_on(run, zero[case], folder / "packed", rel=5e-4 if "bf16" in case else 1e-5)


@pytest.mark.parametrize("form", ["plain", "flat", "accelerate"])
def test_torch_checkpoint_folders_are_taken_over_bit_by_bit(folder, fsdp2, form):
    run, _ = taken(folder / form, folder, f"from-{form}")
    require_equal(run, fsdp2)
    require_goes_on(run, fsdp2, folder / "packed")


def test_a_transformers_checkpoint_is_taken_over_bit_by_bit(folder, trainer):
    run, _ = taken(folder / "trainer-plain" / "checkpoint-3", folder, "from-trainer")
    require_equal(run, trainer["plain"])
    (attempt,) = attempts(run)
    assert (attempt.target, attempt.end_step, read_state(run).status) == ("import", 3, "preempted")
    require_goes_on(run, trainer["plain"], folder / "packed")


def test_a_transformers_checkpoint_in_several_files_is_taken_over_bit_by_bit(folder, trainer):
    source = folder / "trainer-sharded" / "checkpoint-3"
    assert len(list(source.glob("model-*-of-*.safetensors"))) > 2
    require_equal(taken(source, folder, "from-sharded")[0], trainer["sharded"])


def test_a_peft_adapter_of_the_trainer_goes_on_beside_its_base_model(folder, trainer):
    source = folder / "trainer-lora" / "checkpoint-3"
    lora = {**LORA, "model__config": None, "model__name": str(folder / "trainer-lora" / "base")}
    run, said = taken(source, folder, "from-lora", **lora)
    assert "21 frozen parameters are taken from the recipe's base model" in said
    truth = {"losses": trainer["lora"]["losses"], "state": {}}
    for (name, kind), array in trainer["lora"]["state"].items():
        truth["state"][name.removeprefix("base_model.model.").replace(".default", ""), kind] = array
    require_equal(run, truth)
    require_goes_on(run, truth, folder / "packed")


def test_experts_that_lie_otherwise_in_files_than_in_memory_are_taken_over(tmp_path):
    words = {
        **make.LLAMA, "model_type": "qwen3_moe", "moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**words))
    lm.save_pretrained(tmp_path / "checkpoint-3")
    run, _ = taken(tmp_path / "checkpoint-3", tmp_path, "experts", weights_only=True, config=words)
    (checkpoint,) = valid_checkpoints(run)
    stored = rigs.read_back(checkpoint.path)
    assert any(p.dim() == 3 for p in lm.parameters()), "no fused experts, nothing to prove"
    assert all(torch.equal(stored[name, "value"], p) for name, p in lm.named_parameters())


def test_weights_without_optimizer_are_taken_only_when_asked_for(folder, fsdp2):
    with pytest.raises(UserError) as caught:
        taken(folder / "weights", folder, "unasked")
    assert str(caught.value) == (
        f"{folder / 'weights'}: lacks the optimizer's moments: it holds no optimizer state. "
        "With --weights-only the weights are taken and the optimizer starts anew."
    )
    assert not (folder / "unasked").exists()
    run, said = taken(folder / "weights", folder, "asked", weights_only=True)
    assert "weights of 21 parameters; the optimizer starts anew" in said
    (checkpoint,) = valid_checkpoints(run)
    stored = rigs.read_back(checkpoint.path)
    assert checkpoint.step == 0
    for (name, kind), array in fsdp2["state"].items():
        assert np.array_equal(stored[name, kind].numpy(), array if kind == "value" else np.zeros_like(array))


def refusal(source: Path, folder: Path, **changes: Any) -> str:
    """The message, after proving that no run was left behind."""
    with pytest.raises(UserError) as caught:
        taken(source, folder, "refused", **changes)
    assert not (folder / "refused").exists()
    return str(caught.value)


def copied(source: Path, target: Path, *leave_out: str) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*leave_out))
    return target


def test_missing_files_are_named(tmp_path, folder, zero, trainer, fsdp2):
    lost = copied(folder / "zero2", tmp_path / "a", "*pp_rank_1_*optim*")
    assert "was written by 2 ranks; missing: zero_pp_rank_1_mp_rank_00_optim_states.pt" in refusal(lost, tmp_path)
    lost = copied(folder / "zero3", tmp_path / "b", "*pp_rank_0_*optim*")
    assert "the optimizer states of ranks [0] are missing" in refusal(lost, tmp_path)
    lost = copied(folder / "zero3", tmp_path / "c", "*pp_rank_1_*model*")
    assert "zero_pp_rank_1_mp_rank_00_model_states.pt is missing" in refusal(lost, tmp_path)
    (file, *_) = sorted((folder / "trainer-sharded" / "checkpoint-3").glob("model-*.safetensors"))
    lost = copied(file.parent, tmp_path / "d", file.name)
    assert f"{file.name}: named in model.safetensors.index.json, but missing" in refusal(lost, tmp_path)
    lost = copied(folder / "plain", tmp_path / "e", "__1_0.distcp")
    assert "__1_0.distcp: named in .metadata, but missing" in refusal(lost, tmp_path)
    lost = copied(folder / "trainer-plain" / "checkpoint-3", tmp_path / "f", "optimizer.pt")
    assert "lacks the optimizer's moments: it holds no optimizer.pt" in refusal(lost, tmp_path)
    lost = copied(folder / "trainer-plain" / "checkpoint-3", tmp_path / "g", "trainer_state.json")
    assert "does not say after how many steps it was written" in refusal(lost, tmp_path)
    lost = copied(folder / "zero2", tmp_path / "h")
    (lost / "latest").write_text("global_step9")
    assert "`latest` names global_step9, which is not there" in refusal(lost, tmp_path)


def test_damaged_files_are_named(tmp_path, folder, zero, trainer, fsdp2):
    for source, name in (
        (folder / "zero2", "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        (folder / "trainer-plain" / "checkpoint-3", "optimizer.pt"),
        (folder / "trainer-plain" / "checkpoint-3", "model.safetensors"),
        (folder / "plain", ".metadata"),
        (folder / "plain", "__0_0.distcp"),
    ):
        bad = copied(source, tmp_path / name.replace("/", "-"))
        content = (bad / name).read_bytes()
        (bad / name).write_bytes(content[: len(content) // 2])
        assert f"{Path(name).name}: cannot be read" in refusal(bad, tmp_path), name


def test_files_of_another_content_than_their_tools_are_refused_in_words(tmp_path, folder, zero, trainer, fsdp2):
    from collections import Counter  # a class of which nothing is read

    trained, staged = folder / "trainer-plain" / "checkpoint-3", folder / "zero2"
    optimizer = torch.load(trained / "optimizer.pt", weights_only=False)
    partition = "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    state = torch.load(staged / partition, weights_only=False)["optimizer_state_dict"]
    described, model = "global_step3/mp_rank_00_model_states.pt", {"module": {}, "param_shapes": [], "global_steps": 3}
    for number, (source, name, content, said) in enumerate([
        (trained, "optimizer.pt", [1], "optimizer.pt: is a list, expected a mapping with state."),
        (trained, "optimizer.pt", {"param_groups": []}, "optimizer.pt: state is missing, expected a mapping."),
        (trained, "optimizer.pt", {**optimizer, "state": [1]}, "optimizer.pt: state is a list, expected a mapping."),
        (trained, "optimizer.pt", {**optimizer, "state": Counter(a=1)},
         "optimizer.pt: state is an object of Counter, of which nothing is read, expected a mapping."),
        (trained, "optimizer.pt", {**optimizer, "state": {0: 5}}, "optimizer.pt: 0 is a whole number, expected a map"),
        (trained, "optimizer.pt", {**optimizer, "param_groups": [{}]}, "optimizer.pt: params is missing, expected a l"),
        (staged, partition, 5, "optim_states.pt: is a whole number, expected a mapping with optimizer_state_dict."),
        (staged, partition, {"optimizer_state_dict": None}, "optimizer_state_dict is null, expected a mapping."),
        (staged, partition, {"optimizer_state_dict": {**state, "base_optimizer_state": 5}}, "is damaged or not laid"),
        (staged, described, {**model, "param_shapes": {}}, "param_shapes is a mapping, expected a list."),
        (staged, described, {**model, "param_shapes": [5]}, f"{staged.name}: is damaged or not laid out as its tool"),
    ]):  # fmt: skip
        bad = copied(source, tmp_path / str(number) / source.name)
        torch.save(content, bad / name)
        assert said in refusal(bad, tmp_path), content
    for source, name, content, said in (
        (trained, "trainer_state.json", b"{", "trainer_state.json: cannot be read"),
        (trained, "trainer_state.json", b"[]", "trainer_state.json: cannot be read"),
        (folder / "plain", ".metadata", pickle.dumps({}), ".metadata: is of type dict, expected torch's Metadata."),
        (folder / "trainer-sharded" / "checkpoint-3", "model.safetensors.index.json", b'{"weight_map": {"a": 5}}',
         "checkpoint-3: is damaged or not laid out as its tool does"),
    ):  # fmt: skip
        bad = copied(source, tmp_path / f"{name}-{len(content)}" / source.name)
        (bad / name).write_bytes(content)
        assert said in refusal(bad, tmp_path), name


def test_an_adapter_for_a_recipe_without_one_is_called_by_its_name(tmp_path, folder, trainer):
    said = refusal(folder / "trainer-lora" / "checkpoint-3", tmp_path)
    assert "checkpoint-3: is an adapter: add adapter.kind=lora, and adapter.rank" in said


def test_another_architecture_is_refused_with_the_names_that_do_not_fit(tmp_path, folder, zero, trainer):
    wider = {**make.LLAMA, "intermediate_size": 96, "num_hidden_layers": 3}
    for source in (folder / "zero3", folder / "trainer-plain" / "checkpoint-3"):
        said = refusal(source, tmp_path, config=wider, weights_only=True)
        assert "does not fit the recipe's model" in said
        assert "it has no model.layers.2.self_attn.q_proj.weight" in said
    said = refusal(folder / "zero3", tmp_path, config={**make.LLAMA, "intermediate_size": 96})
    assert "model.layers.0.mlp.gate_proj.weight is [64, 32] there, the model's is [96, 32]" in said
    said = refusal(folder / "zero3", tmp_path, config={**make.LLAMA, "num_hidden_layers": 1})
    assert "it holds model.layers.1.self_attn.q_proj.weight, which the model has not" in said
    said = refusal(folder / "trainer-plain" / "checkpoint-3", tmp_path, config={**make.LLAMA, "num_hidden_layers": 1})
    assert "has groups of [16, 5] parameters: expected [9, 3]" in said


def test_what_is_no_checkpoint_is_told_apart(tmp_path, folder, trainer):
    assert "expected a folder with a checkpoint" in refusal(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    said = refusal(tmp_path / "empty", tmp_path)
    assert "no checkpoint that is read here: expected a DeepSpeed folder" in said
    assert said.endswith("It holds nothing.")
    assert "holds checkpoint-3, checkpoint-5: give one of them as PATH" in refusal(folder / "trainer-plain", tmp_path)
    run, _ = taken(folder / "trainer-plain" / "checkpoint-3", tmp_path, "ours")
    assert "is of this launcher already" in refusal(run.path, tmp_path)
    with pytest.raises(UserError, match="is a run already: expected a new one"):
        taken(folder / "trainer-plain" / "checkpoint-3", tmp_path, "ours")
    said = refusal(folder / "trainer-plain" / "checkpoint-3", tmp_path, train__max_steps=3)
    assert said.startswith("train.max_steps = 3: expected more than the 3 steps of")


def test_a_pickle_that_names_code_runs_none_of_it(tmp_path, folder, trainer):
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    source = copied(folder / "trainer-plain" / "checkpoint-3", tmp_path / "trap")
    content = torch.load(source / "optimizer.pt", weights_only=False)
    torch.save({**content, "extra": Trap()}, source / "optimizer.pt")
    require_equal(taken(source, tmp_path, "careful")[0], trainer["plain"])
    assert not (tmp_path / "sprung").exists()
    torch.load(source / "optimizer.pt", weights_only=False)
    assert (tmp_path / "sprung").exists(), "the trap would not have worked"


def test_the_verb_says_what_it_took_and_how_to_go_on(tmp_path, folder, trainer):
    recipe = tmp_path / "recipe.yaml"
    values = to_dict(sources.recipe(run__dir=str(tmp_path)))
    recipe.write_text(json.dumps(values))
    source = folder / "trainer-plain" / "checkpoint-3"
    result = CliRunner().invoke(command, [str(source), str(recipe), "run.name=new"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "transformers checkpoint checkpoint-3, step 3" in result.output
    assert f"written as {tmp_path / 'new' / 'checkpoints' / 'step-00000003-a1'}" in result.output
    assert f"go on with: launcher run {recipe} run.name=new" in result.output
