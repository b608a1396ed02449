"""Which questions and answers the demo learns: objects of this machine's standard library and their documentation."""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "turtledemo",
}
_SHORTEST, _LONGEST = 20, 320  # characters of an answer
_SYSTEM = "You explain the Python standard library."

Pair = tuple[str, str]  # question, answer


def standard_library_pairs() -> list[Pair]:
    """Every documented public object of the standard library as (question, answer), each once, in a fixed order.

    Sources are parsed, never imported, so nothing of them runs; the built-in functions and types come from `builtins`.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, str] = {}
    for name, kind, doc in [*_documented_in_files(root), *_documented_builtins()]:
        answer = _first_paragraph(doc)
        if _SHORTEST <= len(answer) <= _LONGEST:
            found.setdefault(_question(name, kind), answer)
    return list(found.items())


def write_jsonl(pairs: list[Pair], folder: Path, *, num_held_out: int, seed: int = 0) -> tuple[Path, Path]:
    """`train.jsonl` and `heldout.jsonl` as chat messages, shuffled once; returns both paths."""
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    for path, part in zip(paths, (shuffled[num_held_out:], shuffled[:num_held_out]), strict=True):
        path.write_text("".join(json.dumps({"messages": messages(*pair)}) + "\n" for pair in part), encoding="utf-8")
    return paths


def messages(question: str, answer: str | None = None) -> list[dict[str, str]]:
    """One conversation in the openai form; without an answer, the prompt alone."""
    turns = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def _documented_in_files(root: Path) -> Iterator[tuple[str, str, str]]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS & set(parts) or any(_private(part) for part in parts if part != "__init__"):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a few shipped files are broken on purpose
        if doc := ast.get_docstring(tree):
            yield module, "module", doc
        yield from _documented_in_tree(tree, module)


def _documented_in_tree(tree: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not _private(node.name):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            if doc := ast.get_docstring(node):
                yield f"{prefix}.{node.name}", kind, doc
            if kind == "class":
                yield from _documented_in_tree(node, f"{prefix}.{node.name}")


def _documented_builtins() -> Iterator[tuple[str, str, str]]:
    for name, value in sorted(vars(builtins).items()):
        if _private(name) or not (doc := inspect.getdoc(value)):
            continue
        yield name, "class" if inspect.isclass(value) else "function", doc
        for inner, member in sorted(vars(value).items()) if inspect.isclass(value) else ():
            if not _private(inner) and (inner_doc := inspect.getdoc(member)):
                yield f"{name}.{inner}", "function", inner_doc


def _private(name: str) -> bool:
    return name.startswith("_")


def _first_paragraph(doc: str) -> str:
    return " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())


def _question(name: str, kind: str) -> str:
    asked = {"module": "What is the module {} for?", "class": "What is the class {}?", "function": "What does {} do?"}
    return asked[kind].format(name)
