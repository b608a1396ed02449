"""F21: wall clocks that jump or differ decide nothing: steps and attempts order, leases go by locks and heartbeats."""

from __future__ import annotations

import itertools
import json
import os
import signal
import uuid
from pathlib import Path

import pytest

from launcher.run.ledger import attempts, valid_checkpoints
from tests.faults.shim import Shim
from tests.jobs.make import finish, launcher, losses, project, run_of, tensors_of, until
from tests.run.make import Script, make_run

HOUR_S, APART_S = 3600, 600
STEPS = 40
_NAMESPACES = 0x00020000 | 0x04000000  # CLONE_NEWNS, CLONE_NEWUTS

# another host on the same files: host name and boot id of its own
ON_HOST = """
import ctypes, socket, subprocess, time
assert ctypes.CDLL(None).unshare({namespaces}) == 0
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "--bind", {boot_id!r}, "/proc/sys/kernel/random/boot_id"], check=True)
socket.sethostname({name!r})
from launcher.run.lease import LeaseHeld, hold_lease
"""
HOLD = """
import fcntl
with hold_lease(run, heartbeat_s=0.05) as lease:
    if {locks_reach}:
        say("held")
    else:
        fcntl.flock(lease._handle, fcntl.LOCK_UN)
        say("held")
    hear()
    say("lost" if lease.lost else "still mine")
"""
TAKE = """
try:
    with hold_lease(run, watch_s={watch_s}) as lease:
        say("taken from " + str(lease.taken_from.host))
except LeaseHeld as held:
    say("refused: " + held.owner.host)
say(str(round(time.time())))
"""


def test_F21_a_clock_that_jumps_an_hour_ahead_and_back_changes_neither_losses_nor_which_checkpoint_is_newest(
    tmp_path, shim
):
    """F21: the wall clock of launcher and ranks jumps by an hour, ahead and back, while they train; then all die.
    The next start succeeds the dead owner at once, goes on from the checkpoint of the highest step, though the folder
    of an older one is newer by the clock, and ends bit-equal to a run with a clock that stood right."""
    recipe = project(
        tmp_path, train={"max_steps": STEPS}, checkpoint={"every_steps": 1, "keep_last": 3, "rehearse": False},
        cluster={"nproc_per_node": 1, "preflight": False},
    )  # fmt: skip
    finish(launcher("run", recipe, "run.name=right"), code=0, timeout_s=400)
    run, right = run_of(recipe, "jumps"), run_of(recipe, "right")
    first = launcher("run", recipe, "run.name=jumps", env=shim.environment())
    for steps, offset_s in ((2, HOUR_S), (4, -HOUR_S), (6, None)):
        until(f"{steps} steps", lambda steps=steps: max(losses(run), default=0) >= steps, timeout_s=400)
        if offset_s is not None:
            shim.set_clock(offset_s)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    until("two checkpoints", lambda: len(valid_checkpoints(run)) >= 2)
    *older, newest = valid_checkpoints(run)
    for checkpoint in older:
        now = newest.path.stat().st_mtime + HOUR_S
        for path in (checkpoint.path, *checkpoint.path.iterdir()):
            os.utime(path, (now, now))
    finish(launcher("run", recipe, "run.name=jumps", env=shim.environment()), code=0, timeout_s=400)

    told = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    jumps = [round((b["time"] - a["time"]) / HOUR_S) for a, b in itertools.pairwise(told)]
    assert 1 in jumps, "the clock of the ranks jumped ahead"
    assert -2 in jumps, "and back"
    known = attempts(run)
    assert [attempt.number for attempt in known] == [1, 2]
    assert known[1].time < known[0].time + HOUR_S / 2, "the later attempt is the earlier one by the clock"
    assert newest.path.name in known[1].accepts
    again = [line["step"] for line in told if line["attempt"] == 2]
    assert again == list(range(newest.step + 1, STEPS + 1))
    assert losses(run) == losses(right)
    assert tensors_of(valid_checkpoints(run)[-1].path) == tensors_of(valid_checkpoints(right)[-1].path)


@pytest.fixture
def hosts(shim_library: Path, tmp_path: Path):
    """Two hosts on one file system, 10 minutes apart: what goes before a script, its environment, and its clock."""
    if os.geteuid() != 0:
        pytest.skip("another boot id is mounted, for which one must be root")
    made = []
    for name, offset_s in (("early", -APART_S / 2), ("late", APART_S / 2)):
        folder = tmp_path / name
        folder.mkdir()
        boot_id = folder / "boot_id"
        boot_id.write_text(f"{uuid.uuid4()}\n")
        clock = Shim(shim_library, folder)
        clock.set_clock(offset_s)
        head = ON_HOST.format(namespaces=_NAMESPACES, boot_id=str(boot_id), name=name)
        made.append((head, {**os.environ, **clock.environment()}, clock))
    return made


@pytest.mark.parametrize("locks_reach", [True, False])
@pytest.mark.parametrize("owner_is_late", [True, False])
def test_F21_a_live_owner_on_a_host_10_minutes_apart_is_never_succeeded(tmp_path, hosts, locks_reach, owner_is_late):
    """F21: of two hosts whose clocks are 10 min apart the second is refused while the first drives the run, whichever
    is ahead, and also where locks do not reach from one to the other and only the heartbeat tells; the owner's clock
    jumps by an hour meanwhile. A dead owner is succeeded."""
    early, late = hosts
    (head, environment, clock), (other_head, other_environment, _) = (late, early) if owner_is_late else (early, late)
    owner_name, run = "late" if owner_is_late else "early", make_run(tmp_path)
    with Script(run, head + HOLD.format(locks_reach=locks_reach), env=environment) as owner:
        assert owner.heard() == "held"
        clock.set_clock(-HOUR_S)
        with Script(run, other_head + TAKE.format(watch_s=30), env=other_environment) as second:
            assert second.heard() == f"refused: {owner_name}"
            second.heard()
        clock.set_clock(HOUR_S)
        owner.tell()
        assert owner.heard() == "still mine"
        owner.kill()
    run = make_run(tmp_path, "dead")
    with Script(run, head + HOLD.format(locks_reach=True), env=environment) as owner:
        assert owner.heard() == "held"
        owner.kill()
    with Script(run, other_head + TAKE.format(watch_s=1), env=other_environment) as second:
        assert second.heard() == f"taken from {owner_name}"
