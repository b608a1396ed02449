"""LoRA: which layers, which start, the same training on every engine, and frozen weights that are known again."""

from __future__ import annotations

import functools
import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.errors import UserError
from launcher.recipe.schema import Adapter
from launcher.run.directory import RunDirectory
from launcher.run.ledger import start_attempt, valid_checkpoints
from launcher.trainer import adapters, model, objectives
from launcher.trainer.checkpoint.reader import Reader, read_manifest
from launcher.trainer.main import run_rank
from launcher.trainer.metrics import read_metrics
from launcher.trainer.model import hugging_face_name
from tests.ranks import run_ranks
from tests.trainer import make

TIED = {**make.LLAMA, "tie_word_embeddings": True}
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": make.VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
}  # fmt: skip
LORA: dict[str, Any] = {"adapter__kind": "lora", "adapter__rank": 4}
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = ("ddp", "fsdp2", "zero2", "zero3")


def skeleton(config: dict[str, Any] = make.LLAMA, **changes: Any) -> model.Skeleton:
    recipe = make.make_recipe(config=config, **{**LORA, **changes})
    return model.build_for(
        recipe.model, device=make.CPU, compute=torch.float32, objective_kind="sft", adapter=recipe.adapter
    )


def adapted(module: torch.nn.Module) -> set[str]:
    """Names of the layers with an adapter."""
    return {name.removeprefix("lm.") for name, child in module.named_modules() if adapters.has_adapter(child)}


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("lm.model.layers.0.mlp.up_proj.base_layer.weight", "model.layers.0.mlp.up_proj.weight"),
        ("lm.h.1.attn.c_attn.base_layer.bias", "h.1.attn.c_attn.bias"),
        ("module.lm.h.0.c_fc.lora_A.default.weight", "h.0.c_fc.lora_A.weight"),
        ("lm._orig_mod.h.0.c_fc.lora_B.default.weight", "h.0.c_fc.lora_B.weight"),
        ("lm.heads.default.weight", "heads.default.weight"),
        ("lm.base_layer.norm.weight", "base_layer.norm.weight"),
        ("lm.my_base_layer.weight", "my_base_layer.weight"),
    ],
)
def test_a_name_loses_what_peft_put_into_it_and_nothing_else(name: str, plain: str) -> None:
    assert hugging_face_name(name) == plain


def test_all_linear_means_each_linear_layer_but_the_output_layer() -> None:
    module = skeleton().module
    leaves = [("self_attn" if "_proj" in n and n[0] in "qkvo" else "mlp", n) for n in LAYERS]
    assert adapted(module) == {f"model.layers.{i}.{part}.{n}" for i in (0, 1) for part, n in leaves}
    assert len(adapted(skeleton(GPT2).module)) == 2 * 4, "GPT-2's layers are of a class of their own"


def test_targets_are_names_or_their_endings() -> None:
    module = skeleton(adapter__targets=["q_proj", "model.layers.1.mlp.up_proj"]).module
    assert adapted(module) == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("q_projection", "this model has none of that name. Nearest: q_proj"),
        ("c_attn", "This model's are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"),
        ("embed_tokens", "it is an Embedding"),
        ("proj", "none of that name"),
        ("layers.7.mlp.up_proj", "Nearest: model.layers.1.mlp.up_proj"),
    ],
)
def test_a_target_that_is_no_linear_layer_is_refused_with_those_that_come_nearest(target: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        skeleton(adapter__targets=["q_proj", target])
    assert str(raised.value).startswith(f"adapter.targets = {target}: expected the name, or its ending, of a linear")
    assert words in str(raised.value)


def test_an_adapter_on_the_output_layer_takes_part_in_the_loss_and_on_a_tied_one_is_refused() -> None:
    built = skeleton(adapter__targets=["lm_head"])
    assert built.module.head is None
    assert "loss: whole logits of each micro-batch, because the output layer has an adapter" in built.notes
    with pytest.raises(UserError, match=r"adapter\.targets = lm_head: .* those of the input embedding too"):
        skeleton(TIED, adapter__targets=["lm_head"])
    with pytest.raises(UserError) as raised:
        skeleton(TIED, adapter__targets=["nothing_here"])
    assert "lm_head" not in str(raised.value), "it would be refused"


def test_a_rank_above_the_width_of_every_layer_is_refused() -> None:
    assert any("lora of rank 32" in note for note in skeleton(adapter__rank=32).notes)
    with pytest.raises(
        UserError, match=r"adapter\.rank = 33: expected at most 32, the smaller dimension of the layers"
    ):
        skeleton(adapter__rank=33)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_skeleton_holds_no_weights_and_only_fp32_adapters_learn(dtype: str) -> None:
    built = skeleton(model__dtype=dtype)
    assert all(p.is_meta for p in built.module.parameters())
    assert not any(b.is_meta for b in built.module.buffers())
    for name, p in built.module.named_parameters():
        assert p.requires_grad == (".lora_" in name), name
        assert p.dtype == (torch.float32 if p.requires_grad else model.DTYPES[dtype]), name
    trained, total = adapters.count(built.module)
    assert trained == sum(
        4 * sum(built.module.lm.get_submodule(n).base_layer.weight.shape) for n in adapted(built.module.lm)
    )
    expected = f"adapter: lora of rank 4 on 14 layers, {trained:,} of {total:,} parameters are trained"
    assert any(note.startswith(expected) for note in built.notes)
    assert "in chunks of tokens" in " ".join(built.notes), "the head is proven beside adapters too"


def test_start_values_follow_from_the_seed_alone_and_the_base_stays_as_it_is(tmp_path: Path) -> None:
    def read(seed: int, lora: bool = True, **changes: Any) -> dict[str, torch.Tensor]:
        recipe = make.make_recipe(**changes, **(LORA if lora else {}))
        config = model.load_config(recipe.model)
        return model.read_weights(recipe.model, config, seed=seed, adapter=recipe.adapter)

    plain, first, again, other = read(5, lora=False), read(5), read(5), read(6)
    assert all(torch.equal(first[name], tensor) for name, tensor in plain.items())
    new = first.keys() - plain.keys()
    assert len(new) == 2 * 14
    for name in new:
        assert torch.equal(first[name], again[name])
        assert (first[name].abs().max() == 0) == name.endswith("lora_B.weight")
    a = "model.layers.1.mlp.down_proj.lora_A.weight"
    assert not torch.equal(first[a], other[a])
    assert 0.9 < first[a].abs().max() * math.sqrt(64) < 1.0, "uniform within 1 / sqrt(width)"

    half = read(5, model__dtype="bf16")
    assert torch.equal(half[a], first[a]), "not rounded to the base model's type"
    from transformers import AutoConfig, AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**make.LLAMA))
    lm.save_pretrained(tmp_path)
    assert torch.equal(read(5, model__config=None, model__name=str(tmp_path))[a], first[a])


# what follows runs on ranks


def train_case(rank: int, world_size: int, store: str, kind: str, micro: int, layout: str) -> list[float]:
    """Losses of four following steps."""
    recipe = make.make_recipe(kind, config=TIED, train__micro_batch_size=micro, **LORA)
    engine, backend = make.make_engine(recipe, rank=rank)
    rows = make.batches(Path(store), recipe, rank=rank, world_size=world_size, layout=layout)
    losses = []
    for step in range(4):
        loss = make.forward_backward(engine, rows.step(step), world_size=world_size, backend=backend)
        dist.all_reduce(loss)
        losses.append(loss.item())
        engine.clip_and_step(1e-2, 1.0)
    return losses


CASES = [(k, *rest) for k, rest in itertools.product(KINDS, [(1, "packed"), (2, "documents")])]


def train_cases(rank: int, world_size: int, store: str) -> list[list[float]]:
    return [train_case(rank, world_size, store, *case) for case in CASES]


@functools.cache
def reference(store: str) -> list[float]:
    """The same batches by plain peft in one process: whole logits, one document at a time."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe = make.make_recipe(config=TIED, **LORA)
    weights = model.read_weights(
        recipe.model, model.load_config(recipe.model), seed=recipe.train.seed, adapter=recipe.adapter
    )
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TIED), attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(lm, LoraConfig(r=4, lora_alpha=8, target_modules=list(LAYERS)))
    for name, p in wrapped.named_parameters():
        p.data.copy_(weights[hugging_face_name(name.removeprefix("base_model.model."))])
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    rows = make.batches(Path(store), recipe, rank=0, world_size=1)
    losses = []
    for step in range(4):
        data, total = rows.step(step), 0.0
        for row in data.rows:
            for document in rows.mix.documents(int(row)):
                tokens = torch.tensor(document.tokens.astype("int64"))
                nll = torch.nn.functional.cross_entropy(
                    wrapped(tokens[None]).logits[0, :-1], tokens[1:], reduction="none"
                )
                loss = (nll * torch.tensor(document.weights[1:])).sum() / data.weight
                loss.backward()
                total += loss.item()
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make.documents_store(tmp_path_factory.mktemp("store")))


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [1, 2])
def test_l1_the_loss_beside_plain_peft_is_the_same_for_every_strategy_split_and_layout(
    world_size: int, store: str
) -> None:
    expected = reference(store)
    assert expected[-1] < expected[0] - 0.01, "nothing is learnt here"
    for case, losses in zip(CASES, run_ranks(train_cases, world_size, store)[0], strict=True):
        assert losses[0] == pytest.approx(expected[0], rel=1e-6), case
        assert losses == pytest.approx(expected, rel=1e-5), case


def made_run(folder: Path, kind: str, **changes: Any) -> RunDirectory:
    """A run of six steps with a checkpoint after every third."""
    folder.mkdir()
    return make.make_run(folder, make.make_recipe(kind, checkpoint__every_steps=3, **{**LORA, **changes}))


def ends_at(run: RunDirectory, total_steps: int) -> None:
    run.data_file.write_text(json.dumps({**json.loads(run.data_file.read_text()), "total_steps": total_steps}))


def losses(run: RunDirectory) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run.metrics_file)[0]}


def stored(run: RunDirectory) -> dict[str, torch.Tensor]:
    """What the newest checkpoint holds."""
    folder = valid_checkpoints(run)[-1].path
    manifest = read_manifest(folder)
    reader = Reader(folder, manifest)
    kinds = {name: manifest["kinds"] if entry["trainable"] else ["value"] for name, entry in manifest["params"].items()}
    return {f"{name} {kind}": reader.read(name, kind) for name, found in kinds.items() for kind in found}


def attempts_of(rank: int, world_size: int, paths: list[tuple[str, int]]) -> None:
    """An attempt of each run up to that step, one after the other in the same ranks."""
    for path, step in paths:
        run = RunDirectory(Path(path))
        box = [0]
        if rank == 0:
            ends_at(run, step)
            box = [start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")]
        dist.broadcast_object_list(box, src=0)
        run_rank(path, box[0])
        dist.barrier()


CHANGES: dict[str, dict[str, Any]] = {  # dropout draws its masks again
    "ddp": {"adapter__dropout": 0.1, "config": TIED},
    "fsdp2": {"adapter__dropout": 0.1, "model__dtype": "bf16"},
    "zero2": {"adapter__dropout": 0.1, "config": GPT2, "model__gradient_checkpointing": "full"},
    "zero3": {"adapter__dropout": 0.1, "train__precision": "bf16", "config": TIED},
}


@pytest.mark.gloo
def test_l4_a_resume_is_bit_exact_with_dropout_and_stores_the_adapter_alone(tmp_path: Path) -> None:
    runs = {
        (kind, how): made_run(tmp_path / f"{kind}-{how}", kind, **CHANGES[kind])
        for kind in KINDS
        for how in ("whole", "stopped")
    }
    jobs = [(str(run.path), 6 if how == "whole" else 3) for (_, how), run in runs.items()]
    run_ranks(attempts_of, 2, jobs + [(str(run.path), 6) for (_, how), run in runs.items() if how == "stopped"])
    for kind in KINDS:
        whole, stopped = runs[kind, "whole"], runs[kind, "stopped"]
        assert [c.step for c in valid_checkpoints(stopped)] == [3, 6]
        assert losses(stopped) == losses(whole), kind
        one, other = stored(whole), stored(stopped)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), kind
        assert {name.split(".lora_")[1].split(" ")[0] for name in one} == {"A.weight", "B.weight"}, "no frozen weights"
        assert all(tensor.dtype == torch.float32 for tensor in one.values()), kind
        base = read_manifest(valid_checkpoints(stopped)[-1].path)["base"]
        assert base == read_manifest(valid_checkpoints(whole)[-1].path)["base"]
        assert base["frozen"].startswith("xxh3-128 ")


@pytest.mark.gloo
def test_evaluation_has_no_dropout(tmp_path: Path) -> None:
    run_ranks(evaluates_alike, 1, str(make.documents_store(tmp_path)))


def evaluates_alike(rank: int, world_size: int, store: str) -> None:
    recipe = make.make_recipe(**LORA, adapter__dropout=0.5)
    engine, backend = make.make_engine(recipe)
    for name, p in engine.module.named_parameters():
        if ".lora_B." in name:
            p.data.fill_(0.05)
    data = make.batches(Path(store), recipe, rank=0, world_size=1).step(0)
    batch = objectives.to_batch(data.micro[0], backend=backend)
    assert engine.evaluate(batch) == engine.evaluate(batch)
    trained = {float(engine.forward_backward(batch, loss_scale=1.0, sync=True)) for _ in range(2)}
    assert len(trained) == 2, "dropout does nothing here"


@pytest.mark.gloo
def test_frozen_weights_may_be_stored_or_not_from_attempt_to_attempt_and_engine_to_engine(tmp_path: Path) -> None:
    whole = made_run(tmp_path / "whole", "fsdp2")
    run = made_run(tmp_path / "changing", "fsdp2")
    run_ranks(attempts_of, 1, [(str(whole.path), 9)])
    held = []
    for kind, world_size, store_frozen, step in (
        ("fsdp2", 2, False, 3), ("zero3", 2, True, 4), ("ddp", 1, True, 5), ("zero2", 1, False, 7),
        ("fsdp2", 2, True, 9),
    ):  # fmt: skip
        recipe = run.read_recipe()
        recipe["strategy"]["kind"], recipe["checkpoint"]["store_frozen"] = kind, store_frozen
        run.write_recipe(recipe)
        run_ranks(attempts_of, world_size, [(str(run.path), step)])
        held.append(sum(1 for name in stored(run) if ".lora_" not in name))
    assert held == [0, 21, 21, 0, 21]
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    bases = [read_manifest(c.path)["base"] for c in (*valid_checkpoints(whole), *valid_checkpoints(run))]
    assert len({base["frozen"] for base in bases}) == 1
    base = model.read_weights(make.make_recipe().model, model.load_config(make.make_recipe().model), seed=5)
    now = stored(run)
    assert all(torch.equal(now[f"{name} value"], tensor) for name, tensor in base.items())


@pytest.mark.gloo
def test_another_base_model_under_the_same_name_is_refused_with_both_hashes(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**make.LLAMA)).save_pretrained(base)
    run = made_run(tmp_path / "made", "fsdp2", model__config=None, model__name=str(base))
    run_ranks(attempts_of, 2, [(str(run.path), 3)])
    then = read_manifest(valid_checkpoints(run)[-1].path)["base"]
    assert then["name"] == str(base)
    lm = AutoModelForCausalLM.from_pretrained(base)
    lm.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    lm.save_pretrained(base)
    with pytest.raises(RuntimeError, match="rank 1: Traceback") as raised:
        run_ranks(attempts_of, 2, [(str(run.path), 6)])
    said = str(raised.value)
    assert "rank 0: Traceback" in said, "every rank ends"
    assert f"model.name = {base}: expected the frozen weights that step-00000003-a1 was trained beside" in said
    assert f"then: {base}, {then['frozen']}" in said
    assert [c.step for c in valid_checkpoints(run)] == [3]


def test_alpha_is_twice_the_rank_unless_it_is_said() -> None:
    assert adapters.scale(Adapter(kind="lora", rank=8)) == 2.0
    assert adapters.scale(Adapter(kind="lora", rank=8, alpha=4.0)) == 0.5
    assert adapters.lora_config(Adapter(kind="lora", rank=8, alpha=4.0), ["q_proj"]).lora_alpha == 4
