"""`launcher export`: a Hugging Face folder from a run's newest good checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.cli._common import find_run


@click.command(short_help="Write a Hugging Face folder from the newest checkpoint.")
@click.argument("run")
@click.option("--out", type=click.Path(path_type=Path), help="The folder to write.  (default: RUN/final)")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Type of the weights.  (default: as trained)"
)
@click.option("--checkpoint", metavar="NAME", help="As step-00000500-a1.  (default: the newest that is whole)")
@click.option("--merge", is_flag=True, help="Write the whole model, an adapter merged into its base.")
def command(run: str, out: Path | None, dtype: str | None, checkpoint: str | None, merge: bool) -> None:
    """Write weights, configuration and tokenizer of a run as a folder that plain transformers loads.

    A run that trained an adapter gives the adapter alone, as peft loads it; --merge gives the whole model.
    Needs no GPU and starts no training; the run may go on meanwhile.

    example: launcher export runs/tiny-cpu --out models/tiny --dtype bf16
    """
    from launcher.jobs.environment import require_train_extra

    require_train_extra()
    from launcher.export import export_run

    click.echo(export_run(find_run(run), out, dtype=dtype, checkpoint=checkpoint, merge=merge))
