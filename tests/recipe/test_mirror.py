"""`checkpoint.mirror`: what it may look like, and that its package is asked for before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import Problem, RecipeError
from launcher.recipe import paths
from tests.recipe.make import loaded


def problems(folder: Path, *overrides: str) -> list[Problem]:
    try:
        loaded(folder, *overrides)
    except RecipeError as error:
        return [problem for problem in error.problems if problem.key == "checkpoint.mirror"]
    return []


@pytest.mark.parametrize(
    ("mirror", "said"),
    [
        ("mirror", "It must mean the same on every machine that starts the run: write the whole path."),
        ("../mirror", "It must mean the same on every machine that starts the run: write the whole path."),
        ("s3a://bucket/x", "Did you mean 's3'?"),
        ("https://host/x", "expected a URL that begins with one of file://, s3://, gs://, gcs://, az://, abfs://"),
        ("memory://x", "expected a URL that begins with one of file://"),
        ("s3://key:secret@bucket/x", "without a user or password in it"),
        ("s3://", "Name a folder, or a bucket."),
        ("/", "Name a folder, or a bucket."),
        ("/mirror/{name}", "{run} alone in braces, for the run's name, not {name}"),
    ],
)
def test_what_is_no_place_for_copies_is_refused_in_words(tmp_path, mirror, said):
    (problem,) = problems(tmp_path, f"checkpoint.mirror='{mirror}'")
    assert said in str(problem)


def test_a_store_whose_package_is_not_installed_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None if name == "s3fs" else object())
    (problem,) = problems(tmp_path, "checkpoint.mirror=s3://bucket/runs")
    assert "s3:// needs s3fs" in str(problem)
    assert "train-launcher[cloud]" in str(problem)
    assert problems(tmp_path, "checkpoint.mirror=gs://bucket/runs") == []


@pytest.mark.parametrize("mirror", ["{runs}", "{runs}/x/{{run}}/../../{{run}}", "file://{runs}", "{runs}/one/copies"])
def test_a_mirror_where_the_run_lies_is_refused(tmp_path, mirror):
    place = mirror.format(runs=tmp_path / "runs")
    (problem,) = problems(tmp_path, f"run.dir={tmp_path / 'runs'}", "run.name=one", f"checkpoint.mirror='{place}'")
    assert f"another place than the run itself, {tmp_path}/runs/one" in str(problem)


@pytest.mark.parametrize("mirror", ["/mirror", "/mirror/{run}/a", "file:///mirror"])
def test_a_path_elsewhere_is_taken(tmp_path, mirror):
    assert problems(tmp_path, f"checkpoint.mirror='{mirror}'") == []
