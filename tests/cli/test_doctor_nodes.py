"""`launcher doctor --nodes` on machines that talk by a network, and what it makes of what their ranks said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from launcher import doctor, versions
from launcher.cli import main
from launcher.doctor import here, known, nodes
from launcher.errors import UserError
from launcher.jobs.finding import Finding
from tests import netns
from tests.jobs.make import finish, launcher, project
from tests.jobs.test_preflight import ODD, node
from tests.pages import DOCS, launcher_commands
from tests.ranks import free_port

SIDE_BY_SIDE = ("doctor", "--nodes", "2", "--json", "--rendezvous", "10.77.0.1:29400", "--node-rank")


@pytest.fixture
def machines() -> Iterator[netns.Machines]:
    netns.require()
    with netns.Machines(2) as made:
        yield made


def named(output: str) -> dict[str, dict[str, str]]:
    """Name -> finding; of several of one name the worst, which comes first."""
    return {finding["name"]: finding for finding in reversed(json.loads(output)["findings"])}


@pytest.mark.gloo
@pytest.mark.slow
def test_two_machines_are_shown_side_by_side_by_the_first(machines: netns.Machines, tmp_path: Path):
    first, second = (machines.launcher(i, *SIDE_BY_SIDE, i, cwd=tmp_path) for i in range(2))
    out, err = finish(first, code=0)
    other, _ = finish(second, code=0)
    assert other == ""
    values, found = json.loads(out), named(out)
    assert [each["host"] for each in values["nodes"]] == ["node0", "node1"]
    assert [each["network"]["address"] for each in values["nodes"]] == machines.addresses
    assert {each["network"]["interface"] for each in values["nodes"]} == {"eth0"}
    assert abs(values["nodes"][1]["clock"]["offset_s"]) < 1
    assert found["shared folder"]["text"] == f"{tmp_path} is one on all nodes"
    assert found["host name"]["state"] == "ok"
    assert found["all-reduce"]["text"].startswith("4 MiB on 4 ranks in ")
    assert values["ranks"]["nodes"] == ["node0", "node0", "node1", "node1"]
    assert "4 ranks on cpu measure together" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gloo
@pytest.mark.slow
def test_a_machine_with_another_version_is_named_and_no_rank_starts(machines: netns.Machines, tmp_path: Path):
    first = machines.launcher(0, *SIDE_BY_SIDE, 0, cwd=tmp_path)
    command = machines.command(1, sys.executable, "-c", ODD, *SIDE_BY_SIDE, "1")
    pipe = subprocess.PIPE
    second = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path, start_new_session=True)
    out, _ = finish(first, code=1)
    finish(second, code=1)
    found = named(out)
    assert found["versions"]["state"] == "bad"
    assert found["versions"]["text"].endswith("on node0, 5.0.0 on node1")
    assert found["all-reduce"]["text"] == "not tried, because nodes do not fit each other"
    assert json.loads(out)["ranks"] is None


@pytest.mark.gloo
def test_a_machine_alone_is_shown_with_what_a_recipe_needs_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(doctor, "examine", lambda: iter([Finding("packages", "torch", "ok", "2.13.0")]))
    for name in ("LAUNCHER_NODES", "LAUNCHER_NODE_RANK", "LAUNCHER_RENDEZVOUS", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as left:
        main(["doctor", str(project(tmp_path)), "--nodes"])
    out = capsys.readouterr().out
    assert left.value.code == 0, out
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["node", "host", "torch"]
    assert lines[1].split()[0] == "0"
    assert "a checkpoint takes 391.9 KiB" in out
    assert "all-reduce" in out


@pytest.mark.gloo
@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path: Path):
    project(tmp_path)
    found = launcher_commands(DOCS / "doctor.md")
    assert ["doctor", "--nodes"] in found
    for arguments in found:
        finish(launcher(*arguments, cwd=tmp_path), code=0)


def test_a_recipe_whose_checkpoints_find_no_space_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(doctor, "examine", lambda: iter(()))
    monkeypatch.setattr(here, "facts", lambda *_: node(0, disk__free=1000))
    with pytest.raises(SystemExit) as left:
        main(["doctor", str(project(tmp_path)), "--json"])
    assert left.value.code == 1
    assert named(capsys.readouterr().out)["disk"]["state"] == "bad"


@pytest.mark.slow
def test_a_node_that_does_not_come_is_said_and_ends_with_1_as_of_run(monkeypatch, capsys):
    monkeypatch.setattr(nodes, "JOIN_TIMEOUT_S", 1)
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--nodes", "2", "--node-rank", "0", "--rendezvous", f"127.0.0.1:{free_port()}"])
    assert left.value.code == 1
    assert "node 1 did not come within 1 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "recipe.yaml"], "--nodes recipe.yaml: expected a number of machines"),
        (["--nodes", "2"], "--node-rank: missing in a job of 2 nodes"),
        (["--nodes", "2", "--node-rank", "2", "--rendezvous", "h:1"], "--node-rank 2: expected 0 to 1"),
        (["--nodes", "0"], "--nodes 0: expected 1 or more"),
        (["--nodes", "2", "--node-rank", "0", "--rendezvous", "h"], "--rendezvous h: expected HOST:PORT"),
    ],
)
def test_a_place_that_cannot_be_is_said(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("LAUNCHER_NODES", "LAUNCHER_NODE_RANK", "LAUNCHER_RENDEZVOUS", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as left:
        main(["doctor", *words])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def ended(report: Any = "", why: str = "", failed: bool = False) -> dict[str, Any]:
    return {"report": json.dumps(report) if report else "", "why": why, "failed": failed}


REPORT = {"nodes": ["n0", "n1"], "all_reduce_s": 0.001, "all_reduce_bytes": 64 << 20, "bus_gb_per_s": 67.1,
          "matmul_tflops": [600.0, 300.0], "slow": [1]}  # fmt: skip


def test_ranks_that_measured_say_what_and_who_is_slow():
    report, found = nodes._told([ended(REPORT), ended()], ["n0", "n1"])
    assert report == REPORT
    assert [(f.name, f.state) for f in found] == [("all-reduce", "ok"), ("matmul", "note")]
    assert found[0].text == "64 MiB on 2 ranks in 1.0 ms, 67.1 GB/s on each link"
    assert found[1].text == "rank 1 on n1 does 300 TFLOP/s, less than 0.8 of the median"


def test_ranks_that_failed_say_why_by_the_one_that_names_a_cause():
    consequence = ended(why="RuntimeError: Connection closed by peer", failed=True)
    cause = ended(
        why="torch.distributed.DistBackendError: NCCL error\nncclSystemError: System call failed", failed=True
    )
    report, (found,) = nodes._told([consequence, cause], ["n0", "n1"])
    assert report is None
    assert found.state == "bad"
    assert found.text == "ranks on n1 failed: ncclSystemError: System call failed"
    assert "cluster.network_interface" in found.fix


def test_a_failing_rank_ends_the_others_and_its_last_words_are_kept(monkeypatch: pytest.MonkeyPatch):
    code = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit('no way'); time.sleep(300)"
    real = subprocess.Popen
    monkeypatch.setattr(nodes.subprocess, "Popen", lambda command, **more: real([sys.executable, "-c", code], **more))
    order = {"ranks": 2, "accelerator": "cpu", "host": "127.0.0.1", "port": 1}
    assert nodes._run_ranks(nodes.Node(), order) == {"report": "", "failed": True, "why": "no way"}


def test_ranks_that_wait_for_each_other_in_vain_are_ended(monkeypatch: pytest.MonkeyPatch):
    real = subprocess.Popen
    code = "import time; time.sleep(300)"
    monkeypatch.setattr(nodes.subprocess, "Popen", lambda command, **more: real([sys.executable, "-c", code], **more))
    monkeypatch.setattr(nodes, "_RANKS_TIMEOUT_S", 0.2)
    done = nodes._run_ranks(nodes.Node(), {"ranks": 1, "accelerator": "cpu", "host": "127.0.0.1", "port": 1})
    assert done["failed"]
    assert done["why"].startswith("nothing came within")


# packages that do not fit


@pytest.mark.parametrize(
    ("requirement", "installed", "clashes"),
    [
        ('transformers>=4.52.0; extra == "transformers"', "4.48.2", True),
        ('transformers>=4.52.0,<5; extra == "transformers"', "5.23.0", True),
        ("transformers (>=4.52)", "5.23.0", False),
        ("torch>=2.1.2", "5.23.0", False),
    ],
)
def test_liger_is_compared_with_transformers(
    requirement: str, installed: str, clashes: bool, monkeypatch: pytest.MonkeyPatch
):
    have = {"liger-kernel": "0.8.1", "transformers": installed}
    monkeypatch.setattr(versions, "of_package", lambda name: have.get(name))
    monkeypatch.setattr(metadata, "requires", lambda name: ["triton>=2.3.1", requirement])
    monkeypatch.setattr(known, "count_gpus", lambda: (0, "none"))
    found = list(known.liger())
    assert bool(found) is clashes
    assert all("model.liger=false" in finding.fix for finding in found)


def test_liger_that_cannot_be_imported_beside_a_gpu_says_its_last_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions, "of_package", lambda name: "1.0")
    monkeypatch.setattr(metadata, "requires", lambda name: [])
    monkeypatch.setattr(known, "count_gpus", lambda: (8, "/dev/nvidia*"))
    monkeypatch.setattr(known, "_import_error", lambda module: "ImportError: cannot import name '_CONFIG_FOR_DOC'")
    (found,) = known.liger()
    assert found.text.endswith("transformers 1.0: ImportError: cannot import name '_CONFIG_FOR_DOC'")


def test_an_import_that_fails_is_told_by_its_last_line():
    assert known._import_error("json") == ""
    assert known._import_error("no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"


def test_bitsandbytes_needs_a_library_for_the_cuda_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "bitsandbytes"
    package.mkdir()
    for name in ("__init__.py", "libbitsandbytes_cpu.so", "libbitsandbytes_cuda126.so", "libbitsandbytes_cuda128.so"):
        (package / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(versions, "of_package", lambda name: "0.46.0")
    monkeypatch.setattr(versions, "installed", lambda: {"cuda": "13.0"})
    (found,) = known.bitsandbytes()
    assert found.state == "note"
    assert found.text == "0.46.0 has no library for CUDA 13.0, which torch is built for; it has those for 126, 128"
    monkeypatch.setattr(versions, "installed", lambda: {"cuda": "12.8"})
    assert [finding.state for finding in known.bitsandbytes()] == ["ok"]


@pytest.mark.parametrize(
    ("cuda", "driver", "words"),
    [
        (None, "580.95.05", "built without CUDA"),
        ("13.0", "570.124", "Driver 570.124 is too old for CUDA 13.0, which needs 580"),
        ("12.8", "570.124", "--gpus all"),
    ],
)
def test_gpus_that_torch_does_not_see_have_a_reason(cuda: str | None, driver: str, words: str):
    assert words in doctor._why_unseen({"cuda": cuda, "driver": driver})


def test_a_scheduler_or_the_options_say_which_machine_this_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("LAUNCHER_NODES", "3")
    assert nodes.where("auto", 1, "h:1").nodes == 3
    monkeypatch.delenv("LAUNCHER_NODES")
    assert nodes.where("auto", None, None).nodes is None
    with pytest.raises(UserError):
        nodes.where("many", None, None)
