"""`python -m launcher.doctor.rank PARENT_PID`: a rank that measures for `launcher doctor`, and dies with it."""

from __future__ import annotations

import sys

from launcher.jobs.tether import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    from launcher.trainer.preflight import main

    main()
