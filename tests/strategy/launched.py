"""What `accelerate launch` makes of a configuration file: processes, environment, the plugins that a script gets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

FREE_PORT = 40123


def launched(file: Path, *arguments: str) -> dict[str, Any]:
    """All that follows from the file and the command line; where two are equal, nothing was read differently."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import launch

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    command = ["--config_file", str(file), *arguments, "-m", "launcher.trainer", "RUN"]
    with clean_environment(), mock.patch.object(launch, "get_free_port", return_value=FREE_PORT):
        args, defaults, from_file = _validate_launch_command(launch_command_parser().parse_args(command))
        if args.use_deepspeed:
            fields = [*defaults.deepspeed_config, *(["mixed_precision"] if from_file else [])]
            args.deepspeed_fields_from_accelerate_config = ",".join(fields)
            command_line, environment = launch.prepare_deepspeed_cmd_env(args)
        else:
            command_line, environment = None, launch.prepare_multi_gpu_env(args)
        made = {key: value for key, value in environment.items() if os.environ.get(key) != value}
        os.environ.update(made)
        torchrun = {key: getattr(args, key, None) for key in _TORCHRUN}
        starter = (args.multi_gpu, args.use_fsdp, args.use_deepspeed, args.use_parallelism_config)
        return {
            "environment": made,
            "torchrun": torchrun,
            "starter": starter,
            "command": command_line,
            "where": defaults.compute_environment.value,
            "plugins": _plugins(args, file.parent),
        }


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """No setting of Accelerate from outside, and none left behind."""
    prefixes = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "OMP_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
    with mock.patch.dict(os.environ, kept, clear=True):
        yield


_TORCHRUN = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "rdzv_endpoint", "rdzv_backend")


def _plugins(args: Any, folder: Path) -> dict[str, str]:
    """Accelerate's own objects, built from the environment as `Accelerator()` does on a rank."""
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, TorchDynamoPlugin

    made: dict[str, Any] = {}
    if args.use_fsdp:
        made["fsdp"] = FullyShardedDataParallelPlugin()
    if args.use_parallelism_config:
        from accelerate.parallelism_config import ParallelismConfig

        made["mesh"] = ParallelismConfig()
    if args.use_deepspeed:
        with contextlib.chdir(folder):
            made["deepspeed"] = DeepSpeedPlugin()
        made["deepspeed"].hf_ds_config = None
    if not args.use_deepspeed:
        made["dynamo"] = TorchDynamoPlugin()
    return {name: str(sorted((k, _text(v)) for k, v in vars(plugin).items())) for name, plugin in made.items()}


def _text(value: Any) -> str:
    return getattr(value, "__qualname__", "") or str(value)
