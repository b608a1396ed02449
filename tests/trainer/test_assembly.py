"""How ranks deal the rows follows from the plan and the strategy, the same on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.data.order import USUAL_COST
from launcher.plan import make_plan
from launcher.trainer import assembly
from launcher.trainer.distributed import Ranks
from tests.trainer import make


@pytest.mark.parametrize(
    ("kind", "lockstep"), [("ddp", False), ("zero1", False), ("zero2", True), ("zero3", True), ("fsdp2", True)]
)
def test_rows_are_dealt_by_the_plans_cost_in_lockstep_where_ranks_meet_at_every_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lockstep: bool
) -> None:
    recipe = make.make_recipe(kind)
    run = make.make_run(tmp_path, recipe)
    given: dict[str, Any] = {}
    monkeypatch.setattr(assembly, "Batches", lambda _mix, **how: given.update(how))
    monkeypatch.setattr(assembly, "Prefetch", lambda *_, **__: None)

    def rows() -> dict[str, Any]:
        ranks = Ranks(rank=1, local_rank=1, world_size=2, local_world_size=2, node=0)
        data = assembly.read_data(run)
        assembly._rows(run, recipe, data, None, ranks=ranks, device=make.CPU, backend="sdpa", step=0)  # type: ignore[arg-type]
        return given

    assert rows()["cost"] == USUAL_COST  # this run's plan knows nothing
    assert (given["lockstep"], given["by_length"]) == (lockstep, False)
    plan = make_plan(recipe)
    assert plan.parameters is not None
    run.write_plan(plan.to_dict())
    recipe.data.packing = "none"
    a, b = rows()["cost"]
    assert b == 6 * 2 * 32
    assert a * 64 + b * 64**2 == pytest.approx(64 * plan.parameters.flops_per_token)
    assert given["by_length"]
