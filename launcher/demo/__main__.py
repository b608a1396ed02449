"""`make demo`: build data, train, stop as a preemption would, resume, export, show what was learnt; all in ./demo."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from launcher.demo.corpus import messages, standard_library_pairs, write_jsonl
from launcher.errors import EXIT_FINISHED, EXIT_PREEMPTED

_FOLDER = Path("demo")
_NUM_HELD_OUT = 200
_NUM_ANSWERS = 3
_LAUNCHER = [sys.executable, "-m", "launcher"]


def main(changes: list[str]) -> None:
    """The whole demo; `changes` are recipe keys as key=value, with which the result is not held to its promise."""
    began = time.monotonic()
    _FOLDER.mkdir(exist_ok=True)
    recipe = _build_inputs()
    run = _FOLDER / "runs" / "stdlib"
    if run.exists():
        print(f"The demo's earlier run in {run} makes room for this one.")
        shutil.rmtree(run)

    _title("train, and be asked to stop half-way, as a preemption would")
    _train(["run", recipe.name, f"cluster.nproc_per_node={_num_processes()}", *changes], stop_at_half=run)
    _title("resume")
    _train(["resume", str(run.relative_to(_FOLDER))])
    _title("export")
    _call(["export", str(run.relative_to(_FOLDER))], expected=EXIT_FINISHED)
    _title("three held-out questions, answered by the exported folder with plain transformers")
    _show_answers(run / "final")
    fall = _summary(run, minutes=(time.monotonic() - began) / 60)
    if fall < 0.4 and not changes:
        sys.exit(f"the evaluation loss fell by {fall:.0%}; at least 40 % was expected")


def _build_inputs() -> Path:
    """Data, tokenizer and recipe below the demo folder; returns the recipe's path."""
    from launcher.demo.tokenizer import train_tokenizer

    _title("build an instruction set and a tokenizer from this machine's standard library")
    pairs = standard_library_pairs()
    train, heldout = write_jsonl(pairs, _FOLDER / "data", num_held_out=_NUM_HELD_OUT)
    num_tokens = train_tokenizer((text for pair in pairs for text in pair), _FOLDER / "tokenizer", vocab_size=512)
    print(f"{len(pairs) - _NUM_HELD_OUT} pairs in {train}, {_NUM_HELD_OUT} held out in {heldout}")
    print(f"byte-level BPE tokenizer of {num_tokens} tokens in {_FOLDER / 'tokenizer'}")
    recipe = _FOLDER / "recipe.yaml"
    shutil.copyfile(Path(__file__).with_name("recipe.yaml"), recipe)
    return recipe


def _num_processes() -> int:
    """Two ranks; on a machine with a single GPU, one."""
    from launcher.jobs.devices import count_gpus

    num_gpus, _ = count_gpus()
    return 1 if num_gpus == 1 else 2


def _train(arguments: list[str], *, stop_at_half: Path | None = None) -> None:
    process = _start(arguments)
    if stop_at_half is not None:
        threading.Thread(target=_stop_at_half, args=(process, stop_at_half), daemon=True).start()
    code = process.wait()
    expected = EXIT_FINISHED if stop_at_half is None else EXIT_PREEMPTED
    if code != expected:
        sys.exit(
            f"launcher {arguments[0]} ended with {code}, expected {expected}; its logs are below {_FOLDER / 'runs'}"
        )
    if stop_at_half is not None:
        print(f"launcher run ended with {code}: stopped, with a durable checkpoint")


def _stop_at_half(process: subprocess.Popen[bytes], run: Path) -> None:
    """Send SIGTERM once half of the steps are done."""
    half = None
    while process.poll() is None:
        time.sleep(0.2)
        if half is None and (run / "data.json").exists():
            half = json.loads((run / "data.json").read_text())["total_steps"] // 2
        if half is not None and any(m["step"] >= half for m in _metrics(run)):
            process.send_signal(signal.SIGTERM)
            return


def _call(arguments: list[str], *, expected: int) -> None:
    code = _start(arguments).wait()
    if code != expected:
        sys.exit(f"launcher {arguments[0]} ended with {code}, expected {expected}")


def _start(arguments: list[str]) -> subprocess.Popen[bytes]:
    print(f"$ cd {_FOLDER} && launcher {' '.join(arguments)}", flush=True)
    return subprocess.Popen([*_LAUNCHER, *arguments], cwd=_FOLDER)


def _metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole; the last may still be in the making."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _show_answers(folder: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for line in (_FOLDER / "data" / "heldout.jsonl").read_text().splitlines()[:_NUM_ANSWERS]:
        _, question, truth = (turn["content"] for turn in json.loads(line)["messages"])
        prompt = tokenizer.apply_chat_template(
            messages(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = model.generate(**prompt, max_new_tokens=60, do_sample=False, repetition_penalty=1.1)
        answer = tokenizer.decode(output[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"Q: {question}\nA: {answer.strip()}\n   (documentation: {truth})\n")


def _summary(run: Path, *, minutes: float) -> float:
    """Print what happened; returns by which share the evaluation loss fell."""
    metrics = _metrics(run)
    training = [m for m in metrics if "loss" in m]
    first, second = ([m for m in training if m["attempt"] == attempt] for attempt in (1, 2))
    evaluations = [m for m in metrics if "eval_loss" in m]
    data = json.loads((run / "data.json").read_text())["train"]
    fall = 1 - evaluations[-1]["eval_loss"] / evaluations[0]["eval_loss"]
    speed = sorted(m["tokens_per_s"] for m in training)[len(training) // 2]
    _title(f"done in {minutes:.1f} min")
    for name, text in (
        ("loss at start", f"{first[0]['loss']:.3f}  (step {first[0]['step']})"),
        ("loss at stop", f"{first[-1]['loss']:.3f}  (step {first[-1]['step']})"),
        ("loss at resume", f"{second[0]['loss']:.3f}  (step {second[0]['step']})"),
        ("loss at end", f"{second[-1]['loss']:.3f}  (step {second[-1]['step']})"),
        (
            "evaluation loss",
            f"{evaluations[0]['eval_loss']:.3f} -> {evaluations[-1]['eval_loss']:.3f}  ({fall:.0%} lower)",
        ),
        ("speed", f"{speed:,.0f} tokens/s (median)"),
        ("packing", f"{data['packing_efficiency']:.1%} of each row are real tokens"),
        ("model", run / "final"),
        ("loss picture", run / "loss.png"),
        ("logs", run / "logs"),
    ):
        print(f"  {name:16} {text}")
    return fall


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
