"""`launcher check` and `launcher show` as a user and a program meet them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.cli import main
from tests.recipe.make import GOOD, write


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAUNCHER_CLUSTER", raising=False)
    monkeypatch.delenv("LAUNCHER_PRESETS", raising=False)
    return tmp_path


def launcher(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, output and error output of the command line."""
    with pytest.raises(SystemExit) as exit:
        main(list(argv))
    captured = capsys.readouterr()
    return int(exit.value.code or 0), captured.out, captured.err


def test_check_of_good_recipes_ends_with_0(here: Path, capsys: pytest.CaptureFixture[str]):
    write(here, name="a.yaml")
    write(here, name="b.yaml")
    assert launcher(capsys, "check", "a.yaml", "b.yaml", "train.seed=1") == (0, "a.yaml: ok\nb.yaml: ok\n", "")


def test_check_tells_every_problem_of_every_recipe_and_ends_with_2(here: Path, capsys: pytest.CaptureFixture[str]):
    write(here, name="good.yaml")
    write(here, GOOD.replace("8", "7"), name="bad.yaml")
    code, out, err = launcher(capsys, "check", "good.yaml", "bad.yaml", "absent.yaml", "cluster.nproc_per_node=2")
    assert code == 2
    assert out == "good.yaml: ok\n"
    assert "bad.yaml: 1 problem\n  line 5: train.global_batch_size = 7: expected a multiple of 2" in err
    assert "absent.yaml: 1 problem" in err


def test_check_json_has_its_documented_shape(here: Path, capsys: pytest.CaptureFixture[str]):
    write(here, name="good.yaml")
    write(here, GOOD + "optimizer: {lr: .inf}\n", name="bad.yaml")
    code, out, err = launcher(capsys, "check", "--json", "good.yaml", "bad.yaml")
    assert (code, err) == (2, "")
    assert json.loads(out, parse_constant=pytest.fail) == [
        {"recipe": "good.yaml", "ok": True, "problems": []},
        {
            "recipe": "bad.yaml",
            "ok": False,
            "problems": [
                {"key": "optimizer.lr", "value": "inf", "expected": "a finite number", "fix": "", "where": "bad.yaml:6"}
            ],
        },
    ]


def test_check_json_is_json_whatever_the_value(here: Path, capsys: pytest.CaptureFixture[str]):
    write(here, GOOD + "strategy: [.inf, {a: .nan}]\n")
    _, out, _ = launcher(capsys, "check", "--json", "recipe.yaml")
    assert json.loads(out, parse_constant=pytest.fail)[0]["problems"][0]["value"] == ["inf", {"a": "nan"}]


def test_check_of_no_recipe_says_so(capsys: pytest.CaptureFixture[str]):
    code, _, err = launcher(capsys, "check", "train.seed=1")
    assert code == 2
    assert "no RECIPE" in err


def test_check_says_what_is_wrong_with_arguments(here: Path, capsys: pytest.CaptureFixture[str]):
    write(here)
    code, _, err = launcher(capsys, "check", "recipe.yaml", "~train.seed")
    assert code == 2
    assert "write train.seed=null" in err


def test_check_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]):
    write(here)
    before = sorted(here.rglob("*"))
    launcher(capsys, "check", "recipe.yaml")
    assert sorted(here.rglob("*")) == before


def test_show_prints_a_recipe_that_is_a_recipe(here: Path, capsys: pytest.CaptureFixture[str]):
    write(here)
    code, out, _ = launcher(capsys, "show", "recipe.yaml", "optimizer.lr=1e-5")
    assert code == 0
    write(here, out, name="again.yaml")
    assert launcher(capsys, "show", "again.yaml") == (0, out, "")
    assert launcher(capsys, "check", "again.yaml")[0] == 0


def test_show_origin_prints_each_value_with_its_place(here: Path, capsys: pytest.CaptureFixture[str]):
    write(here)
    _, out, _ = launcher(capsys, "show", "recipe.yaml", "--origin", "train.epochs=2", "run.tags=[a]")
    lines = dict(line.split("  # ", 1)[::-1] for line in out.splitlines() if "  # " in line and "# default" not in line)
    shown = [line.split("#") for line in out.splitlines()]
    rows = {left.split(":")[0]: (left.partition(":")[2].strip(), right.strip()) for left, right in shown}
    assert rows["model.name"] == ("org/model", "recipe.yaml:1")
    assert rows["train.epochs"] == ("2.0", "argument train.epochs=2")
    assert rows["train.max_steps"] == ("null", "argument train.epochs=2")
    assert rows["run.tags.0"] == ("a", "argument run.tags=[a]")
    assert rows["data.eval"] == ("[]", "default")
    assert rows["strategy.kind"] == ("fsdp2", "default")
    assert lines


def test_show_needs_no_files_that_the_recipe_names(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "recipe.yaml").write_text(GOOD)
    assert launcher(capsys, "show", "recipe.yaml")[0] == 0
    code, _, err = launcher(capsys, "show", "recipe.yaml", "train.sed=1")
    assert code == 2
    assert "Did you mean train.seed?" in err


@pytest.mark.parametrize("verb", ["check", "show"])
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]):
    code, out, _ = launcher(capsys, verb, "--help")
    assert code == 0
    assert f"example: launcher {verb} recipes/" in out
