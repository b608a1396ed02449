"""Set-up lines, named variables and the missing extra."""

from __future__ import annotations

import os

import pytest

from launcher.errors import UserError
from launcher.jobs import environment
from launcher.jobs.environment import evaluate_setup, require_train_extra, require_variables


@pytest.fixture
def own_environment(monkeypatch):
    """Changes of os.environ end with the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_setup_lines_change_the_environment_as_the_shell_would(own_environment):
    os.environ["GONE"] = "1"
    evaluate_setup(["export A='x=1;y'", "greet() { echo hello; }", 'export B="$A-$(greet)"', "unset GONE", "echo loud"])
    assert os.environ["A"] == "x=1;y"
    assert os.environ["B"] == "x=1;y-hello"
    assert "GONE" not in os.environ


def test_setup_line_with_a_newline_in_a_value_survives(own_environment):
    evaluate_setup([r"export LINES_OF=$'one\ntwo=2'"])
    assert os.environ["LINES_OF"] == "one\ntwo=2"


def test_failing_setup_line_is_a_users_error_with_what_bash_said(own_environment):
    with pytest.raises(UserError, match=r"cluster.setup failed with 3: no such module"):
        evaluate_setup(["echo 'no such module' >&2", "(exit 3)", "export NEVER=1"])
    assert "NEVER" not in os.environ


def test_missing_variables_are_named_all_at_once_and_values_never_shown(monkeypatch):
    monkeypatch.setenv("PRESENT", "secret")
    with pytest.raises(UserError) as caught:
        require_variables(["PRESENT", "ABSENT_ONE", "ABSENT_TWO"])
    assert "ABSENT_ONE, ABSENT_TWO" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_variable_that_set_up_exports_is_there_and_one_that_it_does_not_is_said_to_be_missing_after_it(
    own_environment,
):
    evaluate_setup(["export BY_SETUP=1"])
    require_variables(["BY_SETUP"], after_setup=True)
    with pytest.raises(UserError, match=r"ABSENT not set, and cluster.setup has run"):
        require_variables(["BY_SETUP", "ABSENT"], after_setup=True)


def test_missing_train_extra_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(UserError, match=r'torch.*pip install "train-launcher\[train\]"'):
        require_train_extra()
