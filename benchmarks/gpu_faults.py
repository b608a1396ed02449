"""F36, one rank of it: a real fault of a GPU or of its collectives, and what this project calls it.

    RANK=0 WORLD_SIZE=1 ... python benchmarks/gpu_faults.py oom|xid|nccl [--cpu]

Prints a JSON object: class and text of the error, seconds from the first error of any rank to this rank's end, and the
last collectives that torch's flight recorder holds. `gpu_checks.check_faults` starts the ranks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main(fault: str, cpu: bool) -> None:
    """Meet the others, compute something together, then fail."""
    os.environ["TORCH_FR_BUFFER_SIZE"] = "100"
    import torch
    import torch.distributed as dist

    from launcher.trainer.beat import last_collectives
    from launcher.trainer.failures import failure_class

    rank = int(os.environ["RANK"])
    device = torch.device("cpu") if cpu else torch.device("cuda", 0)  # two ranks on one GPU is what NCCL refuses
    collectives, began = list[str](), time.monotonic()
    try:
        dist.init_process_group("gloo" if cpu else "nccl", timeout=timedelta(seconds=30))
        value = torch.ones(4, device=device)
        began = time.monotonic()
        dist.all_reduce(value)
        value.sum().item()
        if fault == "oom":
            out_of_memory(device)
        elif fault == "xid":
            value[torch.tensor([1 << 30], device=device)].sum().item()
        elif rank == 1:
            os._exit(1)  # the peer goes in mid-run
        else:
            dist.all_reduce(value)
            value.sum().item()
        raise SystemExit(f"{fault}: nothing failed")
    except Exception as error:
        try:
            collectives = [entry["name"] for entry in last_collectives()]
        except Exception as why:
            collectives = [f"none: {type(why).__name__}: {why}"]
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        seconds = time.monotonic() - began
        said = {"class": failure_class(error), "text": text, "seconds": seconds, "collectives": collectives}
    print(json.dumps(said), flush=True)
    os._exit(0)


def out_of_memory(device: object) -> None:
    """Take memory until there is none; on the CPU below a limit of this process's own."""
    import resource

    import torch

    if torch.device(str(device)).type == "cpu":
        with open("/proc/self/statm") as pages:
            used = int(pages.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), used + (1 << 29)))
    taken = []
    while True:
        taken.append(torch.empty(1 << 30, dtype=torch.uint8, device=str(device)))


if __name__ == "__main__":
    main(sys.argv[1], "--cpu" in sys.argv)
