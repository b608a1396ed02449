"""DeepSpeed's ZeRO beside the split matrix: options and precisions, where state lies, dropped steps, resuming."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.errors import UserError
from launcher.run.directory import RunDirectory
from launcher.run.ledger import start_attempt, valid_checkpoints
from launcher.trainer import ops
from launcher.trainer.metrics import read_metrics
from launcher.trainer.model import hugging_face_name
from launcher.trainer.objectives import to_batch
from tests.ranks import run_ranks
from tests.trainer import make
from tests.trainer.checkpoint import rigs

OFFLOAD = {"strategy__offload__optimizer": "cpu", "strategy__offload__params": "cpu"}
TIED = {**make.LLAMA, "tie_word_embeddings": True}
EXPERTS = {
    **{k: v for k, v in make.LLAMA.items() if k != "model_type"}, "model_type": "mixtral", "num_local_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
ROUND_ROBIN = {"strategy__deepspeed": {"zero_optimization": {"round_robin_gradients": True}}}
Case = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make.documents_store(tmp_path_factory.mktemp("store")))


def made(case: Case, rank: int) -> tuple[Any, str]:
    """(engine, back end); DeepSpeed is told that it has fp16 here, as it has on a GPU."""
    from launcher.trainer.engines import deepspeed

    deepspeed.load(make.CPU).accelerator.get_accelerator().is_fp16_supported = lambda: True
    kind, changes = case
    changes = dict(changes)
    return make.make_engine(make.make_recipe(kind, config=changes.pop("config", None), **changes), rank=rank)


def steps(engine: Any, backend: str, store: str, numbers: list[int], max_norm: float | None = 1.0) -> list[float]:
    """The losses of these steps' global batches, each followed by an update."""
    rank, world_size, out = dist.get_rank(), dist.get_world_size(), []
    rows = make.batches(Path(store), make.make_recipe(), rank=rank, world_size=world_size)
    for number in numbers:
        loss = make.forward_backward(engine, rows.step(number), world_size=world_size, backend=backend)
        dist.all_reduce(loss)
        out.append(loss.item())
        engine.clip_and_step(1e-3, max_norm)
    return out


def losses(rank: int, world_size: int, store: str, cases: list[Case]) -> list[list[float]]:
    """Of the first three steps, for each case."""
    return [steps(*made(case, rank), store, [0, 1, 2]) for case in cases]


@pytest.mark.gloo
def test_options_of_zero_recomputation_and_adapters_change_no_loss(store: str) -> None:
    groups: dict[str, list[Case]] = {
        "plain": [
            ("ddp", {}),
            ("zero2", ROUND_ROBIN),
            ("zero2", {"strategy__offload__optimizer": "cpu"}),
            ("zero3", {"strategy__zero__hpz_partition_size": 2}),
            ("zero3", {"strategy__zero__sub_group_size": 5000, "strategy__zero__param_persistence_threshold": 0}),
            *[("zero3", {"model__gradient_checkpointing": mode}) for mode in ("full", "selective", "offload")],
            *[("zero1", {"model__gradient_checkpointing": mode}) for mode in ("selective", "offload")],
        ],
        "tied": [("ddp", {"config": TIED}), ("zero2", {"config": TIED}), ("zero3", {"config": TIED, **OFFLOAD})],
        "experts": [("ddp", {"config": EXPERTS}), ("zero3", {"config": EXPERTS})],
        "lora": [(kind, {"adapter__kind": "lora"}) for kind in ("ddp", "zero1", "zero2", "zero3")],
    }
    got = iter(run_ranks(losses, 2, store, [case for cases in groups.values() for case in cases])[0])
    for name, cases in groups.items():
        expected = next(got)
        for case in cases[1:]:
            assert next(got) == pytest.approx(expected, rel=2e-6), (name, case)


@pytest.mark.gloo
def test_half_precision_stays_close_to_fp32_and_is_not_fp32(store: str) -> None:
    half: list[Case] = [
        *[(kind, {"train__precision": p}) for kind in ("zero1", "zero2", "zero3") for p in ("bf16", "fp16")],
        *[(kind, {"model__dtype": "bf16"}) for kind in ("zero1", "zero3")],
        ("zero3", {"train__precision": "bf16", **OFFLOAD}),
    ]
    exact, *others = run_ranks(losses, 2, store, [("ddp", {}), *half])[0]
    for case, got in zip(half, others, strict=True):
        assert got == pytest.approx(exact, rel=3e-2), case
        assert got != pytest.approx(exact, rel=1e-6), case


@pytest.mark.gloo
@pytest.mark.matrix
def test_compiled_blocks_give_the_same_losses(store: str) -> None:
    expected, got = run_ranks(losses, 1, store, [("ddp", {}), ("zero2", {"model__compile": True})], timeout_s=540)[0]
    assert got == pytest.approx(expected, rel=1e-5)


def masters(rank: int, world_size: int, cases: list[Case]) -> list[tuple[bool, bool]]:
    """For each case: (first masters are ddp's weights bit for bit, what the forward pass reads is their rounding)."""
    import deepspeed

    expected, out = make.weights_of(made(("ddp", {}), rank)[0]), []
    for case in cases:
        engine, _ = made(case, rank)
        got = make.weights_of(engine)
        engine.refresh()
        low = {}
        for name, p in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([p], enabled=engine.stage == 3):
                low[hugging_face_name(name)] = p.detach().clone()
        same = all(torch.equal(got[name], expected[name]) for name in expected)
        out.append((same, all(torch.equal(low[name], expected[name].to(low[name].dtype)) for name in expected)))
    return out


@pytest.mark.gloo
def test_training_begins_from_the_whole_precision_of_the_weights_in_half_precision_too() -> None:
    cases = [(kind, {"train__precision": p}) for kind in ("zero1", "zero2", "zero3") for p in ("fp32", "bf16")]
    for ranks in run_ranks(masters, 2, cases):
        assert ranks == [(True, True)] * len(cases)


def covered(rank: int, world_size: int, store: str, cases: list[Case]) -> list[list[tuple[str, str, int, int]]]:
    """Pieces after a step and an evaluation, when small parameters of ZeRO-3 are gathered."""
    out = []
    for case in cases:
        engine, backend = made(case, rank)
        steps(engine, backend, store, [0])
        data = make.batches(Path(store), make.make_recipe(), rank=rank, world_size=world_size).step(1)
        engine.evaluate(to_batch(data.micro[0], backend=backend))
        engine.ensure_state()
        out.append([(p.name, p.kind, p.start, p.tensor.numel()) for p in engine.pieces() if p.replica == 0])
        shapes = engine.parameter_shapes()
    return [*out, sorted((name, "", 0, math.prod(entry["shape"])) for name, entry in shapes.items())]


@pytest.mark.gloo
def test_pieces_cover_every_value_and_moment_once_also_right_after_an_evaluation(store: str) -> None:
    cases: list[Case] = [
        ("zero1", {}), ("zero1", {"train__precision": "bf16"}), ("zero2", ROUND_ROBIN), ("zero3", {}),
        ("zero3", {"strategy__zero__sub_group_size": 3000, **OFFLOAD}),
    ]  # fmt: skip
    ranks = run_ranks(covered, 3, store, cases)
    sizes = {name: size for name, _, _, size in ranks[0][-1]}
    assert len(sizes) == 21
    for index, case in enumerate(cases):
        for name, size in sizes.items():
            for kind in ("value", "exp_avg", "exp_avg_sq"):
                parts = sorted((s, n) for rank in ranks for p, k, s, n in rank[index] if (p, k) == (name, kind) and n)
                at = 0
                for start, length in parts:
                    assert start == at, (case, name, kind)
                    at += length
                assert at == size, (case, name, kind)


def poisoned(rank: int, world_size: int, store: str, cases: list[Case]) -> list[dict[str, Any]]:
    """A step, a step whose loss is infinite on the last rank alone, and another; with what changed meanwhile."""
    out = []
    for case in cases:
        straight = steps(*made(case, rank), store, [0, 1])
        engine, backend = made(case, rank)
        first = steps(engine, backend, store, [0])
        engine.ensure_state()
        before = [(p.name, p.kind, p.tensor.clone()) for p in engine.pieces()]
        data = make.batches(Path(store), make.make_recipe(), rank=rank, world_size=world_size).step(2)
        for i, micro in enumerate(data.micro):
            batch = to_batch(micro, backend=backend)
            if rank == world_size - 1 and i == 0:
                batch.weights = batch.weights * math.inf
            engine.forward_backward(batch, loss_scale=world_size / data.weight, sync=i == len(data.micro) - 1)
        norm = engine.clip_and_step(1e-3, 1.0)
        bad = float(engine.nonfinite)
        engine.ensure_state()
        after = [p.tensor for p in engine.pieces()]
        same = all(torch.equal(old, new) for (_, _, old), new in zip(before, after, strict=True))
        state = engine.trainer_state()
        second = steps(engine, backend, store, [1])
        out.append({
            "same": same, "bad": bad, "norm": float(norm), "step": state["optimizer_step"],
            "scale": state["loss_scale"],
            "losses": [*first, *second], "straight": straight, "good": float(engine.nonfinite),
            "shape": tuple(norm.shape),
        })  # fmt: skip
    return out


@pytest.mark.gloo
def test_a_gradient_that_is_not_finite_changes_nothing_on_any_rank(store: str) -> None:
    cases: list[Case] = [
        ("zero1", {}), ("zero1", {"train__precision": "bf16"}), ("zero2", {"train__precision": "bf16"}), ("zero3", {}),
        ("zero3", OFFLOAD), ("zero3", {"train__precision": "fp16"}),
    ]  # fmt: skip
    for ranks in run_ranks(poisoned, 2, store, cases):
        for case, got in zip(cases, ranks, strict=True):
            assert got["same"], case
            assert not math.isfinite(got["norm"]), case
            assert got["shape"] == ()
            assert (got["step"], got["good"]) == (1, 0.0), case
            assert got["losses"] == got["straight"], case
            fp16 = "fp16" in case[1].values()  # there it may be the loss scale, which is halved and asked again
            assert got["bad"] == (0.0 if fp16 else 1.0), case
            assert got["scale"] == ([2.0**15, 0.0] if fp16 else None), case


def scales(rank: int, world_size: int, store: str) -> list[Any]:
    """The loss scale of an engine after steps, and of another one that takes over its state."""
    engine, backend = made(("zero2", {"train__precision": "fp16"}), rank)
    steps(engine, backend, store, [0, 1])
    state = engine.trainer_state()
    other, _ = made(("zero3", {"train__precision": "fp16"}), rank)
    other.load_trainer_state({**state, "loss_scale": [8.0, 1999.0]})
    loaded = other.trainer_state()
    grown = steps(other, backend, store, [2]) and other.trainer_state()
    other.loss_scale.value.fill_(1.0)
    other.load_trainer_state({**state, "loss_scale": [1.0, 0.0]})
    return [state, loaded, grown, other.zero.loss_scale]


@pytest.mark.gloo
def test_the_loss_scale_moves_as_in_the_other_engines_and_goes_with_the_trainer_state(store: str) -> None:
    state, loaded, grown, told = run_ranks(scales, 1, store)[0]
    assert state == {"optimizer_step": 2, "loss_scale": [2.0**16, 2.0]}
    assert loaded == {"optimizer_step": 2, "loss_scale": [8.0, 1999.0]}
    assert grown == {"optimizer_step": 3, "loss_scale": [16.0, 0.0]}
    assert told == 1.0


def groups_of(rank: int, world_size: int, kinds: list[str]) -> list[list[tuple[float, int]]]:
    """(weight decay, elements of whole parameters) of each parameter group."""
    out = []
    for kind in kinds:
        engine, _ = made((kind, {}), rank)
        groups = getattr(engine.zero, "bit16_groups", None) or engine.zero.fp16_groups
        decay = [group["weight_decay"] for group in engine.optimizer.param_groups]
        out.append([(d, sum(getattr(p, "ds_numel", p.numel()) for p in g)) for d, g in zip(decay, groups, strict=True)])
    return out


@pytest.mark.gloo
def test_weight_decay_is_on_matrices_alone_though_zero3_shows_flat_parameters() -> None:
    norms = 5 * make.LLAMA["hidden_size"]
    for found in run_ranks(groups_of, 1, ["zero1", "zero3"])[0]:
        assert [decay for decay, _ in found] == [0.1, 0.0]
        assert found[1][1] == norms
        assert found[0][1] > norms


def unused(rank: int, world_size: int) -> tuple[float, float]:
    """The norm of a gradient of one step, and of the next one's, in which a parameter takes no part."""
    engine, _ = made(("zero3", {"strategy__zero__param_persistence_threshold": 0}), rank)
    found = []
    for scale in (1.0, 0.0):
        engine.module.objective = Probe(scale)
        engine.forward_backward(None, loss_scale=1.0, sync=True)
        found.append(float(engine.clip_and_step(0.0, None)))
    return found[0], found[1]


class Probe:
    """An objective that uses the final norm always and the first layer's only when its scale is not 0."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        total = model.lm.base_model.norm(torch.ones(1, 32)).sum()
        if self.scale:
            total = total + model.lm.base_model.layers[0].input_layernorm(torch.ones(1, 32)).sum()
        return total.double()


@pytest.mark.gloo
def test_a_parameter_that_takes_no_part_in_a_step_has_no_gradient_left_from_the_one_before() -> None:
    both, one = run_ranks(unused, 1)[0]
    assert one == pytest.approx(both / math.sqrt(2))


def whole_and_cut(rank: int, world_size: int, folder: str, cases: list[Case]) -> None:
    """Each case's run to its end at once, and in two attempts."""
    from launcher.recipe.schema import to_dict
    from launcher.trainer.main import run_rank

    for number, (kind, changes) in enumerate(cases):
        recipe = make.make_recipe(kind, checkpoint__every_steps=2, checkpoint__keep_last=9, **changes)
        for name, totals in (("whole", (5,)), ("cut", (3, 5))):
            path = Path(folder) / f"{number}" / name
            for total in totals:
                if rank == 0:
                    run = RunDirectory(path / "run")
                    if not run.path.exists():
                        run = make.make_run(path, recipe, evaluation=False)
                    data = json.loads(run.data_file.read_text())
                    run.data_file.write_text(json.dumps({**data, "total_steps": total}))
                    run.write_recipe(to_dict(recipe))
                    start_attempt(run, target="test", job_id=None, nodes=["here"], reason="test")
                dist.barrier()
                run_rank(str(path / "run"), totals.index(total) + 1)
                dist.barrier()


@pytest.mark.gloo
@pytest.mark.slow
def test_l4_a_run_in_two_attempts_repeats_the_losses_and_weights_of_one_bit_for_bit(tmp_path: Path) -> None:
    cases: list[Case] = [
        ("zero1", {}), ("zero1", {"train__precision": "bf16"}), ("zero2", {}), ("zero3", {}),
        ("zero3", {"train__precision": "bf16"}), ("zero3", OFFLOAD),
    ]  # fmt: skip
    run_ranks(whole_and_cut, 2, str(tmp_path), cases, timeout_s=540)
    for number, case in enumerate(cases):
        runs = [RunDirectory(tmp_path / f"{number}" / name / "run") for name in ("whole", "cut")]
        whole, cut = ({s["step"]: s["loss"] for s in read_metrics(run.metrics_file)[0]} for run in runs)
        assert sorted(whole) == [1, 2, 3, 4, 5]
        assert cut == whole, case
        ends = [rigs.read_back(valid_checkpoints(run)[-1].path) for run in runs]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0]), case


def refusals(rank: int, world_size: int, cases: list[Case]) -> list[str]:
    """What each recipe is refused with."""
    import deepspeed

    out = []
    for kind, changes in cases:
        missing = changes.pop("missing", False)
        if missing:
            sys.modules["deepspeed"] = None  # type: ignore[assignment]
        try:
            make.make_engine(make.make_recipe(kind, **changes), rank=rank)
            out.append("")
        except UserError as error:
            out.append(str(error))
        sys.modules["deepspeed"] = deepspeed
    return out


@pytest.mark.gloo
def test_what_deepspeed_cannot_do_here_is_refused_with_the_key_and_the_fix(
    tmp_path: Path,
) -> None:
    folder = {"strategy__offload__nvme_path": str(tmp_path), "strategy__zero__leaf_modules": ["LlamaMLP"]}
    cases: list[tuple[Case, str]] = [
        (("zero1", {"missing": True}), "pip install 'train-launcher[deepspeed]'"),
        (("zero2", {"train__precision": "fp16"}), "train.precision = fp16: expected bf16 or fp32"),
        (("zero3", {"model__compile": True}), "model.compile = true: expected false with strategy.kind=zero3"),
        (
            ("zero3", {"strategy__zero__leaf_modules": ["LlamaMLPs"]}),
            "leaf_modules = LlamaMLPs: expected a class of this model's modules. Did you mean 'LlamaMLP'?",
        ),
        (("zero3", {"strategy__zero__hpz_partition_size": 3}), "hpz_partition_size = 3: expected a divisor of the 2"),
        (("zero3", {"strategy__zero__quantized_weights": True}), "quantized_weights = true: expected false on a cpu"),
        (("zero3", {"strategy__offload__optimizer": "nvme", **folder}), "Run `launcher doctor --build-ops` on it"),
    ]
    for got in run_ranks(refusals_without_ops, 2, [case for case, _ in cases]):
        for (case, words), message in zip(cases, got, strict=True):
            assert words in message, (case, message)


@pytest.mark.gloo
def test_what_deepspeed_says_against_keys_laid_over_is_a_users_error_that_names_them() -> None:
    """A key's type and bounds are checked before; here DeepSpeed refuses what only it can see."""
    (got,) = run_ranks(overlays, 1)
    assert got[0].startswith("strategy.deepspeed = data_types.keep_in_fp32_modules: expected")
    assert "keep_in_fp32_modules" in got[0].partition("it says")[2]
    assert got[1] == "TypeError: a mistake of ours"
    assert got[2] == []  # nothing is tried out with the compiler


def overlays(rank: int, world_size: int) -> list[Any]:
    import deepspeed

    from launcher.trainer.engines.deepspeed_setup import naming_overlay

    out: list[Any] = []
    overlay = {"strategy__deepspeed": {"data_types": {"keep_in_fp32_modules": "never"}}}
    for call in (lambda: make.make_engine(make.make_recipe("zero2", **overlay), rank=rank), lambda: _mistake()):
        try:
            with naming_overlay(make.make_recipe("zero2")):
                call()
        except Exception as error:
            out.append(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
    return [*out, list(deepspeed.ops.__compatible_ops__)]


def _mistake() -> None:
    raise TypeError("a mistake of ours")


def refusals_without_ops(rank: int, world_size: int, cases: list[Case]) -> list[str]:
    """The same on a machine for which nothing is built."""
    import tempfile

    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCH_EXTENSIONS_DIR"] = empty
        return refusals(rank, world_size, cases)


@pytest.mark.slow
def test_to_ask_for_an_operator_says_nothing_on_a_machine_without_a_gpu() -> None:
    """DeepSpeed's import warns where it has to find out by itself."""
    code = "from launcher.trainer.ops import op_is_built; op_is_built('cpu_adam')"
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_an_operator_counts_as_built_for_these_versions_and_this_processor_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(ops, "_came_with_deepspeed", lambda name: False)
    folder = ops.build_folder("cpu_adam")
    assert folder == tmp_path / "cpu_adam"
    folder.mkdir()
    stamp = ops._built_for()
    assert not ops.op_is_built("cpu_adam")
    (folder / ops.STAMP).write_text(json.dumps(stamp))
    assert not ops.op_is_built("cpu_adam"), "a stamp without its library"
    (folder / "cpu_adam.so").touch()
    assert ops.op_is_built("cpu_adam")
    assert not ops.op_is_built("async_io")
    for changed in ({"torch": "1.0"}, {"deepspeed": "0.1"}, {"features": ["quantum"]}):
        (folder / ops.STAMP).write_text(json.dumps({**stamp, **changed}))
        assert not ops.op_is_built("cpu_adam"), changed
    with pytest.raises(UserError, match=r"cpu_adam is not built for this machine\. Run `launcher doctor --build-ops`"):
        ops.load_op("cpu_adam")


def test_an_operator_of_gpus_cannot_be_built_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(UserError, match=r"quantizer cannot be built: DeepSpeed has it for GPUs only"):
        ops.build_op("quantizer")


def with_built_adam(rank: int, world_size: int, store: str, cases: list[Case]) -> list[Any]:
    """Losses, the update's class, and the count after another engine took over the state."""
    out = []
    for case in cases:
        engine, backend = made(case, rank)
        got = steps(engine, backend, store, [0, 1])
        engine.set_step(7)
        out.append((got, type(engine.optimizer).__name__, engine.trainer_state()["optimizer_step"]))
    return out


@pytest.mark.gloo
def test_an_offloaded_update_runs_in_deepspeeds_adam_where_it_is_built(store: str) -> None:
    if not ops.op_is_built("cpu_adam"):
        pytest.skip("DeepSpeed's cpu_adam is not built: launcher doctor --build-ops")
    cases: list[Case] = [("ddp", {}), ("zero2", {"strategy__offload__optimizer": "cpu"}), ("zero3", OFFLOAD)]
    (expected, _, _), *others = run_ranks(with_built_adam, 2, store, cases)[0]
    for losses_, name, count in others:
        assert losses_ == pytest.approx(expected, rel=1e-5)
        assert (name, count) == ("DeepSpeedCPUAdam", 7)


def over_nvme(rank: int, world_size: int, store: str, folder: str) -> tuple[list[float], list[float], bool]:
    """(ddp's losses, those over nvme, of which the last come from an engine that took over state; it is the same)."""
    places = {"strategy__offload__optimizer": "nvme", "strategy__offload__params": "cpu"}
    case = ("zero3", {**places, "strategy__offload__nvme_path": folder, "strategy__zero__sub_group_size": 5000})
    expected = steps(*made(("ddp", {}), rank), store, [0, 1, 2, 3])
    engine, backend = made(case, rank)
    got = steps(engine, backend, store, [0, 1])
    engine.ensure_state()
    saved, state = [p.tensor.clone() for p in engine.pieces()], engine.trainer_state()
    other, backend = made(case, rank)
    other.ensure_state()
    for piece, value in zip(other.pieces(), saved, strict=True):
        piece.tensor.copy_(value)
    other.load_trainer_state(state)
    other.refresh()
    other._staged.clear()
    other.ensure_state()
    same = all(torch.equal(p.tensor, value) for p, value in zip(other.pieces(), saved, strict=True))
    return expected, got + steps(other, backend, store, [2, 3]), same


@pytest.mark.gloo
def test_state_on_nvme_is_read_and_written_through_its_pieces(store: str, tmp_path: Path) -> None:
    if lacking := [name for name in ("async_io", "cpu_adam") if not ops.op_is_built(name)]:
        pytest.skip(f"DeepSpeed's {' and '.join(lacking)} not built: launcher doctor --build-ops (needs libaio)")
    for expected, got, same in run_ranks(over_nvme, 2, store, str(tmp_path)):
        assert same
        assert got == pytest.approx(expected, rel=1e-4)
