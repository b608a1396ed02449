"""Real gloo ranks for tests, forked from a server that has imported torch once: a job costs a third of a second."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_PRELOAD = [
    "torch", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "tests.ranks", "tests.trainer.make",
    "pytest", "launcher.trainer.engines.ddp", "launcher.trainer.engines.fsdp2", "launcher.trainer.checkpoint.manager",
    "deepspeed", "launcher.trainer.engines.deepspeed",
]  # fmt: skip


def free_port() -> int:
    """A TCP port of this host that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def context() -> Any:
    """The forkserver context all multi-process tests share."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(_PRELOAD)
    return ctx


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240) -> list[Any]:
    """Call `function(rank, world_size, *args)` on that many gloo ranks; their return values by rank.

    The function must be importable (defined at the top of a test module); its result must pickle.
    The process group is made before and destroyed after the call.

    Raises:
        RuntimeError: a rank raised; the text holds the first traceback.
    """
    ctx, port = context(), free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        parent, child = ctx.Pipe(duplex=False)
        process = ctx.Process(target=_rank, args=(function, rank, world_size, port, child, args), daemon=True)
        process.start()
        child.close()
        pipes.append(parent)
        processes.append(process)
    try:
        results = [_receive(pipe, rank, timeout_s) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
    errors = [value for ok, value in results if not ok]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [value for _, value in results]


def _receive(pipe: Connection, rank: int, timeout_s: float) -> tuple[bool, Any]:
    if not pipe.poll(timeout_s):
        return False, f"rank {rank} sent nothing in {timeout_s} s"
    try:
        return pipe.recv()  # type: ignore[no-any-return]
    except EOFError:
        return False, f"rank {rank} died"


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, port: int, pipe: Connection, args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        result: tuple[bool, Any] = (True, function(rank, world_size, *args))
        pipe.send(result)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
