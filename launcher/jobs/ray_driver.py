"""`python -m launcher.jobs.ray_driver RUN --recipe FILE`: the job on Ray: one agent a node, attempt after attempt.

The driver need not see the run directory: what an attempt came to is decided in `launcher worker` on node 0 and read
here from its exit code; an agent that goes without one is a lost node.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR, RecipeError, UserError
from launcher.jobs.ray_agent import Meeting, RayAgent
from launcher.recipe.schema import Cluster

_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what Ray's job server tells its entrypoint
WAITING = "; waiting up to "  # in the driver's last line while it waits for nodes, which `launcher status` reads
AGAIN = "starting again on a new set of nodes"
_INITS = 5  # tries to make a cluster of this machine
_POLL_S = 0.5
_PATIENCE_S = 5.0  # before waiting for nodes is worth a line
_MORE_S = 30.0  # at the first start, for the rest of the nodes where fewer suffice
_GROW_EVERY_S = 10.0  # between looks for room in the cluster, and before the run is asked again for the checkpoint
_REST_S = 60.0  # what the other nodes are given to end by themselves once one has ended
_LAST_WORDS_S = 15.0  # the same where node 0 is lost, whose end the others notice at once if they can

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be done, whatever happens to nodes.

    run: its directory as the nodes see it; recipe: the text of its file
    job: the id that stays over restarts; first_restart: of them, the number of the first attempt here
    folder: where the workers run; None: where Ray starts its processes
    """

    run: str
    recipe: str
    cluster: Cluster
    job: str
    first_restart: int = 0
    folder: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """The driver's exit code: 0 finished, 1 stopped for good, 2 a user's mistake, 75 stopped with a checkpoint."""
    given = _parser().parse_args(arguments)
    cluster, recipe = cluster_of(given.recipe), Path(given.recipe).read_text(encoding="utf-8")
    here = os.getcwd()  # ray.init may leave it
    local = cluster.ray.address == "local" and _JOB_CONFIG not in os.environ
    if local:
        _take_token()
    try:
        import ray
    except ImportError:
        raise UserError('Ray is not installed in this Python: pip install "train-launcher[ray]"') from None
    stop = Stop()
    stop.listen()
    _connect(ray, cluster, local=local)
    stop.listen()  # Ray has put a handler of its own for SIGTERM, which prints a stack and dies (2.60)
    task = Task(
        run=os.path.join(here, given.run),
        recipe=recipe,
        cluster=cluster,
        job=given.job_id or _submission_id() or f"{Path(given.run).name}-{os.getpid()}",
        first_restart=given.restart,
        folder=given.folder or (here if local else None),
    )
    try:
        return Driver(ray, task, stop).drive()
    finally:
        ray.shutdown()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launcher.jobs.ray_driver", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="directory of the run, as every node sees it; made if it is absent")
    parser.add_argument("--recipe", required=True, metavar="FILE", help="the resolved recipe, where the driver starts")
    parser.add_argument(
        "--folder", help="where the workers run, from the directory of Ray's own processes  [default: there]"
    )
    parser.add_argument(
        "--job-id", default=os.environ.get("LAUNCHER_JOB_ID"), help="stays over restarts  [default: Ray's submission]"
    )
    parser.add_argument(
        "--restart", type=int, default=int(os.environ.get("LAUNCHER_JOB_RESTART") or 0), help="number of the first one"
    )
    return parser


def cluster_of(recipe: str) -> Cluster:
    """The recipe's section; paths are not looked at, since they are the nodes'."""
    from launcher.recipe.compose import draft, in_order

    found = draft(recipe, resolved=True)
    if found.problems:
        raise RecipeError(in_order(found.problems), recipe)
    return found.composed.recipe.cluster


@dataclass(slots=True)
class Stop:
    """Why to stop, once somebody has asked for it."""

    why: str | None = None

    def listen(self) -> None:
        """SIGTERM (`ray job stop`) and Ctrl-C leave a note; a second Ctrl-C ends the driver, and Ray its actors."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.why == "Ctrl-C":
            os._exit(EXIT_FAILED)
        self.why = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _take_token() -> None:
    """A cluster that lives as long as its job gets a token of its own; Ray would leave one in the home (2.60)."""
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def _connect(ray: Any, cluster: Cluster, *, local: bool) -> None:
    """Connect to the cluster that this process belongs to, or make one of this machine."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    if local:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": 100 << 20}
        options |= {"runtime_env": {"pip": list(cluster.ray.pip)}} if cluster.ray.pip else {}
    else:
        options["address"] = "auto"
        if (address := os.environ.get("RAY_ADDRESS", "")).startswith(("http://", "https://")):
            raise UserError(
                f"RAY_ADDRESS = {address}: expected HOST:PORT of the head, or unset. This is the driver, which runs "
                "on the cluster; `launcher submit --target ray` sends it there."
            )
    for left in reversed(range(_INITS)):
        try:
            ray.init(**options)
            return
        except ConnectionError as error:
            where = os.environ.get("RAY_ADDRESS") or "this machine"
            raise UserError(f"no Ray cluster answers at {where}: {error}") from None
        except Exception as error:  # a bare one, after 30 s that no setting changes (Ray 2.60)
            ray.shutdown()
            if "timed out during startup" not in str(error) or not left:
                raise
            say("Ray did not come up within its 30 s; this machine is busy: once more")


def _submission_id() -> str | None:
    config = json.loads(os.environ.get(_JOB_CONFIG) or "{}")
    return config.get("metadata", {}).get("job_submission_id")


class _Stopped(Exception):
    """The job is to stop before its workers have started."""


@dataclass(slots=True)
class _Node:
    """One node of an attempt. code: of its worker, None while it runs or when it went without a word."""

    rank: int
    actor: Any
    meeting: Meeting
    code: int | None = None
    ended: bool = False

    @property
    def lost(self) -> bool:
        """Whether it went without the worker's word: the node, the agent, or the worker by a signal."""
        return self.ended and (self.code is None or self.code < 0)


@dataclass(slots=True)
class Driver:
    """Attempts of one task on a connected cluster until one of them is the last."""

    ray: Any
    task: Task
    stop: Stop
    _verdict: tuple[str | None, int] = field(default=(None, 0))
    _deaths: int = 0  # attempts that ended without a verdict
    _growing: bool = False  # the attempt has been asked to make room for more nodes

    def drive(self) -> int:
        """Run to the end; the driver's exit code.

        Raises:
            UserError: the nodes did not come within cluster.join_timeout_s.
        """
        restart = self.task.first_restart
        while True:
            code = self._attempt(restart)
            if code is None:
                self._deaths += 1
                if self._deaths > (budget := self.task.cluster.restart.node):
                    say(
                        f"{self._deaths} attempts were lost with their nodes; cluster.restart.node = {budget}: stopping"
                    )
                    return EXIT_FAILED
            elif code != EXIT_PREEMPTED:
                return code
            if self.stop.why is not None:
                say(f"stopped ({self.stop.why}); submit the same recipe again to go on")
                return EXIT_PREEMPTED
            restart += 1
            say(f"{AGAIN}: restart {restart}")

    def _attempt(self, restart: int) -> int | None:
        """One attempt on nodes of its own; the worker's exit code on node 0, None if it went without one."""
        from ray.util import remove_placement_group

        group = self._reserve(first=restart == self.task.first_restart)
        if group is None:
            return EXIT_PREEMPTED
        nodes: list[_Node] = []
        self._growing = False
        try:
            nodes = self._agents(group)
            if (code := self._word_since(nodes[0])) is not None:
                return code
            self._start(nodes, restart)
            return self._watch(nodes)
        except _Stopped:
            return EXIT_PREEMPTED
        except self.ray.exceptions.RuntimeEnvSetupError as error:
            raise UserError(
                f"Ray could not prepare a node (cluster.ray.pip, cluster.ray.working_dir): {error}"
            ) from None
        except self.ray.exceptions.RayError as error:  # an agent went before it had started
            say(f"a node is lost: {_short(error)}")
            return None
        finally:
            for node in nodes:
                self.ray.kill(node.actor)
            remove_placement_group(group)

    # nodes

    def _reserve(self, *, first: bool) -> Any:
        """A placement group with a node for each agent, waited for; None if the job is to stop meanwhile.

        With cluster.min_nodes it has as many nodes as there are, once all have been waited for: for long at the first
        start, else for a moment, since the run grows anyway when the cluster has room.
        """
        from ray.util import placement_group, remove_placement_group

        bundle, cluster = self._bundle(), self.task.cluster
        group, began, told = placement_group([bundle] * cluster.nodes, strategy="STRICT_SPREAD"), time.monotonic(), ""
        ready, asked_at = group.ready(), began
        while not self.ray.wait([ready], timeout=_POLL_S)[0]:
            waited = time.monotonic() - began
            missing = self._missing(bundle)
            if self.stop.why is not None:
                remove_placement_group(group)
                return None
            if waited > (limit := cluster.join_timeout_s):
                remove_placement_group(group)
                raise UserError(f"{missing}; gave up after {limit} s (cluster.join_timeout_s).")
            if time.monotonic() - asked_at > (_MORE_S if first else _PATIENCE_S) and (count := self._suffice(bundle)):
                remove_placement_group(group)
                group, asked_at = placement_group([bundle] * count, strategy="STRICT_SPREAD"), time.monotonic()
                ready = group.ready()
                say(f"{count} of {cluster.nodes} nodes are there, {cluster.min_nodes} suffice")
            if waited > _PATIENCE_S and missing != told:
                say(f"{missing}{WAITING}{limit} s")
                told = missing
        return group

    def _suffice(self, bundle: dict[str, float]) -> int:
        """How many nodes a job with cluster.min_nodes can have now, as far as it wants them; 0: not enough."""
        cluster = self.task.cluster
        if cluster.min_nodes is None:
            return 0
        free = min(len(self._free(bundle)), cluster.nodes)
        return free if free >= cluster.min_nodes else 0

    def _free(self, bundle: dict[str, float]) -> set[str]:
        """Ids of the nodes that have a bundle free now."""
        from ray._private.state import available_resources_per_node

        alive = {node["NodeID"] for node in self.ray.nodes() if node["Alive"]}
        return {id for id, free in available_resources_per_node().items() if id in alive and _fits(bundle, free)}

    def _bundle(self) -> dict[str, float]:
        """What each agent reserves. GPUs where the recipe wants them, or does not say and the cluster has some."""
        cluster = self.task.cluster
        total = self.ray.cluster_resources()
        wanted = {"auto": total.get("GPU", 0) > 0, "cuda": True, "cpu": False}[cluster.accelerator]
        cpus = cluster.ray.cpus_per_node or cluster.nproc_per_node
        gpus = {"GPU": float(cluster.nproc_per_node)} if wanted else {}
        return {"CPU": float(cpus), **gpus, **cluster.ray.resources}

    def _missing(self, bundle: dict[str, float]) -> str:
        """What was asked for against what there is."""
        count, least = self.task.cluster.nodes, self.task.cluster.min_nodes
        wanted = f"{count} node{'s' * (count > 1)}" if least is None else f"{least} to {count} nodes"
        alive = [node for node in self.ray.nodes() if node["Alive"]]
        large = [node["NodeID"] for node in alive if _fits(bundle, node["Resources"])]
        now = len(self._free(bundle) & set(large))
        return (
            f"the job asks for {wanted} with {_shown(bundle)} each: of the cluster's "
            f"{len(alive)} nodes {len(large)} have that, {now} have it free now"
        )

    def _agents(self, group: Any) -> list[_Node]:
        """An agent in each bundle, and where the nodes meet."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = self._bundle()
        own = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
        remote = self.ray.remote(RayAgent)
        actors = [
            remote.options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                resources=own,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
                max_concurrency=4,
                max_restarts=0,
            ).remote(self.task.run)
            for rank in range(group.bundle_count)
        ]
        meetings = self._all([actor.meeting.remote() for actor in actors])
        return [_Node(rank, actor, meeting) for rank, (actor, meeting) in enumerate(zip(actors, meetings, strict=True))]

    def _all(self, answers: list[Any]) -> list[Any]:
        """Wait for answers, which may take as long as Ray prepares a node.

        Raises:
            _Stopped: the job is to stop meanwhile.
        """
        while len(self.ray.wait(answers, num_returns=len(answers), timeout=_POLL_S)[0]) < len(answers):
            if self.stop.why is not None:
                raise _Stopped
        return list(self.ray.get(answers))

    def _word_since(self, node: _Node) -> int | None:
        """The exit code of an attempt whose node died after it had written `stop`; None otherwise."""
        before, self._verdict = self._verdict, self.ray.get(node.actor.verdict.remote())
        if self._deaths and self._verdict != before and self._verdict[0] == "stop":
            say("the lost attempt had left its verdict: stop")
            return EXIT_FAILED
        return None

    def _start(self, nodes: list[_Node], restart: int) -> None:
        first = nodes[0].meeting
        names = ", ".join(node.meeting.name for node in nodes)
        say(f"{self.task.job}: {len(nodes)} node{'s' * (len(nodes) > 1)} ({names}), restart {restart}")
        environment = {
            "LAUNCHER_TARGET": "ray",
            "LAUNCHER_JOB_ID": self.task.job,
            "LAUNCHER_JOB_RESTART": str(restart),
        }
        starts = []
        for node in nodes:
            options = ["--nodes", str(len(nodes)), "--node-rank", str(node.rank)]
            if len(nodes) > 1:
                options += ["--rendezvous", f"{first.address}:{first.port}"]
            starts.append(node.actor.start.remote(options, self.task.recipe, environment, self.task.folder))
        self.ray.get(starts)

    # the attempt

    def _watch(self, nodes: list[_Node]) -> int | None:
        """Pass lines on until every node has ended; node 0 speaks for the attempt, another one where that is lost."""
        polls = {node.actor.poll.remote(): node for node in nodes}
        asked, deadline, looked = False, float("inf"), time.monotonic()
        while polls:
            if not asked and len(polls) == len(nodes) and time.monotonic() - looked >= _GROW_EVERY_S:
                looked = time.monotonic()
                self._grow(nodes)
            for poll in self.ray.wait(list(polls), timeout=_POLL_S)[0]:
                node = polls.pop(poll)
                if self._heard(node, poll):
                    polls[node.actor.poll.remote()] = node
                else:
                    rest = _LAST_WORDS_S if nodes[0].lost else _REST_S
                    deadline = min(deadline, time.monotonic() + rest)
            if self.stop.why is not None and not asked:
                asked = True
                say(f"{self.stop.why}: every node is asked for a checkpoint and the end")
                for node in polls.values():
                    node.actor.stop.remote()
            if polls and time.monotonic() > deadline:
                self._end(polls.values())
                polls.clear()
        if nodes[0].ended and not nodes[0].lost:
            return nodes[0].code
        return next((node.code for node in nodes if node.code in (EXIT_FAILED, EXIT_USER_ERROR, EXIT_PREEMPTED)), None)

    def _grow(self, nodes: list[_Node]) -> None:
        """Ask for a checkpoint and a start with more nodes where the cluster has room for them.

        Asked again until it is served, since a start of the run takes an older request back.
        """
        cluster = self.task.cluster
        if cluster.min_nodes is None or len(nodes) == cluster.nodes:
            return
        room = self._free(self._bundle()) - {node.meeting.node_id for node in nodes}
        if not room:
            return
        more = min(len(room), cluster.nodes - len(nodes))
        text = f"room for {more} more in the cluster, {len(nodes)} of {cluster.nodes} take part"
        if not self._growing:
            say(f"{text}: the run writes a checkpoint and starts with them")
        self._growing = True
        nodes[0].actor.grow.remote(text)

    def _heard(self, node: _Node, poll: Any) -> bool:
        """Print what a node says; whether there is more to come."""
        name = f"{node.meeting.name} (node {node.rank})"
        try:
            lines, node.code = self.ray.get(poll)
        except self.ray.exceptions.ActorUnavailableError:  # the network between, perhaps: Ray finds out
            time.sleep(_POLL_S)
            return True
        except self.ray.exceptions.RayError as error:
            node.ended = True
            say(f"{name} is lost: {_short(error)}")
            return False
        for line in lines:
            say(line if node.rank == 0 else f"{name}: {line}")
        node.ended = node.code is not None
        if node.lost and self.stop.why is None:
            say(f"{name} is lost: its worker was ended by signal {-(node.code or 0)}")
        return not node.ended

    def _end(self, nodes: Any) -> None:
        """End workers that would wait for one that is gone."""
        for node in nodes:
            say(f"{node.meeting.name} (node {node.rank}): ended, for it would wait for the nodes that have gone")
        kills = [node.actor.kill.remote() for node in nodes]
        self.ray.wait(kills, num_returns=len(kills), timeout=10)


def say(text: str) -> None:
    """One line of the job's output."""
    print(text, flush=True)


def _fits(bundle: dict[str, float], resources: dict[str, float]) -> bool:
    return all(resources.get(name, 0) >= amount for name, amount in bundle.items())


def _shown(bundle: dict[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in bundle.items())


def _short(error: BaseException) -> str:
    """What Ray says, without its page of possible reasons."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as problem:
        print(problem, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
