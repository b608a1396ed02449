"""Host memory while an engine is built from a folder of safetensors: one rank reads, nobody else holds the model."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from launcher.recipe.schema import Model
from launcher.trainer.engines.base import give_back_memory
from tests.ranks import run_ranks
from tests.trainer import make

WORLD = 4
M_MMAP_THRESHOLD = -3  # of mallopt
CONFIG = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 69 million parameters, in several files as large ones are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = tmp_path_factory.mktemp("model")
    rest = {key: value for key, value in CONFIG.items() if key != "model_type"}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **rest), dtype=torch.float32)
    lm.save_pretrained(path, max_shard_size="100MB")
    return path


def memory(*keys: str) -> list[int]:
    """Bytes of this process, by the kernel's own names."""
    fields = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    found = {key: int(rest.split()[0]) * 1024 for key, _, rest in fields if key in keys}
    return [found[key] for key in keys]


def building(rank: int, world_size: int, kind: str, folder: str) -> tuple[float, float, float, int]:
    """(most memory while building, anonymous memory afterwards, the same with a whole model), all above that before
    and in models; elements of the model."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)  # what is freed is gone, so that memory in use is measured
    make.make_engine(make.make_recipe(kind), rank=rank)  # libraries, threads and pools are there
    give_back_memory()
    resident, anonymous = memory("VmRSS", "RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    recipe = make.make_recipe(kind)
    recipe.model = Model(name=folder, attention="sdpa")
    engine, _ = make.make_engine(recipe, rank=rank)
    highest, now = memory("VmHWM", "RssAnon")
    total = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    whole_model = torch.ones(total)
    seen = memory("RssAnon")[0] - anonymous
    bytes_of_model = whole_model.nbytes
    return (highest - resident) / bytes_of_model, (now - anonymous) / bytes_of_model, seen / bytes_of_model, total


@pytest.mark.gloo
@pytest.mark.parametrize(("kind", "shards"), [("fsdp2", 1), ("zero3", 3)])
def test_nobody_but_the_reader_comes_near_the_whole_model_and_the_reader_returns_to_its_share(
    kind: str, shards: int, folder: Path
) -> None:
    """Besides its shard of the weights a rank of ZeRO-3 has one of the masters and one of the gradients from the start,
    which FSDP2 makes in the first step; on a GPU these lie there, here they are host memory like all the rest."""
    own = shards / WORLD
    (_, kept, _, total), *others = run_ranks(building, WORLD, kind, str(folder))
    assert total > 60e6
    for highest, afterwards, with_a_model, _ in others:
        assert own < highest < own + 0.35  # 0.6 of the model with FSDP2
        assert afterwards < own + 0.1
        assert with_a_model > own + 0.9  # a whole model would have been seen
    assert kept < own + 0.1
