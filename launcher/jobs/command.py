"""An attempt whose ranks a command starts on all nodes, as `srun ... python -m launcher.trainer RUN`: watch and judge.

One process, on the node where the job's script runs, does what node 0 does otherwise; torch's agent has no part.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from launcher.errors import UserError
from launcher.jobs import preflight, restart, warm
from launcher.jobs.agent import ended
from launcher.jobs.console import Console
from launcher.jobs.ending import Ending, judge
from launcher.jobs.environment import evaluate_setup, require_train_extra, require_variables
from launcher.jobs.opening import copied, open_run, owned
from launcher.jobs.place import start_reason
from launcher.jobs.preparation import is_prepared
from launcher.jobs.signals import Signals
from launcher.jobs.spec import stop_after_s
from launcher.jobs.supervisor import begin, conclude, failed_somewhere, pass_on_stop, prepared, tell, ticks, written
from launcher.plan import Plan, make_plan
from launcher.recipe.elastic import on_nodes
from launcher.recipe.schema import Recipe
from launcher.run.control import read_outcomes
from launcher.run.directory import RunDirectory
from launcher.run.lease import Submission

ATTEMPT = "LAUNCHER_ATTEMPT"  # variable by which ranks that a command starts are told their attempt
_OTHERS_GRACE_S = 60.0  # after a rank failed, for the command to end the others
_KILL_AFTER_S = 30.0


def watch_over(
    command: Sequence[str],
    run: RunDirectory,
    recipe: Recipe,
    *,
    nodes: int,
    submission: Submission | None,
    console: Console,
) -> Ending:
    """Hold the lease, prepare the data, run the command as one attempt and say how it ended.

    nodes: on which the command starts ranks, where the recipe leaves room (`cluster.min_nodes`)

    Raises:
        UserError: whatever is wrong before the command starts, and an attempt that ended for such a reason.
    """
    started = time.monotonic()
    here = on_nodes(recipe, nodes)
    plan = make_plan(here)
    with Signals() as signals:
        evaluate_setup(recipe.cluster.setup)
        require_train_extra()
        require_variables(recipe.cluster.env, after_setup=bool(recipe.cluster.setup))
        if shutil.which(command[0]) is None:
            raise UserError(f"-- {command[0]}: expected a command that starts the ranks, PATH has none of that name.")
        with (
            owned(run, submission, console.say),
            copied(run, recipe, console.say, hurry=lambda: signals.at_once),
        ):
            with written(run):
                open_run(run, recipe, make_plan(recipe), force=False, say=console.say)
                attempt = begin(run, here, plan, reason=start_reason(submission), submission=submission)
            if (ending := restart.refusal(run, attempt)) is None:
                if not is_prepared(run, recipe):
                    warm.start(recipe.strategy.kind, "cpu")
                ending = prepared(run, recipe, console, signals)
            if ending is None and recipe.cluster.preflight and plan.nodes == 1:  # of others nothing is known here
                seen = preflight.alone(recipe, plan, run)
                seen.tell(console.say)
                seen.keep(run, attempt)
                ending = seen.ending
            if ending is None:
                ending = _supervise(command, run, recipe, plan, attempt, console, signals, started=started)
            ending = conclude(run, attempt, ending)
    tell(run, attempt, ending, console)
    return ending


def _supervise(
    command: Sequence[str],
    run: RunDirectory,
    recipe: Recipe,
    plan: Plan,
    attempt: int,
    console: Console,
    signals: Signals,
    *,
    started: float,
) -> Ending:
    limit = stop_after_s(recipe.cluster)
    deadline = None if limit is None else started + limit
    total = int(run.read_json("data.json")["total_steps"])
    console.watch(logs=run.path / "logs" / f"attempt-{attempt}", metrics=run.metrics_file, total_steps=total)
    environment = {**os.environ, ATTEMPT: str(attempt), "LAUNCHER_LOG": "1"}
    failed_at: float | None = None
    with _started(command, environment) as process:
        for _ in ticks(lambda: process.poll() is not None or signals.at_once):
            pass_on_stop(run, signals, deadline, console.say)
            console.poll()
            if failed_at is None and failed_somewhere(run, attempt):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at >= _OTHERS_GRACE_S:
                console.say(f"a rank failed {_OTHERS_GRACE_S:.0f} s ago: the command is ended")
                break
    console.close()
    if signals.at_once:
        message = "ended at once by a second Ctrl-C; the work since the last checkpoint is lost"
        return Ending(status="failed", failure_class="unknown", message=message, for_good=True)
    code = process.returncode
    how = f"the command ended with exit code {code}" if code >= 0 else f"the command was {ended(code)}"
    how = f"{how}: {shlex.join(command)}"
    outcomes = read_outcomes(run, attempt)
    ending = judge(outcomes, {}, ranks=range(plan.world_size))
    if ending.failure_class == "unknown" and not any(o.kind == "failed" for o in outcomes.values()):
        return replace(ending, message=f"{ending.message}; {how}")
    if code != 0 and ending.status != "failed":
        console.say(f"warning: every rank ended well, yet {how}")
    return ending


@contextlib.contextmanager
def _started(command: Sequence[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The command, away from the terminal's signals; what is left of it at the end is ended."""
    tied = [sys.executable, "-m", "launcher.jobs.tether", str(os.getpid()), *command]
    process = subprocess.Popen(tied, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            _signal(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_AFTER_S)
        if process.poll() is None:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
