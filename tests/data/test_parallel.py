"""Shares of the shards, made by processes that know nothing of each other, come to what one process makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.data.parallel import Share
from launcher.errors import UserError
from tests.data.make import tiny_tokenizer, write_jsonl
from tests.jobs.make import made_in

ROOT = Path(__file__).parents[2]


def recipe_of(folder: Path) -> Path:
    """A recipe over two sources, the first of seven files, each of which is a shard."""
    (folder / "many").mkdir()
    for number in range(7):
        records = [{"prompt": f"{number} plus {i}? ", "completion": f"It is {number + i}."} for i in range(40)]
        write_jsonl(folder / "many" / f"{number}.jsonl", records)
    write_jsonl(folder / "more.jsonl", [{"text": f"Once upon a time there were {i}."} for i in range(50)])
    recipe = {
        "run": {"name": "tiny", "dir": str(folder / "runs")},
        "model": {
            "config": {"model_type": "llama", "vocab_size": 400},
            "tokenizer": str(tiny_tokenizer(folder / "tokenizer")),
        },
        "data": {
            "train": [{"path": str(folder / "many")}, {"path": str(folder / "more.jsonl")}], "seq_len": 64,
            "num_workers": 1, "eval_fraction": 0.1,
        },
        "train": {"global_batch_size": 4, "epochs": 1},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def start(recipe: Path, cache: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launcher", "prepare", str(recipe), f"data.cache_dir={cache}", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def said(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def identities(cache: Path) -> set[tuple[int, int]]:
    """Inode and time of each part's tokens, which a part keeps when its folder is renamed."""
    found = (file.stat() for file in cache.rglob("part-*/tokens.npy"))
    return {(stat.st_ino, stat.st_mtime_ns) for stat in found}


@pytest.mark.slow
def test_three_shares_and_a_merge_make_byte_for_byte_what_one_process_makes(tmp_path):
    recipe = recipe_of(tmp_path)
    alone = start(recipe, tmp_path / "alone")
    shares = [start(recipe, tmp_path / "shared", "--shards", f"{i}/3") for i in range(3)]
    for i, share in enumerate(shares):
        assert f"share {i} of 3 is tokenised" in said(share)
    parts = identities(tmp_path / "shared")
    assert len(list((tmp_path / "shared" / "tokens").glob(".*.unfinished/part-*"))) == 8
    assert not any((tmp_path / "shared" / "packed").iterdir())
    merged = said(start(recipe, tmp_path / "shared"))
    assert "packing efficiency" in merged
    said(alone)
    assert made_in(tmp_path / "shared") == made_in(tmp_path / "alone")
    assert identities(tmp_path / "shared") == parts, "the merge made a finished shard again"
    assert "0 of 2 is tokenised" in said(start(recipe, tmp_path / "shared", "--shards", "0/2")), "all is made already"
    assert made_in(tmp_path / "shared") == made_in(tmp_path / "alone")


@pytest.mark.parametrize("text", ["3/3", "1", "-1/2", "1/0", "0/1001", "a/b", "1/2/3"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(UserError, match="expected I/N"):
        Share.parse(text)


def test_a_share_is_a_number_of_how_many():
    assert Share.parse("2/7") == Share(2, 7)
