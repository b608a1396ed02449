"""The store through which nodes speak: numbers given twice, refusals, who is lost, and what node 0 says at the end."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from launcher.errors import UserError
from launcher.jobs import meeting
from launcher.jobs.agent import Node
from launcher.jobs.ending import Ending
from launcher.jobs.meeting import Away, Stopped, host, join
from launcher.jobs.signals import Signals
from tests.ranks import free_port

pytestmark = pytest.mark.slow


@pytest.fixture
def node():
    """Makes the place of a node rank in one job."""
    port = free_port()

    def make(rank: int, nodes: int = 3, join_timeout_s: int = 60) -> Node:
        return Node(nodes=nodes, rank=rank, rendezvous=f"127.0.0.1:{port}", join_timeout_s=join_timeout_s)

    return make


@pytest.fixture
def leader(node):
    made = host(node(0), Signals())
    yield made
    made.leave()


def enter(node: Node, signals: Signals | None = None) -> meeting.Meeting:
    return join(node, signals or Signals(), lambda text: None)


def quietly(text: str) -> None:
    pass


def test_a_node_rank_given_twice_is_named_on_both_sides(leader, node):
    first = enter(node(1))
    with pytest.raises(UserError) as refused:
        enter(node(1))
    text = f"--node-rank 1: given twice on {socket.gethostname()}: expected another number on each node."
    assert str(refused.value) == text
    ending = leader.await_all(quietly)
    assert (ending.failure_class, ending.message) == ("user", text)
    leader.announce(1, "token", ending)
    assert first.announced()[2].message == text
    first.leave()


def test_a_second_node_0_is_told_and_tells_the_first(leader, node):
    text = meeting.twice_node_0(node(0))
    assert text.startswith("--node-rank 0: given twice on ")
    assert leader.disturbance().message == text


def test_two_node_0_at_the_same_moment_are_told_what_a_taken_port_says(leader, node):
    with pytest.raises(UserError, match=r"port \d+ is taken on this machine. Is another node 0 running here"):
        host(node(0), Signals())


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 8])
def test_a_listener_that_is_no_node_0_is_given_up_within_seconds(node, answer, monkeypatch):
    monkeypatch.setattr(meeting, "_TWIN_S", 0.5)
    monkeypatch.setattr(meeting, "_SLACK_S", 0.5)
    place = node(0)
    with socket.create_server(("127.0.0.1", int(place.rendezvous.rpartition(":")[2]))) as listener:
        answering = threading.Thread(target=_answer, args=(listener, answer), daemon=True)
        answering.start()
        assert meeting.twice_node_0(place) is None
    answering.join()


def _answer(listener: socket.socket, text: bytes) -> None:
    """Says the same to everybody, to whom the lines stay open."""
    lines = []
    listener.settimeout(0.1)
    while listener.fileno() >= 0:
        try:
            lines.append(listener.accept()[0])
            lines[-1].sendall(text)
        except OSError:
            continue
    for line in lines:
        line.close()


def test_nodes_that_count_the_job_otherwise_are_refused_on_both_sides(leader, node):
    with pytest.raises(UserError, match=r"--nodes: .* \(node 0\) counts 3, .* \(node 1\) 2: expected the same"):
        enter(node(1, nodes=2))
    assert "expected the same on every node" in leader.disturbance().message


def test_a_node_that_cannot_take_part_ends_the_wait_for_all(leader, node):
    other = enter(node(2))
    other.refuse("node 2 (b): training needs torch")
    assert leader.await_all(quietly).message == "node 2 (b): training needs torch"
    other.leave()


def test_a_signal_on_a_waiting_node_stops_the_job_where_node_0_waits(leader, node):
    signals = Signals()
    other = enter(node(1), signals)
    signals.stop = "SIGTERM"
    with pytest.raises(Stopped, match="SIGTERM while waiting for node 0"):
        other.announced()
    other.ask_to_stop("SIGTERM")
    ending = leader.await_all(quietly)
    assert (ending.status, ending.failure_class) == ("preempted", "preemption")
    assert f"SIGTERM on node 1 ({socket.gethostname()})" in ending.message
    other.leave()


def test_a_node_that_does_not_come_ends_the_wait_with_its_number_and_the_key(node):
    leader = host(node(0, join_timeout_s=1), Signals())
    ending = leader.await_all(quietly)
    assert ending.failure_class == "node"
    assert ending.message == "node 1 did not come within 1 s (cluster.join_timeout_s)"
    leader.leave()


def test_a_node_0_that_does_not_come_ends_the_wait_with_the_key(node):
    said = []
    with pytest.raises(Away, match=r"node 0 did not answer at .* within 1 s \(cluster.join_timeout_s\)"):
        join(node(1, join_timeout_s=1), Signals(), said.append)
    assert "waiting for node 0 at 127.0.0.1" in said[0]


def test_all_come_exchange_and_hear_how_it_ended(leader, node):
    others = [enter(node(rank)) for rank in (1, 2)]
    with ThreadPoolExecutor() as pool:
        leader.announce(4, "token", None)

        def follow(other):
            attempt, token, ending = other.announced()
            assert (attempt, token, ending) == (4, "token", None)
            other.come()
            assert other.settled() is None
            assert other.exchange("facts", {"rank": other.node.rank}) is None
            said = other.broadcast("verdict")
            other.last_word({other.node.rank: "killed by SIGKILL"} if other.node.rank == 2 else {})
            return said, other.concluded()

        futures = [pool.submit(follow, other) for other in others]
        assert leader.await_all(quietly) is None
        leader.settle(None)
        assert leader.exchange("facts", {"rank": 0}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        leader.broadcast("verdict", "good")
        assert leader.last_words() == ({2: "killed by SIGKILL"}, [])
        ending = Ending(status="failed", failure_class="unknown", step=3, rank=2, verdict="requeue", why="once more")
        leader.conclude(ending)
        assert [future.result(timeout=60) for future in futures] == [("good", ending)] * 2


def test_a_node_that_stands_still_is_lost_and_named(leader, node, monkeypatch):
    monkeypatch.setattr(meeting, "BEAT_S", 0.05)
    others = [enter(node(rank)) for rank in (1, 2)]
    for other in others:
        other.come()
    assert leader.await_all(quietly) is None
    assert leader.lost() is None
    monkeypatch.setattr(meeting, "LOST_S", 3.0)
    others[1].leave()  # its counter stands still from here on
    deadline = time.monotonic() + 60
    while (lost := leader.lost()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lost == f"node 2 ({socket.gethostname()}) is lost: nothing was heard of it for 3 s"
    others[0].leave()


def test_a_node_0_that_has_gone_is_noticed_and_is_asked_nothing_more(node, monkeypatch):
    monkeypatch.setattr(meeting, "BEAT_S", 0.05)
    monkeypatch.setattr(meeting, "GONE_S", 0.2)
    leader = host(node(0), Signals())
    other = enter(node(1))
    leader.leave()  # its counter stands still from here on
    monkeypatch.setattr(meeting, "LOST_S", 1.0)
    with pytest.raises(Away, match=r"node 0 .*is lost: nothing was heard of it for 1 s"):
        other.announced()
    assert other.concluded() is None
    other.last_word({})
