"""Which rank this process is, on which device, and how it joins and leaves the others."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from launcher.errors import UserError


@dataclass(frozen=True, slots=True)
class Ranks:
    """The place of this process in the job, as torchrun's environment variables tell it."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node: int

    @classmethod
    def from_environment(cls) -> Ranks:
        """One rank alone when no variable is set."""
        get = os.environ.get
        return cls(
            rank=int(get("RANK", "0")), local_rank=int(get("LOCAL_RANK", "0")), world_size=int(get("WORLD_SIZE", "1")),
            local_world_size=int(get("LOCAL_WORLD_SIZE", "1")), node=int(get("GROUP_RANK", "0")),
        )  # fmt: skip


def choose_device(accelerator: str, ranks: Ranks) -> torch.device:
    """The device of this rank: `auto` takes a GPU where there is one for each local rank, else the CPU.

    Raises:
        UserError: cuda was asked for and there are fewer GPUs than local ranks.
    """
    gpus = torch.cuda.device_count()
    if accelerator == "cuda" and gpus < ranks.local_world_size:
        raise UserError(
            f"cluster.accelerator = cuda: expected {ranks.local_world_size} GPUs here (cluster.nproc_per_node), "
            f"found {gpus}. Lower cluster.nproc_per_node, or set cluster.accelerator=cpu."
        )
    if accelerator == "cuda" or (accelerator == "auto" and gpus >= ranks.local_world_size):
        return torch.device("cuda", ranks.local_rank)
    return torch.device("cpu")


def set_threads(ranks: Ranks) -> int:
    """Threads of this rank's arithmetic: OMP_NUM_THREADS where set, else its share of the node's usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // ranks.local_world_size))
    torch.set_num_threads(threads)
    return threads


def join(device: torch.device, ranks: Ranks, *, timeout_s: float = 1800.0) -> bool:
    """Meet the other ranks; whoever made the process group, which is told by the answer, also leaves it.

    CPU tensors travel by gloo and GPU tensors by NCCL in the same group, so offloaded state needs no group of its own.
    """
    if dist.is_initialized():
        return False
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if ranks.world_size == 1 else "29500")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=ranks.rank, world_size=ranks.world_size, timeout=timedelta(seconds=timeout_s),
    )  # fmt: skip
    return True


def leave() -> None:
    """Meet once more, so that nobody loses a peer in mid-message, then part; only on the way of success."""
    dist.barrier()
    dist.destroy_process_group()


def exit_now(code: int) -> None:
    """End without interpreter shutdown: gloo's threads abort the process when they free tensors during it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
