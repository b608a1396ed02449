"""What a forkserver imports once, so that a rank starts in a third of a second; starts no threads, joins no group."""

from __future__ import annotations

MODULES: list[str] = [
    "torch",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.device_mesh",
    "torch.distributed.tensor",
    "torch.nn.parallel",
    "numpy",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "launcher.trainer.main",
    "launcher.trainer.assembly",
    "launcher.trainer.loop",
    "launcher.trainer.preflight",
    "launcher.trainer.model",
    "launcher.trainer.engines.ddp",
    "launcher.trainer.engines.fsdp2",
    "launcher.trainer.checkpoint.manager",
    "launcher.data.batches",
]

# DeepSpeed's import asks for its device, and a fork server that has touched a GPU could start no rank that uses one
DEEPSPEED: list[str] = ["deepspeed", "launcher.trainer.engines.deepspeed"]


def modules(kind: str, device: str) -> list[str]:
    """What is imported ahead for ranks of `strategy.kind` on a `cpu` or `cuda` device."""
    return [*MODULES, *DEEPSPEED] if kind.startswith("zero") and device == "cpu" else MODULES
