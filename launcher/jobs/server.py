"""First module the fork server imports: ties it to the launcher and shields it, and so its ranks, from stray signals.

Imported for its effect, in that process alone; signals of a terminal or a scheduler are for the launcher to understand.
"""

from __future__ import annotations

import gc
import os
import signal

from tqdm import tqdm

from launcher.jobs.signals import STOPPING
from launcher.jobs.tether import PARENT, die_with_parent

die_with_parent(int(os.environ[PARENT]))
gc.disable()  # modules are not garbage: looking for it takes a sixth of their import; ranks look again
tqdm.get_lock()  # made in a child, its semaphore would have a name, and stay behind when that child is killed
os.setsid()  # Ctrl-C, Ctrl-\\ and a closing terminal reach process groups
for _signal in STOPPING:
    signal.signal(_signal, signal.SIG_IGN)  # ranks inherit this and take SIGTERM and SIGUSR1 back for their own use
signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # blocked since `launcher.jobs.warm` started this process
