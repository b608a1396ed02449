"""prepare against datasets.map + TRL's packing: same corpus, same tokenizer, same cores, in turns; time and CPU time.

Run: python benchmarks/prepare.py [--mb 48] [--repeats 3] [--cores 1 2]

The corpus is text of this Python's own library, cut into documents of a median of 2,000 characters; the tokenizer is a
byte-level BPE of 32,000 tokens, trained on another part of it, with Llama 3's pattern. TRL is put into a throw-away
folder with pip, without its dependencies; where that fails the comparison is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

SEQ_LEN = 4096
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=48, help="size of each corpus")
    parser.add_argument("--repeats", type=int, default=3, help="turns, of which the best counts")
    parser.add_argument("--cores", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))}))
    parser.add_argument("--only", choices=("text", "chat"))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        who, what, folder, cores = options.child
        print(json.dumps((ours if who == "ours" else theirs)(what, Path(folder), int(cores))))
        return
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as name:
        folder = Path(name)
        make(folder, options.mb << 20)
        trl = install_trl(folder / "trl")
        print(f"tokenizer: {proven(folder)}")
        for what in (options.only,) if options.only else ("text", "chat"):
            for cores in options.cores:
                compare(what, folder, cores, options.repeats, trl)


def compare(what: str, folder: Path, cores: int, repeats: int, trl: Path | None) -> None:
    """Best of several turns each, in turns."""
    best: dict[str, dict[str, float]] = {}
    size = (folder / f"{what}.jsonl").stat().st_size / 1e6
    for _ in range(repeats):
        for who in ("theirs", "ours") if trl else ("ours",):
            found = child(who, what, folder, cores, trl)
            if who not in best or found["cpu"] < best[who]["cpu"]:
                best[who] = found
    for who, found in best.items():
        rate = found["tokens"] / found["cpu"] / 1e6
        rest = ", ".join(f"{k} {v:.1f} s" for k, v in found.items() if k not in ("seconds", "cpu", "tokens"))
        name = {"ours": "launcher prepare", "theirs": "datasets.map + trl"}[who]
        print(
            f"{what}, {cores} core{'s' * (cores > 1)}: {name:<18} {found['seconds']:6.1f} s, {found['cpu']:.1f} s of "
            f"a core, for {size:.0f} MB, {found['tokens'] / 1e6:.1f}M tokens: {rate:.2f}M tokens/s a core"
            + (f" ({rest})" if rest else "")
        )
    if "theirs" in best:
        wall, computed = (best["theirs"][key] / best["ours"][key] for key in ("seconds", "cpu"))
        print(f"{what}, {cores} cores: ratio {wall:.2f}, by CPU time {computed:.2f}")


def child(who: str, what: str, folder: Path, cores: int, trl: Path | None) -> dict[str, float]:
    """One turn, in a process of its own on so many cores."""
    mine = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
    environment = {
        **os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(trl or ""), "HF_DATASETS_CACHE": str(folder / "theirs"),
    }  # fmt: skip
    command = [sys.executable, __file__, "--child", who, what, str(folder), str(cores)]
    shown = subprocess.run(["taskset", "-c", mine, *command], env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(shown.stdout.splitlines()[-1])
    return found


def ours(what: str, folder: Path, cores: int) -> dict[str, float]:
    """`prepare` with a fresh cache but for the proof of the tokenizer, after the imports."""
    from launcher.data.prepare import prepare
    from launcher.recipe.schema import from_dict

    cache = folder / "ours"
    for name in ("tokens", "packed", "locks", "duplicates", "files"):
        shutil.rmtree(cache / name, ignore_errors=True)
    recipe = from_dict(recipe_of(what, folder, cache, cores))
    import datasets  # noqa: F401  # both sides have their libraries loaded
    import transformers  # noqa: F401

    begin, spent = time.perf_counter(), cpu()
    prepared = prepare(recipe)
    return {"seconds": time.perf_counter() - begin, "cpu": cpu() - spent, "tokens": prepared.train["tokens"]}


def cpu() -> float:
    """Seconds that this process and those it has waited for have computed."""
    return sum(os.times()[:4])


def recipe_of(what: str, folder: Path, cache: Path, cores: int) -> dict[str, Any]:
    return {
        "model": {"config": {"model_type": "llama", "vocab_size": 40000}, "tokenizer": str(folder / "tokenizer")},
        "data": {
            "train": [{"path": str(folder / f"{what}.jsonl")}], "seq_len": SEQ_LEN, "overlong": "truncate",
            "cache_dir": str(cache), "num_workers": cores,
        },
        "train": {"global_batch_size": 8, "epochs": 1},
        "objective": {"kind": "pretrain" if what == "text" else "sft"},
    }  # fmt: skip


def theirs(what: str, folder: Path, cores: int) -> dict[str, float]:
    """What trl.SFTTrainer does with these columns: load, map, pack; each step written to the cache of datasets."""
    import datasets
    from transformers import AutoTokenizer
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    cache = folder / "theirs"
    shutil.rmtree(cache, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    end = tokenizer.eos_token

    def texts(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer([text + end for text in batch["text"]])["input_ids"]}

    def chats(batch: dict[str, Any]) -> dict[str, Any]:
        done = tokenizer.apply_chat_template(
            batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": done["input_ids"], "assistant_masks": done["assistant_masks"]}

    begin, spent = time.perf_counter(), cpu()
    table = datasets.load_dataset("json", data_files=str(folder / f"{what}.jsonl"), split="train", cache_dir=str(cache))
    loaded = time.perf_counter()
    workers = {"num_proc": cores} if cores > 1 else {}
    function = texts if what == "text" else chats
    table = table.map(function, batched=True, remove_columns=table.column_names, **workers)
    mapped = time.perf_counter()
    packed = pack_dataset(table, SEQ_LEN, strategy="bfd", map_kwargs=workers)
    tokens = sum(len(ids) for batch in packed.with_format("numpy").iter(1000) for ids in batch["input_ids"])
    ended = time.perf_counter()
    return {
        "seconds": ended - begin, "cpu": cpu() - spent, "tokens": tokens,
        "load": loaded - begin, "map": mapped - loaded, "pack": ended - mapped,
    }  # fmt: skip


def make(folder: Path, size: int) -> None:
    """Both corpora and the tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    documents = cut_documents(size)
    train = list(documents[: len(documents) // 4])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32000, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(train, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder / "tokenizer")
    with open(folder / "text.jsonl", "w") as f:
        f.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    with open(folder / "chat.jsonl", "w") as f:
        f.writelines(json.dumps({"messages": list(turns(documents, i))}) + "\n" for i in range(0, len(documents), 4))


def turns(documents: list[str], at: int) -> Iterator[dict[str, str]]:
    """Four documents as two questions and answers."""
    for i, document in enumerate(documents[at : at + 4]):
        yield {"role": ("user", "assistant")[i % 2], "content": document.strip() or "nothing"}


def cut_documents(size: int) -> list[str]:
    """So many bytes of documents, of log-normal length; the files again in another cut where they do not suffice."""
    files = sorted(f for place in ("stdlib", "purelib") for f in Path(sysconfig.get_path(place)).rglob("*.py"))
    chance = random.Random(0)
    chance.shuffle(files)
    documents: list[str] = []
    left = size
    while left > 0:
        for file in files:
            text = file.read_text(errors="ignore")
            at = chance.randrange(500)
            while at < len(text) and left > 0:
                length = int(chance.lognormvariate(7.6, 0.8)) + 20
                documents.append(text[at : at + length])
                left -= len(documents[-1].encode())
                at += length
            if left <= 0:
                break
    return documents


def proven(folder: Path) -> str:
    """The verdict on the tokenizer, which is kept for all turns, and what it took."""
    from launcher.data.encode import judge
    from launcher.data.tokenizer import TokenizerSpec, load_tokenizer

    tokenizer = load_tokenizer(TokenizerSpec(str(folder / "tokenizer")))
    with open(folder / "text.jsonl") as f:
        texts = [json.loads(line)["text"] for line, _ in zip(f, range(20_000), strict=False)]
    begin = time.perf_counter()
    verdict = judge(tokenizer, lambda: iter(texts), folder / "ours" / "encoders")
    return f"{verdict}; found once in {time.perf_counter() - begin:.1f} s"


def install_trl(folder: Path) -> Path | None:
    """TRL in a folder of its own."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "trl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return folder
    print(f"trl: not compared, since it cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    return None


if __name__ == "__main__":
    main()
