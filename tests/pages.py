"""The commands of a page for people, as a reader would type them: what stands in its ```sh blocks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def commands(page: Path) -> list[str]:
    """The lines of a page's ```sh blocks in their order: continued lines joined, comments gone."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [command for line in lines if (command := re.sub(r"(^|\s+)#.*", "", line).strip())]


def launcher_commands(page: Path) -> list[list[str]]:
    """Arguments of each of them that is a `launcher ...`."""
    return [shlex.split(command)[1:] for command in commands(page) if command.startswith("launcher ")]
