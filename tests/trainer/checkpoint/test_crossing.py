"""One checkpoint for every engine: any strategy on any number of ranks opens any checkpoint, bit by bit, and goes on.

A dozen pairs run with every `make test`; all of them, with the marker `matrix`, by `make test-matrix`.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.trainer import make
from tests.trainer.checkpoint import crossing

RANKS = (1, 2, 3, 4)
TOLERANCE = {"bf16": 1e-3}  # of bf16 arithmetic in another order; of the losses alone, state is equal bit by bit

Saved = dict[str, dict[str, Any]]


def save(folder: Path, cases: list[tuple[str, str]], world_size: int) -> Saved:
    """What rank 0 saw of the saving runs."""
    crossing.begin_all(folder, [crossing.label(*case, world_size) for case in cases])
    return ranks.run_ranks(crossing.save_all, world_size, folder, cases, timeout_s=1500)[0]  # type: ignore[no-any-return]


def require_opens(folder: Path, strategy: str, flavour: str, world_size: int, saved: Saved) -> None:
    """Every one of these checkpoints opens with that strategy, holds what it held, and the run goes on from it."""
    crossing.begin_all(folder, list(saved))
    results = ranks.run_ranks(
        crossing.load_all, world_size, folder, strategy, flavour, list(saved), timeout_s=1500
    )  # fmt: skip
    wrong = []
    for name, before in saved.items():
        now = results[0][name]
        changed = [key for key in before["truth"] if now["truth"] and now["truth"].get(key) != before["truth"][key]]
        if before["truth"] and now["truth"] and (changed or now["truth"].keys() != before["truth"].keys()):
            wrong.append(f"{name}: state changed: {changed[:3]}")
        rel = TOLERANCE.get(flavour, 1e-5)
        if now["losses"] != pytest.approx(before["losses"], rel=rel):
            wrong.append(f"{name}: losses {now['losses']}, uninterrupted {before['losses']}")
        assert len(now["losses"]) == crossing.STEPS - crossing.SAVED == 2
    assert not wrong, f"opened by {strategy} on {world_size} ranks:\n" + "\n".join(wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    made: Path = tmp_path_factory.mktemp("crossing")
    make.documents_store(made)
    return made


@pytest.fixture(scope="module")
def few(folder: Path) -> Saved:
    """Checkpoints of two and of three ranks, of every strategy."""
    both = [("zero1", "fp32"), ("zero3", "fp32"), ("fsdp2", "fp32"), ("zero2", "lora")]
    three = [("zero2", "fp32"), ("zero3-offload", "fp32"), ("hsdp", "fp32"), ("ddp", "fp32"), ("zero3", "lora")]
    return {**save(folder, both, 2), **save(folder, three, 3)}


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("strategy", "flavour", "world_size", "opened"),
    [
        ("zero3", "fp32", 2, ["fsdp2-fp32-2", "zero1-fp32-2", "zero3-offload-fp32-3", "ddp-fp32-3"]),
        ("fsdp2", "fp32", 3, ["zero3-fp32-2", "zero2-fp32-3", "hsdp-fp32-3"]),
        ("zero2", "fp32", 1, ["zero3-fp32-2", "fsdp2-fp32-2", "zero2-fp32-3"]),
        ("zero1", "lora", 2, ["zero2-lora-2", "zero3-lora-3"]),
        ("ddp", "lora", 2, ["zero3-lora-3"]),
    ],
)
def test_L5_a_dozen_pairs_of_strategies_and_rank_counts(folder, few, strategy, flavour, world_size, opened):
    require_opens(folder, strategy, flavour, world_size, {name: few[name] for name in opened})


@pytest.fixture(scope="module")
def all_fp32(folder: Path) -> Saved:
    cases = [(strategy, "fp32") for strategy in crossing.STRATEGIES]
    return {name: value for n in RANKS for name, value in save(folder, cases, n).items()}


@pytest.mark.matrix
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("strategy", "world_size"), list(itertools.product(crossing.STRATEGIES, RANKS)))
def test_L5_every_strategy_on_every_rank_count_opens_every_checkpoint(folder, all_fp32, strategy, world_size):
    require_opens(folder, strategy, "fp32", world_size, all_fp32)


@pytest.fixture(scope="module")
def all_forms(folder: Path) -> Saved:
    more = [(strategy, "fp32") for strategy in crossing.MORE]
    return {name: value for n in (2, 3) for name, value in save(folder, more, n).items()}


@pytest.mark.matrix
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("strategy", "world_size"), list(itertools.product([*crossing.MORE, "ddp", "zero1", "zero3", "fsdp2"], (2, 3)))
)
def test_L5_offload_round_robin_sub_groups_and_gathered_units(folder, all_forms, strategy, world_size):
    require_opens(folder, strategy, "fp32", world_size, all_forms)


@pytest.fixture(scope="module")
def all_flavours(folder: Path) -> dict[str, Saved]:
    flavours = [flavour for flavour in crossing.FLAVOURS if flavour != "fp32"]
    found: dict[str, Saved] = {flavour: {} for flavour in flavours}
    for n in (2, 3):
        for flavour in flavours:
            found[flavour] |= save(folder, [(strategy, flavour) for strategy in crossing.STRATEGIES], n)
    return found


@pytest.mark.matrix
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("flavour", "strategy", "world_size"),
    list(itertools.product(["bf16", "tied", "lora", "lora-stored"], crossing.STRATEGIES, (2, 3))),
)
def test_L5_half_precision_tied_frozen_and_adapted_weights(folder, all_flavours, flavour, strategy, world_size):
    require_opens(folder, strategy, flavour, world_size, all_flavours[flavour])
