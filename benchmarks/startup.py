"""How long until the first optimizer step: `launcher run` on 2 CPU ranks against a hand-written torchrun script.

Both import the same libraries and train the same tiny model; runs alternate, so that a busy machine is fair to both.
Prints the ratio (goal: 1.0 or less), then the medians of --help, check, plan and render (goals: 0.15, 0.25, 1, 1 s),
then how long a job of 4,096 nodes takes to be rendered for each target (goal: 1 s).
The launcher's first step counts when its figures are written, which is while its second step runs.

    python benchmarks/startup.py [--pairs 5]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
MODEL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 400, "max_position_embeddings": 512,
}  # fmt: skip

# what a person would write: the imports of launcher.trainer.preload, the same model, one step, the time at its end
SCRIPT = """
import importlib, json, os, sys, time
from launcher.trainer.preload import MODULES
for name in MODULES:
    importlib.import_module(name)
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[1])))
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = torch.randint(0, 400, (2, 128))
model(input_ids=ids, labels=ids).loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
if dist.get_rank() == 0:
    open(sys.argv[2], "w").write(str(time.time()))
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each, alternating")
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = make_project(folder)
        subprocess.run(
            [*LAUNCHER, "run", str(recipe), "run.name=warm-up"], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL
        )
        ours, theirs = [], []
        for number in range(pairs):
            ours.append(time_launcher(recipe, number))
            theirs.append(time_torchrun(folder, number))
            print(f"pair {number + 1}: launcher run {ours[-1]:.2f} s, torchrun script {theirs[-1]:.2f} s", flush=True)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        print(
            f"to the first optimizer step: {statistics.median(ours):.2f} s, torchrun {statistics.median(theirs):.2f} s"
        )
        print(f"ratio, median of pairs: {statistics.median(ratios):.2f} (goal 1.0 or less)")
        for words in (["--help"], ["check", str(recipe)], ["plan", str(recipe)], ["render", str(recipe)]):
            print(f"launcher {words[0]}: {time_command(words):.3f} s, median of 9")
        for target in ("torchrun", "accelerate", "slurm", "ray", "kubernetes"):
            print(f"4,096 nodes for {target}: checked, planned and rendered in {time_large_job(target):.2f} s")


LAUNCHER = [sys.executable, "-m", "launcher"]


def time_launcher(recipe: Path, number: int) -> float:
    """Seconds from the start of `launcher run` on prepared data to the end of its first step, as its metrics tell."""
    begun = time.time()
    command = [*LAUNCHER, "run", str(recipe), f"run.name=timed-{number}"]
    subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    first = (recipe.parent / "runs" / f"timed-{number}" / "metrics.jsonl").read_text().splitlines()[0]
    return float(json.loads(first)["time"]) - begun


def time_torchrun(folder: Path, number: int) -> float:
    """The same of the hand-written script."""
    script, mark = folder / "train.py", folder / f"mark-{number}"
    script.write_text(SCRIPT)
    begun = time.time()
    command = ["torchrun", "--standalone", "--nproc-per-node=2", str(script), json.dumps(MODEL), str(mark)]
    subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return float(mark.read_text()) - begun


def time_command(words: list[str], *, count: int = 9) -> float:
    """Median seconds of a whole `launcher` process."""
    seconds = []
    for _ in range(count):
        begun = time.perf_counter()
        subprocess.run([str(BIN / "launcher"), *words], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def time_large_job(target: str, *, count: int = 3) -> float:
    """Median seconds from a recipe to the files of a job of 4,096 nodes x 8 ranks, in this process."""
    from launcher.jobs.spec import job_spec
    from launcher.jobs.targets import render
    from launcher.plan import make_plan
    from launcher.recipe.check import load
    from launcher.shipped import folder

    changes = [
        f"cluster.target={target}", "cluster.nodes=4096", "train.global_batch_size=65536", "run.dir=/shared/runs",
        "cluster.kubernetes.image=team/launcher:1", "cluster.kubernetes.claim=training",
    ]  # fmt: skip
    seconds = []
    for _ in range(count):
        begun = time.perf_counter()
        recipe = load(folder("recipes") / "llama3.1-8b-fsdp2.yaml", changes).recipe
        render(job_spec(recipe, make_plan(recipe)), target=target)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def make_project(folder: Path) -> Path:
    """Data, tokenizer and recipe of two steps; returns the recipe."""
    from launcher.demo.tokenizer import train_tokenizer

    words = random.Random(0)
    texts = [" ".join(words.choices(["a", "small", "model", "learns", "some", "words"], k=60)) for _ in range(64)]
    (folder / "data.txt").write_text("\n".join(texts))
    train_tokenizer(texts, folder / "tokenizer", vocab_size=400)
    recipe = {
        "run": {"dir": str(folder / "runs")},
        "model": {"config": MODEL, "tokenizer": str(folder / "tokenizer")},
        "objective": {"kind": "pretrain"},
        "data": {"train": [{"path": str(folder / "data.txt")}], "seq_len": 128, "train_on": "all", "overlong": "split",
                 "cache_dir": str(folder / "cache")},
        "train": {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 2, "precision": "fp32"},
        "strategy": {"kind": "fsdp2"},
        "checkpoint": {"rehearse": False},  # the script that it is compared with tries nothing out
        "cluster": {"nproc_per_node": 2, "accelerator": "cpu"},
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    return file


if __name__ == "__main__":
    main()
