"""How the trained module is built: a skeleton on every rank, real weights on one, and the path from tokens to loss."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from launcher.errors import UserError
from launcher.trainer import activations, adapters, attention, kernels, objectives
from launcher.trainer.architecture import cannot_be_built, refuse_what_looks_ahead
from launcher.trainer.architecture import load_config as load_config
from launcher.trainer.objectives import Batch
from launcher.trainer.objectives.chunked import Head, weighted_nll

if TYPE_CHECKING:
    from launcher.recipe.schema import Adapter, Model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainedModel(nn.Module):
    """A Hugging Face causal language model and its loss in one forward, so that FSDP2 and DDP see a single call.

    Args:
        lm: the causal language model
        head: how its logits follow from hidden states; None: take its own whole logits
        liger: use Liger's fused loss where all weights are 1
    """

    def __init__(self, lm: Any, *, head: Head | None, liger: bool = False) -> None:
        super().__init__()
        self.lm = lm
        self.head = head
        self.liger = liger
        self.objective: Any = None

    def forward(self, batch: Batch) -> Tensor:
        """The objective's sum over the micro-batch, 0-d float64."""
        return self.objective.loss(self, batch)  # type: ignore[no-any-return]

    def weighted_nll(self, batch: Batch) -> Tensor:
        """Sum of weight x negative log likelihood of the trained tokens, 0-d float64."""
        arguments = dict(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=None,
            use_cache=False,
            **batch.attention,
        )
        if self.head is None:
            logits = self.lm(**arguments).logits.flatten(0, 1).index_select(0, batch.trained).float()
            nll = nn.functional.cross_entropy(logits, batch.targets, reduction="none")
            return (nll * batch.weights).sum(dtype=torch.float64)
        states = self.lm.base_model(**arguments).last_hidden_state.flatten(0, 1).index_select(0, batch.trained)
        linear = self.lm.get_output_embeddings()
        bias = getattr(linear, "bias", None)
        if self.liger and kernels.fits_fused_loss(batch, states, self.head):
            return kernels.fused_nll_sum(states, linear.weight, bias, batch.targets, self.head.softcap).double()
        return weighted_nll(states, linear.weight, bias, batch.targets, batch.weights, self.head)

    def blocks(self) -> list[nn.Module]:
        """The decoder blocks, in order: the units of sharding, compilation and recomputation."""
        names = set(getattr(self.lm, "_no_split_modules", None) or ())
        found = [m for m in self.lm.modules() if type(m).__name__ in names]
        if found:
            return found
        lists = [m for m in self.lm.base_model.modules() if isinstance(m, nn.ModuleList)]
        return max(([*modules] for modules in lists), key=len, default=[])


def hugging_face_name(name: str) -> str:
    """A parameter's name without what wrappers put before it and adapters into it."""
    for prefix in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(prefix, "")
    return adapters.plain_name(name.removeprefix("module.").removeprefix("lm."))


@dataclass(slots=True)
class Skeleton:
    """The module without weights, and what was decided while building it.

    backend: attention back end
    notes: one line each for the log
    """

    module: TrainedModel
    config: Any
    backend: str
    notes: list[str]


def build_for(
    model: Model,
    *,
    device: torch.device,
    compute: torch.dtype,
    objective_kind: str,
    adapter: Adapter | None = None,
) -> Skeleton:
    """Skeleton with every choice made for this device: attention, kernels, loss path.

    Args:
        compute: type of the arithmetic
        adapter: None: train every parameter
    """
    config = load_config(model)
    chosen = attention.choose(
        model.attention, device, dtype=compute, config=config.get_text_config(), model_class=_model_class(config)
    )
    use = kernels.choose(model.liger, device, config.model_type)
    objective = objectives.get(objective_kind)
    return build_skeleton(model, config, chosen=chosen, use=use, objective=objective, adapter=adapter)


def build_skeleton(
    model: Model,
    config: Any,
    *,
    chosen: attention.Attention,
    use: kernels.Kernels,
    objective: Any,
    adapter: Adapter | None = None,
) -> Skeleton:
    """The trained module with parameters on the meta device and real buffers; the same on every rank, costs no memory.

    Raises:
        UserError: the architecture is not a causal language model, cannot keep documents apart, or has not the layers
            that are to get an adapter.
    """
    with parameters_on_meta():
        lm = _from_config(model, config, chosen.implementation)
        adapted = adapters.inject(lm, adapter) if adapter is not None and adapter.kind == "lora" else None
    refuse_what_looks_ahead(model, lm)
    attention.refuse_without_positions(lm.base_model)
    liger = f"liger: {str(use.liger).lower()} ({use.reason})"
    fused_loss = False
    if use.liger:
        said, fused_loss = kernels.apply(lm, use)
        liger += f"; {said}"
    head, why = find_head(lm)
    notes = [
        f"attention: {chosen.backend} ({chosen.reason})",
        f"{liger}; {kernels.loss_clause(head)}" if fused_loss else liger,
        f"loss: {why}",
    ]
    if adapted is not None:
        notes.append(f"adapter: {adapted}")
    module = TrainedModel(lm, head=head, liger=fused_loss)
    if model.gradient_checkpointing != "none":
        notes.append(f"gradient checkpointing: {activations.apply(module, model.gradient_checkpointing)}")
    module.objective = objective
    return Skeleton(module, config, chosen.backend, notes)


def read_weights(model: Model, config: Any, *, seed: int, adapter: Adapter | None = None) -> dict[str, Tensor]:
    """Every parameter and persistent buffer in host memory, by Hugging Face name; called on one rank of the job.

    From a name or folder they are read; from a config they are random, decided by the seed alone, so that they are
    the same for every engine, device and number of ranks. So are the start values of an adapter.

    Raises:
        UserError: weights are missing in the folder, or it cannot be read.
    """
    torch.manual_seed(seed)
    lm = _from_config(model, config, "eager") if model.config is not None else _from_pretrained(model, config)
    lm.tie_weights()
    if adapter is not None and adapter.kind == "lora":
        adapters.inject(lm, adapter)
        adapters.start(lm, seed)
    return dict(named_state(lm))


def named_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters (tied ones once) and persistent buffers, by Hugging Face name."""
    for name, parameter in module.named_parameters():
        yield hugging_face_name(name), parameter.detach()
    for name, buffer in persistent_buffers(module):
        yield hugging_face_name(name), buffer


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the state; rotary tables and the like do not."""
    seen: set[int] = set()
    for prefix, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield (f"{prefix}.{name}" if prefix else name), buffer


def check_vocabulary(config: Any, *, data_vocab_size: int) -> None:
    """Refuse data whose token ids the model does not have.

    Raises:
        UserError: the tokenizer is larger than the model's embedding.
    """
    size = config.get_text_config().vocab_size
    if data_vocab_size > size:
        raise UserError(
            f"model.tokenizer: the data holds token ids up to {data_vocab_size - 1}, the model's vocabulary is {size}. "
            "Use the model's own tokenizer, or a config with vocab_size of at least that."
        )


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, a module's parameters go to the meta device as they are registered; buffers stay real.

    Meta buffers would lose what only the constructor computes (rotary frequencies are not part of any checkpoint).
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if (
            parameter is not None and not parameter.is_meta
        ):  # a tied parameter is on meta already and must stay the same object
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give every meta parameter (or shard of one) memory on the device, values undefined; move the buffers there."""
    made: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                child._parameters[name] = made[id(parameter)]
        for name, buffer in list(child._buffers.items()):
            if buffer is not None:
                child._buffers[name] = buffer.to(device)


def find_head(lm: Any) -> tuple[Head | None, str]:
    """How this model's logits follow from hidden states, proven against its own forward, and a clause for the log.

    The proof needs no weights: the backbone is replaced by a stub that returns random hidden states, the output layer
    by a small random one, and the model's own logits are compared with ours.
    """
    if adapters.has_adapter(lm.get_output_embeddings()):
        return None, "whole logits of each micro-batch, because the output layer has an adapter"
    config = lm.config.get_text_config()
    head = Head(scale=_logit_scale(config), softcap=getattr(config, "final_logit_softcapping", None))
    try:
        problem = _head_differs(lm, head, config.hidden_size)
    except Exception as error:
        problem = f"it cannot be proven ({type(error).__name__}: {error})"
    if problem:
        return None, f"whole logits of each micro-batch, because {problem}"
    return head, "in chunks of tokens, head proven equal to the model's own"


def _head_differs(lm: Any, head: Head, hidden_size: int) -> str | None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, hidden_size, generator=generator) * 4
    original = lm.get_output_embeddings()
    small = nn.Linear(hidden_size, 11, bias=getattr(original, "bias", None) is not None)
    stub = _StubBackbone(hidden)
    prefix, backbone = lm.base_model_prefix, lm.base_model
    try:
        lm.set_output_embeddings(small)
        setattr(lm, prefix, stub)
        with torch.no_grad():
            theirs = lm(input_ids=torch.zeros(2, 3, dtype=torch.int64), use_cache=False).logits
            ours = head.logits(hidden, small.weight, small.bias)
    finally:
        setattr(lm, prefix, backbone)
        lm.set_output_embeddings(original)
    if stub.calls != 1 or theirs.shape != ours.shape:
        return "its forward does more than backbone and output layer"
    return None if torch.allclose(theirs.float(), ours, rtol=1e-5, atol=1e-5) else "its logits are not the plain head's"


class _StubBackbone(nn.Module):
    """Returns the same hidden states to whoever asks, and counts the calls."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden, self.calls = hidden, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        self.calls += 1
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


def _logit_scale(config: Any) -> float:
    if scaling := getattr(config, "logits_scaling", None):  # Granite divides
        return 1.0 / float(scaling)
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    return 1.0 if scale is None else float(scale)


def _model_class(config: Any) -> Any:
    """The class transformers builds for this architecture, None for one that brings its own code."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping.get(type(config), None)


def _from_config(model: Model, config: Any, implementation: str) -> Any:
    """A model of its own config: transformers writes the attention implementation into the one it is given."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=DTYPES[model.dtype],
            attn_implementation=implementation,
            trust_remote_code=model.trust_remote_code,
        )
    except Exception as error:  # of any class: a wrong size or name fails wherever it is first used
        raise cannot_be_built(model, config, error) from error


def _from_pretrained(model: Model, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        lm, report = AutoModelForCausalLM.from_pretrained(
            model.name, config=copy.deepcopy(config), revision=model.revision,
            trust_remote_code=model.trust_remote_code, dtype=DTYPES[model.dtype], attn_implementation="eager",
            output_loading_info=True, weights_only=True,
        )  # fmt: skip
    except pickle.UnpicklingError as error:  # torch.load with weights_only, which builds tensors and nothing else
        raise UserError(
            f"model.name = {model.name}: the weights cannot be read: they are a pickle (pytorch_model.bin) that would "
            "run code, or is damaged. Use a model in safetensors, or one that was saved as plain tensors."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"model.name = {model.name}: the weights cannot be read: {error}") from error
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(
            f"model.name = {model.name}: expected weights for {shown}, found none. Is it a causal language model?"
        )
    return lm
