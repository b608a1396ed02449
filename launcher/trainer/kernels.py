"""Which of Liger's fused kernels are used, and why; the one seam of kernels beside attention."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from launcher.errors import UserError

if TYPE_CHECKING:
    from launcher.trainer.objectives import Batch
    from launcher.trainer.objectives.chunked import Head

_ROTARY = "apply_rotary_pos_emb"
_TOLERANCE = 2e-5  # of the largest value, in float32; tanh in place of the exact GELU differs by more


@dataclass(frozen=True, slots=True)
class Kernels:
    """The decision and its reason.

    liger: Liger's norms, rotary embedding, MLP and fused linear cross entropy replace those of transformers
    reason: one clause for the log
    required: the recipe says `true`, so a kernel that is wrong for this model is an error and not left out
    device: where they run, None: nowhere
    """

    liger: bool
    reason: str
    required: bool = False
    device: torch.device | None = None


def choose(requested: Literal["auto", True, False], device: torch.device, model_type: str) -> Kernels:
    """Decide before a model is built: Liger patches without complaint anywhere and then fails in the first forward.

    Raises:
        UserError: `model.liger: true` where it cannot be.
    """
    if requested is False:
        return Kernels(False, "switched off in the recipe")
    problem = _problem(device, model_type)
    if problem is None:
        return Kernels(True, f"a GPU, and {model_type} is supported", requested is True, device)
    if requested is True:
        raise UserError(f"model.liger = true: {problem}. Use model.liger=auto, which does without it here.")
    return Kernels(False, problem)


def apply(model: Any, use: Kernels) -> tuple[str, bool]:
    """Put Liger's kernels into a built model and keep those that compute what they replace.

    Liger looks at the model's type alone, so an unusual activation or rotary embedding would change the model in
    silence. One module of each kind, the rotary embedding and the loss are therefore compared on the device, with
    gradients. The head stays ours, which calls Liger's fused loss itself.

    Returns:
        A clause for the log, and whether the fused loss can be used.
    Raises:
        UserError: `model.liger: true`, and one differs.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    assert use.device is not None
    source = sys.modules[type(model).__module__]
    before, bound = dict(vars(source)), {id(m) for m in model.modules() if "forward" in vars(m)}
    _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False, cross_entropy=False)
    after = {name: value for name, value in vars(source).items() if before.get(name) is not value}
    for name in after:  # the instance is patched; another model of this process keeps its classes
        setattr(source, name, before[name])
    used: Counter[str] = Counter()
    left_out: dict[str, str] = {}
    patched = [m for m in model.modules() if "forward" in vars(m) and id(m) not in bound]
    _keep_those_that_fit(patched, use.device, used, left_out)
    if _ROTARY in after:
        if why := _rotary_differs(model, before[_ROTARY], after[_ROTARY], use.device):
            left_out["rotary embedding"] = why
        else:
            setattr(source, _ROTARY, after[_ROTARY])
            used["rotary embedding"] = 1
    if why := _loss_differs(model, use.device):
        left_out["fused loss"] = why
    without = "; ".join(f"{kind}: {why}" for kind, why in left_out.items())
    if without and use.required:
        raise UserError(
            f"model.liger = true: Liger's kernels do not fit this model ({without}). "
            "Use model.liger=auto, which leaves them out."
        )
    text = ", ".join(kind if count == 1 else f"{kind} x {count}" for kind, count in used.items()) or "no kernel fits"
    return (f"{text}; left out: {without}" if without else text), "fused loss" not in left_out


def loss_clause(head: Head | None) -> str:
    """When the fused loss is used with this head."""
    if head is None or head.scale != 1.0:
        return "never the fused loss: " + ("whole logits are needed" if head is None else "this model scales logits")
    return "fused loss where all token weights are 1"


def fits_fused_loss(batch: Batch, hidden: Tensor, head: Head) -> bool:
    """Whether Liger's fused loss gives what ours gives: it knows neither token weights nor scaled logits.

    It computes gradients when the hidden states need one, so it would give a head none that learns alone.
    """
    learns_alone = torch.is_grad_enabled() and not hidden.requires_grad
    return batch.uniform and head.scale == 1.0 and len(batch.targets) > 0 and not learns_alone


def fused_nll_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
) -> Tensor:
    """Sum of the tokens' negative log likelihoods by Liger's fused linear cross entropy.

    Liger 0.8 counts the targets on the host, which waits for the device once a micro-batch. Weights are cast once:
    under autocast each of its chunks would cast them again.

    Args:
        hidden: [tokens, hidden_size]; weight: [vocab, hidden_size]; targets: [tokens] int64
    """
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    device_type = hidden.device.type
    compute = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=softcap, accum_dtype=torch.float32)
    with torch.autocast(device_type, enabled=False):
        return loss(weight.to(compute), hidden.to(compute), targets, None if bias is None else bias.to(compute))


def _problem(device: torch.device, model_type: str) -> str | None:
    if device.type != "cuda":
        return f"its kernels need a GPU, this rank uses the {device.type.upper()}"
    for name, package in (("liger_kernel", "liger-kernel"), ("triton", "triton")):
        if importlib.util.find_spec(name) is None:
            return f"{package} is not installed (pip install 'train-launcher[gpu]')"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"liger-kernel has nothing for model_type {model_type}"
    return None


def _keep_those_that_fit(
    patched: list[nn.Module], device: torch.device, used: Counter[str], left_out: dict[str, str]
) -> None:
    """Compare one module of each kind with its class; those that differ get their own forward back."""
    verdicts: dict[Any, str | None] = {}
    for module in patched:
        kind = (type(module), vars(module)["forward"].__func__, tuple(p.shape for p in module.parameters()))
        if kind not in verdicts:
            verdicts[kind] = _module_differs(module, device)
        if why := verdicts[kind]:
            left_out[type(module).__name__] = why
            for name in ("forward", "extra_repr", "_get_name"):
                vars(module).pop(name, None)
        else:
            used[type(module).__name__] += 1


def _module_differs(module: nn.Module, device: torch.device) -> str | None:
    """Compare the bound forward with the class's own on random weights and input; why it must not be used, or None."""
    original = type(module).forward
    taken = [p for p in inspect.signature(original).parameters.values() if p.default is p.empty]
    width = _input_width(module)
    if width is None or len(taken) != 2:  # self and hidden states
        return "cannot be compared"
    generator = torch.Generator().manual_seed(0)

    def random(shape: Any) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    with _comparison() as told:
        trial = copy.deepcopy(module).to_empty(device=device).float().eval()
        for parameter in trial.parameters():
            parameter.data.copy_(random(parameter.shape) * (width**-0.5 if parameter.dim() > 1 else 1.0))
            parameter.requires_grad_()
        states = random((2, 8, width))

        def theirs(x: Tensor) -> Tensor:
            return original(trial, x)

        told.append(_functions_differ(trial.forward, theirs, [states], list(trial.parameters()), random))
    return told[-1]


def _input_width(module: nn.Module) -> int | None:
    linear = next((m for m in module.modules() if isinstance(m, nn.Linear)), None)
    if linear is not None:
        return linear.in_features
    weight = getattr(module, "weight", None)
    return weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() == 1 else None


def _rotary_differs(model: Any, original: Any, fused: Any, device: torch.device) -> str | None:
    """Compare the rotary embedding on two rows whose positions begin again, with the model's own tables."""
    from launcher.trainer.attention_kernels import heads

    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)

    def random(shape: Any) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    with _comparison() as told:
        embedding = copy.deepcopy(model.base_model.rotary_emb).to(device)
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 0, 1]], device=device)
        head_dim, _, shared = heads(config)
        for layer_type in getattr(embedding, "layer_types", None) or [None]:
            chosen = {} if layer_type is None else {"layer_type": layer_type}
            cos, sin = embedding(random((2, 8, config.hidden_size)), positions, **chosen)
            inputs = [random((2, 2 * shared, 8, head_dim)), random((2, 2, 8, head_dim))]

            def call(function: Any, q: Tensor, k: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
                return torch.cat([part.flatten() for part in function(q, k, cos, sin)])

            told.append(
                _functions_differ(
                    lambda q, k, call=call: call(fused, q, k), lambda q, k, call=call: call(original, q, k),  # type: ignore[misc]
                    inputs, [], random,
                )
            )  # fmt: skip
            if told[-1]:
                break
    return told[-1]


def _loss_differs(model: Any, device: torch.device) -> str | None:
    """Compare the fused loss with ours on a few tokens, capped as this model caps its logits."""
    from launcher.trainer.objectives.chunked import Head, weighted_nll

    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    generator = torch.Generator().manual_seed(0)

    def random(shape: Any) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    with _comparison() as told:
        targets, ones = torch.arange(24, device=device), torch.ones(24, device=device)

        def ours(hidden: Tensor, weight: Tensor) -> Tensor:
            return weighted_nll(hidden, weight, None, targets, ones, Head(softcap=softcap)).float()

        def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
            return fused_nll_sum(hidden, weight, None, targets, softcap)

        told.append(_functions_differ(theirs, ours, [random((24, 64)), random((40, 64))], [], random))
    return told[-1]


def _functions_differ(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: list[Tensor],
    parameters: list[Any],
    random: Callable[[Any], Tensor],
) -> str | None:
    """Compare values and gradients; fused kernels may overwrite what they are given, so each call has its own."""
    results = []
    direction: Tensor | None = None
    for function in (theirs, ours):
        given = [t.clone().requires_grad_() for t in inputs]
        out = function(*(t * 1 for t in given))
        if direction is None:
            direction = random(out.shape)
        gradients = torch.autograd.grad((out * direction).sum(), [*given, *parameters])
        results.append([out.detach(), *gradients])
    for what, a, b in zip(("values", *["gradients"] * len(results[0])), *results, strict=False):
        difference = ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item()
        if not difference <= _TOLERANCE:
            return f"{what} differ by {difference:.0e}"
    return None


@contextlib.contextmanager
def _comparison() -> Iterator[list[str | None]]:
    """Exact float32 products; a comparison that cannot be made is a reason against a kernel, not the end of the run."""
    told: list[str | None] = []
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield told
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0]
        told.append(f"cannot be compared ({type(error).__name__}: {text})")
    finally:
        torch.set_float32_matmul_precision(precision)
