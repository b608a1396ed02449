"""The list F1-F36 is complete: docs/reliability.md names for each fault tests that exist, and names no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"


def fault_tests() -> set[str]:
    """Names of the tests in this folder that begin with the number of a fault."""
    trees = (ast.parse(file.read_text()) for file in HERE.glob("test_*.py"))
    names = (node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {name for name in names if re.match(r"test_F\d\d_", name)}


def rows() -> dict[int, set[str]]:
    """Fault -> the tests that the page's table names for it."""
    found = re.findall(r"^\| F(\d+) \|.*\|([^|]*)\|$", PAGE.read_text(), re.MULTILINE)
    return {int(number): set(re.findall(r"`(\w+)`", tests)) for number, tests in found}


def test_every_fault_from_1_to_36_is_in_the_table_once():
    assert list(rows()) == list(range(1, 37))


def test_every_fault_but_that_of_a_gpu_has_a_test_by_its_name_here():
    numbers = {int(name[6:8]) for name in fault_tests()}
    assert numbers >= set(range(1, 36))


def test_the_table_names_tests_that_exist_each_beside_its_own_fault():
    for number, names in rows().items():
        if number != 36:
            assert names, number
            assert names <= fault_tests(), number
            assert {int(name[6:8]) for name in names} == {number}


def test_what_needs_a_gpu_is_in_gpu_check():
    assert '"""F36:' in (HERE.parents[1] / "benchmarks" / "gpu_checks.py").read_text()
