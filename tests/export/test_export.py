"""The exported folder: loaded by plain transformers, equal to the checkpoint bit by bit, whole or not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from launcher.cli import main
from launcher.errors import EXIT_USER_ERROR, UserError
from launcher.export import consolidate, describe, export_run
from launcher.export.weights import of_checkpoint
from launcher.recipe.schema import to_dict
from launcher.run import ledger
from launcher.run.directory import RunDirectory
from launcher.trainer.checkpoint.manager import CheckpointManager
from launcher.trainer.checkpoint.reader import Reader, read_manifest
from launcher.trainer.model import parameters_on_meta
from tests.trainer import make
from tests.trainer.checkpoint import rigs

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip


def write_tokenizer(folder: Path, *, template: str | None = CHATML) -> Path:
    """A byte-level tokenizer whose end token is not the one that ends a turn."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:90]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(specials)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return folder


def made_run(
    path: Path, config: dict[str, Any], *, steps: tuple[int, ...] = (3,), **changes: Any
) -> tuple[RunDirectory, Any]:
    """A run with checkpoints of that architecture, and the model as it was at the last one."""
    recipe = make.make_recipe(config=config, **changes)
    recipe.model.tokenizer = str(write_tokenizer(path / "tokenizer"))
    run = RunDirectory(path / "run")
    run.create(to_dict(recipe), {}, {})
    attempt = ledger.start_attempt(run, target="torchrun", job_id=None, nodes=["here"], reason="test")
    meta = {"run_id": run.read_json("run.json")["run_id"]}
    manager = CheckpointManager(run, attempt=attempt, rank=0, world_size=1, keep_last=9, meta=meta)
    rest = {key: value for key, value in config.items() if key != "model_type"}
    lm: Any = None
    for step in steps:
        torch.manual_seed(step)
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **rest))
        lm.eval()
        rigs.saved(manager, step, Trained(lm))
    return run, lm


class Trained(rigs.FlatEngine):
    """The pieces that an engine offers: parameters and persistent buffers."""

    def __init__(self, lm: Any) -> None:
        super().__init__(lm)
        kept = {name for name, _ in lm.named_parameters()}
        for name, _ in list(lm.named_buffers()):
            assert name not in lm.state_dict(), "this test knows no persistent buffers"
            kept.discard(name)
        self.kept = kept

    def states(self):
        return (state for state in super().states() if state[0] in self.kept)

    def parameter_shapes(self):
        return {name: entry for name, entry in super().parameter_shapes().items() if name in self.kept}


def logits(lm: Any) -> torch.Tensor:
    with torch.no_grad():
        return lm(input_ids=torch.arange(1, 30)[None]).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_plain_transformers_loads_the_same_model(tmp_path, tied, model_type):
    config = {**make.LLAMA, "model_type": model_type, "tie_word_embeddings": tied}
    run, lm = made_run(tmp_path, config)
    out = export_run(run)
    assert out == run.final
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded), logits(lm))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    with safetensors.safe_open(out / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118
    described = json.loads((out / "config.json").read_text())
    assert (described["architectures"], described["dtype"]) == ([type(lm).__name__], "float32")
    assert described["use_cache"] is True


def test_the_tokenizer_comes_with_its_template_and_generation_ends_at_the_end_of_a_turn(tmp_path):
    run, _ = made_run(tmp_path, make.LLAMA)
    out = export_run(run)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == CHATML
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")}
    generation = GenerationConfig.from_pretrained(out)
    assert set(generation.eos_token_id) == ends
    assert generation._from_model_config is False, "generate() would make the settings anew from the model's config"
    assert generation.pad_token_id == tokenizer.pad_token_id
    lm = AutoModelForCausalLM.from_pretrained(out)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = lm.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]


def test_the_chat_template_of_the_recipe_replaces_the_tokenizers_own(tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]<|endoftext|>{% endfor %}")
    run, _ = made_run(tmp_path, make.LLAMA, data__chat_template=str(template))
    assert AutoTokenizer.from_pretrained(export_run(run)).chat_template == template.read_text()


def test_a_fine_tuned_model_keeps_the_generation_settings_of_its_base(tmp_path):
    """Even sampling values that transformers refuses to save without do_sample; the taught end of turn is added."""
    run, lm = made_run(tmp_path, make.LLAMA)
    base = write_tokenizer(tmp_path / "base")
    lm.save_pretrained(base)
    (base / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 5, "max_new_tokens": 77}')
    recipe = run.read_recipe()
    recipe["model"].update(name=str(base), config=None, tokenizer=None)
    run.write_recipe(recipe)
    generation = GenerationConfig.from_pretrained(export_run(run))
    assert (generation.temperature, generation.max_new_tokens) == (0.6, 77)
    end_of_turn = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|im_end|>")
    assert {5, end_of_turn} <= set(generation.eos_token_id)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtype_rounds_the_weights_and_says_so_in_the_config(tmp_path, name, dtype):
    run, lm = made_run(tmp_path, make.LLAMA)
    out = export_run(run, tmp_path / "out", dtype=name)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == dtype
    for key, tensor in lm.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor.to(dtype)), key
    assert not run.final.exists()


def test_large_models_are_written_in_numbered_files_with_an_index(tmp_path):
    run, lm = made_run(tmp_path, make.LLAMA)
    folder = ledger.valid_checkpoints(run)[-1].path
    reader = Reader(folder, read_manifest(folder))
    recipe = describe.read_recipe(run)
    skeleton = describe.build_skeleton(recipe, reader)
    out = tmp_path / "out"
    out.mkdir()
    consolidate.write_weights(of_checkpoint(reader), skeleton, out, max_shard=30_000)
    describe.write_description(recipe, skeleton, out, dtype="float32")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].startswith("model-00001-of-0000")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(lm))


def test_experts_are_written_as_the_hub_names_them(tmp_path):
    run, lm = made_run(tmp_path, MIXTRAL)
    out = export_run(run)
    with safetensors.safe_open(out / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert any(".experts.2.w1.weight" in name for name in names), sorted(names)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(lm))


def test_the_newest_good_checkpoint_is_taken_or_the_one_that_is_named(tmp_path, caplog):
    run, _ = made_run(tmp_path, make.LLAMA, steps=(1, 2, 3))
    shard = run.checkpoint(3, 1) / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)

    def exported(**options: Any) -> str:
        return json.loads((export_run(run, **options) / "launcher.json").read_text())["checkpoint"]

    assert exported() == "step-00000002-a1"
    assert "step-00000003-a1/rank-00000.safetensors: its content has changed" in caplog.text
    assert exported(checkpoint="step-00000001-a1") == "step-00000001-a1", "an earlier export is replaced"
    with pytest.raises(UserError, match=r"no checkpoint is whole:\n  step-00000003-a1/rank-00000"):
        export_run(run, checkpoint="step-00000003-a1")
    with pytest.raises(UserError, match=r"--checkpoint step-9: expected one of step-00000001-a1, step-00000002-a1"):
        export_run(run, checkpoint="step-9")


def test_what_cannot_be_exported_is_refused_with_exit_code_2_and_nothing_written(tmp_path, capsys):
    run, _ = made_run(tmp_path, make.LLAMA, steps=())
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("ten years of work")
    for arguments, text in (
        ([tmp_path / "nowhere"], "neither a path nor a name below runs/"),
        ([run.path], "has no checkpoint yet, so there is nothing to export"),
        ([run.path, "--out", foreign], "expected a new or empty folder, or an earlier export"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["export", *map(str, arguments)])
        assert end.value.code == EXIT_USER_ERROR
        assert text in capsys.readouterr().err
    assert not run.final.exists()
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


def test_a_failure_on_the_way_leaves_neither_the_folder_nor_remains(tmp_path, monkeypatch):
    run, _ = made_run(tmp_path, make.LLAMA)
    monkeypatch.setattr("launcher.export.write_description", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match="cannot be written: full"):
        export_run(run)
    assert not list(run.path.glob("*final*"))
    assert not list(run.path.glob(".final*"))


def test_a_run_without_an_adapter_has_nothing_to_merge(tmp_path):
    run, _ = made_run(tmp_path, make.LLAMA)
    with pytest.raises(UserError, match="--merge: expected a run with an adapter, this one trained every parameter"):
        export_run(run, merge=True)


def test_another_architecture_than_the_recipes_is_refused(tmp_path):
    run, _ = made_run(tmp_path, make.LLAMA)
    recipe = run.read_recipe()
    recipe["model"]["config"]["num_hidden_layers"] = 3
    run.write_recipe(recipe)
    with pytest.raises(UserError, match=r"is of another model than the recipe's; they differ in model\.layers\.2"):
        export_run(run)


def test_the_skeleton_takes_no_memory_for_weights(tmp_path):
    run, _ = made_run(tmp_path, make.LLAMA)
    folder = ledger.valid_checkpoints(run)[-1].path
    lm = describe.build_skeleton(describe.read_recipe(run), Reader(folder, read_manifest(folder)))
    assert all(parameter.is_meta for parameter in lm.parameters())
    with parameters_on_meta():
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_the_command_prints_the_folder_and_starts_no_process_group(tmp_path):
    run, _ = made_run(tmp_path, make.LLAMA)
    code = (
        "import sys\nfrom launcher.cli import main\n"
        "try: main(['export', sys.argv[1]])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "import torch.distributed as dist\nassert not dist.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code, run.path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(run.final)
