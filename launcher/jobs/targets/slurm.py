"""Target `slurm`: one batch job, submitted by sbatch, asked about by squeue, sacct or scontrol, ended by scancel.

The text of the script is decided in `slurm_script`, what Slurm's words mean in `slurm_states`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from launcher.errors import Problem, UserError, show_value
from launcher.jobs.job import Finding, Job, JobStatus
from launcher.jobs.spec import JobSpec, Rendered
from launcher.jobs.targets import slurm_states
from launcher.jobs.targets.slurm_script import FILE, cores_of_a_node, output_name, script, uses_gpus
from launcher.plan.saving import save_s, time_problem
from launcher.run.control import read_verdict, stop_requested
from launcher.run.directory import RunDirectory
from launcher.run.ledger import attempts

NAME_LENGTH = 200  # with a job id and `slurm-` it has to fit into a file name, and accounting keeps 255
_NAME = re.compile(r"[A-Za-z0-9][\w.,=+@-]*", re.ASCII)
_ASK_TIMEOUT_S = 60
_NO_SLURM = ("Unable to contact slurm controller", "configuration source", "configuration file", "no answer within")
_KEEP = ("SLURM_CONF", "SLURM_CLUSTERS")  # of the variables of a job in which `submit` is called

# What sbatch says, in words that have been the same since 20.11, and the keys that it is about.
_REFUSALS = (
    ("Invalid account or account/partition", "cluster.slurm.account, cluster.slurm.partition"),
    ("partition", "cluster.slurm.partition"),
    ("Invalid account", "cluster.slurm.account"),
    ("Invalid qos", "cluster.slurm.qos"),
    ("feature specification", "cluster.slurm.constraint"),
    ("reservation", "cluster.slurm.reservation"),
    ("node name", "cluster.slurm.exclude"),
    ("generic resource", "cluster.slurm.gres, cluster.nproc_per_node"),
    ("Memory specification", "cluster.slurm.mem"),
    ("time limit", "cluster.time_limit_min"),
    ("Node count", "cluster.nodes"),
    ("More processors", "cluster.slurm.cpus_per_node"),
    ("array specification", "the number of runs of the sweep"),
    ("node configuration is not available", "{nodes}"),
    ("accounting/QOS policy", "cluster.slurm.account, cluster.slurm.qos, cluster.time_limit_min"),
    ("unrecognized option", "cluster.slurm.extra"),
    ("Invalid --", "cluster.slurm.extra"),
)


_NODES = "sinfo -o '%P %D nodes, %c cores, %m MB, %G, %f'"
_ALLOWED = (  # what shows what there is, by a word of the keys above
    ("reservation", "scontrol show reservation"),
    ("account", "sacctmgr show associations user=$USER format=account,partition,qos"),
    ("qos", "sacctmgr show qos format=name"),
    ("partition", "sinfo"),
    ("time_limit_min", "sinfo -o '%P %l'"),
    *((word, _NODES) for word in ("nodes", "constraint", "exclude", "gres", ".mem", "cpus_per_node")),
)


def problems(spec: JobSpec) -> Iterator[Problem]:
    """What of the recipe cannot be a batch job; keys that are wrong by themselves are the schema's part."""
    slurm, ranks = spec.cluster.slurm, spec.nproc_per_node
    if spec.name and (not _NAME.fullmatch(spec.name) or len(spec.name) > NAME_LENGTH):
        expected = f"at most {NAME_LENGTH} letters, digits and . _ , = + @ -, the first a letter or digit"
        yield Problem("run.name", spec.name, f"{expected}, to be the name of a Slurm job")
    if (limit := time_problem(spec.cluster, save_s())) is not None:
        yield limit
    if (cores := slurm.cpus_per_node) is not None and 1 <= cores < ranks:
        yield Problem(
            "cluster.slurm.cpus_per_node", cores, f"{ranks} or more, one core for each rank of a node",
            f"{4 * ranks} leaves each some for loading data.", because=("cluster.nproc_per_node",),
        )  # fmt: skip
    elif cores is not None and slurm.tasks == "gpu" and cores % ranks:
        yield Problem(
            "cluster.slurm.cpus_per_node", cores, f"a multiple of {ranks}, since tasks is gpu: each rank gets a share",
            f"Nearest: {max(1, round(cores / ranks)) * ranks}.", because=("cluster.nproc_per_node",),
        )  # fmt: skip
    if slurm.tasks == "gpu" and slurm.container.runtime != "none":
        yield Problem(
            "cluster.slurm.tasks", "gpu", "node, since container.runtime is set",
            "The worker stays on the host with tasks: gpu; an agent a node runs inside the container.",
        )  # fmt: skip
    yield from _gres(spec)
    if slurm.container.runtime != "none" and re.search(r"[,:\s]", spec.run):
        yield Problem("run.dir", spec.run, "a path without comma, colon and space, to be mounted into the container")


def _gres(spec: JobSpec) -> Iterator[Problem]:
    gres, ranks = spec.cluster.slurm.gres, spec.nproc_per_node
    if gres is None or not uses_gpus(spec):
        return
    gpus = [re.fullmatch(r"gpu(?::[^:]+)??(?::(\d+))?", one) for one in gres.split(",")]
    counts = [int(match[1] or 1) for match in gpus if match]
    if not counts:
        yield Problem("cluster.slurm.gres", gres, f"gpu:{ranks} among them, or cluster.accelerator cpu")
    elif sum(counts) != ranks:
        yield Problem(
            "cluster.slurm.gres", gres, f"{ranks} GPUs a node, as cluster.nproc_per_node says",
            because=("cluster.nproc_per_node",),
        )  # fmt: skip


def render(spec: JobSpec) -> Rendered:
    """`job.sbatch` beside the run's files."""
    return Rendered({**spec.files, FILE: script([spec], name=spec.name)}, f"sbatch {FILE}")


def render_sweep(specs: Sequence[JobSpec], *, name: str) -> Rendered:
    """`job.sbatch` as one array job of two runs or more; the files of element I carry `-I`, as recipe-0.yaml.

    Raises:
        UserError: the runs do not ask for the same of Slurm.
    """
    first = specs[0]
    for spec in specs[1:]:
        if _without_names(spec) != _without_names(first):
            raise UserError(
                f"--sweep: {spec.name} asks for other machines, time or settings than {first.name}: expected the same "
                "of all, because one array job starts them. Submit those one by one."
            )
    files = {element_file(name, number): text for number, spec in enumerate(specs) for name, text in spec.files.items()}
    return Rendered({**files, FILE: script(specs, name=name)}, f"sbatch {FILE}")


def _without_names(spec: JobSpec) -> JobSpec:
    """What the runs of a sweep share."""
    return replace(spec, name="", run="", files={}, accelerate={}, submission=0)


def element_file(name: str, number: int) -> str:
    """What a file of a run is called among those of a sweep, as recipe-0.yaml."""
    return f"{Path(name).stem}-{number}{Path(name).suffix}"


def validate(spec: JobSpec, rendered: Rendered, folder: Path) -> Iterator[Finding]:
    """What `bash` says of the script and `sbatch --test-only` of the job."""
    bash = shutil.which("bash")
    if bash is None:
        yield Finding("bash -n", "skipped", "no bash here")
    else:
        read = subprocess.run([bash, "-n"], input=rendered.files[FILE], capture_output=True, text=True)
        yield Finding("bash -n", "bad" if read.returncode else "ok", read.stderr.strip())
    if shutil.which("sbatch") is None:
        yield Finding("sbatch --test-only", "skipped", "no sbatch here; a login node of the cluster has it")
        return
    code, _, error = _run(["sbatch", "--test-only", FILE], folder=folder)
    said = _words(error)
    if spec.cluster.slurm.container.runtime == "pyxis" and "--container-image" not in _run(["srun", "--help"])[1]:
        if _unreachable(error):
            yield Finding("pyxis", "skipped", "srun knows no cluster here, so it cannot say whether that has pyxis")
        else:
            text = "cluster.slurm.container.runtime = pyxis: srun of this cluster has no --container-image"
            yield Finding("pyxis", "bad", f"{text}. Have pyxis installed, or take apptainer")
    if code == 0:
        yield Finding("sbatch --test-only", "ok", said)
    elif _unreachable(error):
        yield Finding("sbatch --test-only", "skipped", said)
    else:
        yield Finding("sbatch --test-only", "bad", _refusal(said, spec))


def submit(spec: JobSpec, rendered: Rendered, folder: Path) -> Job:
    """sbatch in the folder of the submission.

    Raises:
        UserError: no sbatch, or it refused; the key to change is named.
    """
    job_id, more = sbatch(spec, folder, FILE)
    return Job(target="slurm", id=job_id, folder=folder, run=Path(spec.run), more=more)


def submit_sweep(specs: Sequence[JobSpec], rendered: Rendered, folder: Path) -> list[Job]:
    """One array job; a job for each of its elements, by the id that Slurm knows it by.

    Raises:
        UserError: as `submit`.
    """
    job_id, more = sbatch(specs[0], folder, FILE)
    return [
        Job(target="slurm", id=f"{job_id}_{number}", folder=folder, run=Path(spec.run), more=more)
        for number, spec in enumerate(specs)
    ]


def sbatch(spec: JobSpec, folder: Path, file: str, *options: str) -> tuple[str, dict[str, str]]:
    """Hand a script in a folder over; the job's id, and what else has to be known to ask about it.

    Raises:
        UserError: no sbatch, or it refused; the key to change is named.
    """
    _require("sbatch")
    missing = [name for name in spec.env_names if name not in os.environ]
    if missing and not spec.setup:
        raise UserError(
            f"cluster.env: {', '.join(missing)} not set here: sbatch hands the job the variables that are. Export it, "
            "or remove the name."
        )
    code, out, error = _run(["sbatch", "--parsable", *options, file], folder=folder)
    match = re.search(r"^(\d+)(?:;(\S+))?$", out, re.MULTILINE)
    if code != 0 or match is None:
        raise UserError(f"sbatch refused {spec.name}: {_refusal(_words(error) or f'exit code {code}', spec)}")
    more = {"requeue": "yes" if spec.cluster.slurm.requeue else "no", "stop_lead_s": str(spec.stop_lead_s)}
    if match[2]:
        more["cluster"] = match[2]
    return match[1], more


def status(job: Job) -> JobStatus:
    """Ask squeue, then sacct, then scontrol; the first that knows the job is believed."""
    return statuses([job])[0]


def statuses(jobs: Sequence[Job]) -> list[JobStatus]:
    """As `status`, in their order; squeue is called once for all jobs of a cluster."""
    by_cluster: dict[str | None, list[str]] = {}
    for job in jobs:
        by_cluster.setdefault(job.more.get("cluster"), []).append(job.id)
    told = {cluster: slurm_states.ask(ids, cluster=cluster, run=_run) for cluster, ids in by_cluster.items()}
    return [
        slurm_states.status(told[job.more.get("cluster")][job.id], requeue=job.more.get("requeue") != "no")
        for job in jobs
    ]


def logs(job: Job) -> Iterator[str]:
    """Lines of the batch job's own output.

    Raises:
        UserError: it has not started, or its output is gone.
    """
    file = job.folder / output_name(array="_" in job.id).replace("%A_%a", job.id).replace("%j", job.id)
    try:
        with open(file, errors="replace") as lines:
            yield from (line.rstrip("\n") for line in lines)
    except OSError as error:
        told = status(job)
        raise UserError(
            f"{file}: cannot be read ({error.strerror}). Slurm makes it when job {job.id} starts; it is {told.state}"
            f"{f' ({told.reason})' if told.reason else ''}."
        ) from None


def cancel(job: Job) -> None:
    """scancel, after which the script does not requeue; ranks that were asked for a checkpoint get time for it first.

    Slurm alone would kill them KillWait (30 s) after scancel, which is short for a large model.

    Raises:
        UserError: no scancel, or it refused.
    """
    _require("scancel")
    run, deadline = RunDirectory(job.run), time.monotonic() + float(job.more.get("stop_lead_s", 0))
    while time.monotonic() < deadline and _saving(run, job):
        time.sleep(0.5)
    code, _, error = _run(["scancel", *slurm_states.of_cluster(job.more.get("cluster")), job.id])
    if code != 0 and not re.search(r"already complet|Invalid job id", error):
        raise UserError(f"scancel {job.id}: {_words(error) or f'exit code {code}'}")


def _saving(run: RunDirectory, job: Job) -> bool:
    """Whether an attempt of the job is under way that was asked to stop and has not said its last word."""
    last = attempts(run)[-1:]
    asked = last and last[0].job_id == job.id and not last[0].ended and stop_requested(run)
    return bool(asked) and read_verdict(run) is None and status(job).state == "running"


def _require(tool: str) -> None:
    if shutil.which(tool) is None:
        raise UserError(
            f"{tool}: not on PATH: expected Slurm's commands, because target slurm calls them. Go to a login node of "
            "the cluster, or write the files with launcher render ... --target slurm -o DIR and call sbatch there."
        )


def _run(command: Sequence[str], folder: Path | None = None) -> tuple[int, str, str]:
    """Exit code, output and error of one of Slurm's commands; 127 where it is not there, 124 where it does not answer.

    The folder of this Python is first on PATH, so that the job finds `launcher` where no environment is activated.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "LAUNCHER_")) or k in _KEEP}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        done = subprocess.run(
            list(command), cwd=folder, env=environment, capture_output=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, timeout=_ASK_TIMEOUT_S,
        )  # fmt: skip
    except FileNotFoundError:
        return 127, "", f"{command[0]}: not on PATH"
    except subprocess.TimeoutExpired:
        return 124, "", f"{command[0]}: no answer within {_ASK_TIMEOUT_S} s"
    return done.returncode, done.stdout, done.stderr


def _words(error: str) -> str:
    """What a command said, on one line, without its name before each line."""
    lines = (re.sub(r"^(sbatch|scancel|allocation failure)(: error)?: ", "", line) for line in error.splitlines())
    kept = [line.removeprefix("Batch job submission failed: ").strip() for line in lines if "--help" not in line]
    return "; ".join(dict.fromkeys(line for line in kept if line))


def _unreachable(error: str) -> bool:
    return any(words in error for words in _NO_SLURM)


def _refusal(said: str, spec: JobSpec) -> str:
    """Slurm's own words, and the keys that they are about."""
    keys = next((keys for words, keys in _REFUSALS if words.lower() in said.lower()), "")
    if not keys:
        return said
    show = next((f" Allowed: `{show}`." for key, show in _ALLOWED if key in keys), "")
    keys = re.sub(r"cluster\.[\w.]+", lambda found: _with_value(found[0], spec), keys)
    keys = keys.replace("{nodes}", _resources(spec))
    return f"{said}. Change {'one of ' if ',' in keys else ''}{keys}.{show}"


def _with_value(key: str, spec: JobSpec) -> str:
    """`key = value`, as far as it was given."""
    value = attrgetter(key.removeprefix("cluster."))(spec.cluster)
    return key if value is None else f"{key} = {show_value(value)}"


def _resources(spec: JobSpec) -> str:
    """What is asked of each node, by key."""
    slurm = spec.cluster.slurm
    asked = [f"cluster.nodes = {spec.nodes}"]
    if slurm.gres:
        asked.append(f"cluster.slurm.gres = {slurm.gres}")
    elif uses_gpus(spec):
        asked.append(f"cluster.nproc_per_node = {spec.nproc_per_node} (GPUs a node; none: cluster.accelerator=cpu)")
    if cores := cores_of_a_node(spec):
        asked.append(f"cluster.slurm.cpus_per_node = {cores}")
    if slurm.mem != "0":
        asked.append(f"cluster.slurm.mem = {slurm.mem}")
    if slurm.constraint:
        asked.append(f"cluster.slurm.constraint = {slurm.constraint}")
    return ", ".join(asked)
