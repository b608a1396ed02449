"""ZeRO 1, 2 and 3 by DeepSpeed: how it is built around a skeleton, driven a step at a time, and where its state lies.

What DeepSpeed is told stands in `launcher.strategy.deepspeed`, what it needs of the process in `deepspeed_setup`.
Whether an update is dropped, DeepSpeed decides on the host: each step reads the norm of the gradient once.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.strategy.deepspeed import config as deepspeed_config
from launcher.trainer.activations import compile_block
from launcher.trainer.engines import Fill, Gate, Precision
from launcher.trainer.engines.base import MOMENTS, broadcast_parts, hand_out, stored_parameters
from launcher.trainer.engines.deepspeed_setup import (
    choose_optimizer,
    hide_gathers,
    load,
    mark_expert_blocks,
    naming_overlay,
    refuse,
)
from launcher.trainer.model import TrainedModel, hugging_face_name, materialise, persistent_buffers
from launcher.trainer.objectives import Batch
from launcher.trainer.optim import LossScale

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe
    from launcher.trainer.checkpoint.format import Piece

Span = tuple[int, int, int, int]  # flat buffer, place in it, start in the flattened parameter, length


class ZeroEngine:
    """See the module.

    Args:
        engine: what `deepspeed.initialize` gave
        compute: type of the arithmetic
    """

    def __init__(
        self, recipe: Recipe, module: TrainedModel, engine: Any, *, device: torch.device, compute: torch.dtype
    ) -> None:
        self.module, self.engine, self.device, self.compute = module, engine, device, compute
        self.zero = engine.optimizer
        self.optimizer = self.zero.optimizer  # over the flat buffers
        self.stage = int(recipe.strategy.kind[-1])
        self.store_frozen = recipe.checkpoint.store_frozen
        self.nonfinite = torch.zeros((), dtype=torch.float64, device=device)
        self.loss_scale = LossScale.start(torch.device("cpu")) if compute == torch.float16 else None
        self.on_nvme = recipe.strategy.offload.optimizer == "nvme"
        self._staged: dict[int, dict[str, Tensor]] = {}  # of flat buffers on nvme, while their pieces are in use
        self._take_over_loss_scale()

    def forward_backward(self, batch: Batch, *, loss_scale: float, sync: bool) -> Tensor:
        """See Engine. ZeRO-1 reduces with `sync` alone, ZeRO-2 and 3 after every micro-batch, into their shards."""
        self._staged.clear()
        self.module.train()
        self.engine.set_gradient_accumulation_boundary(sync)
        total: Tensor = self.engine(batch)
        # a loss that is not finite spoils the gradient on purpose: the reduction then tells every rank
        scale = torch.where(torch.isfinite(total.detach()), loss_scale, math.nan)
        self.engine.backward(total * scale, scale_wrt_gas=False)
        return total.detach()

    def evaluate(self, batch: Batch) -> Tensor:
        """See Engine."""
        self.module.eval()
        with torch.no_grad():
            return self.engine(batch).detach()  # type: ignore[no-any-return]

    def clip_and_step(self, lr: float, max_norm: float | None, gate: Gate | None = None) -> Tensor:
        """See Engine. Clipping and the fp16 scale are DeepSpeed's; what it skips, it skips on every rank alike.

        DeepSpeed drops an update for one reason alone, so the gradient of one that is to be dropped is made not finite.
        """
        spoilt = gate is not None and bool(gate(torch.zeros((), dtype=torch.bool, device=self.device))[1])
        if spoilt:
            self._spoil()
        self.zero.clip_grad = max_norm or 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        if self.stage == 3:  # else a parameter that no token reaches in the next step would repeat this gradient
            self.zero.grad_partitions_flat_buffer.zero_()
        dropped = torch.tensor(not spoilt and not self.engine.was_step_applied())
        if self.loss_scale is not None:
            dropped = self.loss_scale.update(dropped)
            self._take_over_loss_scale()
        self.nonfinite = dropped.to(device=self.device, dtype=torch.float64)
        norm = self.zero._global_grad_norm
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device).detach().reshape(())

    def ensure_state(self) -> None:
        """See Engine."""
        if self.stage == 3:
            self.zero.checkpoint_event_prologue()  # small parameters that stay gathered go back into their shards
        for group, flat in enumerate(self.flats()):
            if group in self._staged:
                continue  # its copy may hold what was just loaded
            with self._in_memory(group):
                if not self.optimizer.state[flat]:
                    zeros = {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
                    step: Any = torch.zeros((), dtype=torch.float32, device=flat.device)
                    if not isinstance(self.optimizer, torch.optim.AdamW):
                        step = 0  # DeepSpeedCPUAdam counts with an int
                    self.optimizer.state[flat] = {"step": step, **zeros}
                if self.on_nvme:
                    self._staged[group] = {kind: t.clone() for kind, t in self._live(group).items()}

    def forget_state(self) -> None:
        """See Engine. On nvme the moments are files, which exist from the beginning."""
        self._staged.clear()
        if not self.on_nvme:
            self.optimizer.state.clear()

    def pieces(self) -> Iterator[Piece]:
        """See Engine; call `ensure_state` first. Values are the fp32 masters."""
        from launcher.trainer.checkpoint.format import Piece

        rank, world_size = dist.get_rank(), dist.get_world_size()
        for name, p in stored_parameters(self.module, self.store_frozen):
            name = hugging_face_name(name)
            if not p.requires_grad:
                if self.stage < 3:
                    yield Piece(name, "value", 0, p.detach().view(-1), rank, world_size)
                else:
                    start, length = _share(p)
                    yield Piece(name, "value", start, p.ds_tensor.data.view(-1)[:length], 0, 1)  # type: ignore[attr-defined]
                continue
            if span := self.span(p):
                group, at, start, length = span
                for kind, whole in self.buffers(group).items():
                    yield Piece(name, kind, start, whole[at : at + length], 0, 1)
        for name, buffer in persistent_buffers(self.module):
            yield Piece(hugging_face_name(name), "value", 0, buffer.view(-1), rank, world_size)

    def set_step(self, step: int) -> None:
        """See Engine."""
        self.ensure_state()
        for flat in self.flats():
            state = self.optimizer.state[flat]
            if isinstance(state["step"], Tensor):
                state["step"].fill_(step)
            else:
                state["step"] = step
        self.engine.global_steps = step

    def refresh(self) -> None:
        """See Engine: the copies that the forward pass reads are made anew from the fp32 masters."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for group in range(len(self.zero.fp16_groups)):
            with self._in_memory(group):
                for kind, staged in self._staged.get(group, {}).items():
                    self._live(group)[kind].copy_(staged)
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self.zero.invalidate_secondary_tensor()
        self.zero.checkpoint_event_epilogue()

    def parameter_shapes(self) -> dict[str, dict[str, Any]]:
        """See Engine."""
        out, master = {}, self.flats()[0].dtype
        for name, t in [*stored_parameters(self.module, self.store_frozen), *persistent_buffers(self.module)]:
            shape, dtype = getattr(t, "ds_shape", t.shape), master if t.requires_grad else t.dtype
            out[hugging_face_name(name)] = {
                "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "trainable": t.requires_grad,
            }  # fmt: skip
        return out

    def trainer_state(self) -> dict[str, Any]:
        """See Engine."""
        steps = {int(state["step"]) for flat in self.flats() if (state := self.optimizer.state[flat])}
        scale = self.loss_scale
        return {
            "optimizer_step": max(steps, default=0),
            "loss_scale": None if scale is None else [float(scale.value), float(scale.good)],
        }

    def load_trainer_state(self, state: dict[str, Any]) -> None:
        """See Engine; another precision than the saved one begins its own loss scale."""
        self.set_step(int(state["optimizer_step"]))
        if self.loss_scale is not None and state.get("loss_scale"):
            value, good = state["loss_scale"]
            self.loss_scale = LossScale.start(torch.device("cpu"), value, good)
            self._take_over_loss_scale()

    def fill(self, weights: dict[str, Tensor] | None) -> None:
        """Set the trained parameters' masters from rank 0's weights, in full precision, a parameter at a time."""
        if self.on_nvme:
            self.ensure_state()
        elif self.stage == 3:
            self.zero.checkpoint_event_prologue()
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                group, at, start, length = self.span(p) or (0, 0, 0, 0)
                mine = self.buffers(group)["value"][at : at + length]
                for begin, part in _from_reader(name, p, weights, dtype=torch.float32, device=self.device):
                    low, high = max(begin, start), min(begin + part.numel(), start + length)
                    if low < high:
                        mine[low - start : high - start].copy_(part[low - begin : high - begin])
        self.refresh()

    def copies(self) -> tuple[int, Iterator[tuple[str, Tensor]]]:
        """See Engine: ZeRO-1 and 2 have the weights of the forward pass on every rank; masters and moments are once."""
        named = () if self.stage == 3 else self.module.named_parameters()
        return 0, ((hugging_face_name(name), p.detach().view(-1)) for name, p in named)

    def _spoil(self) -> None:
        """Let DeepSpeed find this step's reduced gradient not finite."""
        if self.stage == 3:
            self.zero.grad_partitions_flat_buffer.fill_(math.nan)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # DeepSpeed looks at it on a stream of its own
        elif self.zero.cpu_offload:
            self.zero.local_overflow = True
        else:
            for gradients in self.zero.averaged_gradients.values():
                for gradient in (g for g in gradients or () if g is not None):
                    gradient.fill_(math.nan)

    def _take_over_loss_scale(self) -> None:
        """The scale of fp16 moves by our rule, which every engine shares; DeepSpeed is told its value."""
        if self.loss_scale is not None:
            self.zero.override_loss_scale(float(self.loss_scale.value))

    def flats(self) -> list[Tensor]:
        """The flat fp32 buffers that the inner optimizer updates."""
        if self.stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        return [group["params"][0] for group in self.optimizer.param_groups]

    def buffers(self, group: int) -> dict[str, Tensor]:
        """Values and moments of a flat buffer, by kind; of one on nvme the copy in memory."""
        return self._staged.get(group) or self._live(group)

    def _live(self, group: int) -> dict[str, Tensor]:
        flat = self.flats()[group]
        state = self.optimizer.state[flat]
        return {"value": flat.detach(), **{kind: state[kind] for kind in MOMENTS if kind in state}}

    @contextlib.contextmanager
    def _in_memory(self, group: int) -> Iterator[None]:
        """Inside, a flat buffer and its moments can be read and written; what lies on nvme is fetched and put back."""
        swapped = self.on_nvme and self.zero._swappable_optimizer_subgroup(group)
        if swapped:
            self.zero._optimizer_states_and_gradient_swap_in(group)
        yield
        if swapped:
            self.zero._optimizer_states_and_gradient_swap_out(group)

    def span(self, p: nn.Parameter) -> Span | None:
        """Where this rank's part of a trained parameter lies; None when it has none."""
        if self.stage == 3:
            group, at, _ = self.zero.grad_position[self.zero.get_param_id(p)]
            start, length = _share(p)
            return (group, at, start, length) if length else None
        group, first = self._places()[id(p)]
        size = self.flats()[group].numel()
        base = size * dist.get_rank(self.zero.real_dp_process_group[group])
        low, high = max(first, base), min(first + p.numel(), base + size)
        return (group, low - base, low - first, high - low) if high > low else None

    def _places(self) -> dict[int, tuple[int, int]]:
        """Parameter -> (group, offset in the whole group's flat buffer), ZeRO-1 and 2.

        Not `p._hp_mapping`, which is wrong with round_robin_gradients (DeepSpeed 0.19.8).
        """
        if not hasattr(self, "_known_places"):
            groups = getattr(self.zero, "round_robin_bit16_groups", None) or self.zero.bf16_groups
            offsets = getattr(self.zero, "round_robin_bit16_offsets", None) or [
                list(itertools.accumulate((p.numel() for p in group), initial=0)) for group in groups
            ]
            self._known_places = {
                id(p): (i, at) for i, group in enumerate(groups) for p, at in zip(group, offsets[i], strict=False)
            }
        return self._known_places


def build(
    recipe: Recipe,
    module: TrainedModel,
    *,
    device: torch.device,
    precision: Precision,
    weights: dict[str, Tensor] | None,
    fill: Fill,
) -> ZeroEngine:
    """See `engines.build`."""
    deepspeed, compute = load(device), precision.compute
    refuse(recipe, deepspeed, module, device=device, compute=compute)
    settings = deepspeed_config(
        recipe, world_size=dist.get_world_size(), device="cuda" if device.type == "cuda" else "cpu",
        precision=precision.name,
    )  # fmt: skip
    if recipe.strategy.kind == "zero3":
        with naming_overlay(recipe):
            init = deepspeed.zero.Init(config_dict_or_path=settings)
        _partition(init, module, weights, device=device, compute=compute, fill=fill)
    else:
        materialise(module, device)
        if fill != "none":
            hand_out(module, weights, device, fill="frozen")
    if fill == "all":
        _fill_buffers(module, weights, device)
    if recipe.model.compile:
        for block in module.blocks():
            compile_block(block)
    optimizer = choose_optimizer(recipe, module)
    if recipe.strategy.zero.leaf_modules is None:
        mark_expert_blocks(deepspeed, module)
    # its lines on memory go nowhere; warnings go to the log all the same
    with contextlib.redirect_stdout(io.StringIO()), naming_overlay(recipe):
        engine = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]
    if hasattr(engine.optimizer, "loss_scaler"):
        engine.optimizer.loss_scaler.update_scale = lambda overflow: None  # what was dropped is reported by the loop
    if recipe.strategy.kind == "zero3" and recipe.model.gradient_checkpointing == "selective":
        hide_gathers(engine.optimizer.parameter_offload)
    built = ZeroEngine(recipe, module, engine, device=device, compute=compute)
    if fill == "all":
        built.fill(weights)
    return built


def _partition(
    init: Any,
    module: TrainedModel,
    weights: dict[str, Tensor] | None,
    *,
    device: torch.device,
    compute: torch.dtype,
    fill: Fill,
) -> None:
    """Give each parameter memory, its frozen value, and at once its shard: no rank ever holds two whole ones."""
    names = {id(p): name for name, p in module.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for key, p in list(child._parameters.items()):
            if p is None:
                continue
            if id(p) not in made:
                new = nn.Parameter(torch.empty(p.shape, dtype=compute, device=device), requires_grad=p.requires_grad)
                if not p.requires_grad and fill != "none":
                    _copy_from_reader(names[id(p)], new, weights, device=device)
                init._convert_to_deepspeed_param(new)
                new.partition()  # type: ignore[attr-defined]
                made[id(p)] = new
            child._parameters[key] = made[id(p)]
    materialise(module, device)  # moves the buffers


def _fill_buffers(module: nn.Module, weights: dict[str, Tensor] | None, device: torch.device) -> None:
    for name, buffer in persistent_buffers(module):
        _copy_from_reader(name, buffer, weights, device=device)


def _copy_from_reader(name: str, out: Tensor, weights: dict[str, Tensor] | None, *, device: torch.device) -> None:
    for start, part in _from_reader(name, out, weights, dtype=out.dtype, device=device):
        out.detach().view(-1)[start : start + part.numel()].copy_(part)


def _from_reader(
    name: str, like: Tensor, weights: dict[str, Tensor] | None, *, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Rank 0's tensor of this name in parts, on every rank; rank 0 lets go of it."""
    full = weights.pop(hugging_face_name(name)) if weights is not None else None
    return broadcast_parts(full, math.prod(getattr(like, "ds_shape", like.shape)), dtype=dtype, device=device)


def _share(p: Any) -> tuple[int, int]:
    """(start, length) of this rank's part of a ZeRO-3 parameter, without the padding."""
    part = p.ds_tensor.ds_numel
    start = min(dist.get_rank(p.ds_process_group) * part, p.ds_numel)
    return start, min(part, p.ds_numel - start)
