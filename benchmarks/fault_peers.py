"""Others under the same killer: transformers' Trainer, and torch.distributed.checkpoint saving into one folder.

Each trains a tiny model in a process forked from a warm server and is killed after its first save: half of the kills
inside a save (a file says when one is under way), half at random times. Then another process tries to go on from what
its own library calls the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "torch.distributed.checkpoint", "deepspeed", "transformers.trainer", "fault_peers"]
MODEL = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4,
    "num_attention_heads": 4, "vocab_size": 1024, "max_position_embeddings": 128,
}  # fmt: skip
SAVING, WAIT_S = "saving", 120.0
TRAINER, DCP = "transformers' Trainer", "torch.distributed.checkpoint in place"


def hunt(name: str, folder: Path, kills: int, *, seed: str) -> dict[str, Any]:
    """Kill one of `PEERS` so often; how often its newest checkpoint could not be used, and why."""
    train, load = PEERS[name]
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    chance, inside, done, reasons, save_s = random.Random(f"{name}-{seed}"), 0, 0, Counter[str](), 0.05
    while done < kills:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        victim = server.Process(target=train, args=(folder,), daemon=True)
        victim.start()
        try:
            _until(lambda: (folder / "saved").exists(), victim)
            if 2 * inside <= done:
                for _ in range(chance.randint(1, 3)):
                    _until(lambda: not (folder / SAVING).exists(), victim)
                    _until(lambda: (folder / SAVING).exists(), victim)
                begun = time.monotonic()
                due = begun + chance.uniform(0, save_s)
                while time.monotonic() < due and (folder / SAVING).exists():
                    time.sleep(0.0005)
                if not (folder / SAVING).exists():
                    save_s = 0.7 * save_s + 0.3 * (time.monotonic() - begun)
            else:
                time.sleep(chance.uniform(0, 1))
        finally:
            victim.kill()
            victim.join()
        done += 1
        inside += (folder / SAVING).exists()
        (folder / SAVING).unlink(missing_ok=True)
        answer, question = server.Pipe(duplex=False)
        heir = server.Process(target=_told, args=(load, folder, question), daemon=True)
        heir.start()
        question.close()
        try:
            problem = answer.recv() if answer.poll(WAIT_S) else "loading did not end"
        except EOFError:
            problem = "loading died"
        heir.kill()
        heir.join()
        if problem:
            reasons[problem] += 1
    shutil.rmtree(folder, ignore_errors=True)
    why = reasons.most_common(1)[0][0] if reasons else ""
    return {"kills": done, "inside saves": inside, "unusable": reasons.total(), "why": why, "reasons": dict(reasons)}


def _until(happened: Any, victim: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happened():
        if not victim.is_alive() or time.monotonic() > deadline:
            raise RuntimeError(f"it ended by itself, exit code {victim.exitcode}")
        time.sleep(0.0005)


def _told(load: Any, folder: Path, question: Any) -> None:
    try:
        load(folder)
        question.send("")
    except BaseException as error:  # DCP raises one that is no Exception
        question.send(f"{type(error).__name__}: {error}".splitlines()[0].replace(str(folder), "")[:120])
    question.close()
    os._exit(0)


@contextlib.contextmanager
def _saving(folder: Path) -> Iterator[None]:
    (folder / SAVING).touch()
    yield
    (folder / SAVING).unlink()
    (folder / "saved").touch()


def _trainer(folder: Path, steps: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.set_num_threads(1)

    class Marked(Trainer):
        """Says when it saves; all else is the library's."""

        def _save_checkpoint(self, *arguments: Any, **more: Any) -> None:
            with _saving(folder):
                super()._save_checkpoint(*arguments, **more)

    torch.manual_seed(0)
    ids = torch.randint(0, MODEL["vocab_size"], (64, 16))
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=steps, save_steps=2, save_total_limit=2, use_cpu=True,
        per_device_train_batch_size=2, report_to=[], disable_tqdm=True, logging_strategy="no", seed=0,
    )  # fmt: skip
    return Marked(model=LlamaForCausalLM(LlamaConfig(**MODEL)), args=arguments, train_dataset=data)  # type: ignore[arg-type]


def trainer_trains(folder: Path) -> None:
    _trainer(folder, 1_000_000).train()


def trainer_loads(folder: Path) -> None:
    """As `resume_from_checkpoint=True` does, to the step of that checkpoint and no further."""
    from transformers.trainer_utils import get_last_checkpoint

    newest = get_last_checkpoint(str(folder / "out"))
    if newest is None:
        raise RuntimeError("no checkpoint is found")
    _trainer(folder, int(newest.rpartition("-")[2])).train(resume_from_checkpoint=newest)


def _dcp_state() -> dict[str, Any]:
    import torch

    return {f"{kind}-{i}": torch.zeros(1024, 128) for kind in ("value", "exp_avg", "exp_avg_sq") for i in range(6)}


def dcp_trains(folder: Path) -> None:
    """Every tensor holds the number of its step; a few milliseconds of training between two saves."""
    import torch.distributed.checkpoint as dcp

    state, step = _dcp_state(), 0
    while True:
        step += 1
        for tensor in state.values():
            tensor.fill_(step)
        time.sleep(0.005)
        with _saving(folder):
            dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)


def dcp_loads(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    state = _dcp_state()
    dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)
    steps = {float(value) for tensor in state.values() for value in tensor.unique()}
    if len(steps) != 1:
        raise RuntimeError("tensors of several steps, no error")


PEERS = {TRAINER: (trainer_trains, trainer_loads), DCP: (dcp_trains, dcp_loads)}
