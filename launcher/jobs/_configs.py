"""`python -m launcher.jobs._configs [FOLDER]`: writes the files of configs/, each as `launcher render` gives it.

All are of one recipe, Llama-3.1 8B in bf16 with 64 rows a step, on 8 GPUs, or on 2 x 8 where a strategy is about
several nodes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from launcher.jobs.spec import job_spec
from launcher.jobs.targets import render
from launcher.plan import make_plan
from launcher.recipe.check import load
from launcher.shipped import folder

RECIPE = "llama3.1-8b-fsdp2.yaml"
FILES = {"deepspeed": "deepspeed.json", "accelerate": "accelerate.yaml"}  # folder of configs/ -> file of a job
PRESETS = {
    "deepspeed": ("zero1", "zero2", "zero2-offload", "zero3", "zero3-offload", "zero3-nvme", "zeropp"),
    "accelerate": ("ddp", "fsdp2", "fsdp2-offload", "hsdp", "zero1", "zero2", "zero3", "zero3-offload"),
}
_TWO_NODES = ("hsdp", "zeropp")


def overrides(preset: str) -> list[str]:
    """What is changed in the recipe for a preset of strategies; whether 8B parameters fit is not asked."""
    cluster = "node8x2" if preset in _TWO_NODES else "node8"
    return [f"strategy={preset}", f"cluster={cluster}", "cluster.gpu_memory_gib=null"]


def files() -> Iterator[tuple[str, str]]:
    """Path below configs/, and text."""
    for kind, presets in PRESETS.items():
        for preset in presets:
            recipe = load(folder("recipes") / RECIPE, overrides(preset)).recipe
            rendered = render(job_spec(recipe, make_plan(recipe)), target="accelerate")
            yield f"{kind}/{preset}{Path(FILES[kind]).suffix}", rendered.files[FILES[kind]]


def main(target: Path) -> None:
    """Write them all."""
    for name, text in files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else folder("configs"))
