"""Which process does not outlive another."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.jobs.make import lives, until


@pytest.mark.parametrize("when", ["later", "before it asks"])
def test_a_process_dies_with_its_parent_also_one_that_died_before_it_could_ask(tmp_path, when):
    """The parent is killed, not the child; a child that asks late sees that its parent is another one by now."""
    go, ask = tmp_path / "go", "from launcher.run.processes import die_with_parent as d; d(int(sys.argv[1]))"
    wait = f"while not os.path.exists({str(go)!r}): time.sleep(0.01)\n" if when != "later" else ""
    child = f"import os, sys, time\n{wait}{ask}\nprint('tied', flush=True)\ntime.sleep(600)"
    parent = (
        "import os, subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())])\n"
        "print(p.pid, flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        if when == "later":
            assert process.stdout.readline() == "tied\n"
        process.kill()
        process.wait()
        go.touch()
        until("its end", lambda: not lives(pid))
