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


# attempts of different nodes


@pytest.fixture
def quick(monkeypatch):
    """Heartbeats and waits of tenths of a second."""
    monkeypatch.setattr(meeting, "BEAT_S", 0.05)
    monkeypatch.setattr(meeting, "GONE_S", 2.0)
    monkeypatch.setattr(meeting, "MORE_S", 0.5)
    monkeypatch.setattr(meeting, "TOGETHER_S", 0.2)


def until(holds, timeout_s: float = 60):
    deadline = time.monotonic() + timeout_s
    while not (value := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def test_enough_nodes_begin_after_a_wait_for_the_rest_and_the_missing_number_is_left_out(quick, leader, node):
    second = enter(node(2))
    said = []
    assert leader.gather(2, said.append) is None
    assert (leader.members, leader.names[2]) == ([0, 2], socket.gethostname())
    leader.announce(1, "token", None)
    assert second.announced() == (1, "token", None)
    assert second.members == [0, 2]
    second.come()
    assert leader.await_all(quietly) is None
    second.leave()


def test_all_nodes_begin_at_once(leader, node):
    others = [enter(node(rank)) for rank in (1, 2)]
    began = time.monotonic()
    assert leader.gather(2, quietly) is None
    assert time.monotonic() - began < meeting.MORE_S
    assert leader.members == [0, 1, 2]
    for other in others:
        other.leave()


def test_too_few_nodes_end_the_wait_with_both_keys(quick, node):
    leader = host(node(0, join_timeout_s=1), Signals())
    ending = leader.gather(2, quietly)
    assert ending.failure_class == "node"
    assert ending.message == (
        "1 node of the 2 that suffice (cluster.min_nodes) came within 1 s (cluster.join_timeout_s)"
    )
    leader.leave()


def test_a_node_that_comes_in_mid_attempt_waits_and_is_taken_into_the_next_one(quick, leader, node):
    first = enter(node(1))
    assert leader.gather(2, quietly) is None
    leader.announce(1, "token", None)
    assert first.announced()[0] == 1
    assert leader.growth() is None
    late, told = enter(node(2)), []
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(late.announced, told.append)
        assert until(leader.growth) == f"node 2 ({socket.gethostname()})"
        assert leader.growth() is None  # asked for once
        assert not waiting.done()
        assert late.outside
        leader.conclude(Ending(status="preempted", failure_class="resize", again=True))
        assert first.concluded().again
        assert leader.gather(2, quietly) is None
        leader.announce(2, "token", None)
        assert waiting.result(timeout=60) == (2, "token", None)
        assert first.announced() == (2, "token", None)
    assert "attempt 1 goes on without this node" in told[0]
    assert late.members == first.members == [0, 1, 2]
    late.leave()
    first.leave()


def test_a_number_is_taken_over_from_a_process_that_has_gone_which_ends_the_attempt(quick, leader, node):
    first, old = enter(node(1)), enter(node(2))
    assert leader.gather(2, quietly) is None
    leader.announce(1, "token", None)
    assert (first.announced()[0], old.announced()[0]) == (1, 1)
    old.leave()  # its heartbeat stands still from here on
    new = enter(node(2))
    assert until(leader.lost) == f"node 2 ({socket.gethostname()}) is lost: it was started again"
    first.last_word({})
    assert leader.last_words() == ({}, [f"node 2 ({socket.gethostname()})"])
    assert leader.enough(2)
    leader.conclude(Ending(status="failed", failure_class="node", again=True))
    assert leader.gather(2, quietly) is None
    leader.announce(2, "token", None)
    assert new.announced()[0] == 2
    assert leader.lost() is None
    for other in (first, new):
        other.leave()


def test_a_lost_node_is_left_out_of_the_next_attempt_at_once(quick, leader, node):
    others = [enter(node(rank)) for rank in (1, 2)]
    assert leader.gather(2, quietly) is None
    leader.announce(1, "token", None)
    others[1].leave()
    until(lambda: len(leader._watch.present()) == 2)
    leader.conclude(Ending(status="failed", failure_class="node", again=True))
    assert leader.gather(2, quietly) is None
    assert leader.members == [0, 1]
    assert not leader.enough(3)
    others[0].leave()


def test_a_node_that_waits_hears_how_the_last_attempt_ended(quick, leader, node):
    first = enter(node(1))
    assert leader.gather(2, quietly) is None
    leader.announce(1, "token", None)
    first.announced()
    late = enter(node(2))
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(late.announced)
        until(lambda: late.outside)
        finishing = pool.submit(leader.conclude, Ending(status="finished", step=9))
        assert first.concluded().status == "finished"
        assert waiting.result(timeout=60)[2].step == 9
        assert late.over
        late.goodbye()
        finishing.result(timeout=60)


def test_a_signal_on_a_node_that_only_waits_ends_that_node_alone(quick, leader, node):
    first, signals = enter(node(1)), Signals()
    assert leader.gather(2, quietly) is None
    leader.announce(1, "token", None)
    first.announced()
    late = enter(node(2), signals)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(late.announced)
        until(lambda: late.outside)
        signals.stop = "SIGTERM"
        with pytest.raises(Stopped, match="SIGTERM while waiting for node 0"):
            waiting.result(timeout=60)
    late.ask_to_stop("SIGTERM")
    assert leader.disturbance() is None
    assert leader._signals.stop is None
    first.leave()
    late.leave()


def test_a_mistake_on_a_node_that_comes_in_mid_attempt_ends_that_node_alone(quick, leader, node):
    first = enter(node(1))
    assert leader.gather(2, quietly) is None
    leader.announce(1, "token", None)
    leader.settle(None)
    with pytest.raises(UserError, match="--node-rank 1: given twice"):
        enter(node(1))
    wrong = enter(node(2))
    wrong.refuse("node 2 (b): training needs torch")
    wrong.leave()
    assert leader.disturbance() is None
    until(lambda: leader._watch.stands_still(2, 2.0))
    assert leader.growth() is None  # it was never there to stay
    first.leave()


def test_a_node_that_gives_up_tells_node_0_why(quick, leader, node):
    first = enter(node(1))
    assert leader.gather(2, quietly) is None
    leader.announce(1, "token", None)
    first.announced()
    stuck = Ending(status="failed", failure_class="hang", message="the fork server stands still")
    first.give_up(stuck)
    assert until(leader.given_up) == stuck
    leader.announce(2, "token", None)
    assert leader.given_up() is None  # of the attempt before
    first.leave()


def test_ranks_elsewhere_end_when_node_0_has_concluded_the_attempt(quick, leader, node):
    """They may wait for a node that is cut off, and say nothing themselves."""
    first = enter(node(1))
    assert leader.gather(2, quietly) is None
    leader.announce(1, "token", None)
    first.announced()
    assert first.given_up() is None
    lost = Ending(status="failed", failure_class="node", again=True)
    leader.conclude(lost)
    assert until(first.given_up) == lost
    leader.announce(2, "token", None)
    first.announced()
    assert first.given_up() is None
    first.leave()
