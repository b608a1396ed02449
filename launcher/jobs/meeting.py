"""The store on node 0 through which the nodes of a job speak: who takes part, how an attempt goes, how each ended.

Node 0 makes it; it lives and dies with node 0's process and serves every attempt that this one makes. Whoever stands
still for `LOST_S` is lost to the others. A node that comes while the others train registers, and waits to be taken in.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from launcher.errors import UserError
from launcher.jobs.agent import Node
from launcher.jobs.ending import Ending
from launcher.jobs.rendezvous import address, taken
from launcher.jobs.signals import Signals

BEAT_S = 2.0
LOST_S = 60.0  # an outage that TCP would survive is no reason to end a job; a link that is cut says nothing else
GONE_S = 10.0  # after its connection broke: node 0 may just have finished
UNREACHED_S = 20.0  # a machine that is up answers at once, even where nobody listens yet
_POLL_S = 0.05
_LAST_WORDS_S = 25.0  # for a node whose ranks are being ended to say how
_VERDICT_S = 20.0
_SAY_EVERY_S = 60.0
MORE_S = 30.0  # at the first start, for the rest of the nodes once as many have come as suffice
_SOON_S = 5.0  # before waiting for nodes is worth a line
_STAYS = 3  # heartbeats of a node that came to stay
TOGETHER_S = 10.0  # for other nodes to come back, too, before the run is asked for a checkpoint to take them in
_TWIN_S = 3.0  # for another node 0 to answer
_SLACK_S = 2.0  # behind a time limit of torch's own, which a listener that says nothing may outlast

Say = Callable[[str], None]


class Away(Exception):
    """The other side did not come, or has gone; the text says who."""


class Stopped(Exception):
    """A stop was asked for while waiting."""


class Meeting:
    """This node's end of the store, registered under its node rank.

    names: host names by node rank, as far as they are known
    members: node ranks of the attempt, 0 first; all numbers until an attempt has been announced
    attempt: its number, 0 before the first
    over: whether node 0 has said that no further attempt follows
    """

    def __init__(self, store: Any, node: Node, signals: Signals) -> None:
        self._store, self.node, self._signals = store, node, signals
        self.names: dict[int, str] = {node.rank: socket.gethostname()}
        self.members: list[int] = list(range(node.nodes))
        self.attempt, self.over = 0, False
        self._begun = self._grown = False
        beat = self._register()
        self._watch = _Watch(store.clone(), node, beat, signals)
        if node.rank == 0:
            self._watch.expect(self.members, self.names)

    # joining

    def _register(self) -> str:
        """Take this node's number, which no other living process may have; the key of its heartbeat.

        Raises:
            UserError: somebody has it, or counts the nodes of the job otherwise; node 0 is told.
        """
        node, store = self.node, self._store
        own = json.dumps([socket.gethostname(), os.getpid(), node.nodes, time.time_ns()])
        before = ""
        while (holder := store.compare_set(_key("node", node.rank), before, own).decode()) != own:
            if node.rank == 0 or _beats(store, node.rank, holder):
                raise self._refused(_twice(node.rank, json.loads(holder)[0]))
            before = holder  # whoever had the number has gone
        if node.rank > 0:
            host, _, nodes, _ = json.loads(store.get(_key("node", 0)))
            self.names[0] = host
            if nodes != node.nodes:
                raise self._refused(
                    f"--nodes: {host} (node 0) counts {nodes}, {socket.gethostname()} (node {node.rank}) {node.nodes}: "
                    "expected the same on every node."
                )
            store.set(_key("arrival", store.add(_key("arrivals"), 1)), json.dumps([node.rank, own]))
        return _beat_key(node.rank, own)

    def _refused(self, problem: str) -> UserError:
        self._store.set(_key("problem"), problem)
        return UserError(problem)

    def refuse(self, problem: str) -> None:
        """Tell node 0 that this node cannot take part; it ends the attempt for all."""
        self._store.set(_key("problem"), problem)

    def ask_to_stop(self, reason: str) -> None:
        """Tell node 0 that a signal came here while it is waited for; one that the others do without just goes."""
        if not self.outside:
            self._store.set(_key("stop"), f"{reason} on node {self.node.rank} ({socket.gethostname()})")

    @property
    def outside(self) -> bool:
        """Whether the attempt under way was made without this node."""
        return self.node.rank not in self.members

    def disturbance(self) -> Ending | None:
        """On node 0, while nodes come and data is prepared: why the attempt is to end, if it is.

        Once ranks have been started, a mistake on a node that comes ends nothing but that node.
        """
        if not self._begun and self._store.check([_key("problem")]):
            return Ending(status="failed", failure_class="user", message=self._store.get(_key("problem")).decode())
        if self._signals.stop is None and self._store.check([_key("stop")]):
            self._signals.stop = self._store.get(_key("stop")).decode()
        return None

    def gather(self, least: int, say: Say) -> Ending | None:
        """On node 0, before an attempt: settle which nodes are its members; how it ends where too few come.

        At the first start the rest is waited for once as many have come as suffice; later ones take who is there, for a
        node that comes back is taken in anyway.
        """
        first, most = self.attempt == 0, self.node.nodes
        self._grown = False
        began = said = time.monotonic()
        enough_since: float | None = None
        while True:
            if (ending := self.disturbance()) is not None:
                return ending
            if self._signals.stop is not None:
                message = f"{self._signals.stop} while waiting for other nodes"
                return Ending(status="preempted", failure_class="preemption", message=message)
            here, now = self._watch.present(), time.monotonic()
            enough_since = (enough_since or now) if len(here) >= least else None
            if len(here) == most or (enough_since and (not first or now - enough_since >= MORE_S)):
                break
            if enough_since is None and now - began >= self.node.join_timeout_s:
                limit = f"{self.node.join_timeout_s} s (cluster.join_timeout_s)"
                message = f"{_few(len(here))} of the {least} that suffice (cluster.min_nodes) came within {limit}"
                return Ending(status="failed", failure_class="node", message=message)
            if now - said >= (_SAY_EVERY_S if said > began else _SOON_S):
                said = now
                say(f"{_few(len(here))} of {most} there, {least} suffice: waiting since {now - began:.0f} s")
            time.sleep(_POLL_S)
        self.members = sorted(here)
        self.names |= here
        self._watch.expect(self.members, self.names)
        return None

    def announce(self, attempt: int, token: str, ending: Ending | None) -> None:
        """On node 0: tell the others which attempt this is and whose, or how it ended already."""
        self.attempt = attempt
        self._store.set(_key("attempt"), json.dumps([attempt, token, self.members, _brief(ending)]))

    def announced(self, say: Say = lambda text: None) -> tuple[int, str, Ending | None]:
        """On the others: the next attempt, the run directory's token, and how it ended if no rank is to start.

        A node that an attempt was made without waits for the next one as long as node 0 lives, and hears here, too, how
        the last one ended (`over`).

        Raises:
            Away: node 0 went, or took too long; Stopped: a signal came.
        """
        told = 0
        for _ in self._until(f"node 0 ({self.names[0]})", patient=lambda: self.outside):
            if self._store.check([_key("over")]):
                self.over = True
                return self.attempt, "", _full(json.loads(self._store.get(_key("over"))))
            if not self._store.check([_key("attempt")]):
                continue
            attempt, token, members, ending = json.loads(self._store.get(_key("attempt")))
            if attempt <= max(self.attempt, told):
                continue
            self.members, told = members, attempt
            if not self.outside:
                break
            say(f"attempt {attempt} goes on without this node, which is taken in at its next checkpoint")
        self.attempt = self._watch.attempt = attempt
        self._watch.expect([0], self.names)
        return attempt, token, _full(ending)

    def come(self, problem: str = "") -> None:
        """On the others: say that this node saw the announcement, or why it cannot take part."""
        self._store.set(self._of("seen", self.node.rank), problem)

    def settle(self, ending: Ending | None) -> None:
        """On node 0, when all have come or will not: let the others start their ranks, or say how the attempt ended."""
        self._begun = self._begun or ending is None
        self._store.set(self._of("settled"), json.dumps(_brief(ending)))

    def settled(self) -> Ending | None:
        """On the others: wait until all have come; how the attempt ended where they have not.

        Raises:
            Away, Stopped: as `announced`.
        """
        for _ in self._until(f"node 0 ({self.names[0]}) and the other nodes"):
            if self._store.check([self._of("settled")]):
                break
        return _full(json.loads(self._store.get(self._of("settled"))))

    def await_all(self, say: Say) -> Ending | None:
        """On node 0: wait until every member has seen the announcement; how the attempt ends where one does not."""
        try:
            for rank in self.members[1:]:
                for _ in self._until(f"node {rank}", say=say):
                    if (ending := self.disturbance()) is not None:
                        return ending
                    if self._store.check([self._of("seen", rank)]):
                        break
                self.names[rank] = json.loads(self._store.get(_key("node", rank)))[0]
                if problem := self._store.get(self._of("seen", rank)).decode():
                    return Ending(status="failed", failure_class="user", message=problem)
        except Stopped as stopped:
            return Ending(status="preempted", failure_class="preemption", message=str(stopped))
        except Away as away:
            return Ending(status="failed", failure_class="node", message=str(away))
        self._watch.expect(self.members, self.names)
        return None

    def exchange(self, name: str, payload: Any) -> list[Any] | None:
        """Give this node's JSON values under a name; on node 0 those of all members in their order, else None.

        Raises:
            Away: a node did not answer within cluster.join_timeout_s; Stopped: a signal came.
        """
        self._store.set(self._of(name, self.node.rank), json.dumps(payload))
        if self.node.rank > 0:
            return None
        for rank in self.members:
            for _ in self._until(f"node {rank} ({self.names.get(rank, '?')})"):
                if self._store.check([self._of(name, rank)]):
                    break
        return [json.loads(self._store.get(self._of(name, rank))) for rank in self.members]

    def broadcast(self, name: str, payload: Any = None) -> Any:
        """Node 0's JSON values under a name, on every node; `payload` counts on node 0 alone.

        Raises:
            Away, Stopped: as `exchange`.
        """
        if self.node.rank == 0:
            self._store.set(self._of(name, "all"), json.dumps(payload))
            return payload
        for _ in self._until(f"node 0 ({self.names[0]})"):
            if self._store.check([self._of(name, "all")]):
                break
        return json.loads(self._store.get(self._of(name, "all")))

    # training

    def lost(self) -> str | None:
        """Which node is lost to this one and since when; None if all is well."""
        return self._watch.lost()

    def tell(self, word: str) -> None:
        """What node 0 is to read of this node, and the others of node 0, with the next beat; waits for nobody."""
        self._watch.word = word

    def told(self) -> dict[int, str]:
        """By node rank what was told last: on node 0 by each of the others, elsewhere by node 0."""
        return dict(self._watch.words)

    def give_up(self, ending: Ending) -> None:
        """On the others: why the ranks of this node were ended, which ends the attempt; node 0 says how it counts."""
        if self.node.rank > 0 and self._node_0_answers():
            with contextlib.suppress(RuntimeError):
                self._store.set(_key("gave-up"), json.dumps([self.attempt, _brief(ending)]))

    def given_up(self) -> Ending | None:
        """Why the ranks of this node are to end, too; None while all is well.

        On node 0: another node has ended its own. On the others: node 0 has concluded the attempt, as without a node
        that was cut off, for which ranks here would wait for long.
        """
        attempt, ending = self._watch.gave_up
        return ending if attempt == self.attempt else None

    def growth(self) -> str | None:
        """On node 0, once an attempt: which nodes wait to be taken in; None if none does, or others may come yet."""
        if self._grown or not (more := self._watch.waiting(self.members)):
            return None
        self._grown = True
        self.names |= more
        return ", ".join(f"node {rank} ({name})" for rank, name in sorted(more.items()))

    def enough(self, least: int) -> bool:
        """On node 0, when an attempt has ended: whether the nodes that are there suffice for another."""
        return len(self._watch.present()) >= least

    # ending

    def last_word(self, died: Mapping[int, str]) -> None:
        """On the others: say that the ranks of this node have ended; node 0 may have gone."""
        if not self._node_0_answers():
            return
        try:
            self._store.set(
                self._of("word", self.node.rank), json.dumps({str(rank): how for rank, how in died.items()})
            )
        except RuntimeError:
            return

    def last_words(self) -> tuple[dict[int, str], list[str]]:
        """On node 0: how processes on other nodes died, by rank, and which nodes have not said a last word."""
        died: dict[int, str] = {}
        silent = []
        deadline = time.monotonic() + _LAST_WORDS_S
        for rank in self.members[1:]:
            while not self._store.check([self._of("word", rank)]):
                if time.monotonic() >= deadline or self._watch.has_gone(rank):
                    silent.append(f"node {rank} ({self.names.get(rank, '?')})")
                    break
                time.sleep(_POLL_S)
            else:
                words = json.loads(self._store.get(self._of("word", rank)))
                died |= {int(rank): how for rank, how in words.items()}
        return died, silent

    def conclude(self, ending: Ending, *, wait_s: float = 0.0) -> None:
        """On node 0: tell the others how the attempt counts; where it is the last, those that live get time to read it.

        wait_s: for nodes that have not come yet
        """
        self._store.set(self._of("end"), json.dumps(_brief(ending)))
        if ending.again:
            return
        self.finish(ending, wait_s=wait_s)

    def finish(self, ending: Ending, *, wait_s: float = 0.0) -> None:
        """On node 0: say how the job ended here, to those that train and to those that wait."""
        self._store.set(_key("over"), json.dumps(_brief(ending)))
        began = time.monotonic()
        others = range(1, self.node.nodes) if wait_s else sorted({*self.members, *self._watch.present()} - {0})
        for rank in others:
            while not self._store.check([_key("bye", rank)]) and not self._watch.has_gone(rank):
                patience = GONE_S if self._store.check([_key("node", rank)]) else wait_s
                if time.monotonic() - began >= patience:
                    break
                time.sleep(_POLL_S)
        self._watch.stop()

    def concluded(self) -> Ending | None:
        """On the others: how node 0 says that the attempt ended; None if it has gone without a word."""
        deadline = time.monotonic() + _VERDICT_S + _LAST_WORDS_S
        try:
            while self._node_0_answers() and time.monotonic() < deadline:
                if self._store.check([self._of("end")]):
                    ending = _full(json.loads(self._store.get(self._of("end"))))
                    if ending is None or not ending.again:
                        self.goodbye()
                    return ending
                time.sleep(_POLL_S)
        except RuntimeError:
            pass
        self._watch.stop()
        return None

    def goodbye(self) -> None:
        """On the others: node 0 need not wait for this node any more."""
        try:
            self._store.set(_key("bye", self.node.rank), "")
        except RuntimeError:  # it has gone
            return
        finally:
            self._watch.stop()

    def leave(self) -> None:
        """End without a word to anybody."""
        self._watch.stop()

    def _node_0_answers(self) -> bool:
        """Whether a question to its store can be asked; behind a link that was cut it would wait for minutes."""
        return not self._watch.broken and not self._watch.stands_still(0, GONE_S)

    def _of(self, *parts: object) -> str:
        """A key of the attempt under way."""
        return _key(f"attempt-{self.attempt}", *parts)

    def _until(
        self, whom: str, say: Say = lambda text: None, *, patient: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """Yields until the caller has what it waits for, which is polled.

        patient: whether the time limit does not count now

        Raises:
            Away: it took longer than cluster.join_timeout_s, or the connection to node 0 broke; Stopped: a signal came.
        """
        began = said = time.monotonic()
        while True:
            if self._signals.stop is not None:
                raise Stopped(f"{self._signals.stop} while waiting for {whom}")
            try:
                yield
            except RuntimeError as error:  # of the store
                raise Away(f"{whom} has gone: {error}") from None
            if (lost := self._watch.lost()) is not None:
                raise Away(lost)
            now = time.monotonic()
            if now - began >= self.node.join_timeout_s and not patient():
                raise Away(f"{whom} did not come within {self.node.join_timeout_s} s (cluster.join_timeout_s)")
            if now - said >= _SAY_EVERY_S:
                said = now
                say(f"waiting for {whom} since {now - began:.0f} s")
            time.sleep(_POLL_S)


def host(node: Node, signals: Signals) -> Meeting:
    """Node 0: make the store that all nodes of the attempt share; its port was found free.

    Raises:
        UserError: somebody has taken the port meanwhile, as another node 0 that was started at the same moment.
    """
    assert node.rendezvous is not None
    name, port = address(node.rendezvous, name="--rendezvous")
    _quiet_torch()
    from torch.distributed import DistNetworkError, TCPStore

    try:
        store = TCPStore(name, port, is_master=True, wait_for_workers=False)
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise taken(node.rendezvous, name="--rendezvous") from None
    return Meeting(store, node, signals)


def join(node: Node, signals: Signals, say: Say) -> Meeting:
    """The others: find node 0's store, which may come later.

    Raises:
        UserError: its machine cannot be reached; or this node's number is taken.
        Away: it did not come within cluster.join_timeout_s; Stopped: a signal came.
    """
    assert node.rendezvous is not None
    name, port = address(node.rendezvous, name="--rendezvous")
    _quiet_torch()
    while True:
        _await_listener(name, port, node, signals, say)
        try:
            return Meeting(_connected(name, port, signals), node, signals)
        except Away:
            if _listens(name, port) is None:
                raise  # nothing that answers as node 0


def twice_node_0(node: Node) -> str | None:
    """Told to the node 0 that listens at the rendezvous, and here: there are two; None if none answers at once."""
    assert node.rendezvous is not None
    name, port = address(node.rendezvous, name="--rendezvous")
    if _listens(name, port) is not None:
        return None
    _quiet_torch()
    try:
        store = _connected(name, port, None, wait_s=_TWIN_S)
        if not store.check([_key("node", 0)]):
            return None
        problem = _twice(0, json.loads(store.get(_key("node", 0)))[0])
        store.set(_key("problem"), problem)
    except (RuntimeError, ValueError, Away):
        return None
    return problem


def listens(node: Node) -> bool:
    """Whether somebody listens at the rendezvous."""
    assert node.rendezvous is not None
    return _listens(*address(node.rendezvous, name="--rendezvous")) is None


def _await_listener(name: str, port: int, node: Node, signals: Signals, say: Say) -> None:
    began = time.monotonic()
    unreached = said = None
    while (error := _listens(name, port)) is not None:
        now = time.monotonic()
        if signals.stop is not None:
            raise Stopped(f"{signals.stop} while waiting for node 0")
        if now - began >= node.join_timeout_s:
            where = f"{node.rendezvous} ({error.strerror or error})"
            raise Away(f"node 0 did not answer at {where} within {node.join_timeout_s} s (cluster.join_timeout_s)")
        unreached = None if isinstance(error, ConnectionRefusedError) else unreached or now
        if unreached is not None and now - unreached >= UNREACHED_S and not node.names_may_come:
            raise UserError(
                f"--rendezvous {node.rendezvous}: {socket.gethostname()} cannot reach {name} "
                f"({error.strerror or error}). Is it up, and is port {port} open between the nodes? "
                "Give an address of node 0 that this node reaches."
            )
        if said is None or now - said >= _SAY_EVERY_S:
            said = now
            say(f"waiting for node 0 at {node.rendezvous} ({error.strerror or error})")
        time.sleep(0.2)


def _listens(name: str, port: int) -> OSError | None:
    """None if somebody listens there, else what is in the way."""
    try:
        with socket.create_connection((name, port), timeout=3):
            return None
    except OSError as error:
        return error


def _connected(name: str, port: int, signals: Signals | None, *, wait_s: float = 60.0) -> Any:
    """A client of the store; a listener that is no store is not waited for longer than that."""
    got: list[Any] = []

    def connect() -> None:
        from torch.distributed import TCPStore

        try:
            wait = timedelta(seconds=wait_s)
            got.append(TCPStore(name, port, is_master=False, wait_for_workers=False, timeout=wait))
        except Exception as error:
            got.append(error)

    threading.Thread(target=connect, name="join", daemon=True).start()
    given_up = time.monotonic() + wait_s + _SLACK_S
    while not got:
        if time.monotonic() >= given_up:
            raise Away(f"what listens at {name}:{port} does not answer as node 0")
        if signals is not None and signals.stop is not None:
            raise Stopped(f"{signals.stop} while waiting for node 0")
        time.sleep(_POLL_S)
    if isinstance(got[0], Exception):
        raise Away(f"what listens at {name}:{port} does not answer as node 0: {got[0]}")
    return got[0]


def _quiet_torch() -> None:
    """Keep torch's stack traces of a store that has gone from the console; it is read when torch is first imported.

    The ranks' fork server, which has its environment already, goes on to show them in the ranks' logs.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _beats(store: Any, rank: int, registration: str) -> bool:
    """Whether the process that registered so lives: whether its counter moves within the time of several beats."""
    key, deadline = _beat_key(rank, registration), time.monotonic() + GONE_S
    count = store.add(key, 0)
    while time.monotonic() < deadline:
        if store.add(key, 0) != count:
            return True
        time.sleep(_POLL_S)
    return False


def _beat_key(rank: int, registration: str) -> str:
    """Of one process: another one that has its number later counts on its own."""
    _, pid, _, began = json.loads(registration)
    return _key("beat", rank, pid, began)


def _few(count: int) -> str:
    return f"{count} node{'s' * (count != 1)}"


def _twice(rank: int, holder: str) -> str:
    me = socket.gethostname()
    where = f"twice on {me}" if holder == me else f"on {holder} and on {me}"
    return f"--node-rank {rank}: given {where}: expected another number on each node."


def _brief(ending: Ending | None) -> dict[str, Any] | None:
    return None if ending is None else asdict(ending)


def _full(values: dict[str, Any] | None) -> Ending | None:
    return None if values is None else Ending(**values)


def _key(*parts: object) -> str:
    return "/".join(["launcher", *map(str, parts)])


@dataclass(slots=True)
class _Seen:
    """A process on another node.

    moved: when its counter last did, by this node's own clock; back: what it counted when it moved after a standstill,
    which one late packet of a node that has gone does, too
    """

    name: str
    key: str
    came: float
    moved: float
    count: int = 0
    back: int = 0

    @property
    def stays(self) -> bool:
        """Whether it has shown several times in a row that it lives."""
        return self.count - self.back >= _STAYS


class _Watch:
    """A thread that shows that this node lives and sees who else does.

    Node 0 reads the others' counters, the others node 0's. Only this node's own clock is used.
    """

    def __init__(self, store: Any, node: Node, beat: str, signals: Signals) -> None:
        self._store, self._node, self._beat, self._signals = store, node, beat, signals
        self._names: dict[int, str] = {0: "?"} if node.rank else {}
        self._members: list[int] = [0] if node.rank else []
        self._seen: dict[int, _Seen] = {}
        self._replaced: set[int] = set()  # members whose number another process has taken since the attempt began
        self._read = 0  # arrivals
        self.word, self.words = "", dict[int, str]()  # what this node tells, and what others have told last
        self.attempt = 0
        self.gave_up: tuple[int, Ending | None] = (0, None)  # of which attempt another node ended its ranks, and why
        self._broken_at: float | None = None
        self._ended = threading.Event()
        if node.rank > 0:
            self._enter(0, store.get(_key("node", 0)).decode())
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> bool:
        """Whether the connection to node 0 ended."""
        return self._broken_at is not None

    def expect(self, members: Collection[int], names: Mapping[int, str]) -> None:
        """From now on the loss of these nodes counts."""
        self._members, self._names = [rank for rank in members if rank != self._node.rank], dict(names)
        self._replaced.clear()

    def present(self) -> dict[int, str]:
        """On node 0: the nodes that live, this one among them, and their names."""
        seen = {rank: one for rank, one in list(self._seen.items()) if one.stays or not one.back}
        others = {rank: one.name for rank, one in seen.items() if not self.stands_still(rank, GONE_S)}
        return {self._node.rank: socket.gethostname(), **others}

    def waiting(self, members: Collection[int]) -> dict[int, str]:
        """On node 0: nodes that live and are no members; none while others may be about to come, too."""
        there = {rank: name for rank, name in self.present().items() if rank not in members}
        more = {rank: name for rank, name in there.items() if self._seen[rank].stays}  # no passing visit
        complete = len(members) + len(more) == self._node.nodes
        newest = max((self._seen[rank].came for rank in more), default=0.0)
        return more if complete or time.monotonic() - newest >= TOGETHER_S else {}

    def lost(self) -> str | None:
        if self._broken_at is not None and time.monotonic() - self._broken_at >= GONE_S:
            return f"node 0 has gone: the connection to {self._node.rendezvous} ended"
        for rank in self._members:
            name = self._names.get(rank, "?")
            where = f" ({name})" if name != "?" else ""
            if rank in self._replaced:
                return f"node {rank}{where} is lost: it was started again"
            if self.stands_still(rank, LOST_S):
                return f"node {rank}{where} is lost: nothing was heard of it for {LOST_S:.0f} s"
        return None

    def has_gone(self, rank: int) -> bool:
        """Whether a member stands still, or is another process by now."""
        return rank in self._replaced or self.stands_still(rank, GONE_S)

    def stands_still(self, rank: int, seconds: float) -> bool:
        return rank in self._seen and time.monotonic() - self._seen[rank].moved >= seconds

    def stop(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        said = ""
        try:
            while True:
                self._store.add(self._beat, 1)
                if (word := self.word) != said:
                    self._store.set(_key("told", self._node.rank), word)
                    said = word
                if self._node.rank == 0:
                    self._read_arrivals()
                    self._hear()
                else:
                    self._hear_end(self.attempt)
                for rank, seen in list(self._seen.items()):
                    if self._store.check([_key("told", rank)]):
                        self.words[rank] = self._store.get(_key("told", rank)).decode()
                    count = self._store.add(seen.key, 0)
                    if count != seen.count:
                        now = time.monotonic()
                        seen.back = seen.count if now - seen.moved >= GONE_S else seen.back
                        seen.count, seen.moved = count, now
                if self._ended.wait(BEAT_S):
                    return
        except Exception:  # the connection ended, as when node 0 has gone
            self._broken_at = time.monotonic()

    def _read_arrivals(self) -> None:
        """Nodes that have registered since the last look, in their order."""
        while self._store.check([_key("arrival", self._read + 1)]):
            self._read += 1
            rank, registration = json.loads(self._store.get(_key("arrival", self._read)))
            if rank in self._seen and rank in self._members:
                self._replaced.add(rank)
            self._enter(rank, registration)

    def _enter(self, rank: int, registration: str) -> None:
        now = time.monotonic()
        self._seen[rank] = _Seen(json.loads(registration)[0], _beat_key(rank, registration), came=now, moved=now)

    def _hear_end(self, attempt: int) -> None:
        """On the others: whether node 0 has concluded the attempt."""
        if self._store.check([end := _key(f"attempt-{attempt}", "end")]):
            self.gave_up = attempt, _full(json.loads(self._store.get(end)))

    def _hear(self) -> None:
        """Another node's signal, also where the attempts pause, and why one gave up."""
        if self._store.check([_key("gave-up")]):
            attempt, ending = json.loads(self._store.get(_key("gave-up")))
            self.gave_up = attempt, _full(ending)
        if self._signals.stop is None and self._store.check([_key("stop")]):
            self._signals.stop = self._store.get(_key("stop")).decode()
