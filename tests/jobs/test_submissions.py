"""What is remembered of submissions: numbers, folders, lines; and where, when the run lies on other machines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.jobs import submissions
from launcher.jobs.job import Job
from launcher.jobs.spec import JobSpec
from launcher.recipe.schema import Cluster

SPEC = JobSpec(name="demo", run="/shared/runs/demo")


def job(folder: Path, id: str = "7") -> Job:
    return Job(target="slurm", id=id, folder=folder, run=Path("/shared/runs/demo"), more={"cluster": "a"})


def test_jobs_are_remembered_in_order_with_all_that_was_said_of_them(tmp_path):
    assert submissions.latest(tmp_path) is None
    assert submissions.all(tmp_path) == []
    first = job(submissions.new_folder(tmp_path), "7")
    submissions.record(tmp_path, first, files=["job.sh"])
    second = job(submissions.new_folder(tmp_path), "8")
    submissions.record(tmp_path, second)
    assert [one.folder.name for one in (first, second)] == ["submission-1", "submission-2"]
    assert submissions.all(tmp_path) == [first, second]
    assert submissions.latest(tmp_path) == second
    assert [(one.number, one.files) for one in submissions.submissions(tmp_path)] == [(1, ("job.sh",)), (2, ())]


def test_a_number_is_not_given_twice_though_a_folder_or_a_line_is_gone(tmp_path):
    submissions.record(tmp_path, job(submissions.new_folder(tmp_path)))
    submissions.new_folder(tmp_path)  # refused, and left behind by a crash
    assert submissions.next_number(tmp_path) == 3
    for path in (tmp_path / "job").glob("submission-*/"):
        path.rmdir()
    assert submissions.next_number(tmp_path) == 2


def test_a_line_that_a_crash_cut_short_and_what_a_later_version_adds_are_passed_over(tmp_path):
    submissions.record(tmp_path, job(submissions.new_folder(tmp_path)))
    file = tmp_path / "job" / "submissions.jsonl"
    file.write_text(file.read_text().replace('"id"', '"new": {"a": 1}, "id"') + '{"target": "slurm", "id"')
    assert [one.id for one in submissions.all(tmp_path)] == ["7"]


def test_the_folder_of_a_moved_run_is_found_where_it_lies_now(tmp_path):
    place = tmp_path / "before"
    submissions.record(place, job(submissions.new_folder(place)))
    place.rename(tmp_path / "after")
    assert submissions.latest(tmp_path / "after").folder == tmp_path / "after" / "job" / "submission-1"


@pytest.mark.parametrize(
    ("target", "address", "elsewhere"),
    [
        ("torchrun", None, False), ("slurm", None, False), ("kubernetes", None, True), ("ray", None, False),
        ("ray", "local", False), ("ray", "http://127.0.0.1:8265", False), ("ray", "http://head:8265", True),
    ],
)  # fmt: skip
def test_pods_and_remote_ray_clusters_have_a_file_system_of_their_own(
    monkeypatch, tmp_path, target, address, elsewhere
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    cluster = Cluster(target=target)
    cluster.ray.address = address
    expected = tmp_path / "launcher" / "runs" / "demo" if elsewhere else Path("/shared/runs/demo")
    assert submissions.place_for(replace(SPEC, cluster=cluster)) == expected


def test_the_address_that_ray_reads_itself_counts_too(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert submissions.elsewhere(replace(SPEC, cluster=Cluster(target="ray")))


def test_what_lies_on_other_machines_is_listed_unless_it_is_here(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert submissions.known_elsewhere() == []
    place = submissions.state_folder("demo")
    submissions.record(place, job(submissions.new_folder(place)))
    submissions.state_folder("never-submitted").mkdir()
    ((run, where),) = submissions.known_elsewhere()
    assert (run.path, where) == (Path("/shared/runs/demo"), place)


def test_one_submit_at_a_time(tmp_path):
    first, second, third = (submissions.one_at_a_time(tmp_path) for _ in range(3))
    with first, pytest.raises(UserError, match="another `launcher submit` of this run is at work"), second:
        pass
    with third:
        pass
