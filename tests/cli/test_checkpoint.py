"""`launcher checkpoint list|verify|prune|repair`, on runs whose checkpoints are real and whose damages are, too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from click.testing import CliRunner

from launcher.cli.checkpoint import command
from launcher.errors import UserError
from launcher.jobs.opening import open_run
from launcher.plan import Plan
from launcher.recipe.schema import Checkpoint, Recipe, to_dict
from launcher.run.directory import MARKER, RunDirectory
from launcher.run.lease import hold_lease
from launcher.run.ledger import (
    latest_attempt,
    lost_beginnings,
    missing_checkpoints,
    start_attempt,
    valid_checkpoints,
)
from launcher.run.state import reached_end, write_state
from launcher.trainer.checkpoint import mirroring, retention
from launcher.trainer.checkpoint.format import rank_file
from launcher.trainer.checkpoint.retention import Hold
from launcher.trainer.checkpoint.verify import MANIFEST, problems
from tests.trainer.checkpoint import rigs

STEPS = (10, 20, 30)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run at rest with three checkpoints, each written by two ranks."""
    return make(tmp_path)


def make(tmp_path: Path, mirror: str | None = None) -> RunDirectory:
    path = tmp_path / "runs" / "one"
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"run_id": "this-run"}))
    run, attempt = rigs.begin(path)
    recipe = Recipe()
    recipe.checkpoint.mirror = mirror
    run.write_recipe(to_dict(recipe))
    for step in STEPS:
        assert rigs.save_with_ranks(run, attempt, step, [rigs.OddShapes(seed=step)] * 2) == ["", ""]
    return run


def ended(*arguments: Any) -> tuple[int, str]:
    """Exit code and output of the command as the shell sees them."""
    done = CliRunner().invoke(command, list(map(str, arguments)), standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return int(done.return_value or 0), done.output


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def steps(run: RunDirectory) -> list[int]:
    return [ref.step for ref in valid_checkpoints(run)]


def test_list_says_how_each_stands_and_which_one_a_resume_takes(run):
    unfinished, void = run.checkpoint(40, 1), run.checkpoint(50, 1)
    shutil.copytree(run.checkpoint(30, 1), unfinished)
    (unfinished / MARKER).unlink()
    rigs.begin(run.path)
    assert rigs.save_with_ranks(run, 1, 50, [rigs.OddShapes()] * 2) != ["", ""], "the older attempt is fenced off"
    shutil.copytree(run.checkpoint(30, 1), void)
    manifest = json.loads((void / MANIFEST).read_text())
    rigs.commit(void, json.dumps({**manifest, "step": 50}))
    flip(run.checkpoint(20, 1) / rank_file(1))
    code, text = ended("list", run.path)
    assert code == 0
    lines = text.splitlines()
    assert lines[3].startswith("step-00000030-a1")
    assert lines[3].endswith("<- a resume goes on from here")
    assert [line.split()[-1] for line in lines[4:6]] == ["unfinished", "void"]
    found = json.loads(ended("list", run.path, "--verify", "--json")[1])
    assert [entry["state"] for entry in found["checkpoints"]] == ["good", "bad", "good", "unfinished", "bad"]
    assert found["resumes_from"] == "step-00000030-a1"
    assert found["checkpoints"][0]["ranks"] == 2
    assert found["checkpoints"][0]["bytes"] == sum(f.stat().st_size for f in run.checkpoint(10, 1).iterdir())


def test_verify_names_the_file_and_ends_with_1(run):
    assert ended("verify", run.path) == (
        0,
        "".join(f"step-000000{step}-a1: good ({size(run, step)}, 2 ranks)\n" for step in STEPS),
    )
    flip(run.checkpoint(20, 1) / rank_file(1))
    code, text = ended("verify", run.path)
    assert code == 1
    assert "bad: step-00000020-a1/rank-00001.safetensors: its content has changed" in text
    assert f"what to do: launcher checkpoint repair {run.path}" in text
    assert ended("verify", run.path, "30")[0] == 0
    assert ended("verify", run.path, "step-00000020-a1")[0] == 1
    with pytest.raises(UserError, match="7: expected a step or the name of a checkpoint"):
        ended("verify", run.path, "7")


def size(run: RunDirectory, step: int) -> str:
    from launcher.plan.disk import size_text

    return size_text(sum(f.stat().st_size for f in run.checkpoint(step, 1).iterdir()))


def test_a_checkpoint_that_goes_while_it_is_verified_is_not_bad(run, monkeypatch):
    from launcher.trainer.checkpoint import care

    monkeypatch.setattr(care, "chosen", lambda run, which: ["step-00000005-a1", "step-00000030-a1"])
    code, text = ended("verify", run.path)
    assert code == 0
    assert "step-00000005-a1: deleted meanwhile" in text


def test_prune_keeps_the_newest_good_ones_and_says_what_it_frees(run):
    freed = sum(f.stat().st_size for f in run.checkpoint(10, 1).iterdir())
    would = json.loads(ended("prune", run.path, "--keep-last", 2, "--dry-run", "--json")[1])
    assert (would["deleted"], would["freed"], would["dry_run"]) == (["step-00000010-a1"], freed, True)
    assert steps(run) == [10, 20, 30]
    flip(run.checkpoint(30, 1) / rank_file(0))
    code, text = ended("prune", run.path, "--keep-last", 1)
    assert (code, steps(run)) == (0, [20, 30]), "20 is the newest good one"
    assert "step-00000030-a1: bad, left for `launcher checkpoint repair`" in text
    assert "step-00000010-a1: deleted" in text


def test_prune_keeps_multiples_and_removes_what_is_unfinished_from_a_run_at_rest(run):
    (run.checkpoint(20, 1) / MARKER).unlink()
    assert ended("prune", run.path, "--keep-last", 1, "--keep-every", 10)[0] == 0
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000010-a1", "step-00000030-a1"]


def test_prune_leaves_what_is_in_use_and_what_a_live_run_may_be_saving(run):
    unfinished = run.checkpoint(40, 1)
    unfinished.mkdir()
    with hold_lease(run), Hold(run.checkpoint(10, 1)):
        for more in (["--dry-run"], []):
            code, text = ended("prune", run.path, "--keep-last", 1, *more)
            assert code == 0
            assert "step-00000010-a1: in use, left" in text
    assert steps(run) == [10, 30]
    assert unfinished.exists()


def test_prune_deletes_nothing_while_no_checkpoint_is_good(run):
    for step in STEPS:
        flip(run.checkpoint(step, 1) / rank_file(0))
    with pytest.raises(UserError, match="no checkpoint is good, so none is deleted"):
        ended("prune", run.path, "--keep-last", 1)
    assert steps(run) == [10, 20, 30]


def test_prune_and_repair_do_nothing_through_a_symbolic_link(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    run.checkpoint(10, 1).rename(elsewhere)
    run.checkpoint(10, 1).symlink_to(elsewhere)
    with pytest.raises(UserError, match="step-00000010-a1: cannot be deleted: is a symbolic link"):
        ended("prune", run.path, "--keep-last", 1)
    assert "step-00000010-a1: is a symbolic link, left alone" in ended("repair", run.path)[1]
    assert problems(elsewhere) == []


def test_repair_puts_bad_ones_aside_with_the_reason_and_deletes_nothing(run):
    flip(run.checkpoint(30, 1) / rank_file(0))
    flip(run.checkpoint(10, 1) / MANIFEST)
    code, text = ended("repair", run.path)
    assert code == 0
    assert text.splitlines()[-1] == "a resume goes on from step-00000020-a1"
    assert steps(run) == [20]
    bad = run.checkpoints / "bad"
    assert (bad / "step-00000030-a1" / rank_file(1)).exists()
    assert "rank-00000.safetensors: its content has changed" in (bad / "step-00000030-a1.why").read_text()
    assert "manifest.json is not the one that COMMITTED vouches for" in (bad / "step-00000010-a1.why").read_text()
    assert ended("repair", run.path) == (0, "nothing was to be mended: a resume goes on from step-00000020-a1\n")


def test_repair_where_none_is_good_moves_nothing_and_ends_with_1(run):
    for step in STEPS:
        flip(run.checkpoint(step, 1) / rank_file(0))
    code, text = ended("repair", run.path)
    assert code == 1
    assert "no checkpoint is good, so nothing was put aside" in text
    assert steps(run) == [10, 20, 30]


def test_repair_of_a_live_run_is_refused(run):
    with hold_lease(run), pytest.raises(UserError, match="is being trained already"):
        ended("repair", run.path)


def test_repair_takes_files_from_the_mirror_and_strangers_away(tmp_path):
    place = str(tmp_path / "mirror")
    run = make(tmp_path, mirror=place)
    with mirroring.mirrored(run, Checkpoint(mirror=place, keep_last=3), print):
        pass
    flip(run.checkpoint(30, 1) / rank_file(1))
    (run.checkpoint(20, 1) / MANIFEST).write_text("{}")
    shutil.copy(run.checkpoint(10, 1) / rank_file(1), run.checkpoint(10, 1) / rank_file(2))
    code, text = ended("repair", run.path)
    assert code == 0, text
    assert f"step-00000030-a1/rank-00001.safetensors: replaced by its copy in {place}/one" in text
    assert f"step-00000020-a1/manifest.json: replaced by its copy in {place}/one" in text
    assert "step-00000010-a1/rank-00002.safetensors: put aside, it does not belong to this checkpoint" in text
    assert [problems(run.checkpoint(step, 1)) for step in STEPS] == [[], [], []]
    found = json.loads(ended("list", run.path, "--json")[1])
    assert [entry["mirrored"] for entry in found["checkpoints"]] == [True] * 3


def test_repair_from_a_copy_brings_a_run_back_whose_directory_is_gone(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    shutil.rmtree(run.path)
    code, text = ended("repair", run.path, "--from", copy)
    assert code == 0, text
    assert f"{run.path} was not here and is restored from {copy}" in text
    assert text.splitlines()[-1] == "a resume goes on from step-00000030-a1"
    with pytest.raises(UserError, match="holds no run"):
        ended("repair", tmp_path / "runs" / "two", "--from", tmp_path)


def test_the_verbs_work_without_torch(run):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from launcher.cli import main\n"
        f"main(['checkpoint', *sys.argv[1:], {str(run.path)!r}])"
    )
    for arguments in (["list", "--verify"], ["verify"], ["repair"], ["prune", "--keep-last", "1"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "step-00000030-a1" in done.stdout
    assert steps(run) == [30]


@pytest.mark.parametrize("ledger", ["gone", "cut"])
def test_a_lost_ledger_loses_no_checkpoint_repair_writes_it_anew(run, ledger):
    """Without it no checkpoint counts: a start is refused, nothing is deleted, and repair makes them count again."""
    if ledger == "gone":
        run.ledger_file.unlink()
    else:
        run.ledger_file.write_bytes(run.ledger_file.read_bytes()[:20])
    assert valid_checkpoints(run) == []
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert lost_beginnings(run) == names
    with pytest.raises(UserError, match=rf"(?s)ledger.jsonl: lost, .*{names[-1]}.*launcher checkpoint repair"):
        open_run(run, Recipe(), Mock(spec=Plan), force=True, say=lambda text: None)
    assert retention.sweep(run, attempt=9) == []
    assert retention.retain(run, attempt=9, keep_last=1, keep_every_steps=None) == []
    code, said = ended("repair", run.path)
    assert code == 0
    assert "ledger.jsonl: was lost or cut off; written anew" in said
    assert steps(run) == list(STEPS)
    assert lost_beginnings(run) == []


def test_checkpoints_that_are_gone_are_not_begun_anew_without_a_word(run):
    start_attempt(run, target="local", job_id="1", nodes=1, reason="run")  # accepts all three
    shutil.move(run.checkpoints, run.path / "elsewhere")
    with pytest.raises(UserError, match=r"(?s)checkpoints: expected step-00000010.*--force"):
        open_run(run, Recipe(), Mock(spec=Plan), force=False, say=lambda text: None)
    shutil.move(run.path / "elsewhere", run.checkpoints)
    assert missing_checkpoints(run) == []


def test_a_finished_run_whose_last_checkpoint_is_bad_is_taken_back_and_has_not_finished_any_more(run):
    attempt = latest_attempt(run)
    run.data_file.write_text(json.dumps({"total_steps": STEPS[-1]}))
    write_state(run, "finished", attempt=attempt, step=STEPS[-1])
    assert reached_end(run)
    flip(run.checkpoint(STEPS[-1], attempt) / rank_file(1))
    code, said = ended("repair", run.path)
    assert code == 0
    assert "was finished at step 30 and is now at step 20" in said
    assert not reached_end(run)
