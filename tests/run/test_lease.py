"""One owner drives a run (L11): the second is refused, a dead one is succeeded, no child keeps the lease alive."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
from dataclasses import replace

import pytest

from launcher.errors import UserError
from launcher.run import lease as lease_module
from launcher.run.lease import LeaseHeld, Owner, Submission, current_owner, hold_lease
from tests.run.make import Script, make_run, start

HOLD = "from launcher.run.lease import hold_lease\nwith hold_lease(run):\n  say('held'); hear()\nsay('left')"


HOLD_AS = (
    "from launcher.run.lease import hold_lease, Submission\n"
    "mine = Submission(target='slurm', job_id='7', restart={restart})\n"
    "with hold_lease(run, submission=mine, heartbeat_s=0.05) as l:\n"
    "  say('held'); hear()\n  while not l.lost: __import__('time').sleep(0.01)\n  say('lost'); hear()\nsay('left')"
)


def start_of(job_id, restart, target="slurm"):
    return Submission(target=target, job_id=job_id, restart=restart)


def vars_of(owner):
    return {name: getattr(owner, name) for name in Owner.__dataclass_fields__}


def sign(run, **changes):
    """Leave the record of another owner, as one does that was killed."""
    with hold_lease(run) as lease:
        owner = lease.owner
    owner = replace(owner, **changes)
    record = json.dumps(vars_of(owner))
    (run.control / "lease").write_text(record.ljust(1024))
    return owner


def elsewhere(run, **changes):
    return sign(run, host="faraway", boot_id="another kernel", pid=1, token="theirs", **changes)


def test_second_start_in_a_live_run_is_refused_and_told_what_to_do_l11(tmp_path):
    run = make_run(tmp_path)
    with Script(run, HOLD) as owner:
        assert owner.heard() == "held"
        start(run)
        with pytest.raises(LeaseHeld) as refused, hold_lease(run):
            pass
        assert refused.value.owner.pid == owner.pid
        text = str(refused.value)
        where = f"host {socket.gethostname()}, pid {owner.pid}, attempt 1"
        for part in (where, "launcher status", "control/stop-request"):
            assert part in text
        owner.tell()
        assert owner.heard() == "left"
    with hold_lease(run) as lease:
        assert lease.taken_from is None


def test_second_holder_in_the_same_process_is_refused_l11(tmp_path):
    run = make_run(tmp_path)
    with hold_lease(run), pytest.raises(LeaseHeld), hold_lease(run):
        pass
    with hold_lease(run):
        pass


def test_of_two_that_start_at_once_one_goes_on_l11(tmp_path):
    run = make_run(tmp_path)
    code = (
        "from launcher.run.lease import hold_lease, LeaseHeld\nsay('ready'); hear()\ntry:\n"
        "  with hold_lease(run): say('held'); hear()\nexcept LeaseHeld: say('refused')"
    )
    with Script(run, code) as one, Script(run, code) as two:
        assert [one.heard(), two.heard()] == ["ready", "ready"]
        one.tell()
        two.tell()
        assert sorted([one.heard(), two.heard()]) == ["held", "refused"]


def test_lease_of_a_killed_owner_is_taken_over_at_once_l11(tmp_path):
    run = make_run(tmp_path)
    with Script(run, HOLD) as owner:
        assert owner.heard() == "held"
        owner.kill()
        with hold_lease(run, watch_s=600) as lease:
            assert lease.taken_from.pid == owner.pid
            assert not lease.lost


def test_stopped_owner_is_alive_l11(tmp_path):
    run = make_run(tmp_path)
    with Script(run, HOLD) as owner:
        assert owner.heard() == "held"
        os.kill(owner.pid, signal.SIGSTOP)
        with pytest.raises(LeaseHeld), hold_lease(run):
            pass
        assert current_owner(run)[1] is True


@pytest.mark.parametrize(
    "spawn",
    [
        "import subprocess; child = subprocess.Popen(['sleep', '600'], close_fds=False, stdout=subprocess.DEVNULL).pid",
        "child = os.fork()\n  if not child: os.closerange(0, 2); os.execvp('sleep', ['sleep', '600'])",
        "child = os.fork()\n  if not child: os.closerange(0, 2); os.kill(os.getpid(), 19); os._exit(0)",
    ],
    ids=["subprocess", "fork and exec", "fork alone"],
)
def test_surviving_child_does_not_keep_the_lease_of_its_dead_owner_l11(tmp_path, spawn):
    run = make_run(tmp_path)
    code = f"from launcher.run.lease import hold_lease\nwith hold_lease(run):\n  {spawn}\n  say(child); hear()"
    with Script(run, code) as owner:
        child = int(owner.heard())
        try:
            with pytest.raises(LeaseHeld), hold_lease(run):
                pass  # a child that drops its copy does not give the owner's lease away
            owner.kill()
            with hold_lease(run) as lease:
                assert lease.taken_from.pid == owner.pid
            os.kill(child, 0)  # it did survive
        finally:
            os.kill(child, signal.SIGKILL)


def test_forkserver_and_its_children_do_not_have_the_lease_l11(tmp_path):
    run = make_run(tmp_path)
    code = """
import multiprocessing
from launcher.run.lease import hold_lease
def main():
    context = multiprocessing.get_context('forkserver')
    with hold_lease(run):
        child = context.Process(target=__import__('signal').pause)
        child.start(); say(child.pid); hear()
main()
"""
    with Script(run, code) as owner:
        child = int(owner.heard())
        try:
            owner.kill()
            with hold_lease(run) as lease:
                assert lease.taken_from.pid == owner.pid
            os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_child_that_leaves_the_block_gives_nothing_back_and_writes_to_no_file_of_its_own(tmp_path):
    run = make_run(tmp_path)
    code = (
        "from launcher.run.lease import hold_lease, _held\n"
        "with hold_lease(run):\n  handle, = _held\n  child = os.fork()\n"
        "  if child: say(os.waitpid(child, 0)[1]); hear()\n"
        "  else: own = os.open(run.path / 'own', os.O_RDWR | os.O_CREAT); assert own == handle\n"
        "if not child: os._exit(os.fstat(own).st_size != 0)"
    )
    with Script(run, code) as owner:
        assert owner.heard() == "0"
        with pytest.raises(LeaseHeld) as refused, hold_lease(run):
            pass
        assert not refused.value.owner.released


def test_file_removed_between_opening_and_locking_is_not_the_lease(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    real = lease_module.fcntl.flock

    def late(handle, how):
        monkeypatch.setattr(lease_module.fcntl, "flock", real)
        shutil.rmtree(run.path)
        real(handle, how)

    monkeypatch.setattr(lease_module.fcntl, "flock", late)
    with hold_lease(run), pytest.raises(LeaseHeld), hold_lease(run):
        pass


def test_pid_that_belongs_to_a_later_process_is_a_dead_owner_l11(tmp_path):
    run = make_run(tmp_path)
    gone = sign(run, pid=os.getpid(), pid_start=1)
    assert current_owner(run)[1] is False
    with hold_lease(run, watch_s=600) as lease:
        assert lease.taken_from == gone


def test_owner_in_another_container_of_this_machine_is_alive_while_it_holds_the_lock_l11(tmp_path):
    """Its pid means another process here, but the lock is of the same kernel: held is alive, free is dead."""
    run = make_run(tmp_path)
    with hold_lease(run) as lease:
        record = {**vars_of(lease.owner), "pid": 1, "pid_namespace": "pid:[1]", "host": "box"}
        (run.control / "lease").write_text(json.dumps(record).ljust(1024))
        assert current_owner(run)[1] is True
        with pytest.raises(LeaseHeld, match="is being trained already: host box, pid 1"), hold_lease(run):
            pass
    (run.control / "lease").write_text(json.dumps(record).ljust(1024))
    assert current_owner(run)[1] is False
    with hold_lease(run, watch_s=600) as lease:
        assert lease.taken_from.host == "box"


def test_zombie_is_a_dead_owner_l11(tmp_path):
    run = make_run(tmp_path)
    with Script(run, HOLD) as owner:
        assert owner.heard() == "held"
        os.kill(owner.pid, signal.SIGKILL)
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # dead, and left unburied
        assert current_owner(run)[1] is False
        with hold_lease(run, watch_s=600):
            pass


def test_owner_on_another_host_whose_heartbeat_moves_is_alive_l11(tmp_path, monkeypatch):
    """Locks that do not reach the other host: the lock is free, the heartbeat is not still. No clock is compared."""
    run = make_run(tmp_path)
    owner = elsewhere(run, since=4e9)  # its clock is decades ahead
    looks = []

    def pause(seconds):
        looks.append(seconds)
        record = json.dumps({**vars_of(owner), "heartbeat": len(looks)})
        (run.control / "lease").write_text(record.ljust(1024))

    monkeypatch.setattr(lease_module.time, "sleep", pause)
    with pytest.raises(LeaseHeld, match=r"host faraway, pid 1"), hold_lease(run, watch_s=600):
        pass
    assert len(looks) == 1


def test_owner_on_another_host_whose_heartbeat_stands_still_is_succeeded_l11(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    owner = elsewhere(run, since=4e9)
    now = [1000.0]
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(lease_module.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    told = []
    with hold_lease(run, watch_s=20, waiting=told.append) as lease:
        assert lease.taken_from == owner
        assert 1020 <= now[0] < 1021
        assert "left by host faraway, pid 1: watching for 20 s" in told[0]


def test_lease_given_back_on_another_host_is_free_at_once(tmp_path):
    run = make_run(tmp_path)
    elsewhere(run, released=True)
    with hold_lease(run, watch_s=600) as lease:
        assert lease.taken_from is None


def test_owner_that_was_succeeded_meanwhile_learns_it_and_leaves_the_record_alone_l11(tmp_path):
    run = make_run(tmp_path)
    with hold_lease(run, heartbeat_s=600) as lease:
        lease.beat()
        assert not lease.lost
        theirs = json.dumps({**vars_of(lease.owner), "host": "faraway", "token": "theirs"}).ljust(1024)
        (run.control / "lease").write_text(theirs)
        lease.beat()
        assert lease.lost
    assert (run.control / "lease").read_text() == theirs


def test_heartbeat_moves_by_itself(tmp_path):
    run = make_run(tmp_path)
    moved = threading.Event()
    with hold_lease(run, heartbeat_s=0.01) as lease:
        beat = lease._sign
        lease._sign = lambda owner: (beat(owner), moved.set() if owner.heartbeat >= 3 else None)
        assert moved.wait(60)
        assert current_owner(run)[0].heartbeat >= 3


def test_lock_that_nobody_signed_for_is_named_so(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "_SETTLE_S", 0.0)
    run = make_run(tmp_path)
    code = "import fcntl\nf = open(run.control / 'lease', 'w'); fcntl.flock(f, fcntl.LOCK_EX); say('locked'); hear()"
    with Script(run, code) as other:
        assert other.heard() == "locked"
        with pytest.raises(LeaseHeld, match=r"has not signed for it. See `fuser"), hold_lease(run):
            pass


def test_file_system_without_locks_is_refused_with_the_fix(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    run = make_run(tmp_path)
    monkeypatch.setattr(lease_module.fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"no file locks .*Mount it with locks"), hold_lease(run):
        pass


def test_no_descriptor_is_left_open(tmp_path):
    run = make_run(tmp_path)
    before = os.listdir("/proc/self/fd")
    with hold_lease(run), pytest.raises(LeaseHeld), hold_lease(run):
        pass
    assert os.listdir("/proc/self/fd") == before


def test_looking_at_the_owner_changes_nothing(tmp_path):
    run = make_run(tmp_path)
    assert current_owner(run) == (None, False)
    assert not (run.control / "lease").exists()
    elsewhere(run)
    owner, alive = current_owner(run)
    assert (owner.host, alive) == ("faraway", None)


def test_lease_of_a_removed_directory_is_not_the_lease_of_a_new_one(tmp_path):
    run = make_run(tmp_path)
    with hold_lease(run):
        shutil.rmtree(run.path)
        with hold_lease(run) as lease:
            assert lease.taken_from is None
    assert current_owner(run)[0].released


def test_a_later_start_of_the_same_job_takes_over_from_a_live_owner_which_learns_it_l11(tmp_path):
    run, told = make_run(tmp_path), []
    with Script(run, HOLD_AS.format(restart=0)) as owner:
        assert owner.heard() == "held"
        with hold_lease(run, submission=start_of("7", 1), waiting=told.append) as lease:
            assert lease.taken_from.pid == owner.pid
            assert told == [
                f"{run.path} is still held by host {socket.gethostname()}, pid {owner.pid}, start 0 of slurm job 7: "
                "taken over, because this is start 1"
            ]
            owner.tell()
            assert owner.heard() == "lost"
            owner.tell()
            assert owner.heard() == "left"
            assert current_owner(run)[0].token == lease.owner.token  # the old copy gave nothing back
            assert not lease.lost
            with pytest.raises(LeaseHeld), hold_lease(run):
                pass
    with hold_lease(run) as lease:
        assert lease.taken_from is None


@pytest.mark.parametrize(
    "newcomer",
    [None, start_of("7", 0), start_of("7", 1), start_of("8", 2), start_of("7", 2, "ray")],
    ids=["a person", "an earlier start", "the same start", "another job", "another target"],
)
def test_nobody_else_takes_over_from_a_live_owner_l11(tmp_path, newcomer):
    run = make_run(tmp_path)
    with Script(run, HOLD_AS.format(restart=1)) as owner:
        assert owner.heard() == "held"
        with pytest.raises(LeaseHeld), hold_lease(run, submission=newcomer):
            pass
        assert current_owner(run)[0].pid == owner.pid


def test_of_two_equal_later_starts_one_takes_over_l11(tmp_path):
    run = make_run(tmp_path)
    code = (
        "from launcher.run.lease import hold_lease, LeaseHeld, Submission\nsay('ready'); hear()\ntry:\n"
        "  with hold_lease(run, submission=Submission(target='slurm', job_id='7', restart=1)): say('held'); hear()\n"
        "except LeaseHeld: say('refused')"
    )
    with Script(run, HOLD_AS.format(restart=0)) as owner, Script(run, code) as one, Script(run, code) as two:
        assert owner.heard() == "held"
        assert [one.heard(), two.heard()] == ["ready", "ready"]
        one.tell()
        two.tell()
        assert sorted([one.heard(), two.heard()]) == ["held", "refused"]


def test_an_earlier_start_on_another_host_is_succeeded_without_a_watch_l11(tmp_path):
    run = make_run(tmp_path)
    owner = elsewhere(run, target="slurm", job_id="7", restart=0)
    with hold_lease(run, submission=start_of("7", 1), watch_s=600) as lease:
        assert lease.taken_from == owner


def test_a_record_of_an_older_launcher_is_nobodys_earlier_start_l11(tmp_path):
    run = make_run(tmp_path)
    owner = elsewhere(run)
    assert not owner.is_succeeded_by(start_of("", 1, ""))
    assert not owner.is_succeeded_by(start_of("7", 1))
