"""The file of global batches that a run leaves out."""

from __future__ import annotations

from launcher.run.directory import RunDirectory
from launcher.run.left_out import LeftOut, leave_out, left_out


def test_what_is_written_down_is_read_back_by_step_and_survives_a_torn_line(tmp_path):
    run = RunDirectory(tmp_path)
    assert left_out(run) == {}
    second = LeftOut(step=9, attempt=2, reason="spike", loss=8.5, limit=3.25, records={"a.jsonl": [4, 7]}, time=1.0)
    first = LeftOut(step=3, attempt=1, reason="non_finite", records=None)
    leave_out(run, second)
    with run.left_out_file.open("a") as file:
        file.write('{"step": 5, "att')
    leave_out(run, first)
    assert left_out(run) == {3: first, 9: second}
    assert list(left_out(run)) == [3, 9]


def test_the_first_line_of_a_step_counts_and_fields_of_a_later_version_are_passed_over(tmp_path):
    run = RunDirectory(tmp_path)
    leave_out(run, LeftOut(step=3, attempt=1, reason="spike"))
    with run.left_out_file.open("a") as file:
        file.write('{"step": 3, "attempt": 2, "reason": "non_finite"}\n')
        file.write('{"step": 4, "attempt": 2, "reason": "moonshine", "more": 1}\n')
    found = left_out(run)
    assert (found[3].attempt, found[3].reason) == (1, "spike")
    assert found[4].step == 4
