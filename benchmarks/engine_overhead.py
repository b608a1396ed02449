"""What our loop costs beside a minimal hand-written one: the same model, weights and packed rows, on one CPU rank.

Ours is the whole training loop of a run: rows read from the store by a thread, guarded and clipped step, the reduction
of reports, metrics on disk; no checkpoints. The other has all its tensors made before, and four lines a step. A few
steps of each alternate in one process, so that a busy machine is fair to both. Goal: a ratio of 0.97 or more.

    python benchmarks/engine_overhead.py [--pairs 12] [--steps 6] [--clock wall|cpu] [--strategy ddp|fsdp2] [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

SEQ_LEN = 256
CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": SEQ_LEN,
}  # fmt: skip
LR = 1e-4
# the processor time of all threads counts our reading of rows in full, though it runs beside the training
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12, help="measurements of each, alternating")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of one measurement")
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp", help="of ours; fsdp2: of both")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the arithmetic; more only wait for each other if busy"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: what a busy machine cannot disturb")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two pairs: does it run?")
    options = parser.parse_args()
    if options.quick:
        CONFIG.update(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        options.pairs, options.steps = 2, 2
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, apart = measure(Path(folder), options)
    tokens = [a / b for a, b in zip(theirs, ours, strict=True)]
    print(f"a step: ours {1e3 * statistics.median(ours):.1f} ms, hand-written {1e3 * statistics.median(theirs):.1f} ms")
    print(f"losses apart by {apart:.1e} after {options.pairs * options.steps} steps")
    print(f"ratio of tokens/s, median of {len(tokens)} pairs: {statistics.median(tokens):.3f} (goal 0.97 or more)")


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[float], list[float], float]:
    """(seconds a step of ours, of the hand-written loop, in pairs; relative difference of the last losses)"""
    from launcher.trainer import distributed
    from launcher.trainer.assembly import assemble
    from launcher.trainer.loop import train

    device, ranks = torch.device("cpu"), distributed.Ranks(0, 0, 1, 1, 0)
    torch.set_num_threads(options.threads)
    distributed.join(device, ranks)
    clock, warm, every = CLOCKS[options.clock], 3, options.steps
    total = warm + options.pairs * every
    recipe, run, attempt = make_run(folder, options.strategy, total)
    other = HandWritten(recipe, run, total)
    ours: list[float] = []
    theirs: list[float] = []
    state = {"step": 0, "begin": 0.0}

    def after_our_step() -> bool:
        """The loop asks once a step whether it shall stop; at a boundary the other one has its turn."""
        state["step"] += 1
        done = state["step"] - warm
        if done == 0:
            other.train(warm)
        elif done > 0 and done % every == 0:
            ours.append((clock() - state["begin"]) / every)
            begin = clock()
            other.train(every)
            theirs.append((clock() - begin) / every)
        if done >= 0 and done % every == 0:
            state["begin"] = clock()
        return False

    training = assemble(run, recipe, attempt=attempt, ranks=ranks, device=device, stop_asked=after_our_step)
    training.saver = NoSaver()  # type: ignore[assignment]
    train(training)
    training.rows.close()
    figures = training.reports.figures
    assert figures is not None
    last = float(figures.last["loss"])
    figures.close()
    return ours, theirs, abs(last - other.loss) / abs(other.loss)


class HandWritten:
    """What a person would write who needs nothing but this model on these rows."""

    def __init__(self, recipe: Any, run: Any, total: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        from launcher.data.batches import Batches
        from launcher.data.store import Store
        from launcher.trainer import model

        rest = {key: value for key, value in CONFIG.items() if key != "model_type"}
        self.model = LlamaForCausalLM(LlamaConfig(**rest, attn_implementation="sdpa"))
        self.model.load_state_dict(
            model.read_weights(recipe.model, model.load_config(recipe.model), seed=recipe.train.seed), strict=False
        )
        if recipe.strategy.kind == "fsdp2":
            mesh = init_device_mesh("cpu", (1,))
            for block in self.model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        betas, eps = (recipe.optimizer.betas[0], recipe.optimizer.betas[1]), recipe.optimizer.eps
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=betas, eps=eps, fused=True, weight_decay=0.0
        )
        store = Store.open(run.path.parent / "packed")
        batches = Batches(
            store, seed=recipe.train.seed, global_batch_size=recipe.train.global_batch_size,
            micro_batch_size=recipe.train.micro_batch_size, world_size=1, rank=0, total_steps=total,
        )  # fmt: skip
        self.steps = [self._tensors(batches.step(number)) for number in range(total)]
        self.done, self.loss = 0, 0.0

    def train(self, steps: int) -> None:
        """So many more steps."""
        for micro, weight in self.steps[self.done : self.done + steps]:
            loss = 0.0
            for ids, positions, labels in micro:
                logits = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
                part = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / weight
                part.backward()
                loss += part.item()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.loss = loss
        self.done += steps

    @staticmethod
    def _tensors(step: Any) -> tuple[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], float]:
        micro = []
        for m in step.micro:
            labels = np.where(m.weights > 0, m.targets, -100).reshape(-1)
            micro.append((torch.as_tensor(m.input_ids), torch.as_tensor(m.position_ids), torch.as_tensor(labels)))
        return micro, step.weight


class NoSaver:
    """Checkpointing off."""

    def due(self, step: int) -> bool:
        return False

    def wanted(self) -> bool:
        return False

    def look(self) -> bool:
        return False

    def save_durably(self, step: int, device: torch.device) -> None:
        """Nothing."""


def make_run(folder: Path, kind: str, total: int) -> tuple[Any, Any, int]:
    """(recipe, run directory, attempt) over a store of random documents."""
    import json

    from launcher.data.store import Store
    from launcher.recipe.schema import Data, Model, Objective, Optimizer, Recipe, Source, Strategy, Train, to_dict
    from launcher.run.directory import RunDirectory
    from launcher.run.ledger import start_attempt

    recipe = Recipe(
        model=Model(config=dict(CONFIG), tokenizer="none", attention="sdpa"),
        objective=Objective(), data=Data(train=[Source(path="none")], seq_len=SEQ_LEN),
        train=Train(global_batch_size=4, micro_batch_size=2, max_steps=total, max_grad_norm=1.0, precision="fp32"),
        optimizer=Optimizer(lr=LR, weight_decay=0.0, schedule="constant"),
        strategy=Strategy(kind=kind),  # type: ignore[arg-type]
    )  # fmt: skip
    store = Store.open(make_store(folder))
    run = RunDirectory(folder / "run")
    run.create(to_dict(recipe), {}, {})
    part = {"name": "made", "store": str(folder / "packed"), "rows": store.rows, "epoch_rows": store.rows}
    run.data_file.write_text(json.dumps({
        "version": 2, "train": {"sources": [part]}, "eval": None, "vocab_size": CONFIG["vocab_size"],
        "total_rows": None, "global_batch_size": 4, "total_steps": total,
    }))  # fmt: skip
    return recipe, run, start_attempt(run, target="benchmark", job_id=None, nodes=["here"], reason="benchmark")


def make_store(folder: Path, *, count: int = 400) -> Path:
    """Packed documents of unequal lengths, a third of each a prompt."""
    from launcher.data.packing import pack
    from launcher.data.store import Encoded, Index, write_part, write_store

    rng = np.random.default_rng(11)
    lengths = np.clip(rng.lognormal(np.log(80), 0.8, count), 8, SEQ_LEN).astype(np.int64)
    encoded = Encoded()
    for record, length in enumerate(lengths):
        weights = np.ones(length, np.float32)
        weights[: length // 3] = 0
        encoded.add(rng.integers(1, CONFIG["vocab_size"], length).astype(np.uint32), weights, file=0, record=record)
    write_part(folder / "tokens", encoded, vocab_size=CONFIG["vocab_size"])
    write_store(
        folder / "packed", parts=[folder / "tokens"], files=["made"], index=Index.gather([folder / "tokens"]),
        packings=[pack(lengths, SEQ_LEN)], seq_len=SEQ_LEN, meta={"key": "made", "vocab_size": CONFIG["vocab_size"]},
    )  # fmt: skip
    return folder / "packed"


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an orderly shutdown
