"""Checkpoints: how long saving holds up training, beside torch.distributed.checkpoint on the same state.

FSDP2 on 2 CPU ranks, some 50 M parameters with both moments. Each pair saves and loads with both, in turns, so that a
busy machine is fair to both; a time is that of the slower rank. Prints the ratios, medians of the pairs:
stall (goal 0.1 or less), time until durable, load, and the share of a save that its checksums take (goal 0.03 or less).
The files go to a temporary folder, which is removed.

    python benchmarks/checkpoint.py [--pairs 5] [--out figures.json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

RANKS = 2
MODEL = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
    "num_attention_heads": 8, "vocab_size": 16384, "max_position_embeddings": 512,
}  # fmt: skip
WHAT = {
    "stall": "how long training stands still (goal 0.1 or less)",
    "durable": "from the beginning until all is on disk",
    "load": "from files to live state, ours with every byte hashed",
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each, alternating")
    parser.add_argument("--out", type=Path, help="also write the medians as JSON")
    options = parser.parse_args()
    import torch.multiprocessing as multiprocessing

    with socket.socket() as s, tempfile.TemporaryDirectory() as folder:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        multiprocessing.spawn(measure, (port, Path(folder), options.pairs, options.out), nprocs=RANKS)


def measure(rank: int, port: int, folder: Path, pairs: int, out: Path | None) -> None:
    """One rank's part; rank 0 prints."""
    import torch
    import torch.distributed as dist

    from launcher.run import ledger
    from launcher.run.directory import RunDirectory
    from launcher.trainer.checkpoint.manager import CheckpointManager

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    engine, run = make_engine(rank), RunDirectory(folder / "run")
    if rank == 0:
        ledger.start_attempt(run, target="benchmark", job_id=None, nodes=["here"], reason="benchmark")
        count = sum(p.numel() for p in engine.module.parameters())
        print(f"{count / 1e6:.0f} M parameters, {12 * count / 1e6:.0f} MB of state, FSDP2 on {RANKS} ranks", flush=True)
    dist.barrier()
    manager = CheckpointManager(run, attempt=1, rank=rank, world_size=RANKS, meta={"run_id": "bench"}, keep_last=1)
    manager.save(0, engine, {"step": 0})  # the host buffer is made once a run
    assert manager.wait().state == "done"
    ratios: dict[str, list[float]] = {key: [] for key in WHAT}
    checksums: list[float] = []
    for pair in range(pairs):
        ours, theirs = both(
            pair, lambda pair=pair: time_ours(manager, engine, pair + 1), lambda: time_dcp(engine, folder)
        )
        for key in WHAT:
            ratios[key].append(ours[key] / theirs[key])
        checksums.append(ours["checksum"] / ours["durable"])
        if rank == 0:
            words = (f"{key} {ours[key]:.3f} s, dcp {theirs[key]:.3f} s" for key in WHAT)
            print(f"pair {pair + 1}: {'; '.join(words)}", flush=True)
    if rank == 0:
        for key, meaning in WHAT.items():
            print(f"{key} ratio, median of pairs: {statistics.median(ratios[key]):.2f}  ({meaning})")
        print(f"checksums: {statistics.median(checksums):.1%} of a save until it is durable (goal 3 % or less)")
        if out is not None:
            medians = {key: statistics.median(values) for key, values in [*ratios.items(), ("checksum", checksums)]}
            out.write_text(json.dumps(medians))
    dist.destroy_process_group()


def both(pair: int, ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[Any, Any]:
    """Both measurements; who begins alternates."""
    if pair % 2 == 0:
        return ours(), theirs()
    other = theirs()
    return ours(), other


def time_ours(manager: Any, engine: Any, step: int) -> dict[str, float]:
    """Seconds of an asynchronous save, of hashing as many bytes as it did, and of a load."""
    stall = clock(lambda: manager.save(step, engine, {"step": step}))
    status = manager.wait()
    assert status.state == "done", status
    times = {"stall": stall, "durable": slowest(status.durable_s), "checksum": time_checksum(status.bytes)}
    return {**times, "load": clock(lambda: manager.load_latest(engine))}


def time_checksum(size: int) -> float:
    """Seconds of the slower rank to hash so many bytes, as a save does while it writes them."""
    import numpy as np
    import xxhash

    from launcher.trainer.checkpoint.format import CHUNK

    chunk = memoryview(np.ones(CHUNK, np.uint8))

    def hashed() -> None:
        digest = xxhash.xxh3_128()
        for at in range(0, size, CHUNK):
            digest.update(chunk[: size - at])

    return clock(hashed)


def time_dcp(engine: Any, folder: Path) -> dict[str, float]:
    """Seconds of a synchronous `torch.distributed.checkpoint.save` of the same state, and of loading it."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    target = folder / "dcp"

    def state() -> dict[str, Any]:
        weights, optimizer = get_state_dict(engine.module, engine.optimizer)
        return {"model": weights, "optimizer": optimizer}

    def load() -> None:
        found = state()
        dcp.load(found, checkpoint_id=target)
        set_state_dict(
            engine.module, engine.optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
        )

    saving = clock(lambda: dcp.save(state(), checkpoint_id=target))
    loading = clock(load)
    if dist.get_rank() == 0:
        shutil.rmtree(target)
    dist.barrier()
    return {"stall": saving, "durable": saving, "load": loading}


def clock(function: Callable[[], Any]) -> float:
    """Seconds of the slower rank."""
    import torch.distributed as dist

    dist.barrier()
    begun = time.perf_counter()
    function()
    return slowest(time.perf_counter() - begun)


def slowest(seconds: float) -> float:
    """The largest of the ranks' figures."""
    import torch
    import torch.distributed as dist

    figure = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(figure, op=dist.ReduceOp.MAX)
    return float(figure)


def make_engine(rank: int) -> Any:
    """Random weights and moments, sharded."""
    import torch

    from launcher.recipe.schema import (
        Adapter,
        Data,
        Model,
        Objective,
        Optimizer,
        Recipe,
        Source,
        Strategy,
        Train,
    )
    from launcher.trainer import engines, model

    recipe = Recipe(
        model=Model(config=MODEL, tokenizer="none"), adapter=Adapter(), objective=Objective(),
        data=Data(train=[Source(path="none")], seq_len=64), train=Train(global_batch_size=2, max_steps=1),
        optimizer=Optimizer(lr=1e-3), strategy=Strategy(kind="fsdp2"),
    )  # fmt: skip
    cpu, precision = torch.device("cpu"), engines.Precision(torch.float32, "benchmark")
    skeleton = model.build_for(recipe.model, device=cpu, compute=torch.float32, objective_kind="sft")
    weights = model.read_weights(recipe.model, skeleton.config, seed=0) if rank == 0 else None
    engine: Any = engines.build(recipe, skeleton.module, device=cpu, precision=precision, weights=weights, fill="all")
    engine.ensure_state()
    for piece in engine.pieces():
        if piece.kind != "value":
            piece.tensor.uniform_(0, 1e-3)
    return engine


if __name__ == "__main__":
    main()
