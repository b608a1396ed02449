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
    "launcher.trainer.model",
    "launcher.trainer.engines.ddp",
    "launcher.trainer.engines.fsdp2",
    "launcher.trainer.checkpoint.manager",
    "launcher.data.batches",
]
