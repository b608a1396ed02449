"""The store on node 0 through which the nodes of one attempt speak: who takes part, how it goes, and how each ended.

Node 0 makes it; it lives and dies with the attempt. Whoever stands still for `LOST_S` is lost to the others.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
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
    """

    def __init__(self, store: Any, node: Node, signals: Signals) -> None:
        self._store, self.node, self._signals = store, node, signals
        self.names: dict[int, str] = {node.rank: socket.gethostname()}
        self._register()
        self._watch = _Watch(store.clone(), node)

    # joining

    def _register(self) -> None:
        """Take this node's number, which nobody else may have.

        Raises:
            UserError: somebody has it, or counts the nodes of the job otherwise; node 0 is told.
        """
        node, store = self.node, self._store
        own = json.dumps([socket.gethostname(), os.getpid(), node.nodes, time.time_ns()])
        holder = store.compare_set(_key("node", node.rank), "", own).decode()
        if holder != own:
            raise self._refused(_twice(node.rank, json.loads(holder)[0]))
        if node.rank > 0:
            host, _, nodes, _ = json.loads(store.get(_key("node", 0)))
            self.names[0] = host
            if nodes != node.nodes:
                raise self._refused(
                    f"--nodes: {host} (node 0) counts {nodes}, {socket.gethostname()} (node {node.rank}) {node.nodes}: "
                    "expected the same on every node."
                )

    def _refused(self, problem: str) -> UserError:
        self._store.set(_key("problem"), problem)
        return UserError(problem)

    def refuse(self, problem: str) -> None:
        """Tell node 0 that this node cannot take part; it ends the attempt for all."""
        self._store.set(_key("problem"), problem)

    def ask_to_stop(self, reason: str) -> None:
        """Tell node 0 that a signal came here while it is waited for."""
        self._store.set(_key("stop"), f"{reason} on node {self.node.rank} ({socket.gethostname()})")

    def disturbance(self) -> Ending | None:
        """On node 0, while nodes come and data is prepared: why the attempt is to end, if it is."""
        if self._store.check([_key("problem")]):
            return Ending(status="failed", failure_class="user", message=self._store.get(_key("problem")).decode())
        if self._signals.stop is None and self._store.check([_key("stop")]):
            self._signals.stop = self._store.get(_key("stop")).decode()
        return None

    def announce(self, attempt: int, token: str, ending: Ending | None) -> None:
        """On node 0: tell the others which attempt this is, or how it ended already."""
        self._store.set(_key("attempt"), json.dumps([attempt, token, _brief(ending)]))

    def announced(self) -> tuple[int, str, Ending | None]:
        """On the others: the attempt, the run directory's token, and how it ended if no rank is to start.

        Raises:
            Away: node 0 went, or took too long; Stopped: a signal came.
        """
        for _ in self._until(f"node 0 ({self.names[0]})"):
            if self._store.check([_key("attempt")]):
                break
        attempt, token, ending = json.loads(self._store.get(_key("attempt")))
        return attempt, token, _full(ending)

    def come(self, problem: str = "") -> None:
        """On the others: say that this node saw the announcement, or why it cannot take part."""
        self._store.set(_key("seen", self.node.rank), problem)

    def settle(self, ending: Ending | None) -> None:
        """On node 0, when all have come or will not: let the others start their ranks, or say how the attempt ended."""
        self._store.set(_key("settled"), json.dumps(_brief(ending)))

    def settled(self) -> Ending | None:
        """On the others: wait until all have come; how the attempt ended where they have not.

        Raises:
            Away, Stopped: as `announced`.
        """
        for _ in self._until(f"node 0 ({self.names[0]}) and the other nodes"):
            if self._store.check([_key("settled")]):
                break
        return _full(json.loads(self._store.get(_key("settled"))))

    def await_all(self, say: Say) -> Ending | None:
        """On node 0: wait until every node has seen the announcement; how the attempt ends where one does not."""
        try:
            for rank in range(1, self.node.nodes):
                for _ in self._until(f"node {rank}", say=say):
                    if (ending := self.disturbance()) is not None:
                        return ending
                    if self._store.check([_key("seen", rank)]):
                        break
                self.names[rank] = json.loads(self._store.get(_key("node", rank)))[0]
                if problem := self._store.get(_key("seen", rank)).decode():
                    return Ending(status="failed", failure_class="user", message=problem)
        except Stopped as stopped:
            return Ending(status="preempted", failure_class="preemption", message=str(stopped))
        except Away as away:
            return Ending(status="failed", failure_class="node", message=str(away))
        self._watch.expect(self.names)
        return None

    def exchange(self, name: str, payload: Any) -> list[Any] | None:
        """Give this node's JSON values under a name; on node 0 those of all nodes by node rank, elsewhere None.

        Raises:
            Away: a node did not answer within cluster.join_timeout_s; Stopped: a signal came.
        """
        self._store.set(_key(name, self.node.rank), json.dumps(payload))
        if self.node.rank > 0:
            return None
        for rank in range(self.node.nodes):
            for _ in self._until(f"node {rank} ({self.names.get(rank, '?')})"):
                if self._store.check([_key(name, rank)]):
                    break
        return [json.loads(self._store.get(_key(name, rank))) for rank in range(self.node.nodes)]

    def broadcast(self, name: str, payload: Any = None) -> Any:
        """Node 0's JSON values under a name, on every node; `payload` counts on node 0 alone.

        Raises:
            Away, Stopped: as `exchange`.
        """
        if self.node.rank == 0:
            self._store.set(_key(name, "all"), json.dumps(payload))
            return payload
        for _ in self._until(f"node 0 ({self.names[0]})"):
            if self._store.check([_key(name, "all")]):
                break
        return json.loads(self._store.get(_key(name, "all")))

    # training

    def lost(self) -> str | None:
        """Which node is lost to this one and since when; None if all is well."""
        return self._watch.lost()

    def tell(self, word: str) -> None:
        """What node 0 is to read of this node, or on node 0 all the others, with the next beats; it waits for nobody."""
        self._watch.word = word

    def told(self) -> dict[int, str]:
        """By node rank what was told last: on node 0 by each of the others, elsewhere by node 0."""
        return dict(self._watch.words)

    # ending

    def last_word(self, died: Mapping[int, str]) -> None:
        """On the others: say that the ranks of this node have ended; node 0 may have gone."""
        if not self._node_0_answers():
            return
        try:
            self._store.set(_key("word", self.node.rank), json.dumps({str(rank): how for rank, how in died.items()}))
        except RuntimeError:
            return

    def last_words(self) -> tuple[dict[int, str], list[str]]:
        """On node 0: how processes on other nodes died, by rank, and which nodes have not said a last word."""
        died: dict[int, str] = {}
        silent = []
        deadline = time.monotonic() + _LAST_WORDS_S
        for rank in range(1, self.node.nodes):
            while not self._store.check([_key("word", rank)]):
                if time.monotonic() >= deadline or self._watch.stands_still(rank, GONE_S):
                    silent.append(f"node {rank} ({self.names.get(rank, '?')})")
                    break
                time.sleep(_POLL_S)
            else:
                words = json.loads(self._store.get(_key("word", rank)))
                died |= {int(rank): how for rank, how in words.items()}
        return died, silent

    def conclude(self, ending: Ending, *, wait_s: float = 0.0) -> None:
        """On node 0: tell the others how the attempt counts, and give those that live time to read it.

        wait_s: for nodes that have not come yet
        """
        self._store.set(_key("end"), json.dumps(_brief(ending)))
        began = time.monotonic()
        for rank in range(1, self.node.nodes):
            while not self._store.check([_key("bye", rank)]) and not self._watch.stands_still(rank, GONE_S):
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
                if self._store.check([_key("end")]):
                    ending = _full(json.loads(self._store.get(_key("end"))))
                    self._store.set(_key("bye", self.node.rank), "")
                    return ending
                time.sleep(_POLL_S)
        except RuntimeError:
            pass
        finally:
            self._watch.stop()
        return None

    def leave(self) -> None:
        """End without a word to anybody."""
        self._watch.stop()

    def _node_0_answers(self) -> bool:
        """Whether a question to its store can be asked; behind a link that was cut it would wait for minutes."""
        return not self._watch.broken and not self._watch.stands_still(0, GONE_S)

    def _until(self, whom: str, say: Say = lambda text: None) -> Iterator[None]:
        """Yields until the caller has what it waits for, which is polled.

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
            if now - began >= self.node.join_timeout_s:
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


class _Watch:
    """A thread that shows that this node lives and sees who else does.

    Node 0 reads the others' counters, the others node 0's. Only this node's own clock is used.
    """

    def __init__(self, store: Any, node: Node) -> None:
        self._store, self._node = store, node
        self.word, self.words = "", dict[int, str]()
        self._names: dict[int, str] = {0: "?"} if node.rank else {}
        self._moved: dict[int, float] = {rank: time.monotonic() for rank in self._names}
        self._counts: dict[int, int] = {}
        self._broken_at: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> bool:
        """Whether the connection to node 0 ended."""
        return self._broken_at is not None

    def expect(self, names: Mapping[int, str]) -> None:
        """From now on these nodes are watched too."""
        now = time.monotonic()
        self._moved |= {rank: now for rank in names if rank != self._node.rank and rank not in self._moved}
        self._names = dict(names)

    def lost(self) -> str | None:
        if self._broken_at is not None and time.monotonic() - self._broken_at >= GONE_S:
            return f"node 0 has gone: the connection to {self._node.rendezvous} ended"
        for rank in list(self._moved):
            if self.stands_still(rank, LOST_S):
                name = self._names.get(rank, "?")
                where = f" ({name})" if name != "?" else ""
                return f"node {rank}{where} is lost: nothing was heard of it for {LOST_S:.0f} s"
        return None

    def stands_still(self, rank: int, seconds: float) -> bool:
        return rank in self._moved and time.monotonic() - self._moved[rank] >= seconds

    def stop(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        own, said = _key("beat", self._node.rank), ""
        try:
            while True:
                self._store.add(own, 1)
                if (word := self.word) != said:
                    self._store.set(_key("told", self._node.rank), word)
                    said = word
                for rank in list(self._moved):
                    count = self._store.add(_key("beat", rank), 0)
                    if count != self._counts.get(rank):
                        self._counts[rank] = count
                        self._moved[rank] = time.monotonic()
                    if self._store.check([_key("told", rank)]):
                        self.words[rank] = self._store.get(_key("told", rank)).decode()
                if self._ended.wait(BEAT_S):
                    return
        except Exception:  # the connection ended, as when node 0 has gone
            self._broken_at = time.monotonic()
