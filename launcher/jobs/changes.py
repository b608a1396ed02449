"""What changed between a run's recipe and the one it goes on with, what that does, and what makes it another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.errors import show_value
from launcher.recipe.schema import Recipe, to_dict
from launcher.strategy.explained import dotted

# what a change does to a run that goes on
Kind = Literal["nothing", "sums", "from here on", "another run", "another model"]
ALLOWED: dict[Kind, str] = {
    "nothing": "yes", "sums": "yes", "from here on": "yes", "another run": "with --force", "another model": "never",
}  # fmt: skip
NOTHING: Kind = "nothing"
SUMS: Kind = "sums"
ONWARD: Kind = "from here on"
OTHER: Kind = "another run"
MODEL: Kind = "another model"

_SAME = "the same samples in the same order"
_LAYOUT = f"{_SAME}; weights and moments bit for bit; losses within 1e-5, as sums are taken in another order"
_KERNEL = f"{_SAME}; losses differ in their last digits, as the arithmetic is done in another order"
_LEARNS = "applies from step {step} on; the samples stay the same"
_JOB = "how the job is run; what is learnt stays the same bit for bit"
_ROWS = "other rows: what this run has seen and will see is no longer one training"
_LORA = "the parameters of the checkpoint do not fit"
# for each key of the schema, or each section of it, what happens: the entry with the longest name that fits counts
RULES: dict[str, tuple[Kind, str]] = {
    "run.name": (NOTHING, "the run was moved; its directory is its name"),
    "run.dir": (NOTHING, "the run was moved; its directory is its place"),
    "run.tags": (NOTHING, "words for people"),
    "run": (NOTHING, _JOB),
    "model.name": (MODEL, "the parameters of another model do not fit"),
    "model.config": (MODEL, "the parameters of another architecture do not fit"),
    "model.tokenizer": (OTHER, "other tokens for the same text"),
    "model.revision": (OTHER, "other weights and perhaps another tokenizer under the same name"),
    "model.trust_remote_code": (NOTHING, "whether code that comes with the model may run"),
    "model.dtype": (MODEL, "the checkpoint's weights would be rounded, or would pretend to digits that they never had"),
    "model.attention": (SUMS, _KERNEL),
    "model.liger": (SUMS, _KERNEL),
    "model.compile": (SUMS, _KERNEL),
    "model.gradient_checkpointing": (SUMS, _KERNEL),
    "adapter.kind": (MODEL, _LORA),
    "adapter.rank": (MODEL, _LORA),
    "adapter.targets": (MODEL, _LORA),
    "adapter.alpha": (OTHER, "the adapter's part in the model is scaled otherwise from one step to the next"),
    "adapter.dropout": (OTHER, "another task for the adapter from step {step} on"),
    "objective.kind": (OTHER, "another loss on other tokens"),
    "data": (OTHER, _ROWS),
    "data.eval": (OTHER, "evaluation losses before and after could not be compared"),
    "data.cache_dir": (NOTHING, "the same rows, from another folder"),
    "data.num_workers": (NOTHING, "the same rows bit for bit, prepared by another number of processes"),
    "train.global_batch_size": (OTHER, "other samples in each step"),
    "train.micro_batch_size": (SUMS, "the same samples in each step, in other portions; losses within 1e-6"),
    "train.max_steps": (ONWARD, "moves the end of the run; the samples up to it stay the same"),
    "train.epochs": (ONWARD, "moves the end of the run; the samples up to it stay the same"),
    "train.seed": (OTHER, "another order of the samples and other dropout"),
    "train.precision": (ONWARD, "the arithmetic has other digits from step {step} on; the samples stay the same"),
    "train.tf32": (ONWARD, "the arithmetic has other digits from step {step} on; the samples stay the same"),
    "train.max_grad_norm": (ONWARD, _LEARNS),
    "train.eval_every_steps": (NOTHING, "when it is evaluated; what is learnt stays the same bit for bit"),
    "train.on_nonfinite": (ONWARD, "acts from step {step} on, where a loss is not finite"),
    "train.on_spike": (ONWARD, "acts from step {step} on, where a loss is a spike"),
    "train.spike_sigmas": (ONWARD, "acts from step {step} on, where a loss is a spike"),
    "train.spike_window": (ONWARD, "acts from step {step} on, where a loss is a spike"),
    "train.max_skips": (ONWARD, "acts from step {step} on, where updates are dropped"),
    "train.replica_check_steps": (NOTHING, "when copies are compared; what is learnt stays the same bit for bit"),
    "optimizer": (ONWARD, _LEARNS),
    "optimizer.kind": (MODEL, "the moments of another optimizer do not fit"),
    "optimizer.schedule_steps": (ONWARD, "lays the curve of the learning rate over other steps, from step {step} on"),
    "strategy": (SUMS, _LAYOUT),
    "strategy.offload": (SUMS, f"{_LAYOUT}; on nvme it goes on closely, but not bit for bit"),
    "strategy.prefetch": (NOTHING, "when weights are gathered; what is learnt stays the same bit for bit"),
    "strategy.zero.quantized_weights": (ONWARD, "weights are rounded on their way from step {step} on"),
    "strategy.zero.quantized_gradients": (ONWARD, "gradients are rounded on their way from step {step} on"),
    "strategy.deepspeed": (ONWARD, "whatever DeepSpeed makes of it, from step {step} on"),
    "checkpoint": (NOTHING, "when and where checkpoints are written; what is learnt stays the same bit for bit"),
    "logging": (NOTHING, "what is written about the run; what is learnt stays the same bit for bit"),
    "cluster": (NOTHING, _JOB),
    "cluster.nodes": (SUMS, _LAYOUT),
    "cluster.min_nodes": (SUMS, _LAYOUT),
    "cluster.nproc_per_node": (SUMS, _LAYOUT),
    "cluster.accelerator": (SUMS, f"{_KERNEL}, and with train.precision = auto perhaps in another type"),
    "cluster.env": (NOTHING, "which variables the job asks for; the launcher does not know what they decide"),
    "cluster.setup": (NOTHING, "which lines run before the job; the launcher does not know what they decide"),
}  # fmt: skip
KIND = "adapter.kind"
OF_LORA = ("adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.targets")
LENGTH = ("train.max_steps", "train.epochs", "optimizer.schedule_steps")  # what the learning rate's curve is laid over
VERSIONS: tuple[Kind, str] = (SUMS, _KERNEL)
PLACE = ("run.name", "run.dir")  # where the run lies; it may have been moved


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that differs: a key of the recipe, the content of a file, a version; its values before and after.

    rule: what the change does; None: what RULES says of the key
    """

    key: str
    old: Any
    new: Any
    rule: tuple[Kind, str] | None = None

    def __str__(self) -> str:
        return f"{self.key}: {show_value(self.old)} -> {show_value(self.new)}"

    def line(self, step: int) -> str:
        """The change and its effect on a run that has finished `step` steps."""
        return f"{self}: {self.effect(step)}"

    def effect(self, step: int) -> str:
        """What it does to a run that has finished `step` steps, a part of a sentence."""
        return self._rule[1].format(step=step + 1)

    @property
    def breaks_identity(self) -> bool:
        return self._rule[0] in (OTHER, MODEL)

    @property
    def breaks_checkpoints(self) -> bool:
        """Whether checkpoints written before it cannot go on after it."""
        return self._rule[0] == MODEL

    @property
    def _rule(self) -> tuple[Kind, str]:
        return self.rule or rule_of(self.key)


def rule_of(key: str) -> tuple[Kind, str]:
    """What RULES says of a key: the entry with the longest name that it is, or lies under."""
    parts = key.split(".")
    for count in range(len(parts), 0, -1):
        if found := RULES.get(".".join(parts[:count])):
            return found
    raise KeyError(f"no rule says what a change of {key} does")


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every key whose value differs, in the order of the schema; where a run lies is no change.

    Nor is an adapter's rank where there is no adapter, nor a key that the version which wrote `old` did not know and
    that has its default in `new`.
    """
    before, after = _with_defaults(dotted(old)), dotted(new)
    keys = [*after, *(key for key in before if key not in after)]
    found = [Change(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]
    without_effect = (*PLACE, *OF_LORA) if before.get(KIND) == after.get(KIND) == "full" else PLACE
    return [change for change in found if not _under(change.key, without_effect)]


def identity(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The values that make a run what it is, by dotted key."""
    return {key: value for key, value in dotted(recipe).items() if Change(key, None, None).breaks_identity}


def _with_defaults(known: dict[str, Any]) -> dict[str, Any]:
    """What a recipe said, and the defaults of the keys that did not exist then."""
    added = {key: value for key, value in dotted(to_dict(Recipe())).items() if key not in known}
    return {**known, **{key: value for key, value in added.items() if not any(_under(k, (key,)) for k in known)}}


def _under(key: str, roots: Sequence[str]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)


def table() -> str:
    """RULES as the table of docs/resume.md."""
    lines = ["| changed | allowed | effect |", "|---|---|---|"]
    for key, (kind, words) in RULES.items():
        lines.append(f"| `{key}` | {ALLOWED[kind]} | {words.format(step='N')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
