"""What a disk may hold after a power cut: every state that the calls a program made do not exclude.

The model is the weakest that POSIX allows: the data of a file are durable after an fsync of the file, a name after an
fsync of its folder. Whatever else was done may be there or not, in any order, each write whole, in part, or as zeros of
the right length. A rename is there as a whole or not at all.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.shim import Call

Tree = dict[str, bytes | None]  # relative path to content, None for a folder, which comes before what is in it
DATA = ("all", "none", "half", "zeros")


@dataclass(eq=False, slots=True)
class _File:
    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # (offset, data); (size, None) to cut it

    def content(self, how: str) -> bytes:
        if how == "none" or not self.pending:
            return self.durable
        whole = bytearray(self.durable)
        for at, data in self.pending:
            if data is None:
                del whole[at:]
                whole.extend(bytes(at - len(whole)))
                continue
            if how == "half":
                data = data[: len(data) // 2]
            elif how == "zeros":
                data = bytes(len(data))
            whole.extend(bytes(max(0, at - len(whole))))
            whole[at : at + len(data)] = data
        return bytes(whole)


@dataclass(eq=False, slots=True)
class _Folder:
    durable: dict[str, _Node] = field(default_factory=dict)
    now: dict[str, _Node] = field(default_factory=dict)


_Node = _File | _Folder
_Change = list[tuple[_Folder, str, "_Node | None"]]  # what happens to names at once


class Disk:
    """A folder that was empty, and what the calls did to it."""

    def __init__(self, root: Path) -> None:
        self._root, self._top = str(root), _Folder()
        self._pending: list[_Change] = []

    def apply(self, call: Call) -> None:
        """One more call; one that failed changed nothing."""
        if call.result < 0 or call.path.endswith(" (deleted)"):
            return
        if call.op == "fsync":
            self._sync(self._find(call.path))
            return
        folder, name = self._place(call.path)
        node = folder.now.get(name)
        match call.op:
            case "open" if node is None:
                self._change([(folder, name, _File())])
            case "open":
                if call.flags & os.O_TRUNC and isinstance(node, _File) and node.content("all"):
                    node.pending.append((0, None))
            case "write":
                assert isinstance(node, _File), call
                node.pending.append((call.offset, call.data))
            case "truncate":
                assert isinstance(node, _File), call
                node.pending.append((call.offset, None))
            case "mkdir":
                self._change([(folder, name, _Folder())])
            case "unlink" | "rmdir":
                self._change([(folder, name, None)])
            case "rename":
                target, new = self._place(call.path2)
                self._change([(folder, name, None), (target, new, node)])
            case "link":
                target, new = self._place(call.path2)
                self._change([(target, new, node)])

    def after_a_power_cut(self, chance: random.Random) -> Iterator[Tree]:
        """States that may be there now; all where names are few, else those with one name more or less, and some."""
        count = len(self._pending)
        picks: list[Sequence[int]] = [range(count), ()]
        picks += [[i for i in range(count) if i != left] for left in range(count)]
        picks += [[i] for i in range(count)]
        picks += [sorted(chance.sample(range(count), chance.randint(0, count))) for _ in range(4)]
        for pick in picks:
            for how in DATA:
                yield self._tree([self._pending[i] for i in pick], lambda file, how=how: how)
        for _ in range(4):
            pick = sorted(chance.sample(range(count), chance.randint(0, count)))
            yield self._tree([self._pending[i] for i in pick], lambda file: chance.choice(DATA))

    def now(self) -> Tree:
        """What a process sees that was not there when it happened."""
        return self._tree(self._pending, lambda file: "all")

    def _tree(self, changes: list[_Change], how: object) -> Tree:
        names: dict[_Folder, dict[str, _Node]] = {}

        def names_of(folder: _Folder) -> dict[str, _Node]:
            return names.setdefault(folder, dict(folder.durable))

        for change in changes:
            for folder, name, node in change:
                if node is None:
                    names_of(folder).pop(name, None)
                else:
                    names_of(folder)[name] = node
        tree: Tree = {}

        def walk(folder: _Folder, at: str) -> None:
            for name, node in names_of(folder).items():
                if isinstance(node, _File):
                    tree[at + name] = node.content(how(node))  # type: ignore[operator]
                else:
                    tree[at + name] = None
                    walk(node, f"{at}{name}/")

        walk(self._top, "")
        return tree

    def _change(self, change: _Change) -> None:
        for folder, name, node in change:
            if node is None:
                folder.now.pop(name, None)
            else:
                folder.now[name] = node
        self._pending.append(change)

    def _sync(self, node: _Node) -> None:
        if isinstance(node, _File):
            node.durable, node.pending = node.content("all"), []
            return
        for change in [change for change in self._pending if any(folder is node for folder, _, _ in change)]:
            for folder, name, target in change:
                if target is None:
                    folder.durable.pop(name, None)
                else:
                    folder.durable[name] = target
            self._pending.remove(change)

    def _find(self, path: str) -> _Node:
        node: _Node = self._top
        for name in path.removeprefix(self._root).strip("/").split("/") if path != self._root else ():
            assert isinstance(node, _Folder), path
            node = node.now[name]
        return node

    def _place(self, path: str) -> tuple[_Folder, str]:
        above, _, name = path.rpartition("/")
        folder = self._find(above)
        assert isinstance(folder, _Folder), path
        return folder, name


class Place:
    """A folder in which one tree after the other is laid out."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._tree = folder, Tree()
        folder.mkdir()

    def lay_out(self, tree: Tree) -> None:
        """Make it real; what is there already stays."""
        for name, content in reversed(self._tree.items()):  # what is in a folder goes before it
            if name not in tree or (content is None) != (tree[name] is None):
                (self.folder / name).rmdir() if content is None else (self.folder / name).unlink()
                self._tree = {other: self._tree[other] for other in self._tree if other != name}
        for name, content in tree.items():
            if content is not None and self._tree.get(name) != content:
                (self.folder / name).write_bytes(content)
            elif content is None and name not in self._tree:
                (self.folder / name).mkdir()
        self._tree = tree
