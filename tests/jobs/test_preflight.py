"""What the facts of nodes come to, by table; and two nodes that examine each other over a real store."""

from __future__ import annotations

import copy
import json
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UserError
from launcher.jobs import checks, preflight, probe
from launcher.jobs import facts as facts_module
from launcher.jobs.checks import Needs, judge
from launcher.jobs.facts import facts
from launcher.jobs.finding import Finding
from launcher.plan import make_plan
from launcher.plan.disk import checkpoint_bytes
from launcher.recipe.check import load
from launcher.run.directory import RunDirectory
from tests.jobs.make import MODEL, finish, launcher, project, run_of, until
from tests.ranks import free_port

GIB = 1 << 30
WELL: dict[str, Any] = {
    "host": "node0",
    "versions": {"launcher": "0.3.0", "python": "3.12.4", "torch": "2.13.0", "cuda": "13.0", "nccl": "2.28.3",
                 "transformers": "5.23.0", "deepspeed": "0.19.8", "driver": "580.95.05"},
    "network": {"interface": "eth0", "address": "10.0.0.1", "mbit_per_s": 100_000},
    "hcas": [{"name": f"mlx5_{i}", "port": "1", "state": "ACTIVE", "rate": "400 Gb/sec (4X NDR)", "link": "InfiniBand"}
             for i in range(2)],
    "disk": {"folder": "/data/runs/x", "mount": "/data", "type": "lustre", "free": 500 * GIB, "total": 1000 * GIB},
    "limits": {"memlock": None, "nofile": 65536},
    "shm": 64 * GIB,
    "memory": {"total": 1024 * GIB, "limit": None},
    "headers": True,
    "compiler": "/usr/bin/gcc",
    "clock": {"offset_s": 0.001, "round_trip_s": 0.0004},
    "gpus": {"count": 8, "how": "/dev/nvidia*", "models": ["NVIDIA H100 80GB HBM3"] * 8, "used": [], "processes": []},
    "name": "10.0.0.1",
    "seconds": 0.02,
}  # fmt: skip
NEEDS = Needs(nodes=2, nproc_per_node=8, checkpoint=100 * GIB, keep_last=2, host=64 * GIB, gpus=8, compiles=True)


def node(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A node on which all is well but for the changes, as `disk__free=5`."""
    made = copy.deepcopy(WELL)
    made["host"] = f"node{number}"
    for key, value in changes.items():
        *path, last = key.split("__")
        target = made
        for part in path:
            target = target[part]
        target[last] = value
    return made


def trouble(*nodes: dict[str, Any], needs: Needs | None = NEEDS) -> list[Finding]:
    """What is not well."""
    return [finding for finding in judge(nodes, needs) if finding.state != "ok"]


def test_nodes_on_which_all_is_well_have_no_trouble():
    assert trouble(node(0), node(1)) == []
    assert {finding.name for finding in judge([node(0)], NEEDS)} >= {
        "disk",
        "/dev/shm",
        "clock",
        "network",
        "InfiniBand",
    }


@pytest.mark.parametrize(
    ("changes", "state", "name", "text"),
    [
        ({"disk__free": 150 * GIB}, "bad", "disk", "150.0 GiB free on /data (lustre); a checkpoint takes 100.0 GiB"),
        ({"disk__free": 250 * GIB}, "note", "disk", "2 checkpoints (checkpoint.keep_last) and the next take 300.0 GiB"),
        ({"gpus__count": 7}, "bad", "GPUs", "7 GPUs (/dev/nvidia*), cluster.nproc_per_node = 8"),
        ({"gpus__models": ["NVIDIA H100"] * 7}, "bad", "GPUs", "the driver answers for 7"),
        ({"shm": 64 << 20}, "note", "/dev/shm", "holds 64.0 MiB"),
        ({"shm": None}, "note", "/dev/shm", "is not there"),
        ({"limits__memlock": 8 << 20}, "note", "locked memory", "InfiniBand's buffers need more"),
        ({"limits__nofile": 256}, "note", "open files", "at most 256 (ulimit -n), this job may need 576"),
        ({"memory__limit": 32 * GIB}, "note", "host memory", "32.0 GiB for this process's control group"),
        ({"name": None}, "note", "host name", "node0, this host's name, has no address"),
        ({"name": "127.0.1.1", "network": None}, "note", "host name", "127.0.1.1, where no other node finds it"),
        ({"headers": False}, "note", "Python.h", "is missing"),
        ({"compiler": None}, "note", "compiler", "no C compiler"),
        ({"clock": {"offset_s": 90.0, "round_trip_s": 0.1}}, "note", "clock", "its clock is 90 s ahead of node 0's"),
        ({"clock": {"offset_s": -90.0, "round_trip_s": 0.1}}, "note", "clock", "its clock is 90 s behind node 0's"),
        ({"clock": {"error": "10.0.0.1:40000: timed out"}}, "bad", "ports", "10.0.0.1:40000: timed out"),
        (
            {"gpus__processes": [{"gpu": 3, "pid": 4711, "mib": 30720, "name": "python", "owner": "yours"}]},
            "note", "leftovers", "your process 4711 (python) holds 30.0 GiB of GPU 3",
        ),
        (
            {"gpus__processes": [{"gpu": 3, "pid": 4711, "mib": None, "name": "python", "owner": "eve"}]},
            "note", "leftovers", "eve's process 4711 (python) holds memory of GPU 3",
        ),
        ({"gpus__used": [{"gpu": 3, "mib": 2048}]}, "note", "leftovers", "2.0 GiB of GPU 3 is taken by a process"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_one_node_is_found(changes: dict[str, Any], state: str, name: str, text: str):
    (found,) = trouble(node(0, **changes))
    assert (found.state, found.name) == (state, name)
    assert text in found.text
    assert found.fix.endswith((".", ")"))


@pytest.mark.parametrize(
    ("changes", "state", "text"),
    [
        ({"versions__torch": "2.12.1"}, "bad", "torch 2.13.0 on node0 and node1, 2.12.1 on node2"),
        ({"versions__nccl": None}, "bad", "nccl 2.28.3 on node0 and node1, missing on node2"),
        ({"versions__driver": "570.1"}, "note", "driver 580.95.05 on node0 and node1, 570.1 on node2"),
        ({"gpus__models": ["NVIDIA A100"] * 8}, "note", "GPU NVIDIA H100 80GB HBM3 on node0 and node1, NVIDIA A100 on"),
        ({"network__mbit_per_s": 1000}, "note", "network 100,000 Mbit/s on node0 and node1, 1,000 Mbit/s on node2"),
        ({"disk__type": "ext4"}, "note", "different file systems: lustre on node0 and node1, ext4 on node2"),
        ({"shm": 1 << 20}, "note", "node2: holds 1.0 MiB"),
    ],
)
def test_what_differs_between_nodes_is_named_by_node(changes: dict[str, Any], state: str, text: str):
    (found,) = trouble(node(0), node(1), node(2, **changes))
    assert found.state == state
    assert text in found.text


def test_a_node_without_gpus_among_others_is_bad_and_a_port_that_is_down_is_named():
    found = trouble(node(0), node(1, gpus__count=0, gpus__models=[]), needs=replace(NEEDS, gpus=None))
    assert [(f.state, f.text) for f in found] == [("bad", "GPUs 8 on node0, 0 on node1")]
    down = [WELL["hcas"][0], {**WELL["hcas"][1], "state": "DOWN"}]
    texts = [finding.text for finding in trouble(node(0), node(1, hcas=down))]
    assert "node1: mlx5_1 port 1 is not active" in texts
    assert "InfiniBand 2 x 400 Gb/sec (4X NDR) on node0, 1 x 400 Gb/sec (4X NDR) on node1" in texts


def test_what_is_true_of_all_nodes_is_said_once_and_bad_things_come_first():
    found = trouble(*(node(i, shm=1 << 20) for i in range(3)), node(3, shm=1 << 20, disk__free=0))
    assert [(f.state, f.text.partition(":")[0]) for f in found] == [
        ("bad", "node3"),
        ("note", "holds 1.0 MiB, less than NCCL takes for the GPUs of a node"),
    ]


def test_many_nodes_are_counted_and_hosts_of_one_name_are_numbered():
    nodes = [node(i) for i in range(100)] + [node(100, versions__torch="2.12.1")]
    assert trouble(*nodes)[0].text == "torch 2.13.0 on node0 and 99 others, 2.12.1 on node100"
    assert checks.labels([node(0), node(0), node(1)]) == ["node0 (node 0)", "node0 (node 1)", "node1"]


def test_a_run_that_has_a_checkpoint_needs_space_for_one_more():
    assert trouble(node(0, disk__free=210 * GIB), needs=replace(NEEDS, kept=1)) == []
    (found,) = trouble(node(0, disk__free=90 * GIB), needs=replace(NEEDS, kept=2))
    assert found.state == "bad"


def test_pinned_offload_needs_memory_that_may_be_locked():
    (found,) = trouble(node(0, hcas=[], limits__memlock=GIB), needs=replace(NEEDS, pinned=40 * GIB))
    assert "at most 1.0 GiB may be page-locked (ulimit -l), offloading pins 40.0 GiB" in found.text


def test_the_refusal_names_everything_at_once_and_the_way_around():
    findings = trouble(node(0, disk__free=0), node(1, versions__torch="2.12.1", gpus__count=7))
    text = preflight.refusal(findings)
    assert text is not None
    assert text.splitlines()[0] == "preflight: 3 things would keep this job from training"
    assert "cluster.preflight=false" in text
    assert preflight.refusal(trouble(node(0, shm=None))) is None


@pytest.mark.parametrize(
    ("changes", "failure_class"), [({"gpus__count": 7}, "node"), ({"disk__free": 0}, "user"), ({"shm": None}, None)]
)
def test_only_what_other_nodes_may_mend_ends_the_attempt_as_a_fault_of_the_node(changes: Any, failure_class: Any):
    ending = preflight.Seen([node(0)], trouble(node(0, **changes))).ending
    assert (ending.failure_class if ending else None) == failure_class


# facts


def test_the_facts_of_this_machine_are_plain_quick_and_import_no_torch(tmp_path: Path):
    code = (
        "import json, sys; from pathlib import Path; from launcher.jobs.facts import facts; "
        f"print(json.dumps(facts(None, Path({str(tmp_path / 'no' / 'such')!r}), address='127.0.0.1'))); "
        "sys.exit('torch' in sys.modules or 'omegaconf' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["host"] == socket.gethostname()
    assert found["network"]["address"] == "127.0.0.1"
    assert found["disk"]["free"] > 0
    assert judge([found], None)


def test_the_mount_above_a_folder_is_the_longest_and_the_last(tmp_path: Path):
    file = tmp_path / "mountinfo"
    file.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n23 22 0:1 / /data rw shared:1 - nfs4 server:/x rw\n"
        "24 22 0:2 / /data\\040set rw - lustre a@tcp:/y rw\n25 23 0:3 / /data/runs rw - tmpfs none rw\n"
    )
    text = file.read_text()
    assert facts_module._mount_of(Path("/data/x"), text) == ("/data", "nfs4")
    assert facts_module._mount_of(Path("/data set/x"), text) == ("/data set", "lustre")
    assert facts_module._mount_of(Path("/data/runs/x"), text) == ("/data/runs", "tmpfs")
    assert facts_module._mount_of(Path("/database"), text) == ("/", "ext4")


def test_adapters_are_read_from_sysfs(tmp_path: Path):
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (port / "link_layer").write_text("InfiniBand\n")
    assert list(facts_module.hcas(tmp_path)) == [WELL["hcas"][0]]


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/job/step\n", {"job/memory.max": "1073741824", "job/step/memory.max": "max"}, 1 << 30),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "2147483648"}, 2 << 30),
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/job\n", {"job/memory.max": str(1 << 60)}, None),
    ],
)
def test_the_least_memory_limit_of_the_control_groups_counts(tmp_path: Path, groups: str, files: Any, limit: Any):
    proc, sys_groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(groups)
    (proc / "meminfo").write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\n")
    for name, text in files.items():
        (sys_groups / name).parent.mkdir(parents=True, exist_ok=True)
        (sys_groups / name).write_text(text + "\n")
    assert facts_module.host_memory(proc, sys_groups) == {"total": 16 << 30, "limit": limit}


def test_nvidia_smi_tells_of_gpus_in_sight_and_of_who_holds_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        "*gpu=*) echo '0, GPU-aaaa, NVIDIA H100, 3, 81559, 580.95'\n"
        "echo '1, GPU-bbbb, NVIDIA H100, 30000, 81559, 580.95';;\n"
        "*) echo 'GPU-bbbb, 999999999, 29990, python3'; echo 'GPU-aaaa, 1, [N/A], x';;\nesac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr(facts_module, "count_gpus", lambda: (1, "here"))
    gpus = facts(None, tmp_path)["gpus"]
    assert gpus["models"] == ["NVIDIA H100"]
    assert gpus["used"] == [{"gpu": 1, "mib": 30000}]
    assert gpus["processes"] == [{"gpu": 1, "pid": 999999999, "mib": 29990, "name": "python3", "owner": ""}]


@pytest.mark.gloo
def test_a_checkpoint_is_as_large_as_the_plan_says(tmp_path: Path):
    recipe = project(tmp_path, train={"max_steps": 2})
    finish(launcher("run", recipe), code=0)
    folder = next(run_of(recipe).checkpoints.iterdir())
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    loaded = load(str(recipe), []).recipe
    parameters = make_plan(loaded).parameters
    assert parameters is not None
    planned = checkpoint_bytes(loaded, parameters)
    assert MODEL["vocab_size"] * MODEL["hidden_size"] * 12 < planned <= files < planned * 1.2  # headers and buffers


# a node alone, and two


def test_clocks_are_compared_over_a_connection_and_a_closed_port_is_named():
    echo = probe.Echo()
    try:
        found = probe.measure("127.0.0.1", echo.port)
    finally:
        echo.close()
    assert found["round_trip_s"] >= 0
    assert abs(found["offset_s"]) <= found["round_trip_s"] + 0.001
    assert f"127.0.0.1:{(port := free_port())}" in probe.measure("127.0.0.1", port)["error"]


@pytest.mark.gloo
def test_a_run_without_space_for_two_checkpoints_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = load(str(project(tmp_path)), []).recipe
    plan, run = make_plan(recipe), RunDirectory(tmp_path / "runs" / "tiny")
    monkeypatch.setattr(preflight, "facts", lambda *_: node(0, disk__free=1000))
    with pytest.raises(UserError, match="1000 bytes free on /data"):
        preflight.before_launch(recipe, plan, run, print)
    assert not run.path.exists()
    recipe.cluster.preflight = False
    assert preflight.before_launch(recipe, plan, run, print).nodes == ()


ODD = """
import sys
from launcher import versions
real = versions.installed
versions.installed = lambda: {**real(), "transformers": "5.0.0"}
sys.argv = ["launcher", *sys.argv[1:]]
from launcher.cli import main
main()
"""


def two_nodes(recipe: Path, *, second: list[str]) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """`launcher worker` of node 0 and of node 1, which starts as `second` says."""
    options = ["worker", str(recipe.parent / "runs" / "tiny"), "--recipe", str(recipe), "--nodes", "2"]
    options += ["--rendezvous", f"127.0.0.1:{free_port()}", "--node-rank"]
    first = launcher(*options, "0")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return first, subprocess.Popen([*second, *options, "1"], start_new_session=True, **pipes)


@pytest.mark.gloo
@pytest.mark.slow
def test_two_nodes_leave_what_they_saw_of_each_other(tmp_path: Path):
    recipe = project(tmp_path, cluster={"nproc_per_node": 1}, train={"max_steps": 2})
    first, second = two_nodes(recipe, second=[sys.executable, "-m", "launcher"])
    finish(first, code=0)
    finish(second, code=0)
    job = run_of(recipe).job(1)
    seen = json.loads((job / "nodes.json").read_text())
    assert [each["network"]["address"] for each in seen["nodes"]] == ["127.0.0.1"] * 2
    assert seen["nodes"][0]["clock"] is None
    assert seen["nodes"][1]["clock"]["round_trip_s"] > 0
    assert len(json.loads((job / "preflight.json").read_text())["nodes"]) == 2


@pytest.mark.gloo
@pytest.mark.slow
def test_two_nodes_of_different_versions_are_refused_by_name_before_a_rank_starts(tmp_path: Path):
    recipe = project(tmp_path, cluster={"nproc_per_node": 1})
    first, second = two_nodes(recipe, second=[sys.executable, "-c", ODD])
    _, err = finish(first, code=2)
    _, other = finish(second, code=2)
    host = socket.gethostname()
    for text in (err, other):
        assert "preflight: 1 thing would keep this job from training" in text
        assert f"on {host} (node 0), 5.0.0 on {host} (node 1). Install one version on all nodes." in text
    assert not run_of(recipe).exists()  # nothing was learnt in it


@pytest.mark.gloo
def test_preflight_false_skips_what_is_looked_at(tmp_path: Path):
    recipe = project(tmp_path, cluster={"preflight": False}, train={"max_steps": 2})
    out, _ = finish(launcher("run", recipe), code=0)
    assert "preflight:" not in out
    assert not {"nodes.json", "preflight.json"} & {file.name for file in run_of(recipe).job(1).iterdir()}


def test_the_echo_ends_with_its_block():
    echo = probe.Echo()
    echo.close()
    until("the port to close", lambda: "error" in probe.measure("127.0.0.1", echo.port) or time.sleep(0.1))
