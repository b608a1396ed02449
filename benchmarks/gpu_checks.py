"""The checks of `gpu_check.py`: each a function that yields rows of its table; none depends on another."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_parts as parts
from benchmarks.gpu_parts import Place, Row, judged
from launcher.errors import UserError
from launcher.trainer import attention, kernels
from launcher.trainer.objectives.chunked import Head, weighted_nll
from launcher.trainer.proof import prove_isolation

Check = Callable[[Place], Iterator[Row]]

# architectures whose Liger patches are compared, by what they add to the small model
LIGER = {
    "qwen3": {}, "qwen2": {}, "llama": {}, "mistral": {"sliding_window": 64}, "gemma2": {"sliding_window": 64},
    "gemma3_text": {"sliding_window": 64}, "olmo2": {}, "phi3": {"pad_token_id": 0}, "granite": {},
    "smollm3": {"pad_token_id": 0},
}  # fmt: skip
FAULT_S = 10  # from an error of one rank to the end of all
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def check_attention(place: Place) -> Iterator[Row]:
    """Law L2: in a row of documents each one's loss and gradient are what they are alone."""
    lengths = [100, 1, 317, 64, 250] if place.gpu else [20, 1, 30, 9]
    half = torch.bfloat16
    row = parts.make_row(lengths, vocab=place.small["vocab_size"])
    exact: tuple[float, dict[str, Tensor]] | None = None
    for compute, backend in [(torch.float32, "eager"), *((half, name) for name in attention.IMPLEMENTATIONS)]:
        name = f"{backend} {'bf16' if compute == half else 'fp32'}"
        recipe = parts.make_recipe(config=place.small, model__attention=backend)
        try:
            module, _, _ = parts.built(recipe, place, compute=compute)
        except UserError as error:
            yield Row("attention", name, "skipped", str(error).partition(". Usable")[0])
            continue
        try:
            with torch.autocast(place.device.type, half, enabled=compute == half):
                together = _loss_and_gradient(module, [parts.to_batch(row, place, backend)])
                alone = _loss_and_gradient(
                    module,
                    [parts.to_batch(parts.cut(row, i), place, backend) for i in range(len(lengths)) if lengths[i] > 1],
                )
        except Exception as error:
            yield Row("attention", name, "failed", _first_line(error))
            continue
        tolerance = (2e-3, 3e-2) if compute == half else (1e-5, 1e-4)
        differences = {
            "loss packed/alone": (parts.relative(together[0], alone[0]), tolerance[0]),
            "gradient packed/alone": (parts.distance(together[1], alone[1]), tolerance[1]),
        }
        if exact is None:
            exact = alone
        else:
            differences["loss bf16/fp32"] = (parts.relative(together[0], exact[0]), 5e-3)
            differences["gradient bf16/fp32"] = (parts.distance(together[1], exact[1]), 1e-1)
        yield judged("attention", name, differences)


def check_attention_speed(place: Place) -> Iterator[Row]:
    """Forward and backward of one attention layer of the 1.7B model, one packed row."""
    lengths = (4096, 8192, 32768) if place.gpu else (64,)
    for seq_len in lengths[:1] if place.quick else lengths:
        for backend in attention.IMPLEMENTATIONS:
            case = f"{backend} {seq_len}"
            if backend in ("eager", "sdpa") and seq_len > 8192:
                continue  # quadratic memory
            try:
                seconds = _time_attention(place, backend, seq_len)
            except UserError as error:
                yield Row("attention speed", case, "skipped", str(error).partition(". Usable")[0])
                continue
            except Exception as error:
                yield Row("attention speed", case, "failed", _first_line(error))
                continue
            yield Row("attention speed", case, "ok", f"{seconds * 1e3:.2f} ms", {"ms": seconds * 1e3})


def check_liger(place: Place) -> Iterator[Row]:
    """A model with Liger's kernels gives the loss and gradient of one without; what they bring in time and memory."""
    choice = kernels.choose("auto", place.device, "qwen3")
    if not choice.liger:
        yield Row("liger", "all", "skipped", choice.reason)
        return
    for model_type, more in LIGER.items():
        try:
            yield _liger_family(place, model_type, more)
        except Exception as error:
            yield Row("liger", model_type, "failed", _first_line(error))
    for compute in (torch.float32, torch.bfloat16):
        yield from _liger_loss(place, compute)


def check_parity(place: Place) -> Iterator[Row]:
    """The engines' losses over 20 steps of low precision against DDP in fp32."""
    steps = 3 if place.quick else 20
    lengths = [120, 40, 200, 152] if place.gpu else [20, 12, 30]
    rows = [parts.make_row(lengths, vocab=place.small["vocab_size"], seed=seed) for seed in range(4)]

    def losses(kind: str, precision: str) -> list[float]:
        recipe = parts.make_recipe(kind, config=place.small, train__precision=precision)
        with parts.clean_memory(place):
            engine, backend, _ = parts.make_engine(recipe, place)
            batches = [parts.to_batch(row, place, backend) for row in rows]
            found = [parts.train_step(engine, [batches[s % 4], batches[(s + 1) % 4]]) for s in range(steps)]
            prove_isolation(engine, backend=backend, vocab_size=place.small["vocab_size"])
            return found

    exact = losses("ddp", "fp32")
    yield Row("parity", "ddp fp32", "ok", f"loss {exact[0]:.4f} to {exact[-1]:.4f} in {steps} steps", {"losses": exact})
    for kind in ENGINES:
        case = f"{kind} {place.precision}"
        if kind == "ddp" and place.precision == "fp32":
            continue  # with which the others are compared
        if why := _lacking(kind):
            yield Row("parity", case, "skipped", why)
            continue
        try:
            found = losses(kind, place.precision)
        except Exception as error:
            yield Row("parity", case, "failed", _first_line(error))
            continue
        worst = max(parts.relative(a, b) for a, b in zip(found, exact, strict=True))
        yield judged("parity", case, {"largest loss difference": (worst, 3e-2 if place.gpu else 1e-5)}, losses=found)


def check_checkpoint(place: Place) -> Iterator[Row]:
    """Three steps with each engine, saved, loaded into the next engine: equal bit by bit, and the same next loss."""
    if importlib.util.find_spec("xxhash") is None:
        yield Row("checkpoint", "all", "skipped", "xxhash is not installed")
        return
    kinds = [kind for kind in ENGINES if not _lacking(kind)]
    if place.quick:
        kinds = kinds[:3]
    for saved, loaded in zip(kinds, kinds[1:] + kinds[:1], strict=True):
        try:
            yield _round_trip(place, saved, loaded)
        except Exception as error:
            yield Row("checkpoint", f"{saved} to {loaded}", "failed", _first_line(error))


def check_activations(place: Place) -> Iterator[Row]:
    """Every mode of recomputation gives the gradient of none; what it costs."""
    config = dict(place.small)
    length = 256
    if place.gpu:
        config |= {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 16}
        length = 2048 if place.quick else 8192
    row = parts.make_row(parts.random_lengths(length), vocab=config["vocab_size"])
    plain: tuple[float, dict[str, Tensor]] | None = None
    for mode in ("none", "selective", "full", "offload"):
        recipe = parts.make_recipe(config=config, model__gradient_checkpointing=mode)
        try:
            with parts.clean_memory(place):
                module, backend, _ = parts.built(recipe, place, compute=torch.bfloat16 if place.gpu else torch.float32)
                batch = parts.to_batch(row, place, backend)
                with torch.autocast(place.device.type, torch.bfloat16, enabled=place.gpu):
                    _loss_and_gradient(module, [batch])
                    begin = parts.now(place)
                    found = _loss_and_gradient(module, [batch])
                    seconds = parts.now(place) - begin
                peak = parts.peak_gib(place)
                del module
        except Exception as error:
            yield Row("activations", mode, "failed", _first_line(error))
            continue
        plain = plain or found
        differences = {
            "loss": (parts.relative(found[0], plain[0]), 1e-6),
            "gradient": (parts.distance(found[1], plain[1]), 1e-2 if place.gpu else 1e-6),
        }
        line = judged("activations", mode, differences, seconds=seconds, peak_gib=peak)
        line.text += f"; {seconds * 1e3:.0f} ms" + (f", peak {peak:.2f} GiB" if peak is not None else "")
        yield line


def check_compile(place: Place) -> Iterator[Row]:
    """torch.compile of each block changes no loss, and compiles once for rows of any length."""
    if not place.gpu:
        yield Row("compile", "all", "skipped", "compiling for a CPU takes a C++ compiler and half a minute")
        return
    totals = (2048, 1536, 1792, 2048)
    rows = [parts.make_row(parts.random_lengths(n, seed=n), vocab=place.small["vocab_size"]) for n in totals]
    for kind in ("ddp", "fsdp2"):
        try:
            found: list[list[float]] = []
            begin = time.perf_counter()
            for compiled in (False, True):
                recipe = parts.make_recipe(kind, config=place.small, model__compile=compiled, train__precision="bf16")
                with parts.clean_memory(place):
                    engine, backend, _ = parts.make_engine(recipe, place)
                    begin = time.perf_counter()
                    found.append([parts.train_step(engine, [parts.to_batch(row, place, backend)]) for row in rows])
                    del engine
            seconds = time.perf_counter() - begin
        except Exception as error:
            yield Row("compile", kind, "failed", _first_line(error))
            continue
        worst = max(parts.relative(a, b) for a, b in zip(found[1], found[0], strict=True))
        line = judged("compile", kind, {"largest loss difference": (worst, 2e-2)}, seconds=seconds)
        line.text += f"; {seconds:.0f} s with compilation"
        yield line


def check_speed(place: Place) -> Iterator[Row]:
    """Tokens a second, share of the device's peak, and peak memory beside the plan's, of whole training steps."""
    if not place.gpu:
        cases: list[tuple[str, int, str, dict[str, Any]]] = [("tiny", 256, "fsdp2", {})]
    else:
        cases = [(size, seq_len, "fsdp2", {}) for size in parts.SIZES for seq_len in (4096, 8192)]
        cases += [
            ("0.6B", 4096, "fsdp2", {"model__liger": False}),
            ("0.6B", 4096, "fsdp2", {"model__compile": True}),
            ("0.6B", 4096, "fsdp2", {"model__gradient_checkpointing": "full"}),
            ("0.6B", 4096, "ddp", {}),
            ("0.6B", 4096, "zero1", {}),
            ("0.6B", 4096, "zero3", {}),
        ]
        cases = cases[:1] if place.quick else cases
    for size, seq_len, kind, changes in cases:
        case = " ".join([size, str(seq_len), kind, *(f"{k.partition('__')[2]}={v}" for k, v in changes.items())])
        if why := _lacking(kind):
            yield Row("speed", case, "skipped", why)
            continue
        try:
            with parts.clean_memory(place):
                yield _speed(place, case, parts.SIZES.get(size, place.small), seq_len, kind, changes)
        except Exception as error:
            yield Row("speed", case, "failed", _first_line(error))


def check_faults(place: Place) -> Iterator[Row]:
    """F36: out of memory, a device-side error, a broken collective: the rank ends at once and says which it was."""
    cases = {"oom": ("out_of_memory", 1), "xid": ("node", 1), "nccl": ("communication", 2)}
    for fault, (expected, ranks) in cases.items():
        if fault == "xid" and not place.gpu:
            yield Row("faults", f"F36 {fault}", "skipped", "needs a GPU")
            continue
        said = _faulty_ranks(fault, ranks, cpu=not place.gpu)
        if not isinstance(said, dict):
            yield Row("faults", f"F36 {fault}", "failed", said)
            continue
        seconds, recorded = said["seconds"], " ".join(said["collectives"][-1:])
        good = said["class"] == expected and seconds < FAULT_S and "all_reduce" in recorded
        text = f"{said['class']} in {seconds:.1f} s (< {FAULT_S}), last collective {recorded}; {said['text']}"
        yield Row("faults", f"F36 {fault}", "ok" if good else "failed", text[:300], {"seconds": seconds})


CHECKS: dict[str, Check] = {
    "attention": check_attention,
    "attention-speed": check_attention_speed,
    "liger": check_liger,
    "parity": check_parity,
    "checkpoint": check_checkpoint,
    "activations": check_activations,
    "compile": check_compile,
    "faults": check_faults,
    "speed": check_speed,
}


def _faulty_ranks(fault: str, ranks: int, *, cpu: bool) -> dict[str, Any] | str:
    """What rank 0 said of a fault, or why it said nothing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = Path(__file__).with_name("gpu_faults.py")
    command = [sys.executable, str(script), fault, *(["--cpu"] if cpu else [])]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    started = [
        subprocess.Popen(
            command, env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        output, trouble = started[0].communicate(timeout=120)
    except subprocess.TimeoutExpired:
        return "rank 0 still stood there after 120 s"
    finally:
        for process in started:
            process.kill()
            process.wait()
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else f"rank 0 said nothing: {' | '.join(trouble.splitlines()[-2:])}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _lacking(kind: str) -> str | None:
    zero = kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None
    return "deepspeed is not installed" if zero else None


def _loss_and_gradient(module: Any, batches: list[Any]) -> tuple[float, dict[str, Tensor]]:
    """Sum over the batches."""
    module.train()
    module.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = module(batch)
        if loss.requires_grad:
            loss.backward()
        total += float(loss.detach())
    return total, parts.gradients(module)


def _time_attention(place: Place, backend: str, seq_len: int) -> float:
    """Seconds of one forward and backward pass."""
    from types import SimpleNamespace

    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import create_causal_mask
    from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

    from launcher.trainer.model import load_config

    recipe = parts.make_recipe(config=parts.SIZES["1.7B"])
    config = load_config(recipe.model)
    chosen = attention.choose(backend, place.device, dtype=torch.bfloat16, config=config)
    config._attn_implementation = chosen.implementation
    row = parts.to_batch(parts.make_row(parts.random_lengths(seq_len), vocab=100), place, backend)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    inputs = [torch.randn(1, n, seq_len, 128, device=place.device, dtype=torch.bfloat16) for n in heads]
    inputs = [t.requires_grad_() for t in inputs]
    embeds = torch.zeros(1, seq_len, 1, device=place.device, dtype=torch.bfloat16)
    mask = None
    if chosen.implementation in AttentionMaskInterface():
        mask = create_causal_mask(
            config=config, inputs_embeds=embeds, attention_mask=None, past_key_values=None,
            position_ids=row.position_ids,
        )  # fmt: skip
    module: Any = SimpleNamespace(
        config=config, is_causal=True, training=True, layer_idx=0, num_key_value_groups=2, modules=lambda: iter(())
    )
    attend = eager_attention_forward if backend == "eager" else AttentionInterface()[chosen.implementation]

    def once() -> None:
        out = attend(module, *inputs, mask, dropout=0.0, scaling=128**-0.5, **row.attention)[0]
        torch.autograd.grad(out.float().sum(), inputs)

    for _ in range(3):
        once()
    begin = parts.now(place)
    for _ in range(10):
        once()
    return (parts.now(place) - begin) / 10


def _liger_family(place: Place, model_type: str, more: dict[str, Any]) -> Row:
    """One architecture with and without."""
    config = {**place.small, **more, "model_type": model_type}
    row = parts.make_row([100, 37, 200], vocab=config["vocab_size"])
    found, note = [], ""
    for liger in (False, "auto"):
        recipe = parts.make_recipe(config=config, model__attention="eager", model__liger=liger)
        module, backend, notes = parts.built(recipe, place, compute=torch.float32)
        found.append(_loss_and_gradient(module, [parts.to_batch(row, place, backend)]))
        note = next(n for n in notes if n.startswith("liger: "))
    differences = {
        "loss": (parts.relative(found[1][0], found[0][0]), 1e-5),
        "gradient": (parts.distance(found[1][1], found[0][1]), 1e-3),
    }
    line = judged("liger", f"{model_type} fp32", differences)
    line.text += f"; {note.partition('; ')[2]}"
    return line


def _liger_loss(place: Place, compute: torch.dtype) -> Iterator[Row]:
    """Both losses of 8192 tokens and the vocabulary of Qwen3: equal, and what each costs."""
    tokens, vocab, hidden_size = 8192, 151936, 1024
    generator = torch.Generator(place.device).manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device=place.device, generator=generator).to(compute).requires_grad_()
    weight = torch.randn(vocab, hidden_size, device=place.device, generator=generator).mul_(0.02).to(compute)
    weight.requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device=place.device, generator=generator)
    ones = torch.ones(tokens, device=place.device)
    name = str(compute).removeprefix("torch.")
    found: dict[str, tuple[float, dict[str, Tensor]]] = {}
    for who in ("ours", "liger"):

        def run(who: str = who) -> Tensor:
            if who == "liger":
                return kernels.fused_nll_sum(hidden, weight, None, targets, None)
            return weighted_nll(hidden, weight, None, targets, ones, Head())

        with parts.clean_memory(place):
            before = torch.cuda.memory_allocated(place.device)
            for _ in range(2):
                torch.autograd.grad(run(), [hidden, weight])
            begin = parts.now(place)
            for _ in range(5):
                loss = run()
                gradients = torch.autograd.grad(loss, [hidden, weight])
            ms = (parts.now(place) - begin) / 5 * 1e3
            peak = (torch.cuda.max_memory_allocated(place.device) - before) / 2**30
        found[who] = (float(loss), dict(zip(("hidden", "weight"), gradients, strict=True)))
        text = f"{ms:.1f} ms forward and backward, {peak:.2f} GiB"
        yield Row("liger", f"loss, {who} {name}", "ok", text, {"ms": ms, "gib": peak})
    tolerance = (1e-5, 1e-3) if compute == torch.float32 else (1e-3, 2e-2)
    yield judged("liger", f"loss, equality {name}", {
        "loss": (parts.relative(found["liger"][0], found["ours"][0]), tolerance[0]),
        "gradient": (parts.distance(found["liger"][1], found["ours"][1]), tolerance[1]),
    })  # fmt: skip


def _round_trip(place: Place, saved: str, loaded: str) -> Row:
    from launcher.recipe.schema import to_dict
    from launcher.run.directory import RunDirectory
    from launcher.run.ledger import start_attempt
    from launcher.trainer.checkpoint.manager import CheckpointManager

    rows = [parts.make_row([60, 30, 38], vocab=place.small["vocab_size"], seed=seed) for seed in range(2)]

    def engine_of(kind: str) -> tuple[Any, list[Any]]:
        recipe = parts.make_recipe(kind, config=place.small, train__precision=place.precision)
        engine, backend, _ = parts.make_engine(recipe, place)
        return engine, [parts.to_batch(row, place, backend) for row in rows]

    with tempfile.TemporaryDirectory() as name, parts.clean_memory(place):
        run = RunDirectory(Path(name) / "run")
        run.create(to_dict(parts.make_recipe(config=place.small)), {}, {})

        def manager(kind: str) -> CheckpointManager:
            attempt = start_attempt(run, target="check", job_id=None, nodes=["here"], reason="check")
            return CheckpointManager(
                run, attempt=attempt, rank=0, world_size=1, meta={"run_id": "check", "engine": kind}
            )

        first, batches = engine_of(saved)
        for _ in range(3):
            parts.train_step(first, batches)
        keeper = manager(saved)
        keeper.save(3, first, first.trainer_state())
        status = keeper.wait()
        if status.state != "done":
            return Row("checkpoint", f"{saved} to {loaded}", "failed", str(status.reason))
        before = _state(first)
        expected = parts.train_step(first, batches)
        del first
        parts.free(place)
        second, batches = engine_of(loaded)
        state = manager(loaded).load_latest(second)
        assert state is not None
        second.load_trainer_state(state)
        after = _state(second)
        unequal = [name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name))]
        next_loss = parts.train_step(second, batches)
        del second
    tolerance = 1e-2 if place.gpu else 1e-5  # bf16 engines round differently
    line = judged("checkpoint", f"{saved} to {loaded}", {
        "unequal tensors": (float(len(unequal)), 0.0), "next loss": (parts.relative(next_loss, expected), tolerance),
    }, blocked_s=status.blocked_s, durable_s=status.durable_s)  # fmt: skip
    if unequal:
        line.text += f"; {sorted(unequal)[0]} differs"
    return line


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def _state(engine: Any) -> dict[str, Tensor]:
    """Values and moments on the host, by name and kind."""
    engine.ensure_state()
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for piece in engine.pieces():
        found.setdefault(f"{piece.name} {piece.kind}", []).append((piece.start, piece.tensor.detach().cpu().clone()))
    return {name: torch.cat([t for _, t in sorted(cut, key=lambda c: c[0])]) for name, cut in found.items()}


def _speed(place: Place, case: str, config: dict[str, Any], seq_len: int, kind: str, changes: dict[str, Any]) -> Row:
    from launcher.trainer.metrics import flops_per_step, peak_flops

    settings = {"model__liger": "auto", "train__precision": place.precision, "data__seq_len": seq_len, **changes}
    recipe = parts.make_recipe(kind, config=config, rows=1, **settings)
    engine, backend, notes = parts.make_engine(recipe, place, random_in_place=True)
    lengths = parts.random_lengths(seq_len)
    batch = parts.to_batch(parts.make_row(lengths, vocab=config["vocab_size"]), place, backend)
    warm, timed = (3, 10) if place.gpu else (1, 2)
    loss = math.nan
    for _ in range(warm):
        loss = parts.train_step(engine, [batch])
    begin = parts.now(place)
    for _ in range(timed):
        loss = parts.train_step(engine, [batch])
    seconds = (parts.now(place) - begin) / timed
    peak = parts.peak_gib(place)
    flops = flops_per_step(engine.module, tokens=seq_len, cost=float(sum(n * n for n in lengths)))
    top = peak_flops(place.device)
    figures = {
        "tokens_per_s": seq_len / seconds, "mfu": flops / seconds / top if top else None, "peak_gib": peak,
        "planned_gib": _planned_gib(recipe), "loss": loss, "attention": backend, "notes": notes,
    }  # fmt: skip
    shown = [f"{figures['tokens_per_s']:,.0f} tokens/s"]
    shown += [f"mfu {figures['mfu']:.1%}"] if figures["mfu"] is not None else []
    shown += [f"peak {peak:.2f} GiB"] if peak is not None else []
    shown += [f"planned {figures['planned_gib']:.2f} GiB"] if figures["planned_gib"] is not None else []
    status = "ok" if math.isfinite(loss) else "failed"
    return Row("speed", case, status, f"{', '.join(shown)}; {backend}, loss {loss:.2f}", figures)


def _planned_gib(recipe: Any) -> float | None:
    """What `launcher plan` says, None where it cannot."""
    try:
        from launcher.plan import make_plan

        memory = make_plan(recipe).memory
    except Exception:
        return None
    return None if memory is None else (memory.total - memory.context) / 2**30  # as the allocator counts
