"""Why a process was killed that said nothing: the kernel's counter of processes ended for want of memory decides."""

from __future__ import annotations

from pathlib import Path

from launcher.jobs.silent import OUT_OF_MEMORY, MemoryKills

KILLED = "killed by SIGKILL"


def counter(folder: Path, kills: int) -> Path:
    file = folder / "memory.events"
    file.write_text(f"low 0\nhigh 0\nmax 7\noom 3\noom_kill {kills}\noom_group_kill 0\n")
    return file


def test_a_kill_that_the_kernel_counted_meanwhile_was_for_want_of_memory(tmp_path):
    kills = MemoryKills([counter(tmp_path, 4)])
    counter(tmp_path, 6)
    assert kills.explained(KILLED, None) == f"{KILLED} ({OUT_OF_MEMORY}: the kernel ended 2 processes here meanwhile)"


def test_a_kill_that_the_kernel_did_not_count_was_somebodys(tmp_path):
    said = MemoryKills([counter(tmp_path, 4)]).explained(KILLED, None)
    assert "by a person or a scheduler" in said
    assert OUT_OF_MEMORY not in said


def test_where_nothing_counts_both_are_possible_and_no_other_end_is_explained():
    kills = MemoryKills([])
    assert "see dmesg" in kills.explained(KILLED, None)
    assert kills.explained("killed by SIGSEGV", None) == "killed by SIGSEGV"
    assert kills.explained("exit code 1", None) == "exit code 1"
