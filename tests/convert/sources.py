"""Real checkpoints of other tools: each trains a plain model, saves in the middle and says how it went on."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.trainer import make

SAVED, STEPS = 3, 5  # updates before the save, and in all
WORDS = {
    "train__global_batch_size": 4, "train__micro_batch_size": 1, "train__max_grad_norm": None,
    "train__max_steps": STEPS,
}  # fmt: skip
BETAS, EPS = (0.9, 0.95), 1e-8


def recipe(**changes: Any) -> Any:
    """What the sources train, as a recipe."""
    made = make.make_recipe("ddp", **{**WORDS, **changes})
    made.optimizer.betas, made.optimizer.eps = list(BETAS), EPS
    return made


def plain_model(*, tied: bool = False, seed: int = 0) -> Any:
    """A plain causal language model of transformers, without anything of ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    words = {key: value for key, value in make.LLAMA.items() if key != "model_type"}
    config = LlamaConfig(**words, tie_word_embeddings=tied, attn_implementation="sdpa", use_cache=False)
    return LlamaForCausalLM(config)


def rows(folder: Path, *, rank: int = 0, world_size: int = 1, **changes: Any) -> Any:
    """This rank's batches: those that a run of ours would take."""
    return make.batches(folder / "packed", recipe(**changes), rank=rank, world_size=world_size, total_steps=STEPS)


def loss_of(model: Any, micro: Any) -> Tensor:
    """Sum of weight x negative log likelihood, written out; documents of a row are kept apart by a mask."""
    ids, position = torch.as_tensor(micro.input_ids).long(), torch.as_tensor(micro.position_ids).long()
    document = (position == 0).cumsum(-1)
    same = document[:, :, None] == document[:, None, :]
    mask = torch.where(torch.tril(same), 0.0, torch.finfo(torch.float32).min)[:, None]
    logits = model(input_ids=ids, position_ids=position, attention_mask=mask, use_cache=False).logits.float()
    targets = torch.as_tensor(micro.targets).long().reshape(-1)
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    return (nll * torch.as_tensor(micro.weights).reshape(-1)).sum()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def deepspeed(rank: int, world_size: int, folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train and save with DeepSpeed once a case; per case the state at the save and the losses that followed.

    A case: the JSON laid over a plain fp32 ZeRO configuration.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.simplefilter("ignore")  # DeepSpeed calls torch by older names
    import deepspeed as library
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    __compatible_ops__["deepspeed_shm_comm"] = False
    found = {}
    for name, changes in cases.items():
        changes = dict(changes)
        tied = changes.pop("tied", False)
        config = {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4 // world_size,
            "train_batch_size": 4, "steps_per_print": 10**9, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0, **changes,
        }  # fmt: skip
        model = plain_model(tied=tied)
        optimizer = torch.optim.AdamW(groups(model), lr=1e-3, betas=BETAS, eps=EPS)
        engine, zero, *_ = library.initialize(model=model, optimizer=optimizer, config=config)
        batches, losses, state = rows(folder, rank=rank, world_size=world_size), [], {}
        for step in range(STEPS):
            batch = batches.step(step)
            total = torch.zeros(())
            for micro in batch.micro:
                loss = loss_of(engine, micro) / batch.weight * world_size * len(batch.micro)
                engine.backward(loss)
                engine.step()
                total += loss.detach() / world_size / len(batch.micro)
            dist.all_reduce(total)
            losses.append(float(total))
            if step + 1 == SAVED:
                engine.save_checkpoint(str(folder / name))
                if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # links moments of all groups but the first
                    zero._hp_optimizer_states_linked = False
                    zero._lazy_init_hp_params_optimizer_state()
                for key, p in engine.module.named_parameters():
                    if config["zero_optimization"].get(
                        "round_robin_gradients"
                    ):  # where DeepSpeed's accessors are wrong
                        state[key, "value"] = p.detach().clone().numpy()
                        continue
                    state[key, "value"] = safe_get_full_fp32_param(p).detach().clone().numpy()
                    for kind in ("exp_avg", "exp_avg_sq"):
                        state[key, kind] = safe_get_full_optimizer_state(p, kind).detach().clone().numpy()
        found[name] = {"state": state, "losses": losses[SAVED:]}
    return found


def fsdp2(rank: int, world_size: int, folder: Path, *, tied: bool = False) -> dict[str, Any]:
    """The same with FSDP2, saved by `torch.distributed.checkpoint`: plain, flat, and as Accelerate lays it down."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.fsdp import fully_shard

    model = plain_model(tied=tied)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(groups(model), lr=1e-3, betas=BETAS, eps=EPS)
    batches, losses, state = rows(folder, rank=rank, world_size=world_size), [], {}
    for step in range(STEPS):
        batch = batches.step(step)
        total = torch.zeros(())
        for micro in batch.micro:
            loss = loss_of(model, micro) / batch.weight
            (loss * world_size).backward()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(float(total))
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == SAVED:
            weights, states = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optim": states}, checkpoint_id=folder / "plain")
            flat = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
            dcp.save({"model": flat[0], "optim": flat[1]}, checkpoint_id=folder / "flat")
            dcp.save({"model": weights}, checkpoint_id=folder / "accelerate" / "pytorch_model_fsdp_0")
            dcp.save({"optimizer": states}, checkpoint_id=folder / "accelerate" / "optimizer_0")
            dcp.save({"model": weights}, checkpoint_id=folder / "weights")
            for name, p in model.named_parameters():
                state[name, "value"] = p.full_tensor().detach().clone().numpy()
                for kind in ("exp_avg", "exp_avg_sq"):
                    state[name, kind] = optimizer.state[p][kind].full_tensor().clone().numpy()
    return {"state": state, "losses": losses[SAVED:]}


def trainer(folder: Path, *, adapter: bool = False, shard: str | None = None) -> dict[str, Any]:
    """The same with transformers' own Trainer on one process: folder/checkpoint-3, and how it went on.

    Args:
        adapter: LoRA by peft, the base being `plain_model` saved in folder/base
        shard: write weights in files of that size at most
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = plain_model()
    if adapter:
        from peft import LoraConfig, get_peft_model

        model.save_pretrained(folder / "base")
        torch.manual_seed(1)
        words = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(model, words)
    batches, losses, state = rows(folder, train__micro_batch_size=4), [], {}

    class Ours(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batch = batches.step(int(inputs["step"]))
            (micro,) = batch.micro
            loss = loss_of(model, micro) / batch.weight
            losses.append(float(loss))
            return loss

        def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
            if shard is None:
                super().save_model(output_dir, _internal_call)
            else:
                self.model.save_pretrained(output_dir, max_shard_size=shard)

    class Watch(TrainerCallback):
        def on_save(self, arguments: Any, now: Any, control: Any, **parts: Any) -> None:
            if now.global_step == SAVED:
                for name, p in parts["model"].named_parameters():
                    if p.requires_grad:
                        state[name, "value"] = p.detach().clone().numpy()
                        entry = parts["optimizer"].state[p]
                        state.update({(name, k): entry[k].clone().numpy() for k in ("exp_avg", "exp_avg_sq")})

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, save_steps=SAVED, per_device_train_batch_size=1, learning_rate=1e-3,
        lr_scheduler_type="constant", weight_decay=0.1, adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS,
        max_grad_norm=0.0, use_cpu=True, report_to=[], disable_tqdm=True, dataloader_num_workers=0, seed=0,
        remove_unused_columns=False, logging_strategy="no", save_total_limit=None,
    )  # fmt: skip
    steps = [{"step": i} for i in range(STEPS)]

    class InOrder(Ours):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(steps)  # type: ignore[arg-type]

    InOrder(
        model=model, args=arguments, train_dataset=steps, data_collator=lambda items: items[0], callbacks=[Watch()]
    ).train()
    return {"state": state, "losses": losses[SAVED:]}


def trainers(rank: int, world_size: int, folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`trainer` once a case in folder/trainer-NAME; in ranks, because the Trainer leaves settings behind."""
    found = {}
    for name, words in cases.items():
        target = folder / f"trainer-{name}"
        target.mkdir()
        (target / "packed").symlink_to(folder / "packed")
        found[name] = trainer(target, **words)
    return found
