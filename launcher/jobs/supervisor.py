"""The attempts of a run on this node, from lease to exit code: prepare, ranks under torch's agent, outcomes, verdict.

Restarts are new attempts of the whole run, decided in `launcher.jobs.restart`. This process makes them itself with the
same lease and fork server, unless they are the scheduler's.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.errors import EXIT_FINISHED, UserError
from launcher.jobs import preflight, restart, snapshot, warm
from launcher.jobs.agent import Agent, Node
from launcher.jobs.console import Console
from launcher.jobs.cures import cure
from launcher.jobs.devices import accelerator, threads_per_rank
from launcher.jobs.ending import Ending, judge
from launcher.jobs.environment import evaluate_setup, require_train_extra, require_variables
from launcher.jobs.meeting import Meeting
from launcher.jobs.opening import copied, discard_if_fresh, open_run, owned, run_directory
from launcher.jobs.place import find_submission
from launcher.jobs.preparation import PreparationError, StopAsked, agrees, complete_plan, is_prepared, prepare_in_child
from launcher.jobs.signals import Signals
from launcher.jobs.spec import job_spec, stop_after_s
from launcher.jobs.targets import render
from launcher.jobs.watch import Watch
from launcher.plan import Plan, make_plan
from launcher.recipe.schema import Recipe
from launcher.run.control import (
    GROW,
    Outcome,
    clear_stop,
    first_failure,
    read_outcomes,
    request_stop,
    stop_reason,
    stop_requested,
    write_verdict,
)
from launcher.run.data import remarks
from launcher.run.directory import RunDirectory
from launcher.run.files import read_json
from launcher.run.lease import Lease, Submission
from launcher.run.ledger import (
    Attempt,
    Failure,
    attempts,
    end_attempt,
    latest_attempt,
    start_attempt,
    valid_checkpoints,
)
from launcher.run.provenance import record_beside, recorded
from launcher.run.reserve import give_up, insist, keep_back
from launcher.run.state import StaleAttempt, reached_end, write_state

_POLL_S = 0.05
_KILLED_S = 3.0  # for the agent to see that its ranks have been killed
_OTHER_NODES_GRACE_S = 10.0  # after a failure elsewhere, for this node's ranks to notice it themselves


@dataclass(frozen=True, slots=True)
class Machine:
    """What this node gives to its ranks."""

    name: str
    accelerator: str
    threads: int

    def environment(self) -> dict[str, str]:
        """Variables that each rank gets on top of torchrun's."""
        return {
            "LAUNCHER_LOG": "1",
            "LAUNCHER_NODE": self.name,
            "LAUNCHER_ACCELERATOR": self.accelerator,
            "OMP_NUM_THREADS": str(self.threads),
        }


def launch(recipe: Recipe, *, force: bool, console: Console, reason: str = "run") -> int:
    """Train a loaded recipe here, creating its run or going on with it; the exit code of `launcher run`.

    Raises:
        UserError: whatever is wrong before a rank starts; a run made for this launch is gone again.
    """
    if (count := recipe.cluster.nodes) > 1:
        verb = f"worker {run_directory(recipe).path}" if reason == "resume" else "run RECIPE"
        raise UserError(
            f"cluster.nodes = {count}: expected 1, because this starts one node. On each of the {count} nodes: "
            f"launcher {verb} --node-rank I --rendezvous HOST:PORT, with I from 0 to {count - 1} and HOST:PORT on node "
            "0; or launcher submit, where there is a scheduler."
        )
    started = time.monotonic()
    plan, run = make_plan(recipe), run_directory(recipe)
    with Signals() as signals:
        machine = ready_machine(recipe, console.say)
        seen = preflight.Seen() if reached_end(run) else preflight.before_launch(recipe, plan, run, console.say)
        with owned(run) as lease, copied(run, recipe, console.say, hurry=lambda: signals.at_once):
            with written(run):
                open_run(run, recipe, plan, force=force, say=console.say)
                if is_finished(run, recipe, console.say):
                    return EXIT_FINISHED
                attempt = begin(run, recipe, plan, reason=reason)
                if snapshot.enter(run, recipe):
                    warm.renew(recipe.strategy.kind, machine.accelerator)
                seen.keep(run, attempt)
            while True:
                ending = restart.refusal(run, attempt)
                ending = ending or supervise(
                    run, recipe, plan, attempt, Node(), machine, console, signals, started=started
                )
                ending = conclude(run, attempt, ending, within=True, enough=True)
                if not ending.again:
                    break
                tell_restart(run, attempt, ending, console)
                ending = paused(run, attempt, ending, lease, signals, deadline=stop_at(recipe, started))
                if not ending.again:
                    break
                warm.start(recipe.strategy.kind, machine.accelerator)  # it may have died, too
                attempt = begin(run, recipe, plan, reason="restarted", within=True)
            if ending.failure_class == "user":
                discard_if_fresh(run, attempt)
    tell(run, attempt, ending, console)
    return ending.exit_code


@contextlib.contextmanager
def written(run: RunDirectory) -> Iterator[None]:
    """Before a rank starts, a file that cannot be written is for the user to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or run.path}: cannot be written ({error.strerror or error}).") from None


def is_finished(run: RunDirectory, recipe: Recipe, say: Callable[[str], None]) -> bool:
    """Whether nothing is left to do, which is then said."""
    finished = reached_end(run) and agrees(run, recipe)
    if finished:
        say(f"{run.path} is finished; a larger train.max_steps or train.epochs would lengthen it.")
    return finished


def ready_machine(recipe: Recipe, say: Callable[[str], None]) -> Machine:
    """Evaluate set-up, check what the recipe asks of this node, and start the fork server with the result.

    Raises:
        UserError: something is missing here.
    """
    evaluate_setup(recipe.cluster.setup)
    require_train_extra()
    require_variables(recipe.cluster.env, after_setup=bool(recipe.cluster.setup))
    ranks = recipe.cluster.nproc_per_node
    device, why = accelerator(recipe.cluster.accelerator, ranks)
    threads = threads_per_rank(ranks)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    warm.start(recipe.strategy.kind, device)
    say(f"{ranks} rank{'s' * (ranks > 1)} on {device}: {why}; {threads} thread{'s' * (threads > 1)} each")
    return Machine(socket.gethostname(), device, threads)


def begin(
    run: RunDirectory,
    recipe: Recipe,
    plan: Plan,
    *,
    reason: str,
    submission: Submission | None = None,
    within: bool = False,
    names: Sequence[str] | None = None,
) -> int:
    """Start an attempt in the ledger and keep the job as text beside it; the caller holds the lease.

    Scripts are kept of a job on one machine; what a target was handed lies in the submission's folder.

    submission: which start of which job this is; None: by hand, on this machine or on several
    within: this process has seen the attempt before end, and starts the next one itself
    names: of the nodes, where they are known; None: only how many there are
    """
    alone = [socket.gethostname()] if plan.nodes == 1 else None
    nodes = (list(names) if names else alone) or plan.nodes
    by = submission or Submission(target=restart.BY_HAND, job_id=str(os.getpid()))
    number = by.restart if submission else None
    attempt = start_attempt(
        run, target=by.target, job_id=by.job_id, restart=number, nodes=nodes, reason=reason, within=within
    )
    restart.forget_stop(run, attempt)
    job = run.job(attempt)
    job.mkdir(parents=True, exist_ok=True)
    record_beside(job)
    spec = job_spec(recipe, plan)
    by_hand = submission is None and plan.nodes == 1
    for name, text in (render(spec, target="torchrun").files if by_hand else spec.files).items():
        (job / name).write_text(text)
    write_state(run, "running", attempt=attempt, step=None)
    keep_back(run.reserve)
    return attempt


def supervise(
    run: RunDirectory,
    recipe: Recipe,
    plan: Plan,
    attempt: int,
    node: Node,
    machine: Machine,
    console: Console,
    signals: Signals,
    *,
    started: float,
    meeting: Meeting | None = None,
) -> Ending:
    """Prepare if need be, host the ranks of this node until they end, and judge how they ended.

    meeting: with the other nodes, whose ranks are judged on node 0
    """
    threading.Thread(target=_import_agent, name="import", daemon=True).start()
    if (failed := prepared(run, recipe, console, signals) if node.rank == 0 else None) is not None:
        return failed
    if node.rank == 0 or find_submission() is None:  # a scheduler shows what its nodes print as one text
        logs = run.logs(attempt, machine.name).parent
        console.watch(logs=logs, metrics=run.metrics_file, total_steps=_total_steps(run))
    watch = Watch(
        run, recipe.cluster, attempt, node=machine.name, ranks=plan.nproc_per_node, say=console.say, meeting=meeting
    )
    agent = Agent(
        run=run.path,
        attempt=attempt,
        run_id=run.path.name,
        ranks=plan.nproc_per_node,
        node=node,
        environment={**machine.environment(), **node.environment, **watch.environment},
        log=run.logs(attempt, machine.name) / f"agent-{node.rank}.log",
    )
    deadline, named = stop_at(recipe, started), False
    for _ in ticks(lambda: agent.done() or signals.at_once):
        pass_on_stop(run, signals, deadline, console.say)
        console.poll()
        elsewhere_stuck = meeting.given_up() if meeting is not None else None
        if (hung := watch.look() or agent.stuck() or elsewhere_stuck) is not None and not agent.done():
            _end_ranks(agent, grace_s=0)
            console.close()
            if meeting is not None:
                meeting.give_up(hung)
            return hung
        if meeting is None:
            continue
        if node.rank == 0 and (more := meeting.growth()) is not None:
            with contextlib.suppress(OSError):
                request_stop(run, f"{GROW}: {more}")
            console.say(f"{more} waits to take part: the run writes a checkpoint and goes on with it")
        if (lost := meeting.lost()) is not None and not agent.done():
            _end_ranks(agent, grace_s=0)
            console.close()
            return Ending(status="failed", failure_class="node", message=lost)
        if (found := first_failure(read_outcomes(run, attempt))) is not None:
            if not named and node.rank == 0:
                _name(*found, console.say)
            named = True
            _end_ranks(agent, grace_s=_OTHER_NODES_GRACE_S)
    if signals.at_once:
        _end_ranks(agent, grace_s=0)
        console.close()
        lost = "the work since the last checkpoint is lost"
        return Ending(
            status="failed", failure_class="unknown", message=f"ended at once by a second Ctrl-C; {lost}", for_good=True
        )
    console.close()
    died, broken = _ended(agent)
    silent, mine = list[str](), set(died)
    if meeting is not None and node.rank > 0:
        meeting.last_word({rank: f"{how} on {machine.name}" for rank, how in died.items()})
    elif meeting is not None:
        elsewhere, silent = meeting.last_words()
        died |= elsewhere
    if broken is not None and not silent:
        return broken
    ending = judge(read_outcomes(run, attempt), died, ranks=range(plan.world_size))
    if silent and ending.failure_class in ("communication", "unknown"):
        message = f"{', '.join(silent)} has gone without a word. {ending.message}"
        return replace(ending, failure_class="node", message=message)
    if ending.rank in mine and not ending.node:
        ending = _placed(ending, machine.name, watch.steps())
    return ending


def _placed(ending: Ending, node: str, steps: Mapping[int, int]) -> Ending:
    """The ending of an attempt whose first failing rank could not say where it was, by what was seen of it here."""
    assert ending.rank is not None
    done = steps.get(ending.rank)
    step = max(steps.values(), default=None) if ending.step is None else ending.step
    return replace(ending, node=node, rank_step=done, step=step)


def _name(rank: int, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Say which rank failed while the others are still being ended."""
    at = "" if outcome.step is None else f" at step {outcome.step}"
    where = f" on {outcome.node}" if outcome.node else ""
    say(f"rank {rank}{where} failed{at} ({outcome.failure_class}): {outcome.message}")


def _ended(agent: Agent) -> tuple[dict[int, str], Ending | None]:
    """How processes of this node ended that did not end well, by rank; and the ending where the agent itself failed."""
    try:
        return agent.failures(), None
    except Exception as error:  # a rendezvous, a store
        message = f"{type(error).__name__}: {error}"
        return {}, Ending(status="failed", failure_class="communication", message=message)


def prepared(
    run: RunDirectory, recipe: Recipe, console: Console, signals: Signals, meeting: Meeting | None = None
) -> Ending | None:
    """Make the run's data ready; how the attempt ended where that did not come about."""

    def stop() -> bool:
        disturbed = meeting is not None and meeting.disturbance() is not None
        return disturbed or signals.stop is not None

    try:
        if not is_prepared(run, recipe):
            prepare_in_child(run, progress=console.working, stop=stop)
            for line in remarks(run.read_json("data.json")):
                console.say(line)
        complete_plan(run)
    except UserError as error:
        return Ending(status="failed", failure_class="user", message=str(error))
    except OSError as error:
        return Ending(status="failed", failure_class="node", message=f"the plan could not be written: {error}")
    except PreparationError as error:
        return Ending(
            status="failed", failure_class="data", message="the data could not be prepared", traceback=str(error)
        )
    except warm.StandsStill as error:
        return Ending(status="failed", failure_class="hang", message=str(error))
    except StopAsked:
        if meeting is not None and (disturbed := meeting.disturbance()) is not None:
            return disturbed
        why = f"{signals.stop} while preparing the data: stopped before the first step; nothing was lost"
        return Ending(status="preempted", failure_class="preemption", message=why)
    finally:
        console.close()
    return None


def conclude(run: RunDirectory, attempt: int, ending: Ending, *, within: bool = False, enough: bool = False) -> Ending:
    """Decide whether the run is started again, and write how the attempt ended: ledger, state, verdict.

    State and verdict are those of the end of this process; where it goes on by itself, the ledger alone is written.
    What cannot be written, though the reserve is given up for it, is said on standard error in one line.

    within, enough: as of `launcher.jobs.restart.concluded`
    Returns:
        The ending with the verdict and whether it goes on, and as `cancelled` where a person did that meanwhile.
    """
    recorded()
    ending = restart.concluded(run, attempt, ending, within=within, enough=enough)

    def write_end() -> None:
        outcome_class = ending.failure_class or ending.status
        end_attempt(
            run, attempt, step=ending.step, outcome_class=outcome_class, verdict=ending.verdict, why=ending.why,
            again=ending.again, first=_first(ending),
        )  # fmt: skip

    words = {run.ledger_file.name: write_end}
    lost = _lost(run, words if ending.again else words | _last_words(run, attempt, ending))
    if lost and ending.again:  # then the next start could not be written down either
        ending = replace(ending, again=False)
        lost |= _lost(run, _last_words(run, attempt, ending)) or {}
    if lost is None:
        return replace(ending, again=False)
    if not ending.again:
        _leave(run)
    elif ending.failure_class == restart.RESIZE:
        with contextlib.suppress(OSError):
            clear_stop(run)  # answered
    _tell_lost(run, lost)
    return ending


def _last_words(run: RunDirectory, attempt: int, ending: Ending) -> dict[str, Callable[[], None]]:
    """What outlives this process, by the names of the files."""

    def write_last_state() -> None:
        said = read_json(run.state_file) or {}
        if (said.get("attempt"), said.get("status")) != (attempt, ending.status):
            write_state(run, ending.status, attempt=attempt, step=ending.step, message=ending.message)

    def write_last_verdict() -> None:
        assert ending.verdict is not None
        write_verdict(run, ending.verdict, attempt=attempt)

    return {run.state_file.name: write_last_state, "verdict": write_last_verdict}


def _lost(run: RunDirectory, words: Mapping[str, Callable[[], None]]) -> dict[str, str] | None:
    """What could not be written, by the names of the files, and why.

    None: this attempt was cut off, and the run was started again elsewhere: it is not ours to speak for.
    """
    lost = {}
    for name, write in words.items():
        try:
            insist(write, run.reserve)
        except StaleAttempt:
            return None
        except OSError as error:
            lost[name] = error.strerror or str(error)
    return lost


def _tell_lost(run: RunDirectory, lost: Mapping[str, str]) -> None:
    if lost:
        reasons = ", ".join(sorted(set(lost.values())))
        print(f"warning: {run.path}: {', '.join(lost)} could not be written ({reasons})", file=sys.stderr)


def _leave(run: RunDirectory) -> None:
    """Free what was kept back; a stop request has been answered."""
    give_up(run.reserve)
    with contextlib.suppress(OSError):
        clear_stop(run)


def _first(ending: Ending) -> Failure | None:
    """What went wrong first, as the ledger keeps it."""
    if ending.status != "failed":
        return None
    return Failure(
        rank=ending.rank,
        node=ending.node,
        step=ending.rank_step if ending.rank is not None else ending.step,
        failure_class=ending.failure_class or "unknown",
        message=ending.message,
        traceback=ending.traceback,
        time=ending.time or time.time(),
    )


def paused(
    run: RunDirectory, attempt: int, ending: Ending, lease: Lease, signals: Signals, *, deadline: float | None
) -> Ending:
    """Wait before the next start; the ending with `again` if it is to be made, else as it counts in the end.

    A signal, the time limit, a stop request and the loss of the lease end the wait at once. What outlives this process
    is then written.

    deadline: monotonic time of the time limit
    """
    until = time.monotonic() + ending.pause_s
    while True:
        if signals.stop is None and deadline is not None and time.monotonic() >= deadline:
            signals.stop = "time limit"
        if lease.lost or (signals.stop is not None or stop_requested(run)) or time.monotonic() >= until:
            break
        time.sleep(min(_POLL_S, max(0.0, until - time.monotonic())))
    lease.beat()
    if lease.lost or latest_attempt(run) > attempt:
        return replace(ending, again=False, message=f"{ending.message}; {run.path} has been taken over meanwhile")
    if signals.stop is None and not stop_requested(run):
        return ending
    ending = restart.asked_to_stop(run, ending, signals.stop or stop_reason(run) or "a stop request")
    if (lost := _lost(run, _last_words(run, attempt, ending))) is not None:
        _leave(run)
        _tell_lost(run, lost)
    return ending


def stop_at(recipe: Recipe, started: float) -> float | None:
    """Monotonic time at which the time limit asks a job that began at `started` to stop; None without a limit."""
    limit = stop_after_s(recipe.cluster)
    return None if limit is None else started + limit


def tell(run: RunDirectory, attempt: int, ending: Ending, console: Console) -> None:
    """Say how the attempt ended and what to do next; a user's mistake is shown without a traceback."""
    if ending.failure_class == "user":
        raise UserError(ending.message)
    step = f" at step {ending.step}" if ending.step is not None else ""
    if ending.status == "finished":
        console.say(f"finished{step}: {run.path}")
    elif ending.status == "cancelled":
        console.say(f"cancelled{step}. {_how_to_go_on(run, attempt)}")
    elif ending.status == "preempted":
        why = f" ({ending.message})" if ending.message else ""
        console.say(f"stopped{step}{why}. {_how_to_go_on(run, attempt)}")
    else:
        _tell_failure(ending, console)
        if ending.verdict is not None and not ending.for_good:
            console.say(f"verdict: {ending.verdict} ({ending.why})")
        if ending.verdict == "requeue" and _by_hand(run, attempt) is not None:
            console.say(f"it was started by hand, so the next start is yours to make. {_how_to_go_on(run, attempt)}")
        console.say(f"logs: launcher logs {run.path}, files in {run.path / 'logs' / f'attempt-{attempt}'}")


def tell_restart(run: RunDirectory, attempt: int, ending: Ending, console: Console) -> None:
    """Say how the attempt failed and, in one line, that this process starts the next one."""
    _tell_failure(ending, console)
    when = f"in {ending.pause_s:g} s" if ending.pause_s else "now"
    at = max((checkpoint.step for checkpoint in valid_checkpoints(run)), default=0)
    console.say(
        f"{ending.why} (cluster.restart.{ending.failure_class}): attempt {attempt + 1} begins {when}, at step {at}"
    )


def _tell_failure(ending: Ending, console: Console) -> None:
    step = f" at step {ending.step}" if ending.step is not None else ""
    if ending.traceback and not (ending.rank == 0 and console.streams_log):
        console.say(ending.traceback.rstrip())
    who = "" if ending.rank is None else f" by rank {ending.rank}" + (f" on {ending.node}" if ending.node else "")
    console.say(f"failed{step}{who} ({ending.failure_class}): {ending.message}")
    if advice := cure(ending.message, ending.traceback):
        console.say(f"what to do: {advice}")


def _by_hand(run: RunDirectory, number: int) -> Attempt | None:
    """The attempt, if a person started it, so that nothing starts it again."""
    with contextlib.suppress(OSError):
        made = (attempt for attempt in attempts(run) if attempt.number == number)
        return next((attempt for attempt in made if attempt.target == restart.BY_HAND), None)
    return None


def _how_to_go_on(run: RunDirectory, number: int) -> str:
    by_hand = _by_hand(run, number)
    if by_hand is not None and (isinstance(by_hand.nodes, int) or len(by_hand.nodes or ()) > 1):
        return "To go on, start every node again, each with its command."
    return f"Go on with: launcher resume {run.path}"


def _import_agent() -> None:
    """While the fork server imports, so does this process: the two overlap."""
    import torch.distributed.launcher.api  # noqa: F401


def ticks(done: Callable[[], bool]) -> Iterator[None]:
    """Some twenty a second until it is done."""
    while not done():
        yield
        time.sleep(_POLL_S)


def pass_on_stop(run: RunDirectory, signals: Signals, deadline: float | None, say: Callable[[str], None]) -> None:
    """Turn a signal or the time limit into the stop request, once."""
    before = signals.passed_on
    if signals.stop is None and deadline is not None and time.monotonic() >= deadline:
        signals.stop = "time limit"
    if signals.stop is not None and not signals.passed_on:
        with contextlib.suppress(OSError):  # not even an empty file: the next look tries again
            request_stop(run, signals.stop)
            signals.passed_on = True
    if signals.passed_on and not before:
        say(f"{signals.stop}: the run stops after a checkpoint (a second Ctrl-C ends it at once)")


def failed_somewhere(run: RunDirectory, attempt: int) -> bool:
    """Whether a rank, of whatever node, has said that it failed."""
    return any(outcome.kind == "failed" for outcome in read_outcomes(run, attempt).values())


def _end_ranks(agent: Agent, *, grace_s: float) -> None:
    """Wait for this node's ranks to end, then kill what is left."""
    until = time.monotonic() + grace_s
    for _ in ticks(lambda: agent.done() or time.monotonic() >= until):
        pass
    if not agent.done():
        agent.kill_ranks()
        agent.join(timeout_s=_KILLED_S)
    if not agent.done():  # it has just started some more
        warm.stop()
        agent.join(timeout_s=_KILLED_S)


def _total_steps(run: RunDirectory) -> int | None:
    return int(run.read_json("data.json")["total_steps"]) if run.data_file.exists() else None
