"""`launcher show`: prints a recipe as its levels make it, on request with the place each value came from."""

from __future__ import annotations

import click


@click.command(short_help="Print the composed recipe.")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--origin", is_flag=True, help="One line a value, with the file and line or the argument it came from.")
def command(recipe: str, overrides: tuple[str, ...], origin: bool) -> None:
    """Print the composed recipe as YAML that can be used as a recipe again; look at no model, data or machine.

    example: launcher show recipes/llama3.1-8b-fsdp2.yaml strategy=ddp --origin
    """
    from launcher.recipe.compose import compose
    from launcher.recipe.read import dump, dump_leaf
    from launcher.recipe.schema import to_dict
    from launcher.recipe.tree import leaves

    composed = compose(recipe, overrides)
    values = to_dict(composed.recipe)
    if not origin:
        click.echo(dump(values), nl=False)
        return
    lines = [(f"{key}: {dump_leaf(value)}", str(composed.origins[key])) for key, value in leaves(values)]
    width = min(60, max(len(text) for text, _ in lines))
    for text, place in lines:
        click.echo(f"{text:<{width}}  # {place}")
