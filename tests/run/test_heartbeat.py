"""What a rank leaves in its heartbeat is what its watch reads."""

from __future__ import annotations

import os

import pytest

from launcher.run.heartbeat import KEPT_GROUPS, PHASES, Heart, Pace, Pulse, file_of, ranks_in


def test_the_last_beat_is_read_with_its_step_and_phase(tmp_path):
    heart = Heart(tmp_path, 3)
    pulse = Pulse(tmp_path, 3)
    assert ranks_in(tmp_path) == [3]
    assert pulse.pid == os.getpid()
    before = pulse.beat()
    heart.beat(PHASES.index("forward"), 17)
    after = pulse.beat()
    assert (after.step, after.phase) == (17, "forward")
    assert after.count == before.count + 1
    assert after.at >= before.at


def test_paces_are_kept_for_the_last_groups(tmp_path):
    heart = Heart(tmp_path, 0)
    for group in range(KEPT_GROUPS + 3):
        heart.pace(group, Pace(float(group), 0.5, 1.0))
    paces = Pulse(tmp_path, 0).paces()
    assert sorted(paces) == list(range(3, KEPT_GROUPS + 3))
    assert paces[5] == Pace(5.0, 0.5, 1.0)


def test_a_file_that_is_being_made_is_not_read(tmp_path):
    file_of(tmp_path, 0).write_bytes(b"")
    with pytest.raises(ValueError, match="length"):
        Pulse(tmp_path, 0)
    file_of(tmp_path, 0).write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="not complete"):
        Pulse(tmp_path, 0)
