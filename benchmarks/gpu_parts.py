"""What the GPU check is made of: models, rows of random documents, engines without a launcher, rows of its table."""

from __future__ import annotations

import contextlib
import gc
import importlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launcher.data.batches import MicroBatch
from launcher.recipe.schema import Adapter, Data, Model, Objective, Optimizer, Recipe, Source, Strategy, Train
from launcher.trainer import engines, model, objectives
from launcher.trainer.model import hugging_face_name

SMALL: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
    "initializer_range": 0.05,
}  # fmt: skip
TINY = {**SMALL, "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
_QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "0.6B": {**_QWEN3, "hidden_size": 1024, "intermediate_size": 3072},
    "1.7B": {**_QWEN3, "hidden_size": 2048, "intermediate_size": 6144},
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how thoroughly a check runs.

    quick: fewer steps and cases
    """

    device: torch.device
    quick: bool

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def small(self) -> dict[str, Any]:
        """The model of the checks that are not about speed."""
        return dict(SMALL if self.gpu else TINY)

    @property
    def precision(self) -> str:
        return "bf16" if self.gpu else "fp32"


@dataclass(slots=True)
class Row:
    """One line of the table.

    status: ok, failed, or skipped
    text: what was seen, or why not
    figures: the same as numbers
    """

    check: str
    case: str
    status: str
    text: str
    figures: dict[str, Any] = field(default_factory=dict)

    as_dict = asdict


def judged(check: str, case: str, differences: dict[str, tuple[float, float]], **figures: Any) -> Row:
    """A row that is ok when every difference is within its tolerance.

    Args:
        differences: name -> (difference, tolerance)
    """
    status = "ok" if all(d <= tolerance for d, tolerance in differences.values()) else "failed"
    text = ", ".join(f"{name} {d:.1e} (<= {tolerance:.0e})" for name, (d, tolerance) in differences.items())
    return Row(check, case, status, text, {**{name: d for name, (d, _) in differences.items()}, **figures})


def make_recipe(kind: str = "ddp", *, config: dict[str, Any], rows: int = 2, **changes: Any) -> Recipe:
    """A recipe without data; `changes` as `model__attention="sdpa"`."""
    recipe = Recipe(
        model=Model(config=config, tokenizer="none", attention="auto", liger=False),
        adapter=Adapter(), objective=Objective(), data=Data(train=[Source(path="none")], seq_len=64),
        train=Train(global_batch_size=rows, micro_batch_size=1, max_steps=100, max_grad_norm=1.0, seed=5),
        optimizer=Optimizer(lr=1e-3, weight_decay=0.1, schedule="constant"), strategy=Strategy(kind=kind),  # type: ignore[arg-type]
    )  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        target: Any = getattr(recipe, section)
        *path, last = name.split("__")
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    recipe.cluster.nodes, recipe.cluster.nproc_per_node = 1, 1
    return recipe


_rotary: dict[str, Any] = {}


def restore_rotary(recipe: Recipe) -> None:
    """Take Liger's rotary embedding out of this process: it is the one thing that Liger changes beside the instance."""
    assert recipe.model.config is not None
    name = recipe.model.config["model_type"].removesuffix("_text")
    source = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    source.apply_rotary_pos_emb = _rotary.setdefault(name, source.apply_rotary_pos_emb)  # type: ignore[attr-defined]


def built(recipe: Recipe, place: Place, *, compute: torch.dtype) -> tuple[model.TrainedModel, str, list[str]]:
    """(model with the recipe's weights and no engine, attention back end, what was decided)"""
    restore_rotary(recipe)
    skeleton = model.build_for(recipe.model, device=place.device, compute=compute, objective_kind=recipe.objective.kind)
    weights = model.read_weights(recipe.model, skeleton.config, seed=recipe.train.seed)
    model.materialise(skeleton.module, place.device)
    for name, parameter in skeleton.module.named_parameters():
        parameter.data.copy_(weights[hugging_face_name(name)])
    return skeleton.module, skeleton.backend, skeleton.notes


def make_engine(recipe: Recipe, place: Place, *, random_in_place: bool = False) -> tuple[Any, str, list[str]]:
    """(engine, attention back end, what was decided)

    Args:
        random_in_place: fill the weights where they lie, for models that take long to make on the host
    """
    restore_rotary(recipe)
    precision = engines.choose_precision(recipe.train.precision, recipe.model.dtype, place.device)
    skeleton = model.build_for(
        recipe.model, device=place.device, compute=precision.compute, objective_kind=recipe.objective.kind
    )
    weights = None if random_in_place else model.read_weights(recipe.model, skeleton.config, seed=recipe.train.seed)
    engine: Any = engines.build(
        recipe, skeleton.module, device=place.device, precision=precision, weights=weights,
        fill="none" if random_in_place else "all",
    )  # fmt: skip
    if random_in_place:
        fill_random(engine)
    return engine, skeleton.backend, skeleton.notes


def fill_random(engine: Any) -> None:
    """Matrices normal with 0.02, vectors 1, moments 0; for any engine."""
    engine.ensure_state()
    shapes = engine.parameter_shapes()
    for piece in engine.pieces():
        if piece.kind != "value":
            piece.tensor.zero_()
        elif len(shapes[piece.name]["shape"]) > 1:
            piece.tensor.normal_(0, 0.02)
        else:
            piece.tensor.fill_(1)
    engine.set_step(0)
    engine.refresh()


def make_row(lengths: list[int], *, vocab: int, seed: int = 0, trained: set[int] | None = None) -> MicroBatch:
    """One row of random documents laid end to end.

    Args:
        trained: numbers of the documents that are trained; None: all
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, sum(lengths))
    weights = np.ones(len(ids), np.float32)
    ends = np.cumsum(lengths)
    weights[ends - 1] = 0
    for i, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        if trained is not None and i not in trained:
            weights[end - length : end] = 0
    return MicroBatch(
        input_ids=ids[None], position_ids=np.concatenate([np.arange(n) for n in lengths])[None],
        targets=np.roll(ids, -1)[None], weights=weights[None], cu_seqlens=np.array([0, *ends], np.int32),
        max_seqlen=max(lengths), rows=[0], documents=list(range(len(lengths))), tokens=len(ids),
    )  # fmt: skip


def cut(row: MicroBatch, document: int) -> MicroBatch:
    """One document of a row, alone."""
    a, b = (int(row.cu_seqlens[document + i]) for i in (0, 1))
    fields = [getattr(row, name)[:, a:b] for name in ("input_ids", "position_ids", "targets", "weights")]
    return MicroBatch(*fields, np.array([0, b - a], np.int32), b - a, [0], [document], b - a)


def random_lengths(total: int, *, seed: int = 0, median: int = 600) -> list[int]:
    """Log-normal lengths that fill a row of `total` tokens."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        length = int(np.clip(rng.lognormal(np.log(median), 0.8), 2, total))
        lengths.append(left if left - length < 2 else length)
    return lengths


def to_batch(row: MicroBatch, place: Place, backend: str) -> objectives.Batch:
    return objectives.to_batch(row, backend=backend).to(place.device)


def train_step(engine: Any, micro: list[objectives.Batch], *, lr: float = 1e-3) -> float:
    """One update on one rank; the loss."""
    weight = float(sum(len(b.targets) for b in micro))
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for i, batch in enumerate(micro):
        total += engine.forward_backward(batch, loss_scale=1.0 / weight, sync=i == len(micro) - 1)
    engine.clip_and_step(lr, 1.0)
    return float(total) / weight


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients over the norm of the second."""
    assert a.keys() == b.keys()
    apart = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    whole = sum(float(b[name].double().square().sum()) for name in b)
    return float((apart / max(whole, 1e-300)) ** 0.5)


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-30)


@contextlib.contextmanager
def clean_memory(place: Place) -> Iterator[None]:
    """Nothing of a case before is left, and its peak is not counted."""
    free(place)
    if place.gpu:
        torch.cuda.reset_peak_memory_stats(place.device)
    yield
    free(place)


def free(place: Place) -> None:
    gc.collect()
    if place.gpu:
        torch.cuda.synchronize(place.device)
        torch.cuda.empty_cache()


def peak_gib(place: Place) -> float | None:
    return torch.cuda.max_memory_allocated(place.device) / 2**30 if place.gpu else None


def now(place: Place) -> float:
    """Seconds, when the device has done what it was told."""
    if place.gpu:
        torch.cuda.synchronize(place.device)
    return time.perf_counter()
