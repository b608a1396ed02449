"""One node's part of a job: node 0 leads the attempt, the others learn of it from node 0's store and follow."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import EXIT_FINISHED, UserError
from launcher.jobs import meeting, network, preflight, restart, shared, warm
from launcher.jobs.agent import Node
from launcher.jobs.changes import changes
from launcher.jobs.command import watch_over
from launcher.jobs.console import Console
from launcher.jobs.ending import Ending
from launcher.jobs.meeting import Away, Meeting, Stopped
from launcher.jobs.opening import copied, discard_if_fresh, open_run, owned, run_directory, stored_recipe
from launcher.jobs.place import Place, find_place, find_submission, settled, start_reason
from launcher.jobs.rendezvous import address, require_free_port
from launcher.jobs.signals import Signals
from launcher.jobs.supervisor import (
    Machine,
    begin,
    conclude,
    failed_somewhere,
    is_finished,
    paused,
    prepared,
    ready_machine,
    stop_at,
    supervise,
    tell,
    tell_restart,
    written,
)
from launcher.plan import Plan, make_plan
from launcher.plan.elastic import empty
from launcher.recipe.check import load
from launcher.recipe.elastic import counts, on_nodes
from launcher.recipe.schema import Recipe, to_dict
from launcher.run.control import GROW, read_verdict, stop_reason, write_verdict
from launcher.run.directory import RunDirectory
from launcher.run.lease import Lease, LeaseHeld, Submission
from launcher.run.ledger import attempts

_OLD_COPY_S = 120.0  # for an earlier start of this job, dying on this machine, to leave the port
_EXCUSE_S = 20.0  # for nodes that are just starting to hear why this one does not take part


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What this process is to do.

    node: its place; `node.nodes` can take part in this start of the job, which a scheduler has fixed
    given: the recipe must be that of node 0, because a person wrote it on each node
    force: as of `launcher run`
    """

    run: RunDirectory
    recipe: Recipe
    node: Node
    submission: Submission | None
    reason: str
    given: bool = False
    force: bool = False

    @property
    def least(self) -> int:
        """Nodes that suffice for an attempt; a scheduler's start has as many as it was given, and no fewer."""
        return self.node.nodes if self.submission is not None else min(counts(self.recipe))

    @property
    def elastic(self) -> bool:
        """Whether attempts of this start may differ in their nodes."""
        return self.least < self.node.nodes


def work(
    run: RunDirectory,
    *,
    recipe_file: Path | None = None,
    nodes: int | None = None,
    node_rank: int | None = None,
    rendezvous: str | None = None,
    command: Sequence[str] = (),
    console: Console,
) -> int:
    """Do this node's part of a job; the exit code of `launcher worker`.

    recipe_file: what the run is made from, or opened with by the first start of a job; None: the run's own
    command: starts every rank of every node, in place of torch's agent on each

    Raises:
        UserError: impossible options, a taken port, or what the recipe asks for and this node lacks.
    """
    submission = find_submission()
    try:
        return _work(
            run, submission, recipe_file=recipe_file, nodes=nodes, node_rank=node_rank, rendezvous=rendezvous,
            command=command, console=console,
        )  # fmt: skip
    except UserError as error:
        _leave_word(run, submission, error)
        raise


def _work(
    run: RunDirectory,
    submission: Submission | None,
    *,
    recipe_file: Path | None,
    nodes: int | None,
    node_rank: int | None,
    rendezvous: str | None,
    command: Sequence[str],
    console: Console,
) -> int:
    place = find_place(nodes=nodes, node_rank=node_rank, rendezvous=rendezvous, command=bool(command))
    recipe = _recipe(run, recipe_file, submission, [])
    given = recipe.cluster.nodes if place.nodes is None else place.nodes
    if not (given == recipe.cluster.nodes or (submission is not None and given in counts(recipe))):
        recipe = _recipe(run, recipe_file, submission, [f"cluster.nodes={given}"])
    if is_finished(run, recipe, console.say):
        return EXIT_FINISHED
    ending: Ending | None
    if command:
        ending = watch_over(command, run, recipe, nodes=given, submission=submission, console=console)
    else:
        again = submission is not None and submission.restart > 0
        node = find_node(on_nodes(recipe, given), place, console.say, port_wait_s=_OLD_COPY_S if again else 0.0)
        reason = start_reason(submission)
        ending = take_part(Part(run=run, recipe=recipe, node=node, submission=submission, reason=reason), console)
    return EXIT_FINISHED if ending is None else ending.worker_exit_code


def _leave_word(run: RunDirectory, submission: Submission | None, error: UserError) -> None:
    """Say `stop` for an attempt that never began.

    The scheduler ends the other nodes along with this one, and how those end must not count instead of the mistake. A
    run that somebody else drives, or whose last attempt left no word, is not spoken for.
    """
    with contextlib.suppress(OSError, UserError):
        known = attempts(run)
        silent = bool(known) and not known[-1].ended
        if submission is not None and not silent and not isinstance(error, LeaseHeld) and read_verdict(run) is None:
            write_verdict(run, "stop")


def launch_node(recipe: Recipe, place: Place, *, force: bool, console: Console) -> int:
    """Do one node's part of a recipe's run, started by hand on each node; the exit code of `launcher run`.

    Raises:
        UserError: as `work`.
    """
    run = run_directory(recipe)
    node = find_node(recipe, place, console.say)
    if is_finished(run, recipe, console.say):
        return EXIT_FINISHED
    part = Part(run=run, recipe=recipe, node=node, submission=None, reason="run", given=True, force=force)
    ending = take_part(part, console)
    return EXIT_FINISHED if ending is None else ending.exit_code


def find_node(recipe: Recipe, place: Place, say: Callable[[str], None], *, port_wait_s: float = 0.0) -> Node:
    """This node's place in a job, with the network interface it talks by, which is said.

    port_wait_s: how long node 0 waits for its port to become free

    Raises:
        UserError: a place that cannot be; a rendezvous that is no address of node 0, or that nothing leads to.
    """
    cluster = recipe.cluster
    rank, rendezvous = settled(place, cluster.nodes)
    if rendezvous is None:
        return Node()
    host, port = address(rendezvous, name="--rendezvous")
    if place.names_may_come:
        _await_name(host, cluster.join_timeout_s, say)
    node = Node(
        nodes=cluster.nodes,
        rank=rank,
        rendezvous=rendezvous,
        join_timeout_s=cluster.join_timeout_s,
        names_may_come=place.names_may_come,
    )
    if rank == 0:
        if not network.is_here(host):
            twice = meeting.twice_node_0(node)
            raise UserError(twice or _not_here(rendezvous))
        require_free_port(port, name=f"--rendezvous {rendezvous}", wait_s=port_wait_s)
    interface = network.choose(host, wanted=cluster.network_interface)
    where = f" ({place.source})" if place.source else ""
    say(f"node {rank} of {cluster.nodes}{where}, node 0 at {rendezvous}; {interface}")
    return Node(
        nodes=node.nodes,
        rank=rank,
        rendezvous=rendezvous,
        local_address=interface.address,
        join_timeout_s=node.join_timeout_s,
        names_may_come=node.names_may_come,
        environment=interface.environment(),
    )


def take_part(part: Part, console: Console) -> Ending | None:
    """Lead or follow to the end of the attempt, which is told; None where nothing was left to do.

    Raises:
        UserError: whatever is wrong before a rank starts, and an attempt that ended for such a reason.
    """
    started = time.monotonic()
    with Signals() as signals:
        with _excused(part.node, signals, console.say):
            machine = ready_machine(part.recipe, console.say)
        act = _lead if part.node.rank == 0 else _follow
        done = act(part, machine, console, signals, started)
    if done is None:
        return None
    attempt, ending = done
    tell(part.run, attempt, ending, console)
    return ending


def _lead(
    part: Part, machine: Machine, console: Console, signals: Signals, started: float
) -> tuple[int, Ending] | None:
    """Node 0: attempt after attempt until one of them is the last; its number and how it ended."""
    run, recipe, node, reason = part.run, part.recipe, part.node, part.reason
    with (
        _hosted(node, signals) as others,
        owned(run, part.submission, console.say) as lease,
        copied(run, recipe, console.say, hurry=lambda: signals.at_once),
    ):
        with written(run):
            open_run(run, recipe, make_plan(recipe), force=part.force, say=console.say)
            if is_finished(run, recipe, console.say):
                return None
        within = False
        while True:
            too_few = others.gather(part.least, console.say) if others is not None and part.elastic else None
            here = on_nodes(recipe, len(others.members)) if others is not None else on_nodes(recipe, node.nodes)
            plan = make_plan(here)
            names = [others.names[rank] for rank in others.members] if others is not None and part.elastic else None
            with written(run):
                attempt = begin(
                    run, here, plan, reason=reason, submission=part.submission, within=within, names=names
                )  # fmt: skip
            ending, missing = _attempt(
                part, here, plan, attempt, too_few, others, machine, console, signals, started=started
            )
            enough = others is not None and part.elastic and others.enough(part.least)
            alone = (stop_reason(run) or "").startswith(GROW) and not part.elastic  # the scheduler's part
            ending = conclude(run, attempt, ending, within=not alone, enough=enough)
            if others is not None:
                others.conclude(ending, wait_s=_EXCUSE_S if missing else 0.0)
            if ending.again:
                ending = _paused(part, attempt, ending, lease, console, signals, started=started)
                if not ending.again and others is not None:
                    others.finish(ending)
            if not ending.again:
                break
            warm.start(recipe.strategy.kind, machine.accelerator)
            within, reason = True, "resized" if ending.failure_class == restart.RESIZE else "restarted"
        if part.submission is None and ending.failure_class == "user":
            discard_if_fresh(run, attempt)
    return attempt, ending


def _attempt(
    part: Part,
    recipe: Recipe,
    plan: Plan,
    attempt: int,
    failed: Ending | None,
    others: Meeting | None,
    machine: Machine,
    console: Console,
    signals: Signals,
    *,
    started: float,
) -> tuple[Ending, bool]:
    """One attempt on node 0: how it ended, and whether nodes may just be starting that have not heard of it.

    failed: how it ended before it began, where too few nodes came
    """
    run = part.run
    ending = failed or restart.refusal(run, attempt) or prepared(run, recipe, console, signals, others)
    if others is not None:
        others.announce(attempt, shared.leave_token(run), ending)
        ending = ending or others.await_all(console.say)
        others.settle(ending)
        if part.elastic and ending is None:
            _say_nodes(part, plan, others, console.say)
    if ending is not None:
        return ending, signals.stop is None
    ending = _preflight(part, recipe, plan, attempt, others, console)
    node = part.node if others is None else replace(part.node, nodes=len(others.members))
    return ending or supervise(
        run, recipe, plan, attempt, node, machine, console, signals, started=started, meeting=others
    ), False  # fmt: skip


def _say_nodes(part: Part, plan: Plan, others: Meeting, say: Callable[[str], None]) -> None:
    """Who takes part in an elastic job's attempt, and what is left of each step."""
    names = ", ".join(others.names[rank] for rank in others.members)
    slots = empty(plan)
    spare = f"; {slots} slot{'s' * (slots > 1)} of each step of weight 0" if slots else ""
    say(f"{plan.nodes} of {part.node.nodes} nodes take part ({names}): {plan.world_size} ranks{spare}")


def _paused(
    part: Part, attempt: int, ending: Ending, lease: Lease, console: Console, signals: Signals, *, started: float
) -> Ending:
    """Say that the next attempt comes, and wait for its time; the ending without `again` where it is called off."""
    if ending.failure_class == restart.RESIZE:
        console.say(f"{ending.message}: attempt {attempt + 1} begins now, at step {ending.step}")
    else:
        tell_restart(part.run, attempt, ending, console)
    return paused(part.run, attempt, ending, lease, signals, deadline=stop_at(part.recipe, started))


def _follow(
    part: Part, machine: Machine, console: Console, signals: Signals, started: float
) -> tuple[int, Ending] | None:
    """The others: each attempt that node 0 makes with this node; the last one's number and how it ended."""
    run, node, attempt = part.run, part.node, 0
    others: Meeting | None = None
    try:
        others = meeting.join(node, signals, console.say)
        while True:
            attempt, token, ending = others.announced(console.say)
            if others.over:
                others.goodbye()
                return attempt, ending or _without_a_word("node 0 ended before this node could take part")
            ending = _followed(part, attempt, token, ending, others, machine, console, signals, started=started)
            if ending.status == "failed" and not failed_somewhere(run, attempt):
                others.give_up(ending)  # a rank died without a word, which ranks elsewhere need not notice
            said = others.concluded()
            if said is None or not said.again:
                break
            console.say(f"attempt {attempt} ended ({said.failure_class}): {said.message}; node 0 makes another")
            warm.start(part.recipe.strategy.kind, machine.accelerator)
    except Stopped as stopped:
        if others is not None:
            others.ask_to_stop(str(signals.stop))
        return attempt, Ending(status="preempted", failure_class="preemption", message=str(stopped))
    except Away as away:
        ending = Ending(status="failed", failure_class="communication", message=str(away))
        said = others.concluded() if others is not None else None
    if said is None and part.elastic:
        console.say("The others may train on without this node: start it again, and it is taken in at a checkpoint.")
    if said is None and attempt:
        said = restart.concluded(run, attempt, ending)  # node 0 has gone: what it would have said
    return attempt, said or ending


def _followed(
    part: Part,
    attempt: int,
    token: str,
    ending: Ending | None,
    others: Meeting,
    machine: Machine,
    console: Console,
    signals: Signals,
    *,
    started: float,
) -> Ending:
    """One attempt on another node than node 0.

    Raises:
        Away, Stopped: as `Meeting.settled`.
    """
    if ending is None:
        others.come(shared.problem(part.run, token) or _differing(part))
        ending = others.settled()
    if ending is not None:
        return ending
    recipe = on_nodes(stored_recipe(part.run), len(others.members))
    plan, node = make_plan(recipe), replace(part.node, nodes=len(others.members))
    ending = _preflight(part, recipe, plan, attempt, others, console)
    return ending or supervise(
        part.run, recipe, plan, attempt, node, machine, console, signals, started=started, meeting=others
    )


def _without_a_word(message: str) -> Ending:
    return Ending(status="failed", failure_class="communication", message=message)


def _recipe(run: RunDirectory, file: Path | None, submission: Submission | None, overrides: Sequence[str]) -> Recipe:
    """What the run is to go on with: the file's recipe at a job's first start, else the run's own."""
    if file is None or (run.exists() and submission is not None and _has_started(run, submission)):
        return stored_recipe(run, overrides)
    recipe = load(file, overrides, new=False).recipe
    place = run.path.absolute()
    recipe.run.dir, recipe.run.name = str(place.parent), place.name
    return recipe


def _has_started(run: RunDirectory, submission: Submission) -> bool:
    job = (submission.target, submission.job_id)
    return any((attempt.target, attempt.job_id) == job for attempt in attempts(run))


def _differing(part: Part) -> str:
    """Why this node's recipe cannot be meant, where a person gave it another one than node 0 has."""
    if not part.given:
        return ""
    found = changes(part.run.read_recipe(), to_dict(part.recipe))
    listed = "\n".join(f"  {change}" for change in found)
    return f"node 0 and node {part.node.rank} were given different recipes:\n{listed}" if found else ""


def _preflight(
    part: Part, recipe: Recipe, plan: Plan, attempt: int, others: Meeting | None, console: Console
) -> Ending | None:
    """Examine the nodes side by side; how the attempt ended where they cannot train together."""
    run = part.run
    if not recipe.cluster.preflight:
        return None
    try:
        seen = preflight.alone(recipe, plan, run) if others is None else preflight.together(recipe, plan, run, others)
    except Stopped as stopped:
        if part.node.rank > 0:
            raise
        return Ending(status="preempted", failure_class="preemption", message=str(stopped))
    except Away as away:
        return Ending(status="failed", failure_class="node", message=str(away))
    if part.node.rank == 0:
        seen.tell(console.say)
        seen.keep(run, attempt)
    return seen.ending


def _await_name(host: str, timeout_s: float, say: Callable[[str], None]) -> None:
    """A pod's name is known when the pod has an address; wait for that of node 0."""
    deadline, told = time.monotonic() + timeout_s, False
    while True:
        try:
            network.resolve(host)
            return
        except UserError as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                say(f"waiting for the name of node 0: {error}")
                told = True
            time.sleep(1)


def _not_here(rendezvous: str) -> str:
    own = ", ".join(f"{addresses[0]} ({name})" for name, addresses in network.interfaces().items())
    return (
        f"--rendezvous {rendezvous}: expected an address of this machine, because it is node 0 (--node-rank 0). "
        f"It has {own or 'none'}."
    )


@contextlib.contextmanager
def _hosted(node: Node, signals: Signals) -> Iterator[Meeting | None]:
    """Node 0's store, on which the others hear it where an error ends it early; None where this node is alone."""
    if node.rendezvous is None:
        yield None
        return
    others = meeting.host(node, signals)
    try:
        yield others
    except UserError as error:
        _say_why(others, error)
        raise
    finally:
        others.leave()


@contextlib.contextmanager
def _excused(node: Node, signals: Signals, say: Callable[[str], None]) -> Iterator[None]:
    """Tell the other nodes why this one does not take part, where an error ends it early."""
    try:
        yield
    except UserError as error:
        if node.rendezvous is not None:
            say(f"this node cannot take part, which the others are told for {_EXCUSE_S:.0f} s: {error}")
            with contextlib.suppress(Exception):
                _excuse(node, signals, error)
        raise


def _excuse(node: Node, signals: Signals, error: UserError) -> None:
    if node.rank == 0:
        _say_why(meeting.host(node, signals), error)
        return
    deadline = time.monotonic() + _EXCUSE_S
    while not meeting.listens(node):
        if time.monotonic() >= deadline or signals.stop is not None:
            return
        time.sleep(0.2)
    others = meeting.join(node, signals, lambda text: None)
    others.refuse(f"node {node.rank} ({others.names[node.rank]}): {error}")
    others.leave()


def _say_why(others: Meeting, error: UserError) -> None:
    ending = Ending(status="failed", failure_class="user", message=str(error))
    others.announce(0, "", ending)
    others.conclude(ending, wait_s=_EXCUSE_S)
