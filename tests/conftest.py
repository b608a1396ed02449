"""What every test shares: no hub, one thread, and the groups that need processes or devices."""

from __future__ import annotations

import os
import signal

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:  # of `nohup make test &`; what tests start would inherit it
        signal.signal(_number, _usual)
