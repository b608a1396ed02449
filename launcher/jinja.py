"""Whether a chat template is a Jinja program at all: told with its line, before anything is rendered."""

from __future__ import annotations

from functools import cache
from typing import Any


def syntax_error(text: str) -> tuple[int, str] | None:
    """Line and reason why a chat template cannot be compiled; None where it can, or where Jinja is not installed."""
    try:
        from jinja2 import TemplateSyntaxError
    except ImportError:  # where recipes are only checked; whoever renders the template has it
        return None
    try:
        _environment().compile(text)
    except TemplateSyntaxError as error:
        return error.lineno, (error.message or "a syntax error").rstrip(".")
    return None


@cache
def _environment() -> Any:
    """That of transformers, as far as the grammar goes: `{% generation %}` blocks, break and continue."""
    from jinja2 import Environment, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  # Jinja's own interface

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
