"""Target `ray`: `launcher.jobs.ray_driver` as a job of a Ray cluster, or in the background here (address `local`).

A cluster is spoken to by its job server alone (http://HOST:8265). `python -m launcher.jobs.targets.ray runtime_env.json
NAME ...` prints a rendered runtime environment with the values of those variables, for `ray job submit` by hand.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launcher.errors import Problem, UserError
from launcher.jobs import ray_driver
from launcher.jobs.environment import require_variables
from launcher.jobs.job import Finding, Job, JobStatus, State
from launcher.jobs.spec import JobSpec, Rendered
from launcher.recipe.schema.ray import LOCAL, address_problem
from launcher.run.directory import RunDirectory
from launcher.run.ledger import attempts

CODE = "code"  # in what is shipped: cluster.ray.working_dir
RUNTIME_ENV = "runtime_env.json"
SCRIPT = "submit.sh"
_DRIVER_SCRIPT = "job.sh"  # the name that `launcher.jobs.targets.process` starts
_OLDEST = (2, 55)  # as in the extra `ray`
_TIMEOUT_S = 5.0  # for a job server's first answer
_STOP_MARGIN_S = 60  # on top of what the run itself has for its checkpoint
_LIMIT_BYTES = 512 << 20  # of one package: Ray's largest message (GRPC_CPP_MAX_MESSAGE_SIZE, Ray 2.60)
_NOT_SHIPPED = {".git", ".venv", "venv", "__pycache__"}  # by Ray's own default
_ENVIRONMENT = threading.Lock()  # held by who changes it: several jobs may be asked for at once
_TALKATIVE = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")  # of each package
_INSTALL = 'pip install "train-launcher[ray]"'


def problems(spec: JobSpec) -> Iterator[Problem]:
    """What of the recipe this target cannot do."""
    ray = spec.cluster.ray
    if ray.address == LOCAL and spec.nodes > 1:
        expected = f"1 with cluster.ray.address = {LOCAL}, which is a cluster of this machine alone"
        fix = "Give the address of a cluster's job server: http://HOST:8265."
        yield Problem("cluster.nodes", spec.nodes, expected, fix, because=("cluster.ray.address",))
    if ray.working_dir is not None and not os.path.isdir(ray.working_dir):
        yield Problem("cluster.ray.working_dir", ray.working_dir, "a folder that exists here, or null")


def render(spec: JobSpec) -> Rendered:
    """`runtime_env.json` and `submit.sh` beside the recipe; for a local cluster `job.sh`, which is the driver."""
    if spec.cluster.ray.address == LOCAL:
        return Rendered({**spec.files, _DRIVER_SCRIPT: _driver_script(spec)}, f"bash {_DRIVER_SCRIPT}")
    ranks = f"{spec.nproc_per_node} rank{'s' * (spec.nproc_per_node > 1)}"
    least = "" if spec.cluster.min_nodes is None else f"{spec.cluster.min_nodes} to "
    about = f"{least}{spec.nodes} node{'s' * (spec.nodes > 1)} with {ranks} each"
    return cluster_job(spec, entrypoint(spec), about=f"Run {spec.name}: {about}, on a Ray cluster.")


def cluster_job(spec: JobSpec, words: list[str], *, about: str) -> Rendered:
    """The files of a job whose entrypoint is a command on the cluster.

    about: says for people what it is
    """
    files = {
        RUNTIME_ENV: json.dumps(_runtime_env(spec), indent=2) + "\n",
        SCRIPT: _submit_script(spec, words, about=about),
    }
    return Rendered({**spec.files, **files}, f"bash {SCRIPT}")


def entrypoint(spec: JobSpec) -> list[str]:
    """The driver's command line: one command without shell syntax, since Ray hands it to a shell."""
    folder = ["--folder", CODE] if spec.cluster.ray.working_dir else []
    return ["python", "-m", "launcher.jobs.ray_driver", spec.run, "--recipe", "recipe.yaml", *folder]


def validate(spec: JobSpec, rendered: Rendered, folder: Path) -> Iterator[Finding]:
    """Whether the cluster answers, is of a Ray that the driver knows, and has the nodes; what is shipped."""
    try:
        here = version("ray")
        yield Finding("ray", "ok", f"{here} is installed here")
    except PackageNotFoundError:
        here = None
        yield Finding("ray", "skipped", f"is not installed here: {_INSTALL}")
    if missing := [name for name in spec.env_names if name not in os.environ]:
        said = f"{', '.join(missing)} not set here"
        yield Finding("cluster.env", "skipped" if spec.setup else "bad", said)
    if spec.cluster.ray.working_dir is not None:
        yield _shippable(spec.cluster.ray.working_dir)
    if spec.cluster.ray.address == LOCAL:
        return
    try:
        address = _address(spec)
        there = _version_there(address)
    except UserError as error:
        yield Finding("job server", "bad", str(error))
        return
    yield _versions_match(there, here)
    yield _large_enough(spec, address)


def submit(spec: JobSpec, rendered: Rendered, folder: Path) -> Job:
    """Hand the folder to the cluster's job server, or start the driver in the background here.

    Raises:
        UserError: Ray is not here, the cluster does not answer or refuses, a variable of cluster.env is not set.
    """
    _require_ray()
    if not spec.setup:
        require_variables(spec.env_names)
    if spec.cluster.ray.address == LOCAL:
        from launcher.jobs.targets import process

        return process.start(spec, rendered, folder, target="ray")
    return submit_to_cluster(spec, rendered, folder, entrypoint(spec))


def submit_to_cluster(spec: JobSpec, rendered: Rendered, folder: Path, words: list[str]) -> Job:
    """Hand the folder of a `cluster_job` to the cluster's job server.

    Raises:
        UserError: as `submit`.
    """
    _require_ray()
    address = _address(spec)
    values = {name: os.environ[name] for name in spec.env_names if name in os.environ}
    with _asked(address, "submit the job") as client, _code_beside(folder, spec.cluster.ray.working_dir):
        name = _new_id(client, spec)
        runtime_env = json.loads(rendered.files[RUNTIME_ENV])
        runtime_env["working_dir"] = str(folder)
        runtime_env["env_vars"] |= values
        client.submit_job(
            entrypoint=shlex.join(words),
            submission_id=name,
            runtime_env=runtime_env,
            metadata={"launcher_run": spec.run},
        )
    return Job(target="ray", id=name, folder=folder, run=Path(spec.run), more={"address": address})


def status(job: Job) -> JobStatus:
    """What the job server says; where the run directory is seen from here, together with what its ledger says."""
    if "address" not in job.more:
        from launcher.jobs.targets import process

        return process.status(job)
    try:
        with _asked(job.more["address"], "ask for the job") as client:
            info = client.get_job_info(job.id)
            phase = _phase(client, job) if info.status == "RUNNING" else ""
    except UserError as error:
        return JobStatus("unknown", str(error))
    return _status(job, str(info.status.value), info.message or "", phase)


def logs(job: Job) -> Iterator[str]:
    """What the driver printed; the ranks' logs are in the run directory.

    Raises:
        UserError: the job server does not answer, or has them no more.
    """
    if "address" not in job.more:
        from launcher.jobs.targets import process

        yield from process.logs(job)
        return
    with _asked(job.more["address"], "read the job's output") as client:
        yield from client.get_job_logs(job.id).splitlines()


def cancel(job: Job) -> None:
    """Stop the job: the driver asks every node for a checkpoint and the end, and is killed only after its time for it.

    Raises:
        UserError: the job server does not answer, or the job has ended.
    """
    if "address" not in job.more:
        from launcher.jobs.targets import process

        process.cancel(job)
        return
    with _asked(job.more["address"], "stop the job") as client:
        if client.get_job_status(job.id).is_terminal():
            raise UserError(f"Ray job {job.id} has ended: nothing to cancel.")
        client.stop_job(job.id)


def with_values(runtime_env: str, names: list[str]) -> str:
    """A rendered runtime environment with the values of variables, which are in no file.

    Raises:
        UserError: one of them is not set.
    """
    require_variables(names)
    filled = json.loads(runtime_env)
    filled["env_vars"] |= {name: os.environ[name] for name in names}
    return json.dumps(filled)


# what is rendered


def _runtime_env(spec: JobSpec) -> dict[str, Any]:
    """Ray's runtime environment of driver and agents, without secrets."""
    stop_wait = {"RAY_JOB_STOP_WAIT_TIME_S": str(spec.stop_lead_s + _STOP_MARGIN_S)}  # Ray's own is 3 s
    pip = {"pip": list(spec.cluster.ray.pip)} if spec.cluster.ray.pip else {}
    return {"working_dir": ".", **pip, "env_vars": {**dict(sorted(spec.env.items())), **stop_wait}}


def _submit_script(spec: JobSpec, words: list[str], *, about: str) -> str:
    """The one call that submits, for people; the same as `submit` but for the number in the job's id."""
    ray, names = spec.cluster.ray, list(spec.env_names)
    address = shlex.quote(ray.address) if ray.address else '"${RAY_ADDRESS:?set it to http://HOST:8265}"'
    lines = [
        "#!/usr/bin/env bash",
        f"# {about}",
        "# Ray ships this folder to the nodes; the driver starts on the cluster and waits there for its nodes.",
        "set -euo pipefail",
        'cd "$(dirname "${BASH_SOURCE[0]}")"',
        f"export RAY_API_SERVER_ADDRESS={address}",
    ]
    if ray.working_dir:
        lines.append(f"ln -sfn {shlex.quote(os.path.abspath(ray.working_dir))} {CODE}  # Ray ships what it leads to")
    runtime_env = RUNTIME_ENV
    if names:
        filled = shlex.join(["python", "-m", "launcher.jobs.targets.ray", RUNTIME_ENV, *names])
        lines.append(
            f"# {', '.join(names)}: read from the environment here, passed on through a pipe, in none of our files."
        )
        runtime_env = f"<({filled})"
    lines += [
        "exec ray job submit --no-wait \\",
        f'  --submission-id "${{1:-{_plain(spec.name)}-$(date +%s)}}" \\',
        f"  --runtime-env {runtime_env} \\",
        f"  -- {shlex.join(words)}",
    ]
    return "\n".join(lines) + "\n"


def _driver_script(spec: JobSpec) -> str:
    """The driver on this machine, which makes a Ray cluster of it and ends that with itself."""
    folder = spec.cluster.ray.working_dir
    options = f" --folder {shlex.quote(os.path.abspath(folder))}" if folder else ""
    lines = [
        "#!/usr/bin/env bash",
        f"# Run {spec.name}: {spec.nproc_per_node} ranks on a Ray cluster of this machine alone.",
        "set -euo pipefail",
        'here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)',
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(spec.env.items())),
        *spec.code_lines,
        f'exec python -m launcher.jobs.ray_driver {shlex.quote(spec.run)} --recipe "$here/recipe.yaml"{options}',
    ]
    return "\n".join(lines) + "\n"


def _plain(name: str) -> str:
    """A name as it may stand in an address."""
    return re.sub(r"[^\w.-]", "-", name)


# the job server


def _require_ray() -> None:
    try:
        import ray.job_submission  # noqa: F401
    except ImportError as error:
        raise UserError(f"target ray needs Ray here ({error}): {_INSTALL}") from None


def _address(spec: JobSpec) -> str:
    """The job server's address, from the recipe or RAY_ADDRESS.

    Raises:
        UserError: neither says it, or RAY_ADDRESS is another kind of address.
    """
    if spec.cluster.ray.address is not None:
        return spec.cluster.ray.address.rstrip("/")
    given = os.environ.get("RAY_ADDRESS")
    if not given:
        expected = f"http://HOST:8265 of the cluster's job server, or {LOCAL} for a cluster of this machine"
        raise UserError(f"cluster.ray.address = null, and RAY_ADDRESS is not set: expected {expected}.")
    if given == LOCAL:
        raise UserError(f"RAY_ADDRESS = {LOCAL}: expected http://HOST:8265. Write cluster.ray.address={LOCAL} instead.")
    if (problem := address_problem(given)) is not None:
        raise UserError(f"RAY_ADDRESS = {given}: expected {problem[0]}. {problem[1]}")
    return given.rstrip("/")


def _get(address: str, path: str) -> Any:
    """JSON that the job server answers within seconds.

    Raises:
        UserError: nothing, or something else, answers there.
    """
    asked = urllib.request.Request(address + path, headers=_headers())
    try:
        with urllib.request.urlopen(asked, timeout=_TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        fix = "Is it Ray's job server (the dashboard's port, 8265)?"
        if error.code in (401, 403):
            fix = "If the cluster wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH."
        raise UserError(f"cluster.ray.address = {address}: answers {error.code} {error.reason}. {fix}") from None
    except ValueError:
        fix = "Give the address of the dashboard, http://HOST:8265."
        raise UserError(f"cluster.ray.address = {address}: what answers is no Ray job server. {fix}") from None
    except OSError as error:
        why = getattr(error, "reason", None) or error
        fix = "Is the head up, and its port 8265 open to this machine (ray start --head --dashboard-host 0.0.0.0)?"
        raise UserError(f"cluster.ray.address = {address}: no answer ({why}). {fix}") from None


def _headers() -> dict[str, str]:
    """What Ray's own client would send: the user's headers, and the token if that is how the cluster is entered.

    Raises:
        UserError: there is no token where RAY_AUTH_MODE asks for one, or RAY_JOB_HEADERS is no JSON.
    """
    try:
        given: dict[str, str] = json.loads(os.environ.get("RAY_JOB_HEADERS") or "{}")
    except ValueError as error:
        raise UserError(f"RAY_JOB_HEADERS: expected a JSON object ({error}).") from None
    try:
        from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    except ImportError:  # no Ray here, or one from before tokens
        return given
    try:
        return {**given, **get_auth_headers_if_auth_enabled(given)}
    except Exception as error:
        raise UserError(f"RAY_AUTH_MODE: {_short(error)}") from None


def _version_there(address: str) -> str:
    answer = _get(address, "/api/version")
    if not isinstance(answer, dict) or "ray_version" not in answer:
        raise UserError(f"cluster.ray.address = {address}: what answers is no Ray job server.")
    return str(answer["ray_version"])


@contextmanager
def _asked(address: str, what: str) -> Iterator[Any]:
    """A client of the job server, whose refusals become the user's.

    Raises:
        UserError: it does not answer, or refuses.
    """
    _require_ray()
    _version_there(address)
    import ray
    from ray.job_submission import JobSubmissionClient

    try:
        yield _client(JobSubmissionClient, address)
    except (RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise UserError(f"Ray at {address} did not {what}: {_short(error)}") from None


def _client(make: Any, address: str) -> Any:
    """A client of this address; left to itself it would take what RAY_ADDRESS says in its place (Ray 2.60)."""
    headers, name = _headers(), "RAY_API_SERVER_ADDRESS"
    for module in _TALKATIVE:
        logging.getLogger(module).setLevel(logging.WARNING)
    with _ENVIRONMENT:
        before = os.environ.get(name)
        os.environ[name] = address
        try:
            return make(address, headers=headers)
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


def _short(error: BaseException) -> str:
    """The reason, without the traceback that a job server adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Traceback" in str(error):
        return lines[-1]
    return " ".join(lines) or type(error).__name__


def _new_id(client: Any, spec: JobSpec) -> str:
    """`<run name>-<n>`, n being the submission's number, or the next that the cluster does not know yet."""
    known, number = {info.submission_id for info in client.list_jobs()}, spec.submission
    while (found := f"{_plain(spec.name)}-{number}") in known:
        number += 1
    return found


@contextmanager
def _code_beside(folder: Path, working_dir: str | None) -> Iterator[None]:
    """While the folder is shipped, a link in it to `cluster.ray.working_dir`, which Ray follows."""
    if working_dir is None:
        yield
        return
    link = folder / CODE
    link.symlink_to(os.path.abspath(working_dir))
    try:
        yield
    finally:
        link.unlink()


# what is looked at before


def _versions_match(there: str, here: str | None) -> Finding:
    numbers = re.match(r"(\d+)\.(\d+)", there)
    if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return Finding("ray version", "bad", f"the cluster has {there}, the driver needs {oldest} or newer")
    if here is not None and there.split(".")[0] != here.split(".")[0]:
        return Finding("ray version", "bad", f"the cluster has {there}, here is {here}: pip install ray=={there}")
    same = "as here" if there == here else f"here is {here}; the job server takes that" if here else "none is here"
    return Finding("ray version", "ok", f"the cluster has {there}, {same}")


def _large_enough(spec: JobSpec, address: str) -> Finding:
    """Whether the cluster has the nodes, busy ones included."""
    what = "nodes"
    try:
        nodes = _get(address, "/nodes?view=summary")["data"]["summary"]
        have = [node["raylet"].get("resourcesTotal", {}) for node in nodes if node["raylet"].get("state") == "ALIVE"]
    except (UserError, LookupError, TypeError, AttributeError) as error:
        return Finding(what, "skipped", f"the cluster does not list them ({_short(error)})")
    ray, accelerator = spec.cluster.ray, spec.cluster.accelerator
    wanted = {"CPU": float(ray.cpus_per_node or spec.nproc_per_node), **ray.resources}
    if accelerator == "cuda" or (accelerator == "auto" and any(node.get("GPU") for node in have)):
        wanted["GPU"] = float(spec.nproc_per_node)
    large = sum(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in have)
    each = ", ".join(f"{name} {amount:g}" for name, amount in wanted.items())
    text = f"{large} of the cluster's {len(have)} have {each}; the job asks for {spec.nodes}"
    if large >= (spec.cluster.min_nodes or spec.nodes):
        return Finding(what, "ok", text)
    if ray.autoscaling:
        return Finding(what, "ok", f"{text}; cluster.ray.autoscaling adds the others")
    key = "cluster.nodes" if large else "cluster.nproc_per_node"
    return Finding(what, "bad", f"{text}. Lower {key}, or set cluster.ray.autoscaling if the cluster adds nodes.")


def _shippable(working_dir: str) -> Finding:
    size, what = 0, "cluster.ray.working_dir"
    for root, folders, files in os.walk(working_dir):
        folders[:] = [name for name in folders if name not in _NOT_SHIPPED]
        size += sum(os.lstat(os.path.join(root, name)).st_size for name in files)
        if size > _LIMIT_BYTES:
            text = f"{working_dir} holds more than {_LIMIT_BYTES >> 20} MiB, which Ray does not ship. "
            return Finding(what, "bad", text + "Move data out of it; .gitignore and .rayignore are not counted here.")
    return Finding(what, "ok", f"{working_dir} has {size / 2**20:.1f} MiB")


# what is said afterwards


def _status(job: Job, said: str, message: str, phase: str) -> JobStatus:
    """Ray's word for a job, and what the run's ledger says of it where it is seen from here.

    phase: the last line in which the driver told what it is at
    """
    ours = [attempt for attempt in attempts(RunDirectory(job.run)) if attempt.job_id == job.id] if _seen(job) else []
    last = ours[-1] if ours else None
    nodes = ", ".join(map(str, last.nodes)) if last and isinstance(last.nodes, list) else ""
    match said:
        case "PENDING":
            return JobStatus("queued", f"PENDING: {message}")
        case "RUNNING" if ray_driver.WAITING in phase:
            return JobStatus("queued", f"RUNNING: {phase}")
        case "RUNNING" if phase.startswith(ray_driver.AGAIN):
            return JobStatus("preempted-will-return", f"RUNNING: {phase}", nodes)
        case "RUNNING":
            state: State = "running" if last or not _seen(job) else "starting"
            return JobStatus(state, "RUNNING" + (f", attempt {last.number}" if last else ""), nodes)
        case "SUCCEEDED":
            return JobStatus("finished", "SUCCEEDED")
        case "STOPPED":
            return JobStatus("cancelled", f"STOPPED; `launcher submit {job.run}` goes on")
        case "FAILED" if last and last.end_class == "cancelled":
            return JobStatus("cancelled", f"FAILED; attempt {last.number} was cancelled")
        case "FAILED":
            why = (
                f"attempt {last.number}: {last.end_class or 'lost with its node'}" if last else _short_message(message)
            )
            return JobStatus("failed", f"FAILED: {why}", nodes)
    return JobStatus("unknown", f"{said}: {message}")


def _seen(job: Job) -> bool:
    return RunDirectory(job.run).exists()


def _phase(client: Any, job: Job) -> str:
    """The last line in which the driver says that it waits, starts again or has its nodes; others print too."""
    for line in reversed(client.get_job_logs(job.id).splitlines()):
        if ray_driver.WAITING in line or line.startswith((ray_driver.AGAIN, f"{job.id}: ")):
            return str(line)
    return ""


def _short_message(message: str) -> str:
    """The last line that a failed driver printed, which is why it failed."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


if __name__ == "__main__":
    try:
        print(with_values(Path(sys.argv[1]).read_text(), sys.argv[2:]))
    except UserError as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)
