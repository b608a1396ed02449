"""A tiny project on disk - tokenizer, data, recipe - and ways to start `launcher` on it as a person would."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.run.directory import RunDirectory
from tests.data.make import tiny_tokenizer

MODEL = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 400, "tie_word_embeddings": True,
}  # fmt: skip
_WORDS = ["the", "a", "small", "model", "learns", "to", "answer", "questions", "about", "foxes", "dogs", "stories"]


def project(folder: Path, **changes: Any) -> Path:
    """A folder with data, tokenizer and recipe; `changes` are by section, as `train={"max_steps": 5}`. The recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(folder / "tokenizer")
    say = random.Random(0)
    with (folder / "data.jsonl").open("w") as lines:
        for number in range(120):
            question = " ".join(say.choices(_WORDS, k=say.randint(3, 10)))
            answer = " ".join(say.choices(_WORDS, k=say.randint(3, 20)))
            turns = [{"role": "user", "content": f"{number} {question}?"}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"messages": turns}) + "\n")
    recipe: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(folder / "runs")},
        "model": {"config": MODEL, "tokenizer": str(folder / "tokenizer")},
        "data": {
            "train": [{"path": str(folder / "data.jsonl")}], "seq_len": 128, "num_workers": 1,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"global_batch_size": 4, "max_steps": 6, "precision": "fp32"},
        "optimizer": {"lr": 1.0e-2, "warmup_steps": 2},
        "strategy": {"kind": "ddp"},
        "checkpoint": {"every_steps": 2, "async_save": False},
        "cluster": {"nproc_per_node": 2, "accelerator": "cpu"},
    }  # fmt: skip
    for section, keys in changes.items():
        recipe[section] = {**recipe.get(section, {}), **keys}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe, indent=2))
    return file


def in_files(folder: Path, count: int) -> Path:
    """A project's records in several files, each of which is a shard of its own. The folder of them."""
    records, many = (folder / "data.jsonl").read_text().splitlines(keepends=True), folder / "many"
    many.mkdir(exist_ok=True)
    for number in range(count):
        (many / f"{number}.jsonl").write_text("".join(records[number::count]))
    return many


def made_in(cache: Path) -> dict[str, bytes]:
    """Every file that `prepare` made in a cache folder, but for locks and what is remembered of files."""
    folders = [cache / name for name in ("tokens", "packed", "duplicates")]
    return {str(f.relative_to(cache)): f.read_bytes() for folder in folders for f in folder.rglob("*") if f.is_file()}


def run_of(recipe: Path, name: str = "tiny") -> RunDirectory:
    """The run that a project's recipe makes."""
    return RunDirectory(recipe.parent / "runs" / name)


def launcher(*arguments: str | Path, prefix: Sequence[str] = (), **more: Any) -> subprocess.Popen[str]:
    """A `launcher` process with its output in pipes, in a process group of its own; `prefix`: what starts it."""
    command = [*prefix, sys.executable, "-m", "launcher", *map(str, arguments)]
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True, **more}
    more["env"] = {**os.environ, "OMP_NUM_THREADS": "1", **more.get("env", {})}
    return subprocess.Popen(command, **more)


def finish(process: subprocess.Popen[str], *, code: int, timeout_s: float = 240) -> tuple[str, str]:
    """Wait for a process; its output and error, after its exit code was checked."""
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == code, f"ended with {process.returncode}, expected {code}\n{out}\n{err}"
    return out, err


def until(what: str, holds: Callable[[], Any], *, timeout_s: float = 120) -> Any:
    """Poll until `holds()` is true; its value."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := holds():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def losses(run: RunDirectory) -> dict[int, tuple[float, float]]:
    """Step to its loss and gradient norm, the last line of a step counting."""
    found = {}
    for line in run.metrics_file.read_text().splitlines() if run.metrics_file.exists() else ():
        values = json.loads(line)
        if "loss" in values:
            found[values["step"]] = (values["loss"], values["grad_norm"])
    return found


def tensors_of(checkpoint: Path) -> list[tuple[str, bytes]]:
    """Names and bytes of a checkpoint's weights, moments and step, without the free metadata (it names the attempt)."""
    found = []
    for file in sorted(checkpoint.glob("*.safetensors")):
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header.pop("__metadata__", None)
        found.append((json.dumps(header, sort_keys=True), content[8 + size :]))
    assert found
    return found


def ranks_of(parent: int) -> list[int]:
    """Process ids of a launcher's ranks, by rank: what its fork server started."""
    children = _children()
    return sorted(rank for child in children.get(parent, []) for rank in children.get(child, []))


def descendants(parent: int) -> list[int]:
    """Every living process below `parent`."""
    children = _children()
    below, new = [], [parent]
    while new:
        new = [child for pid in new for child in children.get(pid, [])]
        below += new
    return below


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    found = _stat(pid)
    return found is not None and found[0] not in "ZX"


def _stat(pid: int) -> tuple[str, int] | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1])


def _children() -> dict[int, list[int]]:
    """Living processes by their parent."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (found := _stat(int(entry.name))) is not None and found[0] not in "ZX":
            children.setdefault(found[1], []).append(int(entry.name))
    return children
