"""Whether memory stays flat: prepares generated text that is larger than the memory it is given.

Run: python benchmarks/prepare_memory.py [--gb 2] [--limit-mb 1024] [--workers 1]

All processes of `prepare` together are held below the limit by a control group (v2, else v1) where one can be made, so
that exceeding it kills them; what they keep of files counts there, too, and fills the rest. Their private memory (as
/proc tells it, without pages of files, which the kernel takes back when it wants) is looked at ten times a second
everywhere, and its peak is held against the limit. Which of the two it was is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

CHILD = """
import json, sys, time
from launcher.data.prepare import prepare
from launcher.recipe.schema import from_dict
begin = time.perf_counter()
told = set()
def progress(what, done, total):
    if what not in told or done * 10 // max(1, total) != (done - 1) * 10 // max(1, total):
        told.add(what)
        print(f"{time.perf_counter() - begin:7.1f} s  {what} {done}/{total}", file=sys.stderr, flush=True)
entry = prepare(from_dict(json.load(open(sys.argv[1]))), progress=progress).train
print(json.dumps({"rows": entry["rows"], "documents": entry["documents"], "tokens": entry["tokens"]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the text")
    parser.add_argument("--limit-mb", type=int, default=1024)
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that tokenise; each has a tokenizer of its own"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as name:
        found = prepared(Path(name), int(options.gb * 1e9), limit=options.limit_mb << 20, workers=options.workers)
    print(
        f"{options.gb:g} GB of text, {found['documents']:,} documents, {found['tokens'] / 1e6:.0f}M tokens into "
        f"{found['rows']:,} rows in {found['seconds']:.0f} s, {options.workers} process; private "
        f"memory at most {found['peak_mb']:.0f} MB of {options.limit_mb} MB ({found['measured']})"
    )
    sys.exit(0 if found["peak_mb"] <= options.limit_mb else 1)


def prepared(folder: Path, size: int, *, limit: int, workers: int) -> dict[str, float | str]:
    """Generate, prepare under the limit, and say what it took.

    Raises:
        RuntimeError: prepare ended otherwise than well, as when it was killed for memory.
    """
    generate(folder / "text.jsonl", size)
    make_tokenizer(folder)
    recipe = {
        "model": {
            "config": {"model_type": "llama", "vocab_size": 8000},
            "tokenizer": str(folder / "tokenizer"),
        },
        "data": {
            "train": [{"path": str(folder / "text.jsonl")}], "seq_len": 4096, "overlong": "split",
            "cache_dir": str(folder / "cache"), "num_workers": workers,
        },
        "train": {"global_batch_size": 8, "epochs": 1},
        "objective": {"kind": "pretrain"},
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))
    with group(limit) as (enter, measured):
        begin = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder / "recipe.json")], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            preexec_fn=enter, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        highest = 0
        while child.poll() is None:
            highest = max(highest, private(child.pid))
            time.sleep(0.1)
        seconds = time.perf_counter() - begin
        assert child.stdout is not None
        if child.returncode:
            raise RuntimeError(f"prepare ended with {child.returncode} (-9: killed, as for memory); {measured}")
        entry = json.loads(child.stdout.read().splitlines()[-1])
        return {**entry, "seconds": seconds, "peak_mb": highest / (1 << 20), "measured": measured}


def generate(path: Path, size: int) -> None:
    """Records of words of a small lexicon, of log-normal length, written in pieces."""
    chance = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(5000)]
    texts = [" ".join(chance.choices(words, k=200)) for _ in range(400)]
    with open(path, "w") as f:
        while f.tell() < size:
            records = []
            for _ in range(1000):
                count = min(60, max(1, int(chance.lognormvariate(0.7, 0.8))))
                records.append('{"text": "' + " ".join(chance.choices(texts, k=count)) + '"}\n')
            f.write("".join(records))


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 8,000 tokens, trained on the first records."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    with open(folder / "text.jsonl") as f:
        tokenizer.train_from_iterator([line for line, _ in zip(f, range(500), strict=False)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder / "tokenizer")


@contextlib.contextmanager
def group(limit: int) -> Iterator[Any]:
    """(what a process calls to enter, what is said of it); the first is None where no group can be made."""
    name = f"launcher-bench-{os.getpid()}"
    kinds = (
        ("v2", Path("/sys/fs/cgroup") / name, "memory.max"),
        ("v1", Path("/sys/fs/cgroup/memory") / name, "memory.limit_in_bytes"),
    )
    for version, path, key in kinds:
        try:
            path.mkdir()
            try:
                if not (path / "cgroup.procs").exists():  # a plain folder: nothing of that version is mounted here
                    raise OSError
                (path / key).write_text(str(limit))
            except OSError:
                path.rmdir()
                raise
        except OSError:
            continue

        def enter(path: Path = path) -> None:
            (path / "cgroup.procs").write_text(str(os.getpid()))

        try:
            yield enter, f"held by a control group, {version}, in which pages of files count, too"
        finally:
            with contextlib.suppress(OSError):
                path.rmdir()
        return
    yield None, "no control group can be made here"


def private(pid: int) -> int:
    """Memory of a process and all below it that no file backs, in bytes."""
    total = 0
    for one in [pid, *below(pid)]:
        with contextlib.suppress(OSError, ValueError, LookupError):  # one that has just ended says less
            text = Path(f"/proc/{one}/status").read_text()
            fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
            total += int(fields["RssAnon"].split()[0]) << 10
    return total


def below(pid: int) -> list[int]:
    """Processes that a process has started, and theirs."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *below(int(child))]
    return found


if __name__ == "__main__":
    main()
