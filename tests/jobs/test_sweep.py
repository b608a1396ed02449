"""A sweep: combinations, names, and one array job of them. sbatch is a stand-in; tests/slurm runs one for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import RecipeError, UserError
from launcher.jobs import submissions
from launcher.jobs.sweep import combinations, expand, names, parse, render_sweep, submit_sweep
from launcher.jobs.targets.slurm_script import FILE
from launcher.recipe.check import load
from launcher.run.directory import RunDirectory
from launcher.run.ledger import end_attempt, start_attempt
from launcher.run.state import write_state
from tests.jobs.make import finish, launcher, project
from tests.jobs.slurm_make import Site, options


def test_every_combination_is_a_run_the_last_key_varies_fastest():
    axes = parse(["optimizer.lr=1e-5,3e-5", "train.seed=1,2"])
    assert combinations(axes) == [
        ["optimizer.lr=1e-5", "train.seed=1"],
        ["optimizer.lr=1e-5", "train.seed=2"],
        ["optimizer.lr=3e-5", "train.seed=1"],
        ["optimizer.lr=3e-5", "train.seed=2"],
    ]
    assert names("big", axes) == [
        "big-lr-1e-5-seed-1",
        "big-lr-1e-5-seed-2",
        "big-lr-3e-5-seed-1",
        "big-lr-3e-5-seed-2",
    ]


def test_commas_in_brackets_and_quotes_part_nothing():
    (axis,) = parse(["data.train=[{path: a.jsonl}, {path: b.jsonl}],'c,d'"])
    assert axis.values == ("[{path: a.jsonl}, {path: b.jsonl}]", "'c,d'")
    assert names("big", [axis]) == ["big-0", "big-1"]  # no name reads well


def test_names_that_would_be_the_same_or_too_long_are_numbers():
    assert names("big", parse(["a.kind=x,y", "b.kind=x,y"]))[:2] == ["big-kind-x-kind-x", "big-kind-x-kind-y"]
    assert names("x" * 60, parse(["optimizer.lr=1,2"])) == [f"{'x' * 60}-0", f"{'x' * 60}-1"]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["optimizer.lr"], "expected KEY=VALUE,VALUE"),
        (["optimizer.lr=1,,2"], "expected KEY=VALUE,VALUE"),
        (["optimizer.lr=1,1"], "each value once"),
        (["optimizer.lr=1,2", "optimizer.lr=3"], "optimizer.lr is swept twice"),
        (["run.name=a,b"], "each run is given its own name"),
        (["optimizer..lr=1,2"], "expected KEY=VALUE,VALUE"),
        (["a.b=" + ",".join(map(str, range(1001)))], "1001 runs: expected at most 1000"),
    ],
)
def test_what_is_no_sweep_is_refused(texts, words):
    with pytest.raises(UserError, match="--sweep") as error:
        parse(texts)
    assert words in str(error.value)


def test_names_are_as_long_as_the_target_takes():
    axes = parse(["optimizer.lr=1e-5,3e-5"])
    assert names("x" * 30, axes, longest=38) == [f"{'x' * 30}-lr-1e-5", f"{'x' * 30}-lr-3e-5"]
    assert names("x" * 30, axes, longest=37) == [f"{'x' * 30}-0", f"{'x' * 30}-1"]


SLURM = {"target": "slurm", "nproc_per_node": 2, "accelerator": "cpu"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)
    made.command("sbatch", "if [[ $1 == --parsable ]]; then echo 40; fi")
    made.command("squeue", "")
    made.command("sacct", "")
    made.command("scontrol", "")
    monkeypatch.setenv("PATH", made.path)
    return made


def recipes(site: Site, *texts: str, **changes: object):
    file = project(site.folder, cluster={**SLURM, **changes})
    return expand(lambda overrides: load(file, overrides).recipe, [], parse(texts))


def submit(site: Site, *texts: str, **changes: object):
    name, found = recipes(site, *texts, **changes)
    return submit_sweep(found, name=name, force=False, say=lambda _: None)


def test_a_sweep_is_one_array_job_whose_elements_are_runs(site):
    found = submit(site, "optimizer.lr=1e-2,1e-3", slurm={"sweep_parallel": 1})
    runs = site.folder / "runs"
    assert [(one.job.id, one.job.run.name) for one in found] == [("40_0", "tiny-lr-1e-2"), ("40_1", "tiny-lr-1e-3")]
    folder = runs / "tiny.sweep" / "sweep-1"
    script = (folder / FILE).read_text()
    assert options(script)["array"] == "0-1%1"
    assert options(script)["job-name"] == "tiny"
    for number, (name, rate) in enumerate([("tiny-lr-1e-2", 1e-2), ("tiny-lr-1e-3", 1e-3)]):
        text = (folder / f"recipe-{number}.yaml").read_text()
        assert json.loads(text.partition("\n")[2])["optimizer"]["lr"] == rate
        assert RunDirectory(runs / name).read_recipe()["optimizer"]["lr"] == rate
        job = submissions.latest(runs / name)
        assert job is not None
        assert (job.id, job.folder) == (f"40_{number}", folder)
    assert [call for call in site.calls if "parsable" in call] == ["sbatch --parsable job.sbatch"]


def test_a_refused_sweep_leaves_nothing(site):
    site.command("sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid qos specification' >&2; exit 1")
    with pytest.raises(UserError, match=r"Invalid qos specification\. Change cluster\.slurm\.qos"):
        submit(site, "optimizer.lr=1e-2,1e-3")
    assert not (site.folder / "runs").exists() or not any((site.folder / "runs").iterdir())


def test_runs_that_are_queued_already_are_not_submitted_again(site):
    submit(site, "optimizer.lr=1e-2,1e-3")
    site.command("squeue", "echo '40_[0-1]|PENDING|Priority|'")
    with pytest.raises(UserError, match=r"tiny-lr-1e-2 is submitted already: slurm job 40_0 is queued"):
        submit(site, "optimizer.lr=1e-2,1e-3")


def test_a_sweep_over_machines_is_refused(site):
    with pytest.raises(UserError, match="asks for other machines, time or settings than"):
        submit(site, "cluster.nproc_per_node=1,2")


def test_what_is_wrong_with_any_of_the_runs_is_said_at_once_at_its_sweep(site):
    with pytest.raises(RecipeError) as error:
        recipes(site, "optimizer.lr=1e-3,fast,slow", "train.seed=1,2")
    assert str(error.value).splitlines()[1:] == [
        "  --sweep optimizer.lr=fast: optimizer.lr = fast: expected a number.",
        "  --sweep optimizer.lr=slow: optimizer.lr = slow: expected a number.",
    ]
    with pytest.raises(RecipeError, match=r"  --sweep foo\.bar=1: foo = \{\.\.\.\}: expected a section"):
        recipes(site, "foo.bar=1")


def test_a_key_that_is_given_by_itself_too_is_refused(site):
    with pytest.raises(UserError, match=r"--sweep: train\.seed is given as train\.seed=3 too"):
        expand(lambda _: pytest.fail("not looked at"), ["train.seed=3"], parse(["train.seed=1,2"]))


def test_a_sweep_over_targets_is_refused(site):
    with pytest.raises(UserError, match="--sweep: runs for ray and slurm: expected one target for all"):
        submit(site, "cluster.target=ray,slurm")
    with pytest.raises(UserError, match="--sweep: target torchrun starts its job on this machine at once"):
        submit(site, "cluster.target=slurm,torchrun")


def finished(run: RunDirectory) -> None:
    """As after its last step."""
    run.data_file.write_text(json.dumps({"global_batch_size": 4, "total_steps": 6, "total_rows": None}))
    number = start_attempt(run, target="slurm", job_id="40_0", nodes=["n1"], reason="worker")
    end_attempt(run, number, step=6, outcome_class="finished", verdict="stop", why="")
    write_state(run, "finished", attempt=number, step=6)


def test_what_is_rendered_is_what_is_submitted(site):
    name, found = recipes(site, "optimizer.lr=1e-2,1e-3")
    (job,) = render_sweep(found, name=name, say=lambda _: None)
    assert (job.runs, job.folder) == (("tiny-lr-1e-2", "tiny-lr-1e-3"), "")
    assert not (site.folder / "runs").exists()
    folder = submit(site, "optimizer.lr=1e-2,1e-3")[0].job.folder
    assert {file: (folder / file).read_text() for file in job.rendered.files} == job.rendered.files


def test_finished_runs_are_left_out_and_a_run_that_is_left_alone_is_a_job_like_others(site):
    submit(site, "optimizer.lr=1e-2,1e-3")
    finished(RunDirectory(site.folder / "runs" / "tiny-lr-1e-2"))
    name, found = recipes(site, "optimizer.lr=1e-2,1e-3")
    said: list[str] = []
    (job,) = render_sweep(found, name=name, say=said.append)
    assert said == [f"{site.folder}/runs/tiny-lr-1e-2 is finished and left out."]
    assert job.runs == ("tiny-lr-1e-3",)
    assert "array" not in options(job.rendered.files[FILE])
    (one,) = submit(site, "optimizer.lr=1e-2,1e-3")
    assert (one.job.id, one.job.folder) == ("40", site.folder / "runs" / "tiny-lr-1e-3" / "job" / "submission-2")
    assert {file: (one.job.folder / file).read_text() for file in job.rendered.files} == job.rendered.files
    assert "recipe=$SLURM_SUBMIT_DIR/recipe.yaml" in job.rendered.files[FILE]  # which is there
    assert "recipe.yaml" in job.rendered.files


def test_the_job_that_one_machine_would_start_at_once_is_refused(site):
    with pytest.raises(UserError, match=r"--sweep: target torchrun starts its job on this machine at once"):
        submit(site, "optimizer.lr=1e-2,1e-3", target="torchrun")


@pytest.mark.slow
def test_the_verb(site):
    recipe = project(site.folder, cluster=SLURM)
    env = {"PATH": site.path}
    out, _ = finish(launcher("submit", recipe, "--sweep", "optimizer.lr=1e-2,1e-3", env=env), code=0)
    lines = out.splitlines()
    assert lines[0] == f"submitted {site.folder}/runs/tiny-lr-1e-2: slurm job 40_0"
    stop = f"  stop:   launcher cancel {site.folder}/runs/tiny-lr-1e-2, and so each of the others"
    assert lines[-2:] == [stop, "          scancel 40  (all at once)"]
    for name in ("runs/tiny", "runs/tiny.sweep"):
        _, error = finish(launcher("status", site.folder / name, env=env), code=2)
        assert "2 whose name begins so, as those of a sweep: tiny-lr-1e-2, tiny-lr-1e-3." in error
    out, _ = finish(launcher("submit", recipe, "--sweep", "optimizer.lr=1e-1,1e-4", "--json", env=env), code=0)
    assert [(run["run"], run["id"]) for run in json.loads(out)["runs"]] == [
        ("tiny-lr-1e-1", "40_0"),
        ("tiny-lr-1e-4", "40_1"),
    ]
    _, error = finish(launcher("submit", recipe, "--sweep", "optimizer.lr=1e-2", "--wait", env=env), code=2)
    assert "--wait: follows one job" in error
    _, error = finish(
        launcher("submit", site.folder / "runs" / "tiny-lr-1e-2", "--sweep", "optimizer.lr=1", env=env), code=2
    )
    assert "makes new runs from a recipe" in error
    _, error = finish(launcher("submit", recipe, "--sweep", "optimizer.lr=fast,slow", env=env), code=2)
    assert "optimizer.lr" in error


@pytest.mark.slow
def test_the_verb_render(site):
    recipe, folder = project(site.folder, cluster=SLURM), site.folder / "job"
    sweep = ("render", recipe, "--sweep", "optimizer.lr=1e-2,1e-3")
    env = {"PATH": site.path}
    printed = json.loads(finish(launcher(*sweep, "--json", env=env), code=0)[0])
    (job,) = printed["jobs"]
    assert (printed["sweep"], job["runs"], job["folder"]) == ("tiny", ["tiny-lr-1e-2", "tiny-lr-1e-3"], "")
    assert [one["what"] for one in job["validation"]] == ["bash -n", "sbatch --test-only"]
    out, _ = finish(launcher(*sweep, "-o", folder, env=env), code=0)
    assert out.splitlines()[-1] == f"(cd {folder} && sbatch job.sbatch)"
    assert {file.name: file.read_text() for file in folder.iterdir()} == job["files"]
    out, _ = finish(launcher(*sweep, env=env), code=0)
    assert "==> recipe-1.yaml <==" in out
    assert out.endswith("==> command <==\nsbatch job.sbatch\n")
    assert not (site.folder / "runs").exists()
    assert [call for call in site.calls if "parsable" in call] == []
    site.command("sbatch", "echo 'sbatch: error: Invalid qos specification' >&2; exit 1")
    finish(launcher(*sweep, env=env), code=2)
    for other in (["--explain"], ["--diff", "tiny"]):
        _, error = finish(launcher(*sweep, *other, env=env), code=2)
        assert "--sweep: --diff and --explain are about one run" in error
