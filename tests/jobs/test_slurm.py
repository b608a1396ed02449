"""Target slurm towards people: what it refuses and in which words, what it calls, and the files of slurm/.

Commands are stand-ins: each answer is one that a real Slurm 22.05 gave (tests/slurm holds one), but a person's site, an
account that is wrong or a second cluster is none that can be made there.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.cli import main as cli
from launcher.errors import RecipeError, UserError
from launcher.jobs._slurm import PRESETS, RECIPE, SWEEPS, files, main, overrides
from launcher.jobs.spec import bare_spec
from launcher.jobs.targets import slurm
from launcher.jobs.targets.slurm_script import FILE
from launcher.recipe.check import load
from launcher.run.control import request_stop
from launcher.run.directory import RunDirectory
from launcher.run.ledger import start_attempt
from launcher.shipped import folder
from tests.jobs.make import project
from tests.jobs.slurm_make import Site, job, spec

SLURM = folder("slurm")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)
    made.command("sbatch", "echo 7")
    monkeypatch.setenv("PATH", made.path)
    return made


def refused(key: str, *, value: object = None, **given: object) -> str:
    """The problem of a key, whole; the only one."""
    (problem,) = slurm.problems(spec(**given))
    assert problem.key == key
    assert value is None or problem.value == value
    return str(problem)


def test_nothing_is_wrong_with_a_usual_job():
    assert list(slurm.problems(spec())) == []
    assert list(slurm.problems(spec(cpus_per_node=64, tasks="gpu", gres="gpu:a100:8"))) == []


@pytest.mark.parametrize("name", ["with space", "x" * 201, "a$b", "-x", "a;b", "ü"])
def test_a_name_that_slurm_or_a_file_cannot_bear(name):
    assert "letters, digits and . _ , = + @ -" in refused("run.name", name=name)


def test_fewer_cores_than_ranks():
    text = refused("cluster.slurm.cpus_per_node", cpus_per_node=4)
    assert text.endswith("expected 8 or more, one core for each rank of a node. 32 leaves each some for loading data.")


def test_cores_that_tasks_cannot_share():
    assert "a multiple of 8" in refused("cluster.slurm.cpus_per_node", cpus_per_node=20, tasks="gpu")


def test_a_limit_that_leaves_no_time_to_save():
    text = refused("cluster.time_limit_min", minutes=5, lead_s=295)
    assert "expected more than the 295 s of cluster.stop_lead_s and the 10 s that a checkpoint takes" in text
    assert "Use at least 6" in text


def test_gres_of_another_number_of_gpus():
    assert "expected 8 GPUs a node" in refused("cluster.slurm.gres", gres="gpu:a100:4")
    assert "expected gpu:8 among them" in refused("cluster.slurm.gres", gres="shard:8")
    assert list(slurm.problems(spec(gres="gpu:8,nvme:1"))) == []
    assert list(slurm.problems(spec(gres="nvme:1", accelerator="cpu"))) == []


def test_tasks_of_srun_in_a_container():
    from launcher.recipe.schema.slurm import Container

    text = refused("cluster.slurm.tasks", tasks="gpu", container=Container(runtime="pyxis", image="x.sqsh"))
    assert "expected node, since container.runtime is set" in text


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        ("mem=lots", "mem", "a number with K, M, G or T"),
        ("mem=12Q", "mem", "a number with K, M, G or T"),
        ("gres='gpu a100'", "gres", "NAME:COUNT or NAME:TYPE:COUNT"),
        ("port=80", "port", "1024 to 65535"),
        ("port=70000", "port", "1024 to 65535"),
        ("cpus_per_node=0", "cpus_per_node", "1 or more"),
        ("sweep_parallel=0", "sweep_parallel", "1 or more"),
        ("account='$PROJECT'", "account", "Slurm expands no variables there."),
        ('comment="it\'s"', "comment", "text without quotes"),
        ("host_suffix=' ib'", "host_suffix", "letters, digits, dots and hyphens"),
        ("extra=[--nodes=4]", "extra", "Use cluster.nodes."),
        ("extra=[--node=4]", "extra", "Use cluster.nodes."),
        ("extra=[-N4]", "extra", "Write --name=value, in its long form."),
        ("extra=[--mail-user=$USER]", "extra", "without shell variables"),
        ("extra=[--output=x]", "extra", "The job cannot work with another value."),
        ("extra=[--gpus-per-task=1]", "extra", "Use cluster.nproc_per_node."),
        ("container.runtime=pyxis", "container.image", "an image, since container.runtime is set"),
        ("container.image=x.sif", "container.runtime", "pyxis or apptainer, since container.image is set"),
    ],
)
def test_keys_that_are_wrong_by_themselves(change, key, words, tmp_path):
    with pytest.raises(RecipeError) as error:
        load(project(tmp_path), ["cluster.target=slurm", f"cluster.slurm.{change}"])
    (problem,) = error.value.problems
    assert problem.key == f"cluster.slurm.{key}"
    assert words in str(problem)


@pytest.mark.parametrize("mount", ["data:/data", "/data", "/a:/b:ro:x", "/a:/b,/c:/d"])
def test_mounts_that_are_none(mount, tmp_path):
    with pytest.raises(RecipeError, match="SOURCE:TARGET or SOURCE:TARGET:ro with absolute paths"):
        load(project(tmp_path), [f"cluster.slurm.container={{runtime: pyxis, image: x, mounts: ['{mount}']}}"])


def test_a_large_model_needs_a_longer_lead(tmp_path):
    """The estimate of saving knows the model: each node writes its share at 1 GB/s."""
    large = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 400}  # fmt: skip
    recipe = project(tmp_path, model={"config": large}, cluster={"nproc_per_node": 4, "time_limit_min": 10})
    with pytest.raises(RecipeError) as error:
        load(recipe, ["cluster.stop_lead_s=20"])
    assert error.value.problems[0].key == "cluster.stop_lead_s"
    assert "GiB at 1 GB/s" in str(error.value)
    assert load(recipe, ["cluster.stop_lead_s=200"])


def test_no_sbatch_is_told_with_the_two_ways_on(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"sbatch: not on PATH.*login node.*--target slurm -o DIR"):
        slurm.submit(spec(), slurm.render(spec()), tmp_path)
    findings = list(slurm.validate(spec(), slurm.render(spec()), tmp_path))
    assert [finding.state for finding in findings] == ["skipped", "skipped"]


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ("sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: Invalid "
         "partition name specified", "cluster.slurm.partition"),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
         "cluster.slurm.account"),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", "cluster.slurm.qos"),
        ("sbatch: error: Batch job submission failed: Invalid feature specification", "cluster.slurm.constraint"),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available",
         "cluster.nodes = 2, cluster.nproc_per_node = 8 (GPUs a node; none: cluster.accelerator=cpu)"),
        ("sbatch: error: Batch job submission failed: Node count specification invalid", "cluster.nodes"),
        ("sbatch: error: Batch job submission failed: Invalid node name specified", "cluster.slurm.exclude"),
        ("sbatch: error: Batch job submission failed: Requested reservation is invalid", "cluster.slurm.reservation"),
        ("sbatch: error: Invalid generic resource (gres) specification", "cluster.slurm.gres"),
        ("sbatch: error: Batch job submission failed: More processors requested than permitted",
         "cluster.slurm.cpus_per_node"),
        ("sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
         "cluster.time_limit_min"),
        ("sbatch: error: Memory specification can not be satisfied", "cluster.slurm.mem"),
        ("sbatch: unrecognized option '--badopt=3'\nTry \"sbatch --help\" for more information",
         "cluster.slurm.extra"),
    ],
)  # fmt: skip
def test_what_sbatch_refuses_is_told_in_its_words_with_the_key(site, said, key):
    (site.folder / "said").write_text(said)
    site.command("sbatch", f"cat {site.folder / 'said'} >&2; exit 1")
    with pytest.raises(UserError) as error:
        slurm.submit(spec(), slurm.render(spec()), site.folder)
    assert str(error.value).startswith("sbatch refused big: ")
    assert said.splitlines()[-1 if "--help" not in said else 0].rpartition(": ")[2] in str(error.value)
    assert str(error.value).partition(". Change ")[2].removeprefix("one of ").startswith(key)


def test_a_refusal_names_the_value_and_what_shows_the_allowed_ones(site):
    words = "sbatch: error: Batch job submission failed: Invalid feature specification"
    site.command("sbatch", f"echo '{words}' >&2; exit 1")
    given = spec(constraint="{a100}")
    with pytest.raises(UserError) as error:
        slurm.submit(given, slurm.render(given), site.folder)
    assert "Change cluster.slurm.constraint = {a100}. Allowed: `sinfo -o " in str(error.value)


def test_a_variable_that_is_not_set_is_told_before_sbatch_is_called(site, monkeypatch):
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(UserError, match="MY_TOKEN not set here"):
        slurm.submit(spec(env_names=("MY_TOKEN",)), slurm.render(spec()), site.folder)
    assert site.calls == []


def test_a_job_carries_its_cluster_and_whether_it_comes_back(site):
    site.command("sbatch", "echo 'a warning of the site'; echo '12;far'")
    found = slurm.submit(spec(requeue=False), slurm.render(spec()), site.folder)
    assert (found.id, found.more) == ("12", {"cluster": "far", "requeue": "no", "stop_lead_s": "300"})
    assert site.calls == ["sbatch --parsable job.sbatch"]


def test_variables_of_the_job_in_which_submit_is_called_do_not_go_along(site, monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "4096")
    monkeypatch.setenv("SLURM_CONF", "/etc/here")
    monkeypatch.setenv("LAUNCHER_NODE_RANK", "3")
    site.command("sbatch", f"env >{site.folder / 'env'}; echo 12")
    slurm.submit(spec(), slurm.render(spec()), site.folder)
    told = (site.folder / "env").read_text()
    assert "SLURM_CONF=/etc/here" in told
    assert "SLURM_MEM_PER_CPU" not in told
    assert "LAUNCHER_NODE_RANK" not in told


def test_a_slurm_that_cannot_be_reached_refuses_nothing(site):
    site.command("sbatch", "echo 'sbatch: fatal: Could not establish a configuration source' >&2; exit 1")
    assert [finding.state for finding in slurm.validate(spec(), slurm.render(spec()), site.folder)] == ["ok", "skipped"]


def test_what_sbatch_says_of_a_trial_is_shown(site):
    site.command("sbatch", "echo 'sbatch: Job 3 to start at 2030-01-01T00:00:00 using 2 processors on a1' >&2")
    *_, finding = slurm.validate(spec(), slurm.render(spec()), site.folder)
    assert (finding.state, finding.text) == ("ok", "Job 3 to start at 2030-01-01T00:00:00 using 2 processors on a1")


def test_a_pyxis_job_needs_a_srun_that_has_it(site):
    from launcher.recipe.schema.slurm import Container

    site.command("srun", "echo '      --container-image=[USER@]'")
    given = spec(container=Container(runtime="pyxis", image="x.sqsh"))
    assert "pyxis" not in [finding.what for finding in slurm.validate(given, slurm.render(given), site.folder)]
    site.command("srun", "echo usage")
    assert ("pyxis", "bad") in [(f.what, f.state) for f in slurm.validate(given, slurm.render(given), site.folder)]
    site.command("sbatch", "echo 'sbatch: error: Unable to contact slurm controller (connect failure)' >&2; exit 1")
    assert ("pyxis", "skipped") in [(f.what, f.state) for f in slurm.validate(given, slurm.render(given), site.folder)]


def test_cancel_ends_one_element_and_takes_no_offence_at_an_ended_job(site):
    site.command("scancel", "echo 'scancel: error: Kill job error on job id 40: Invalid job id specified' >&2; exit 1")
    slurm.cancel(job(site.folder, id="40_2", cluster="far"))
    assert site.calls == ["scancel -M far 40_2"]
    site.command("scancel", "echo 'scancel: error: Kill job error on job id 40: Access/permission denied' >&2; exit 1")
    with pytest.raises(UserError, match=r"scancel 40_2: .*Access/permission denied"):
        slurm.cancel(job(site.folder, id="40_2"))


@pytest.mark.slow
def test_cancel_waits_for_the_checkpoint_of_a_run_that_trains(site):
    """squeue writes the verdict when it is asked for the third time, as if the worker had."""
    one = job(site.folder, stop_lead_s="300")
    run = RunDirectory(one.run)
    run.control.mkdir(parents=True)
    start_attempt(run, target="slurm", job_id="7", nodes=1, reason="worker")
    request_stop(run, "cancel by me")
    verdict = run.control / "verdict"
    third = f"[[ $(grep -c squeue {site.folder / 'calls'}) -lt 3 ]] || echo stop >{verdict}"
    site.command("squeue", f"echo '7|RUNNING|None|a1'; {third}")
    site.command("scancel", "")
    slurm.cancel(one)
    assert [call.split()[0] for call in site.calls] == ["squeue"] * 3 + ["scancel"]


@pytest.mark.parametrize("state", ["PENDING", "COMPLETING"])
def test_cancel_does_not_wait_for_a_job_that_does_not_train(site, state):
    one = job(site.folder, stop_lead_s="300", id="8")  # the attempt is of another job
    run = RunDirectory(one.run)
    run.control.mkdir(parents=True)
    start_attempt(run, target="slurm", job_id="7", nodes=1, reason="worker")
    request_stop(run, "cancel by me")
    site.command("squeue", f"echo '8|{state}|None|'")
    site.command("scontrol", "")
    site.command("scancel", "")
    slurm.cancel(one)
    assert site.calls == ["scancel 8"]


def test_logs_are_the_file_that_slurm_writes_beside_the_script(site):
    (site.folder / "slurm-7.out").write_text("one\ntwo\n")
    (site.folder / "slurm-40_2.out").write_text("three\n")
    assert list(slurm.logs(job(site.folder))) == ["one", "two"]
    assert list(slurm.logs(job(site.folder, id="40_2"))) == ["three"]
    site.command("squeue", "echo '8|PENDING|Priority|'")
    site.command("scontrol", "exit 1")
    with pytest.raises(UserError, match=r"slurm-8.out: cannot be read.*it is queued \(PENDING, Priority\)"):
        list(slurm.logs(job(site.folder, id="8")))


def test_status_asks_once_for_all_jobs_of_a_cluster(site):
    site.command("squeue", "echo '1|RUNNING|None|a1'; echo '2|COMPLETED|None|a2'; echo '3|NODE_FAIL|None|a3'")
    found = slurm.statuses([job(site.folder, id="1"), job(site.folder, id="2"), job(site.folder, id="3", requeue="no")])
    assert [status.state for status in found] == ["running", "finished", "failed"]
    assert len(site.calls) == 1


# slurm/: scripts ready to edit


@pytest.fixture(scope="module")
def rendered() -> dict[str, str]:
    return dict(files())


@pytest.mark.parametrize("script", PRESETS)
def test_a_shipped_script_is_byte_for_byte_what_render_gives(script, rendered):
    assert (SLURM / f"{script}.sbatch").read_text() == rendered[f"{script}.sbatch"]


@pytest.mark.parametrize("script", ["multi-node", "array"])
def test_the_command_of_the_page_makes_it(script, tmp_path):
    sweep = ["--sweep", SWEEPS[script]] if script in SWEEPS else []
    command = ["render", RECIPE.removesuffix(".yaml"), *overrides(script), *sweep, "-o", str(tmp_path)]
    with pytest.raises(SystemExit):
        cli(command)
    assert (tmp_path / FILE).read_bytes() == (SLURM / f"{script}.sbatch").read_bytes()
    recipes = [f"recipe-{number}.yaml" for number in range(3)] if sweep else ["recipe.yaml"]
    assert sorted(path.name for path in tmp_path.glob("recipe*")) == recipes


def test_there_is_no_other_script_and_the_page_names_each(rendered, tmp_path):
    assert {path.name for path in SLURM.iterdir()} == {*rendered, "README.md"}
    main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(rendered)
    page = (SLURM / "README.md").read_text()
    for script, preset in PRESETS.items():
        assert f"| `{script}.sbatch` | {preset}" in page
    assert all(sweep in page for sweep in SWEEPS.values())
    assert RECIPE in page
    assert " ".join(overrides("multi-node")[:1]) in page


def test_every_preset_for_slurm_is_shown_by_a_script():
    shipped = {path.stem for path in (folder("recipes") / "cluster").glob("slurm-*.yaml")}
    assert shipped == set(PRESETS.values())


def test_presets_have_nothing_that_the_target_refuses():
    for script in PRESETS:
        recipe = load(folder("recipes") / RECIPE, overrides(script)).recipe
        assert list(slurm.problems(bare_spec(recipe))) == []


def test_set_up_is_the_only_line_that_names_a_file_of_the_reader():
    assert os.environ["HOME"] not in "".join(path.read_text() for path in SLURM.glob("*.sbatch"))
