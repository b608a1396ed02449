"""`launcher render`: prints the whole job a recipe would start: recipe, plan, engine settings, scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import click


@click.command(short_help="Print the job a recipe would submit; submit nothing.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--target", default="torchrun", show_default=True, help="What would start the job.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the files into this folder instead.")
@click.option("--json", "as_json", is_flag=True, help="Print one object: command and files (docs/json.md).")
def command(recipe: str, overrides: tuple[str, ...], target: str, output: Path | None, as_json: bool) -> None:
    """Print the job a recipe would start; start nothing, need no GPU, write files only with -o.

    example: launcher render recipes/llama3.1-8b-fsdp2.yaml cluster.nodes=4 -o job
    """
    from launcher.jobs.spec import job_spec
    from launcher.jobs.targets import render
    from launcher.plan import make_plan
    from launcher.recipe.check import load

    loaded = load(recipe, overrides).recipe
    rendered = render(job_spec(loaded, make_plan(loaded)), target=target)
    if output is not None:
        _write(output, rendered.files)
    if as_json:
        click.echo(json.dumps({"target": target, "command": rendered.command, "files": dict(rendered.files)}, indent=2))
    elif output is not None:
        click.echo(f"wrote {', '.join(rendered.files)}\ncd {output}\n{rendered.command}")
    else:
        for name, text in rendered.files.items():
            click.echo(f"==> {name} <==\n{text}")
        click.echo(f"==> command <==\n{rendered.command}")


def _write(folder: Path, files: Mapping[str, str]) -> None:
    from launcher.errors import UserError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise UserError(f"-o {folder}: cannot be written ({error.strerror})") from None
