"""Target ray without a Ray: what is rendered, what is refused before anything is queued, what states mean."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_PREEMPTED, EXIT_USER_ERROR, RecipeError, UserError
from launcher.jobs import ray_driver
from launcher.jobs.job import Job
from launcher.jobs.ray_agent import RayAgent
from launcher.jobs.spec import JobSpec, job_spec
from launcher.jobs.targets import ray
from launcher.plan import make_plan
from launcher.recipe.check import load
from launcher.recipe.schema import Cluster
from tests.jobs.make import project
from tests.ranks import free_port


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    return project(tmp_path)


def spec_of(recipe: Path, *changes: str) -> JobSpec:
    from launcher.jobs import targets

    loaded = load(recipe, ["cluster.target=ray", *changes], rules=[targets.problems]).recipe
    return job_spec(loaded, make_plan(loaded))


# rendered


def test_the_script_is_one_ray_job_submit_whose_entrypoint_is_one_command(recipe, tmp_path):
    spec = spec_of(recipe, "cluster.nodes=2", "cluster.ray.address=http://head:8265", "cluster.ray.pip=[trl==0.24]")
    rendered = ray.render(spec)
    assert rendered.command == "bash submit.sh"
    assert set(rendered.files) >= {"recipe.yaml", "runtime_env.json", "submit.sh"}
    assert rendered.files["submit.sh"] == (
        "#!/usr/bin/env bash\n"
        "# Run tiny: 2 nodes with 2 ranks each, on a Ray cluster.\n"
        "# Ray ships this folder to the nodes; the driver starts on the cluster and waits there for its nodes.\n"
        "set -euo pipefail\n"
        'cd "$(dirname "${BASH_SOURCE[0]}")"\n'
        "export RAY_API_SERVER_ADDRESS=http://head:8265\n"
        "exec ray job submit --no-wait \\\n"
        '  --submission-id "${1:-tiny-$(date +%s)}" \\\n'
        "  --runtime-env runtime_env.json \\\n"
        f"  -- python -m launcher.jobs.ray_driver {tmp_path}/runs/tiny --recipe recipe.yaml\n"
    )
    assert json.loads(rendered.files["runtime_env.json"]) == {
        "working_dir": ".",
        "pip": ["trl==0.24"],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "360"},
    }


def test_values_of_secrets_are_rendered_nowhere_and_pass_through_a_pipe(recipe, monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", "hush")
    rendered = ray.render(spec_of(recipe, "cluster.env=[HUB_TOKEN]"))
    assert "hush" not in "".join(rendered.files.values())
    assert (
        "--runtime-env <(python -m launcher.jobs.targets.ray runtime_env.json HUB_TOKEN)" in rendered.files["submit.sh"]
    )
    filled = json.loads(ray.with_values(rendered.files["runtime_env.json"], ["HUB_TOKEN"]))
    assert filled["env_vars"]["HUB_TOKEN"] == "hush"
    monkeypatch.delenv("HUB_TOKEN")
    with pytest.raises(UserError, match="HUB_TOKEN"):
        ray.with_values(rendered.files["runtime_env.json"], ["HUB_TOKEN"])


@pytest.mark.parametrize("address", [None, "http://head:8265", "local"])
def test_scripts_pass_shellcheck(recipe, tmp_path, address):
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck")
    (tmp_path / "it's code").mkdir()
    changes = [f"cluster.ray.working_dir={tmp_path}/it's code", "cluster.env=[HOME]"]
    rendered = ray.render(spec_of(recipe, *changes, *([f"cluster.ray.address={address}"] if address else [])))
    [script] = (text for name, text in rendered.files.items() if name.endswith(".sh"))
    done = subprocess.run([shellcheck, "-"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_a_shipped_folder_is_where_the_workers_run(recipe, tmp_path):
    spec = spec_of(recipe, f"cluster.ray.working_dir={tmp_path}")
    assert ray.entrypoint(spec)[-2:] == ["--folder", "code"]
    assert f"ln -sfn {tmp_path} code" in ray.render(spec).files["submit.sh"]


# refused


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        ("cluster.ray.address=ray://head:10001", "cluster.ray.address", "Use http://head:8265: ray:// is Ray Client"),
        ("cluster.ray.address=head:6379", "cluster.ray.address", "Use http://head:8265"),
        ("cluster.ray.address=10.0.0.7:6379", "cluster.ray.address", "Use http://10.0.0.7:8265"),
        ("cluster.ray.address=http://", "cluster.ray.address", "Use http://HOST:8265"),
        ("cluster.ray.address=http://head:99999", "cluster.ray.address", "Port out of range"),
        ("cluster.ray.address=http://head:8265/api/jobs", "cluster.ray.address", "Use http://head:8265."),
        ("cluster.ray.address=loca", "cluster.ray.address", "or local"),
        ("cluster.ray.cpus_per_node=0", "cluster.ray.cpus_per_node", "1 core or more"),
        ("cluster.ray.resources={rack: many}", "cluster.ray.resources.rack", "number"),
        ("cluster.ray.resources={rack: 0}", "cluster.ray.resources.rack", "a number above 0"),
        ("cluster.ray.resources={GPU: 4}", "cluster.ray.resources", "cluster.nproc_per_node"),
        ("cluster.ray.pip=[-r requirements.txt]", "cluster.ray.pip.0", "a requirement"),
        ("cluster.ray.working_dir=/no/such/folder", "cluster.ray.working_dir", "a folder that exists here"),
        ("cluster.ray.adress=local", "cluster.ray.adress", "address"),
    ],
)
def test_wrong_keys_are_refused_with_key_and_fix(recipe, change, key, said):
    with pytest.raises(RecipeError, match=r".") as refused:
        spec_of(recipe, change)
    assert refused.value.key == key
    assert said in str(refused.value)


def test_a_local_cluster_has_one_node(recipe):
    with pytest.raises(RecipeError, match=r"cluster.nodes = 2: expected 1 with cluster.ray.address = local"):
        spec_of(recipe, "cluster.ray.address=local", "cluster.nodes=2", "train.global_batch_size=4")


def submit(spec: JobSpec, folder: Path) -> str:
    """What a submission that is refused says, within seconds."""
    began, rendered = time.monotonic(), ray.render(spec)
    with pytest.raises(UserError) as refused:
        ray.submit(spec, rendered, folder)
    assert time.monotonic() - began < 60
    return str(refused.value)


def validation(spec: JobSpec, folder: Path) -> list[str]:
    return [finding.text for finding in ray.validate(spec, ray.render(spec), folder) if finding.state == "bad"]


def test_an_unreachable_head_is_named(recipe, tmp_path):
    address = f"http://127.0.0.1:{free_port()}"
    spec = spec_of(recipe, f"cluster.ray.address={address}")
    said = submit(spec, tmp_path)
    assert validation(spec, tmp_path) == [said]
    assert said.startswith(f"cluster.ray.address = {address}: no answer (")
    assert "8265" in said


def test_no_address_at_all(recipe, tmp_path):
    assert "RAY_ADDRESS is not set: expected http://HOST:8265" in submit(spec_of(recipe), tmp_path)


@pytest.mark.parametrize("address", ["ray://head:10001", "head:6379", "local"])
def test_a_wrong_ray_address_in_the_environment(recipe, tmp_path, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    said = submit(spec_of(recipe), tmp_path)
    assert said.startswith(f"RAY_ADDRESS = {address}: expected http://HOST:8265")


def test_rays_own_word_for_the_cluster_of_this_machine_is_no_host(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    said = submit(spec_of(recipe), tmp_path)
    assert said.startswith("RAY_ADDRESS = auto: expected http://HOST:8265")
    assert said.endswith(
        "Use http://127.0.0.1:8265 for a cluster that runs here, or cluster.ray.address=local for a fresh one."
    )


def test_a_variable_that_is_not_set_is_asked_for_before_the_cluster(recipe, tmp_path):
    spec = spec_of(recipe, "cluster.env=[NOT_SET_ANYWHERE]", f"cluster.ray.address=http://127.0.0.1:{free_port()}")
    assert "NOT_SET_ANYWHERE" in submit(spec, tmp_path)


def test_without_ray_the_command_that_installs_it_is_named(recipe, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    spec = spec_of(recipe, "cluster.ray.address=local")
    with pytest.raises(UserError, match=r'pip install "train-launcher\[ray\]"'):
        ray.submit(spec, ray.render(spec), tmp_path)


class _Server(http.server.ThreadingHTTPServer):
    """Answers each path with what `answers` says; a text as it is, a number as a code, else as JSON."""

    answers: dict[str, object]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = self.server.answers.get(self.path)  # type: ignore[attr-defined]
            body = answer if isinstance(answer, str) else json.dumps(answer)
            self.send_response(404 if answer is None else answer if isinstance(answer, int) else 200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass


@pytest.fixture
def server():
    server = _Server(("127.0.0.1", 0), _Server.Handler)
    server.answers = {"/api/version": {"ray_version": "2.60.0"}}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def findings(spec: JobSpec, server: _Server, folder: Path) -> dict[str, tuple[str, str]]:
    spec = replace(spec, cluster=replace(spec.cluster, ray=replace(spec.cluster.ray, address=_address(server))))
    return {finding.what: (finding.state, finding.text) for finding in ray.validate(spec, ray.render(spec), folder)}


def _address(server: _Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def _nodes(*resources: dict[str, float]) -> dict[str, object]:
    summary = [{"raylet": {"state": "ALIVE", "resourcesTotal": each}} for each in resources]
    return {"data": {"summary": [*summary, {"raylet": {"state": "DEAD", "resourcesTotal": {"CPU": 64.0, "GPU": 8.0}}}]}}


def test_what_is_no_job_server_is_said_to_be_none(recipe, server, tmp_path):
    server.answers = {"/api/version": "<html>hello</html>"}
    assert "no Ray job server" in findings(spec_of(recipe), server, tmp_path)["job server"][1]
    server.answers = {}
    assert "answers 404" in findings(spec_of(recipe), server, tmp_path)["job server"][1]
    server.answers = {"/api/version": 401}
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in findings(spec_of(recipe), server, tmp_path)["job server"][1]


def test_headers_that_are_no_json_are_refused(recipe, server, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_JOB_HEADERS", "Authorization: Bearer hush")
    said = findings(spec_of(recipe), server, tmp_path)["job server"]
    assert said[0] == "bad"
    assert said[1].startswith("RAY_JOB_HEADERS: expected a JSON object")
    assert "hush" not in said[1]


def test_a_cluster_with_an_old_ray_is_refused(recipe, server, tmp_path):
    server.answers = {"/api/version": {"ray_version": "2.9.3"}}
    assert findings(spec_of(recipe), server, tmp_path)["ray version"] == (
        "bad", "the cluster has 2.9.3, the driver needs 2.55 or newer",
    )  # fmt: skip


def test_nodes_are_counted_by_what_each_agent_reserves(recipe, server, tmp_path):
    server.answers["/nodes?view=summary"] = _nodes({}, {"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 1.0})
    spec = spec_of(recipe, "cluster.nodes=2", "cluster.accelerator=auto")
    state, text = findings(spec, server, tmp_path)["nodes"]
    assert (state, text.partition(". ")[0]) == ("bad", "1 of the cluster's 3 have CPU 2, GPU 2; the job asks for 2")
    assert "cluster.ray.autoscaling" in text
    growing = spec_of(recipe, "cluster.nodes=2", "cluster.accelerator=auto", "cluster.ray.autoscaling=true")
    assert findings(growing, server, tmp_path)["nodes"][0] == "ok"
    on_cpu = spec_of(recipe, "cluster.nodes=2", "cluster.accelerator=cpu")
    assert findings(on_cpu, server, tmp_path)["nodes"][0] == "ok"


def test_a_folder_too_large_to_ship_is_refused(recipe, server, tmp_path):
    code = tmp_path / "code"
    (code / ".git").mkdir(parents=True)
    for file in (code / "weights.bin", code / ".git" / "pack"):
        with file.open("wb") as hole:
            hole.truncate(300 << 20)
    spec = spec_of(recipe, f"cluster.ray.working_dir={code}")
    assert findings(spec, server, tmp_path)["cluster.ray.working_dir"][0] == "ok"
    shutil.copy(code / "weights.bin", code / "more.bin")
    state, text = findings(spec, server, tmp_path)["cluster.ray.working_dir"]
    assert (state, "512 MiB" in text) == ("bad", True)


# said afterwards


@pytest.mark.parametrize(
    ("said", "message", "phase", "state"),
    [
        ("PENDING", "Job has not started yet.", "", "queued"),
        ("RUNNING", "", "the job asks for 2 nodes ...; waiting up to 60 s", "queued"),
        ("RUNNING", "", "starting again on a new set of nodes: restart 1", "preempted-will-return"),
        ("RUNNING", "", "tiny-1: 2 nodes (a, b), restart 0", "running"),
        ("STOPPED", "", "", "cancelled"),
        ("SUCCEEDED", "", "", "finished"),
        ("FAILED", "failed with exit code 2\nrecipe.yaml: 1 problem", "", "failed"),
        ("SOMETHING_NEW", "", "", "unknown"),
    ],
)
def test_every_word_of_ray_is_one_of_our_states(tmp_path, said, message, phase, state):
    job = Job(target="ray", id="tiny-1", folder=tmp_path, run=tmp_path / "not-here", more={"address": "http://h:1"})
    status = ray._status(job, said, message, phase)
    assert status.state == state
    assert message.splitlines()[-1:] == [] or message.splitlines()[-1] in status.reason


def test_a_job_server_that_does_not_answer_leaves_the_state_unknown_with_the_reason(tmp_path):
    more = {"address": f"http://127.0.0.1:{free_port()}"}
    status = ray.status(Job(target="ray", id="tiny-1", folder=tmp_path, run=tmp_path, more=more))
    assert status.state == "unknown"
    assert "no answer" in status.reason


# agent and driver


def heard(agent: RayAgent) -> tuple[list[str], int]:
    """All lines of a worker and its exit code."""
    lines: list[str] = []
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        more, code = agent.poll()
        lines += more
        if code is not None:
            return lines, code
    raise AssertionError(f"no end: {lines}")


def test_an_agent_passes_on_what_its_worker_says_and_how_it_ends(tmp_path):
    agent = RayAgent(str(tmp_path / "runs" / "tiny"))
    agent.start([], "train: {max_stepz: 3}", {"LAUNCHER_TARGET": "ray", "LAUNCHER_JOB_ID": "tiny-1"}, None)
    lines, code = heard(agent)
    assert code == EXIT_USER_ERROR
    assert any("train.max_stepz" in line for line in lines)
    assert agent.poll() == ([], EXIT_USER_ERROR)  # also for who missed the first answer


def test_an_agent_that_cannot_start_its_worker_says_why(tmp_path):
    agent = RayAgent(str(tmp_path / "runs" / "tiny"))
    agent.start([], "", {}, str(tmp_path / "no-such-folder"))
    lines, code = heard(agent)
    assert code == EXIT_FAILED
    assert "no-such-folder" in lines[0]


def drive(*codes: int | None, budget: int = 2, stop: bool = False) -> tuple[int, int]:
    """The driver's exit code and how many attempts it made, each ending with the next of `codes`."""
    cluster = Cluster()
    cluster.restart.node = budget
    task = ray_driver.Task(run="/runs/tiny", recipe="", cluster=cluster, job="tiny-1")
    left = list(codes)

    class Scripted(ray_driver.Driver):
        def _attempt(self, restart: int) -> int | None:
            return left.pop(0)

    driver = Scripted(None, task, ray_driver.Stop("SIGTERM" if stop else None))
    return driver.drive(), len(codes) - len(left)


def test_the_driver_starts_again_for_75_and_for_a_lost_node_only():
    assert drive(EXIT_FINISHED) == (EXIT_FINISHED, 1)
    assert drive(EXIT_PREEMPTED, None, EXIT_PREEMPTED, EXIT_FINISHED) == (EXIT_FINISHED, 4)
    assert drive(EXIT_FAILED, EXIT_FINISHED) == (EXIT_FAILED, 1)
    assert drive(EXIT_USER_ERROR, EXIT_FINISHED) == (EXIT_USER_ERROR, 1)
    assert drive(EXIT_PREEMPTED, EXIT_FINISHED, stop=True) == (EXIT_PREEMPTED, 1)


def test_losses_without_a_word_end_with_the_budget():
    assert drive(None, None, None, EXIT_FINISHED) == (EXIT_FAILED, 3)
    assert drive(None, EXIT_FINISHED, budget=0) == (EXIT_FAILED, 1)


def test_a_driver_with_the_job_servers_address_is_told_where_it_belongs(recipe, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    monkeypatch.setattr(ray_driver.Stop, "listen", lambda _: None)  # signals are pytest's
    with pytest.raises(UserError, match=r"launcher submit --target ray"):
        ray_driver.main(["/runs/tiny", "--recipe", str(recipe)])
