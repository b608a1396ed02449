"""Target `kubernetes`: one manifest with the recipe and a JobSet, TrainJob or RayJob (cluster.kubernetes.kind)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.errors import Problem
from launcher.jobs.job import Finding, Job, JobStatus
from launcher.jobs.spec import JobSpec, Rendered

FILE = "job.yaml"
COMMAND = f"kubectl create -f {FILE}"


def problems(spec: JobSpec) -> Iterator[Problem]:
    """What of the recipe Kubernetes would not take or would not do."""
    from launcher.jobs.targets.kubernetes_problems import problems

    return problems(spec)


def render(spec: JobSpec) -> Rendered:
    """`job.yaml` beside the job's own files, which the pods do not need: their recipe comes with the manifest."""
    return Rendered({**spec.files, FILE: manifest(spec)}, COMMAND)


def manifest(spec: JobSpec) -> str:
    """The objects as YAML, with the recipe's text as it is."""
    from launcher.jobs.targets.kubernetes_jobs import objects
    from launcher.jobs.targets.manifests.strict import plain

    config, job = objects(spec)
    heading = (
        f"# Run {spec.name}: {spec.nodes} node{'s' * (spec.nodes > 1)} x {spec.nproc_per_node} ranks as a {job.kind}.\n"
        f"# Start: {COMMAND}     Stop: kubectl delete -f {FILE}\n"
    )
    return heading + "".join(f"---\n{_yaml(plain(one))}" for one in (config, job))


def validate(spec: JobSpec, rendered: Rendered, folder: Path) -> Iterator[Finding]:
    """Our models and the operators' rules; pods by kubernetes-validate and jobs by their CRDs where those are here."""
    from launcher.jobs.targets.kubernetes_validation import findings

    return findings(rendered.files[FILE])


def submit(spec: JobSpec, rendered: Rendered, folder: Path) -> Job:
    """Create the objects by the official Python client.

    Raises:
        UserError: the client or a context is not here (the text says how kubectl does it), or the server refused.
    """
    from launcher.jobs.targets.kubernetes_client import submit

    return submit(spec, rendered.files[FILE], folder)


def status(job: Job) -> JobStatus:
    """What the operator's conditions say, and of a job that waits what its pods or Kueue say."""
    from launcher.jobs.targets.kubernetes_client import status

    return status(job)


def logs(job: Job) -> Iterator[str]:
    """Lines of the pods, node 0 first; of a RayJob those of its driver.

    Raises:
        UserError: there is no pod any more, or not yet.
    """
    from launcher.jobs.targets.kubernetes_client import logs

    return logs(job)


def cancel(job: Job) -> None:
    """Delete the job; its pods get SIGTERM and the time for a checkpoint.

    Raises:
        UserError: it is not there, or the server refused.
    """
    from launcher.jobs.targets.kubernetes_client import cancel

    cancel(job)


def _yaml(value: Any) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Texts of several lines as they are, so that a person can read the recipe."""

    def text(dumper: Any, data: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)

    Dumper.add_representer(str, text)
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, width=1000)
