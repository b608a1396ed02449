"""Export of a run that trained an adapter: peft loads the folder, merged weights are the whole model, one base fits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from launcher.cli import main
from launcher.errors import EXIT_USER_ERROR, UserError
from launcher.export import export_run
from launcher.export.weights import merged
from launcher.run.directory import RunDirectory
from launcher.run.ledger import valid_checkpoints
from launcher.trainer import adapters, model
from launcher.trainer.checkpoint.reader import Reader, read_manifest
from launcher.trainer.model import hugging_face_name
from tests.export.test_export import CHATML, MIXTRAL, logits, write_tokenizer
from tests.ranks import run_ranks
from tests.trainer import make
from tests.trainer.test_adapters import GPT2, TIED, attempts_of

pytestmark = pytest.mark.gloo

LORA: dict[str, Any] = {"adapter__kind": "lora", "adapter__rank": 3, "adapter__alpha": 9.0, "optimizer__lr": 0.05}
CASES: dict[str, dict[str, Any]] = {
    "tied": {"config": TIED, "strategy__kind": "fsdp2", "adapter__dropout": 0.2},
    "gpt2": {"config": GPT2, "strategy__kind": "zero2"},
    "experts": {"config": MIXTRAL},
    "some layers, bf16": {"config": make.LLAMA, "model__dtype": "bf16", "adapter__targets": ["layers.1.mlp.up_proj"]},
    "output layer": {"config": make.LLAMA, "adapter__targets": ["q_proj", "lm_head"]},
    "stored": {"config": TIED, "checkpoint__store_frozen": True, "strategy__kind": "zero3"},
    "random": {"config": make.LLAMA},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """One trained run a case; each but the last beside a base model in a folder."""
    made = {}
    for case, changes in CASES.items():
        folder = tmp_path_factory.mktemp("run")
        base = write_tokenizer(folder / "base")
        recipe = make.make_recipe(**changes, **LORA)
        recipe.model.tokenizer = str(base)
        if case != "random":
            torch.manual_seed(1)
            dtype = model.DTYPES[recipe.model.dtype]
            config = AutoConfig.for_model(**changes["config"])
            AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(base)
            recipe.model.name, recipe.model.config, recipe.model.tokenizer = str(base), None, None
        made[case] = make.make_run(folder, recipe, evaluation=False)
    run_ranks(attempts_of, 1, [(str(run.path), 4) for run in made.values()])
    return made


def base_of(run: RunDirectory) -> Path:
    return run.path.parent / "base"


def trained(run: RunDirectory) -> Any:
    """The model as training left it, put together without anything of the export."""
    from launcher.recipe.schema import from_dict

    recipe = from_dict(run.read_recipe())
    config = model.load_config(recipe.model)
    weights = model.read_weights(recipe.model, config, seed=recipe.train.seed, adapter=recipe.adapter)
    folder = valid_checkpoints(run)[-1].path
    reader = Reader(folder, read_manifest(folder))
    lm = AutoModelForCausalLM.from_config(config, dtype=model.DTYPES[recipe.model.dtype])
    adapters.inject(lm, recipe.adapter)
    for name, p in lm.named_parameters():
        name = hugging_face_name(name)
        p.data.copy_(reader.read(name) if p.requires_grad else weights[name])
    return lm.eval()


@pytest.mark.parametrize("case", [case for case in CASES if case != "random"])
def test_peft_puts_the_folder_onto_the_base_and_merged_weights_are_the_same_model(runs, tmp_path, case):
    run = runs[case]
    expected, plain = logits(trained(run)), logits(AutoModelForCausalLM.from_pretrained(base_of(run)))
    out = export_run(run, tmp_path / "adapter")
    described = json.loads((out / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(base_of(run))
    assert (described["r"], described["lora_alpha"], described["peft_type"]) == (3, 9, "LORA")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="peft")
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(run)), out).eval()
    assert torch.equal(logits(loaded), expected)
    assert not torch.allclose(expected, plain, atol=1e-2), "nothing was learnt here"
    assert AutoTokenizer.from_pretrained(out).chat_template == CHATML
    assert not (out / "config.json").exists()

    whole = export_run(run, tmp_path / "whole", merge=True)
    lm, report = AutoModelForCausalLM.from_pretrained(whole, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert lm.dtype == (torch.bfloat16 if "bf16" in case else torch.float32)
    assert torch.allclose(logits(lm), expected, atol=2e-2 if "bf16" in case else 2e-5)
    assert AutoTokenizer.from_pretrained(whole).chat_template == CHATML
    assert (whole / "generation_config.json").exists()
    facts = json.loads((whole / "launcher.json").read_text())
    assert facts["merged"] is True
    assert facts["base"]["name"] == str(base_of(run))


def test_targets_are_written_as_short_as_they_can_be(runs, tmp_path):
    def targets(case: str) -> list[str]:
        return json.loads((export_run(runs[case], tmp_path / case) / "adapter_config.json").read_text())[
            "target_modules"
        ]

    assert targets("tied") == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert targets("some layers, bf16") == ["model.layers.1.mlp.up_proj"]


def test_dtype_is_that_of_the_adapter_or_of_the_merged_weights(runs, tmp_path):
    from safetensors.torch import load_file

    halves = load_file(export_run(runs["tied"], tmp_path / "a", dtype="bf16") / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in halves.values()} == {torch.bfloat16}
    run = runs["some layers, bf16"]
    wide = load_file(export_run(run, tmp_path / "b", dtype="fp32", merge=True) / "model.safetensors")
    lm, name = trained(run), "model.layers.1.mlp.up_proj"
    layer = lm.get_submodule(name)
    product = layer.lora_B.default.weight @ layer.lora_A.default.weight
    assert torch.equal(wide[f"{name}.weight"], layer.base_layer.weight.float() + 3.0 * product), "added in fp32"


def test_merging_holds_one_parameter_of_the_base_at_a_time(runs, monkeypatch):
    monkeypatch.setattr("launcher.export.weights.read_weights", lambda *a, **k: pytest.fail("reads the whole model"))
    from launcher.export.describe import build_skeleton, read_recipe

    run = runs["tied"]
    folder = valid_checkpoints(run)[-1].path
    reader, recipe = Reader(folder, read_manifest(folder)), read_recipe(run)
    weights = merged(recipe, reader, build_skeleton(recipe, reader))
    for name in weights.shapes:
        assert weights.load(name).shape == weights.shapes[name].shape
    weights.finish()


def test_a_base_that_has_changed_since_is_not_merged(runs, tmp_path):
    run = runs["output layer"]
    lm = AutoModelForCausalLM.from_pretrained(base_of(run))
    lm.model.norm.weight.data[0] += 1e-3
    lm.save_pretrained(base_of(run))
    with pytest.raises(UserError, match=r"expected the weights that step-00000004-a1 was trained beside \(xxh3-128 "):
        export_run(run, tmp_path / "out", merge=True)
    assert not list(tmp_path.iterdir())


def test_frozen_weights_that_the_checkpoint_holds_need_no_base_to_merge(runs, tmp_path):
    run = runs["stored"]
    expected = logits(trained(run))
    (base_of(run) / "model.safetensors").unlink()
    lm = AutoModelForCausalLM.from_pretrained(export_run(run, tmp_path / "out", merge=True))
    assert torch.allclose(logits(lm), expected, atol=2e-5)


def test_beside_a_random_base_only_the_whole_model_can_be_written(runs, tmp_path, capsys):
    run = runs["random"]
    with pytest.raises(SystemExit) as end:
        main(["export", str(run.path)])
    assert end.value.code == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert "model.config: the base model's weights are random" in said
    assert f"launcher export {run.path} --merge" in said
    assert not run.final.exists()
    with pytest.raises(SystemExit) as end:
        main(["export", str(run.path), "--merge"])
    assert not end.value.code
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(run.final)), logits(trained(run)), atol=2e-5)


def test_a_checkpoint_of_another_adapter_than_the_recipes_is_refused(runs, tmp_path):
    run = runs["gpt2"]
    recipe = run.read_recipe()
    try:
        run.write_recipe({**recipe, "adapter": {**recipe["adapter"], "rank": 5}})
        with pytest.raises(UserError, match=r"is of another model than the recipe's; they differ in .*lora_A\.weight"):
            export_run(run, tmp_path / "out")
    finally:
        run.write_recipe(recipe)
