"""Targets by name: each module turns a job spec into text with `render(spec)`, purely."""

from __future__ import annotations

import importlib

from launcher.errors import UserError, nearest
from launcher.jobs.spec import JobSpec, Rendered

TARGETS = {"torchrun": "launcher.jobs.targets.torchrun", "accelerate": "launcher.jobs.targets.accelerate"}


def render(spec: JobSpec, *, target: str) -> Rendered:
    """The job as the target's files and command.

    Raises:
        UserError: no such target; the text names those that exist.
    """
    if target not in TARGETS:
        known = ", ".join(TARGETS)
        raise UserError(f"--target {target}: expected one of {known}. {nearest(target, TARGETS)}".rstrip())
    rendered: Rendered = importlib.import_module(TARGETS[target]).render(spec)
    return rendered
