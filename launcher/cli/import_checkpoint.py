"""`launcher import-checkpoint`: a new run that goes on from what DeepSpeed, transformers or FSDP left behind."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Make a new run that goes on from another tool's checkpoint.")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--weights-only", is_flag=True, help="Leave the optimizer's state out: it starts anew.")
def command(path: Path, recipe: str, overrides: tuple[str, ...], weights_only: bool) -> None:
    """Make a new run of RECIPE whose first checkpoint holds what PATH holds; start no training.

    PATH is a DeepSpeed folder (ZeRO 1, 2, 3), a transformers checkpoint-N, or a torch.distributed.checkpoint folder.
    Weights, both moments and the step are taken; what is missing there is said and nothing is written.
    `launcher run` with the same recipe then goes on. Needs no GPU and no DeepSpeed.

    example: launcher import-checkpoint out/checkpoint-500 recipes/tiny-cpu.yaml run.name=from-trainer
    """
    from launcher.jobs.environment import require_train_extra
    from launcher.recipe.check import load

    loaded = load(recipe, overrides).recipe
    require_train_extra()
    from launcher.jobs.importing import import_checkpoint

    run = import_checkpoint(path, loaded, weights_only=weights_only, say=click.echo)
    click.echo(f"go on with: launcher run {' '.join([recipe, *overrides])}    (run directory {run.path})")
