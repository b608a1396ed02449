"""The batch script as text, and what it decides when it runs.

Slurm's commands are stand-ins here, because a real one (tests/slurm) cannot be made to give each of these answers: a
worker that dies without a word eleven times, a site's odd node list, a job in the moment of its preemption.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.jobs.targets import slurm
from launcher.jobs.targets.slurm_script import FILE
from launcher.recipe.schema.slurm import Container
from tests.jobs.make import until
from tests.jobs.slurm_make import Site, options, spec, text

SHELLCHECK = Path(sys.executable).parent / "shellcheck"
PYXIS = Container(runtime="pyxis", image="nvcr.io#nvidia/pytorch:25.09", mounts=["/data:/data:ro"], workdir="/x")
APPTAINER = Container(runtime="apptainer", image="/i/x.sif", setup=["module load apptainer"])
SHAPES = {
    "one-node": spec(nodes=1),
    "nodes": spec(setup=("module load cuda",), env_names=("HF_TOKEN",), env={"NCCL_DEBUG": "it's"}),
    "tasks-gpu": spec(tasks="gpu"),
    "tasks-gpu-one-node": spec(tasks="gpu", nodes=1),
    "pyxis": spec(container=PYXIS, env_names=("HF_TOKEN",), setup=("module load cuda",)),
    "apptainer": spec(container=APPTAINER),
    "cpu": spec(accelerator="cpu", exclusive=False, mem="8G"),
    "no-requeue": spec(requeue=False),
    "odd-names": spec(run="/shared/with space/it's", comment="two words", host_suffix="-ib", port=12345),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_clean_to_bash_and_shellcheck(shape):
    for given in (["bash", "-n"], [SHELLCHECK, "-s", "bash", "-"]):
        done = subprocess.run(given, input=text(SHAPES[shape]), capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("shape", SHAPES)
def test_no_sbatch_line_holds_a_shell_variable_and_none_comes_behind_a_command(shape):
    lines = text(SHAPES[shape]).splitlines()
    given = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert given == list(range(1, len(given) + 1))
    assert not any("$" in line for line in lines[: len(given) + 1])


def test_what_is_asked_for_stands_in_the_options():
    asked = options(text(spec(partition="gpu", account="a", qos="q", constraint="h100&ib", reservation="r")))
    assert asked == {
        "job-name": "big", "account": "a", "partition": "gpu", "qos": "q", "constraint": "'h100&ib'",
        "reservation": "r", "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "8", "exclusive": "", "mem": "0",
        "time": "60", "signal": "B:USR1@300", "requeue": "", "open-mode": "append", "output": "slurm-%j.out",
    }  # fmt: skip


def test_a_range_of_nodes_is_asked_for_and_each_start_takes_what_it_was_given():
    script = text(spec(nodes=4, min_nodes=2))
    assert options(script)["nodes"] == "2-4"
    assert "ntasks-per-node" not in options(script)  # with it Slurm gives two nodes, however many are free
    assert "# Run big: 2 to 4 nodes x 8 ranks" in script
    assert script.count('"$SLURM_JOB_NUM_NODES"') == 2  # of srun, and of the worker
    assert "--nodes 4" not in script


def test_without_gpus_without_limit_on_shared_nodes():
    asked = options(text(spec(accelerator="cpu", minutes=None, exclusive=False, mem="8G", requeue=False)))
    assert not {"gpus-per-node", "time", "exclusive", "requeue"} & set(asked)
    assert (asked["cpus-per-task"], asked["mem"], asked["no-requeue"]) == ("32", "8G", "")


def test_gres_takes_the_place_of_gpus_per_node_and_extra_lines_come_last():
    script = text(spec(gres="gpu:a100:8", extra=["--mail-type=END", "--licenses=x:1"]))
    assert "gpus-per-node" not in options(script)
    assert options(script)["gres"] == "gpu:a100:8"
    assert [line for line in script.splitlines() if line.startswith("#SBATCH")][-2:] == [
        "#SBATCH --mail-type=END", "#SBATCH --licenses=x:1",
    ]  # fmt: skip


def test_cores_are_shared_by_the_tasks_of_a_node():
    assert options(text(spec(cpus_per_node=64)))["cpus-per-task"] == "64"
    assert options(text(spec(cpus_per_node=64, tasks="gpu")))["cpus-per-task"] == "8"


def test_srun_starts_the_worker_itself():
    script = text(spec())
    start = script[script.index("srun \\") : script.index("step=$!")]
    assert "bash" not in start
    assert "tee" not in start
    for option in ('--cpus-per-task="$cores"', "--cpu-bind=none", "--kill-on-bad-exit=1", "--nodes=2"):
        assert option in start


def test_secrets_are_names_alone(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "the-secret-value")
    for container in (None, PYXIS):
        script = text(spec(env_names=("HF_TOKEN",), container=container))
        assert "the-secret-value" not in script
        assert "HF_TOKEN" in script


def test_a_script_for_4096_nodes_is_as_long_as_one_for_two():
    assert len(text(spec(nodes=4096)).splitlines()) == len(text(spec()).splitlines())


def test_pyxis_options_stand_before_the_worker():
    script = text(SHAPES["pyxis"])
    assert "--container-image=nvcr.io#nvidia/pytorch:25.09" in script.replace("'", "")
    assert '--container-mounts="$run:$run,$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR,/data:/data:ro"' in script
    assert "--container-env=LAUNCHER_TARGET,LAUNCHER_JOB_ID,LAUNCHER_JOB_RESTART,HF_TOKEN" in script
    assert script.index("--container-image") < script.index('launcher worker "$run"')
    assert "module load cuda" not in script  # the worker runs it inside
    assert "command -v launcher" not in script  # the image has it, not the host


def test_apptainer_is_the_task_and_the_worker_behind_it():
    script = text(SHAPES["apptainer"])
    assert "module load apptainer" in script
    assert '--bind "$run:$run,$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR"' in script
    assert script.index("apptainer exec") < script.index("--nv") < script.index("/i/x.sif \\")
    assert "--nv" not in text(spec(container=APPTAINER, accelerator="cpu"))


# What it does when it runs.


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Commands of a quiet cluster: the job runs on, and the worker ends as $CODE and $VERDICT say."""
    made = Site(tmp_path)
    (tmp_path / "recipe.yaml").write_text("{}\n")
    made.command("launcher", "")
    made.command("scontrol", 'if [[ $1 == show ]]; then printf "localhost\\nother\\n"; fi')
    made.command("squeue", 'echo "${STATE:-RUNNING-None}"')
    made.command(
        "srun",
        'env | grep "^LAUNCHER_\\|^OMP\\|^MASTER" >>env; cd "$RUN"; [[ -z ${VERDICT:-} ]] || echo "$VERDICT" '
        ">control/verdict; exit ${CODE:-0}",
    )
    return made


def end(site: Site, *, node_budget: int = 10, requeue: bool = True, **given: str) -> tuple[int, str, bool]:
    """Exit code, output, and whether the job was requeued."""
    (site.folder / "calls").unlink(missing_ok=True)
    run = site.folder / "runs" / "big"
    script = text(spec(run=run, ranks=2, node_budget=node_budget, requeue=requeue))
    code, said = site.run(script, RUN=str(run), **given)
    return code, said, any(call.startswith("scontrol requeue") for call in site.calls)


@pytest.mark.parametrize(
    ("verdict", "code", "state", "exit_code", "requeued"),
    [
        ("stop", 0, "RUNNING-None", 0, False),  # finished
        ("stop", 1, "RUNNING-None", 1, False),  # failed for good
        ("requeue", 75, "RUNNING-None", 0, True),
        ("requeue", 0, "RUNNING-None", 0, True),
        ("requeue", 1, "RUNNING-None", 0, True),  # another node's code, the verdict counts
        ("requeue", 75, "COMPLETING-TimeLimit", 0, True),  # a missed warning, the checkpoint came in KillWait
        ("requeue", 75, "TIMEOUT-TimeLimit", 0, True),
        ("requeue", 75, "COMPLETING-None", 75, False),  # scancel, and preemption, where Slurm itself requeues
        ("requeue", 75, "CANCELLED-None", 75, False),
        ("requeue", 75, "PENDING-BeginTime", 75, False),  # it is requeued already
        ("", 0, "RUNNING-None", 0, False),  # nothing was left to do
        ("", 2, "RUNNING-None", 2, False),  # the user's mistake
        ("", 126, "RUNNING-None", 126, False),
        ("", 127, "RUNNING-None", 127, False),  # no launcher on a node
        ("", 137, "RUNNING-None", 0, True),  # the worker died
        ("", 233, "RUNNING-None", 0, True),  # a node did not answer srun
    ],
)
def test_it_goes_back_into_the_queue_when_the_verdict_says_so(site, verdict, code, state, exit_code, requeued):
    found = end(site, VERDICT=verdict, CODE=str(code), STATE=state)
    assert (found[0], found[2]) == (exit_code, requeued), found[1]


def test_without_requeue_it_ends_with_75_and_says_how_to_go_on(site):
    code, said, requeued = end(site, requeue=False, VERDICT="requeue", CODE="75")
    assert (code, requeued) == (75, False)
    assert "sbatch job.sbatch" in said


def test_ends_without_a_word_are_counted_and_bounded(site):
    found = [end(site, node_budget=2, CODE="137")[2] for _ in range(4)]
    assert found == [True, True, False, False]
    assert end(site, node_budget=2, VERDICT="requeue", CODE="75")[2]
    assert end(site, node_budget=2, CODE="137")[2]  # a word in between begins the count again


def test_another_job_begins_its_own_count(site):
    assert [end(site, node_budget=1, CODE="137")[2] for _ in range(2)] == [True, False]
    assert end(site, node_budget=1, CODE="137", SLURM_JOB_ID="8")[2]


def test_an_earlier_starts_verdict_is_not_taken_for_this_ones(site):
    assert end(site, VERDICT="requeue", CODE="75")[2]
    assert not end(site, CODE="2")[2]


def test_a_failed_requeue_is_told(site):
    site.command("scontrol", 'if [[ $1 == requeue ]]; then echo "disabled" >&2; exit 1; fi; echo localhost')
    code, said, _ = end(site, VERDICT="requeue", CODE="75")
    assert code == 75
    assert "7: not requeued; it goes on after: sbatch job.sbatch" in said


def test_the_worker_is_told_job_restart_place_and_recipe(site):
    end(site, VERDICT="stop", SLURM_RESTART_COUNT="3", LAUNCHER_NODE_RANK="5", LAUNCHER_ATTEMPT="9")
    (call,) = [line for line in site.calls if line.startswith("srun")]
    assert call.endswith(
        f"launcher worker {site.folder}/runs/big --recipe {site.folder}/recipe.yaml --nodes 2 "
        "--rendezvous localhost:10007"
    )
    assert "--cpus-per-task=32 " in call  # of the smallest node
    told = (site.folder / "env").read_text().split()
    assert sorted(word for word in told if word.startswith("LAUNCHER_")) == [
        "LAUNCHER_JOB_ID=7", "LAUNCHER_JOB_RESTART=3", "LAUNCHER_TARGET=slurm",
    ]  # fmt: skip


def test_a_port_that_is_taken_is_passed_over(site):
    with socket.socket() as taken:
        port = next(port for port in range(10000, 30000) if _bound(taken, port))
        taken.listen()
        end(site, VERDICT="stop", SLURM_JOB_ID=str(port - 10000))
    (call,) = [line for line in site.calls if line.startswith("srun")]
    assert call.endswith(f"localhost:{10000 + (port - 10000 + 1009) % 20000}")


def _bound(server: socket.socket, port: int) -> bool:
    try:
        server.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def test_an_element_of_an_array_has_its_own_run_recipe_and_id(site):
    runs = [spec(name=f"big-{i}", run=site.folder / "runs" / f"big-{i}") for i in range(3)]
    rendered = slurm.render_sweep(runs, name="big")
    assert set(rendered.files) == {
        FILE, *(f"recipe-{i}.yaml" for i in range(3)), *(f"plan-{i}.json" for i in range(3)),
    }  # fmt: skip
    assert options(rendered.files[FILE])["array"] == "0-2"
    (site.folder / "recipe-1.yaml").write_text("{}\n")
    code, _ = site.run(
        rendered.files[FILE], RUN=str(site.folder / "runs" / "big-1"), VERDICT="requeue", CODE="75",
        SLURM_JOB_ID="41", SLURM_ARRAY_JOB_ID="40", SLURM_ARRAY_TASK_ID="1",
    )  # fmt: skip
    assert code == 0
    assert any(
        f"launcher worker {site.folder}/runs/big-1 --recipe {site.folder}/recipe-1.yaml" in c for c in site.calls
    )
    assert "squeue --noheader --jobs=40_1 --format=%T-%r" in site.calls
    assert "scontrol requeue 40_1" in site.calls
    assert "LAUNCHER_JOB_ID=40_1" in (site.folder / "env").read_text()


def test_a_recipe_that_is_not_there_is_told_with_code_2(site):
    (site.folder / "recipe.yaml").unlink()
    code, said, requeued = end(site)
    assert (code, requeued) == (2, False)
    assert "call sbatch in the folder that holds it" in said


def test_a_variable_that_is_not_set_is_told_by_name(site):
    script = text(spec(run=site.folder / "runs" / "big", env_names=("MY_TOKEN",)))
    code, said = site.run(script)
    assert code != 0
    assert "MY_TOKEN: cluster.env names it, but it is not set where sbatch was called" in said


def test_set_up_lines_may_read_what_is_not_set_and_bring_variables(site):
    lines = ("if [[ -n $NOT_SET_ANYWHERE ]]; then :; fi", "export MY_TOKEN=x")
    run = site.folder / "runs" / "big"
    code, said = site.run(text(spec(run=run, setup=lines, env_names=("MY_TOKEN",))), RUN=str(run), VERDICT="stop")
    assert code == 0, said


def test_each_task_of_srun_reads_its_own_variables(site):
    """Executed: variables that would be those of the first node, had the batch script expanded them."""
    run = site.folder / "runs" / "big"
    site.command("launcher", 'while [[ $1 != -- ]]; do shift; done; shift; "$@"')
    site.command(
        "srun",
        "while [[ $1 == --* ]]; do shift; done; export SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 SLURM_NODEID=1; "
        '"$@"',
    )
    site.command("python", 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $GROUP_RANK $MASTER_PORT $*"')
    code, said = site.run(text(spec(run=run, ranks=2, tasks="gpu")))
    assert code == 0, said
    assert said.strip() == f"3 1 4 2 1 10007 -m launcher.trainer {run}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_becomes_a_request_that_a_start_cannot_lose(site, name):
    """The worker takes a first request back, as a start does; the script repeats it while the step lives."""
    run = site.folder / "runs" / "big"
    site.command(
        "srun",
        f"cd {run}; touch started; until [[ -e control/stop-request ]]; do sleep 0.1; done; rm control/stop-request; "
        "until [[ -e control/stop-request ]]; do sleep 0.1; done; cp control/stop-request kept; "
        "echo requeue >control/verdict; rm control/stop-request; sleep 3; exit 75",
    )
    (site.folder / FILE).write_text(text(spec(run=run)))
    process = subprocess.Popen(
        ["bash", FILE], cwd=site.folder, env=site.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    until("the step", (run / "started").exists)
    process.send_signal(getattr(signal, f"SIG{name}"))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert json.loads((run / "kept").read_text())["reason"] == f"SIG{name} of Slurm"
    assert "scontrol requeue 7" in site.calls
    assert sorted(path.name for path in (run / "control").iterdir()) == ["verdict"]


def test_a_request_that_is_there_is_left_as_it_is(site):
    """`launcher cancel` has written it: the job is not to come back."""
    run = site.folder / "runs" / "big"
    site.command("srun", f"cd {run}; touch started; while [[ ! -e end ]]; do sleep 0.1; done")
    (run / "control").mkdir(parents=True)
    (run / "control" / "stop-request").write_text("cancel\n")
    (site.folder / FILE).write_text(text(spec(run=run)))
    process = subprocess.Popen(["bash", FILE], cwd=site.folder, env=site.environment(), stdout=subprocess.DEVNULL)
    until("the step", (run / "started").exists)
    process.send_signal(signal.SIGUSR1)
    until("the script polls", lambda: (run / "end").touch() or process.poll() is not None)
    assert (run / "control" / "stop-request").read_text() == "cancel\n"
