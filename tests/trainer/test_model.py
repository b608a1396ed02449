"""Building: the head is proven or given up, weights are read once and whole, bad models are refused with a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.errors import UserError
from launcher.recipe.schema import Model
from launcher.trainer import model, objectives, proof
from launcher.trainer.failures import DataError, NonFiniteError, SaveError, failure_class
from launcher.trainer.model import find_head
from tests.trainer import make
from tests.trainer.test_attention import built, packed

CPU = torch.device("cpu")
SMALL = {k: v for k, v in make.LLAMA.items() if k not in ("model_type", "max_position_embeddings")}
HEADS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},  # a bias in the head
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_loss_in_chunks_is_the_loss_of_the_models_own_logits(kind: str) -> None:
    config = {**SMALL, "model_type": kind, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **HEADS[kind]}
    trained = built(config, "eager").eval()
    assert trained.head is not None
    tokens = [np.arange(1, 20), np.arange(30, 41)]
    batch = objectives.to_batch(packed(tokens, [np.ones(len(t), np.float32) for t in tokens]), backend="eager")
    with torch.no_grad():
        ours = trained(batch).item()
        trained.head = None
        theirs = trained(batch).item()
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_model_whose_forward_does_more_than_its_head_gets_whole_logits_with_the_reason() -> None:
    lm = built(make.LLAMA, "sdpa").lm
    original = type(lm).forward

    class Odd(type(lm)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = original(self, *args, **kwargs)
            out.logits = out.logits * 1.01
            return out

    lm.__class__ = Odd
    head, why = find_head(lm)
    assert head is None
    assert why == "whole logits of each micro-batch, because its logits are not the plain head's"


def test_reading_weights_leaves_the_skeletons_attention_as_it_was_chosen() -> None:
    assert built(make.LLAMA, "sdpa").lm.config._attn_implementation == "sdpa"


def test_the_skeleton_holds_no_weights_and_right_buffers() -> None:
    recipe = make.make_recipe()
    skeleton = model.build_for(recipe.model, device=CPU, compute=torch.float32, objective_kind="sft")
    assert all(p.is_meta for p in skeleton.module.parameters())
    assert not any(b.is_meta for b in skeleton.module.buffers())


def save_model(folder: Path) -> Any:
    """A folder as Hugging Face makes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = {k: v for k, v in make.LLAMA.items() if k != "model_type"}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config))
    lm.save_pretrained(folder)
    return lm


def test_weights_of_a_folder_are_read_by_name(tmp_path: Path) -> None:
    lm = save_model(tmp_path)
    section = Model(name=str(tmp_path))
    read = model.read_weights(section, model.load_config(section), seed=0)
    for name, parameter in lm.named_parameters():
        assert torch.equal(read[name], parameter)


def test_a_folder_that_lacks_weights_is_refused_by_their_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    section = Model(name=str(tmp_path))
    with pytest.raises(UserError, match=r"expected weights for model\.layers\.1\.mlp\.up_proj\.weight, found none"):
        model.read_weights(section, model.load_config(section), seed=0)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.name = .*nothing: the architecture cannot be read"):
        model.load_config(Model(name=str(tmp_path / "nothing")))


def test_token_ids_that_the_model_has_not_are_refused() -> None:
    config = model.load_config(make.make_recipe().model)
    model.check_vocabulary(config, data_vocab_size=97)
    with pytest.raises(UserError, match="token ids up to 97, the model's vocabulary is 97"):
        model.check_vocabulary(config, data_vocab_size=98)


class Evaluator:
    """An engine of which only evaluation is needed."""

    device = CPU

    def __init__(self, trained: Any) -> None:
        self.trained = trained

    def evaluate(self, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.trained.eval()(batch)  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_l2_isolation_is_proven_on_the_built_model_before_the_first_step(backend: str) -> None:
    engine = Evaluator(built(make.LLAMA, backend))
    assert proof.prove_isolation(engine, backend=backend, vocab_size=97) == 0.0  # type: ignore[arg-type]


def test_l2_a_model_that_lets_documents_see_each_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Evaluator(built(make.LLAMA, "sdpa"))
    original = objectives.to_batch

    def leaky(micro: Any, *, backend: str) -> Any:
        batch = original(micro, backend=backend)
        batch.position_ids = torch.arange(batch.input_ids.shape[1])[None]
        return batch

    monkeypatch.setattr(proof, "to_batch", leaky)
    with pytest.raises(UserError, match="documents of one row see each other"):
        proof.prove_isolation(engine, backend="sdpa", vocab_size=97)  # type: ignore[arg-type]


def test_pretraining_refuses_rows_with_masked_tokens() -> None:
    from launcher.trainer.objectives import pretrain

    tokens = np.arange(1, 12)
    pretrain.check(packed([tokens], [np.ones(11)]))
    with pytest.raises(UserError, match=r"objective\.kind = pretrain: .* are masked"):
        pretrain.check(packed([tokens], [np.arange(11) > 5]))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("x"), "user"),
        (DataError("x"), "data"),
        (NonFiniteError("x"), "non_finite"),
        (SaveError("x"), "node"),
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer"), "communication"),
        (torch.distributed.DistBackendError("NCCL error"), "communication"),
        (OSError(28, "No space left on device"), "node"),
        (ZeroDivisionError("x"), "unknown"),
    ],
)
def test_failures_are_told_apart_by_class(error: BaseException, expected: str) -> None:
    assert failure_class(error) == expected
