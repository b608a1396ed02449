"""`launcher doctor`: what it finds, what it says to do, its exit code, and building DeepSpeed's operators ahead."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from launcher import doctor
from launcher.cli import main
from launcher.errors import UserError
from launcher.trainer import ops

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the verb without looking at real operators; returns (exit code, standard output)."""
    monkeypatch.setattr(ops, "op_is_built", lambda name: name == "cpu_adam")

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main(["doctor", *arguments])
        assert isinstance(left.value.code, int)
        return left.value.code, capsys.readouterr().out

    return run


def report(output: str) -> dict[str, dict[str, str]]:
    """Name -> finding of `--json`."""
    values = json.loads(output)
    assert values["version"] == 1
    assert values["ok"] == all(finding["state"] != "bad" for finding in values["findings"])
    return {finding["name"]: finding for finding in values["findings"]}


def without(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Let some packages have other versions, or none."""
    real = doctor._version
    names = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(doctor, "_version", lambda name: names[name] if name in names else real(name))


def script(*arguments: str, folder: Path, path: str) -> subprocess.CompletedProcess[str]:
    """The command in its own process, with its own folder of built operators."""
    environment = {**os.environ, "PATH": path, "TORCH_EXTENSIONS_DIR": str(folder)}
    command = [sys.executable, "-c", "from launcher.cli import main; main()", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_report_names_packages_devices_tools_and_operators(call: Any):
    code, output = call("--json")
    found = report(output)
    assert code == 0
    assert {"torch", "transformers", "accelerate", "peft", "deepspeed", "liger-kernel", "flash-attn"} <= set(found)
    assert found["torch"]["state"] == "ok"
    assert found["cores"]["text"] == f"{len(os.sched_getaffinity(0))} for this process"
    if found["deepspeed"]["state"] == "ok":
        assert {"g++", "ninja", "libaio", "cpu_adam", "async_io"} <= set(found)
        assert found["cpu_adam"] == {
            "group": "operators", "name": "cpu_adam", "state": "ok", "text": "built", "fix": "",
        }  # fmt: skip
        assert found["async_io"]["fix"] == "Run launcher doctor --build-ops on this machine."


def test_every_note_says_what_to_do(call: Any):
    findings = report(call("--json")[1]).values()
    assert all(finding["fix"].endswith(".") for finding in findings if finding["state"] != "ok")


def test_the_table_has_a_line_a_finding_under_its_group(call: Any):
    _, output = call()
    lines = output.splitlines()
    assert [line for line in lines if not line.startswith(" ")][:2] == ["packages", "devices"]
    assert any(line.split()[:2] == ["ok", "torch"] for line in lines)


def test_what_only_some_recipes_need_is_a_note_and_what_training_needs_is_bad(
    call: Any, monkeypatch: pytest.MonkeyPatch
):
    without(monkeypatch, deepspeed=None, torch=None)
    code, output = call("--json")
    found = report(output)
    assert code == 1
    assert found["deepspeed"]["state"] == "note"
    assert found["deepspeed"]["text"] == "not installed: zero1, zero2 and zero3 need it"
    assert found["deepspeed"]["fix"] == "Run pip install 'train-launcher[deepspeed]'."
    assert found["torch"]["state"] == "bad"
    assert found["torch"]["text"] == "not installed: training needs >=2.11,<3"
    assert "cpu_adam" not in found


def test_a_version_outside_the_declared_range_is_bad(call: Any, monkeypatch: pytest.MonkeyPatch):
    without(monkeypatch, transformers="4.57.1", deepspeed="0.20.0")
    code, output = call("--json")
    found = report(output)
    assert code == 1
    assert found["transformers"]["text"] == "4.57.1, expected >=5.17,<6"
    assert found["transformers"]["fix"] == "Run pip install 'transformers>=5.17,<6'."
    assert found["deepspeed"]["state"] == "bad"


def test_gpus_that_torch_does_not_see_are_bad(call: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "count_gpus", lambda: (8, "/dev/nvidia*"))
    monkeypatch.setattr(doctor, "_gpus_of_torch", lambda: 0)
    code, output = call("--json")
    finding = report(output)["GPUs"]
    assert code == 1
    assert finding["text"].startswith("8 (/dev/nvidia*), but torch")
    assert "torch with CUDA" in finding["fix"]


def test_gpus_that_torch_sees_bring_the_quantizer_along(call: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "count_gpus", lambda: (2, "/dev/nvidia*"))
    monkeypatch.setattr(doctor, "_gpus_of_torch", lambda: 2)
    without(monkeypatch, deepspeed="0.19.8")
    found = report(call("--json")[1])
    assert found["GPUs"]["state"] == "ok"
    assert "strategy.zero.quantized_weights" in found["quantizer"]["text"]


@pytest.mark.parametrize(
    ("installed", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.11,<3", True),
        ("2.10.1", ">=2.11,<3", False),
        ("3.0", ">=2.11,<3", False),
        ("3", ">=3.0", True),
        ("0.19.8", ">=0.19,<0.20", True),
        ("0.20.0rc1", ">=0.19,<0.20", False),
        ("4", ">=3.5,<5", True),
    ],
)
def test_a_version_is_compared_number_by_number(installed: str, wanted: str, fits: bool):
    assert doctor.within(installed, wanted) is fits


def test_every_requirement_of_the_project_is_understood():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for extra, lines in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for line in lines:
            found = doctor._REQUIREMENT.match(f"{line}; extra == '{extra}'" if extra else line)
            assert found, line
            assert (found[3] or "") == extra
            assert sum(sign in found[2] for sign in (">=", "<")) == len(found[2].split(","))
    assert set(doctor.PURPOSES) <= set(project["optional-dependencies"])
    assert set(doctor.OPS) == set(ops.OPS) - set(ops.NEEDS.values())  # what another one brings along is not named


def test_only_the_adam_has_to_be_built(call: Any, monkeypatch: pytest.MonkeyPatch):
    def build_op(name: str) -> Path:
        if name == broken:
            raise UserError(f"launcher doctor --build-ops: {name} cannot be built: no compiler.")
        return Path("/built") / name

    without(monkeypatch, deepspeed="0.19.8")
    monkeypatch.setattr(ops, "op_is_built", lambda name: False)
    monkeypatch.setattr(ops, "build_op", build_op)
    broken = "async_io"
    code, output = call("--build-ops", "--json")
    assert (code, report(output)["async_io"]["state"]) == (0, "note")
    assert report(output)["cpu_adam"]["text"] == "built in /built/cpu_adam"
    broken = "cpu_adam"
    code, output = call("--build-ops", "--json")
    assert (code, report(output)["cpu_adam"]["state"]) == (1, "bad")


def test_building_without_deepspeed_says_how_to_install_it(call: Any, monkeypatch: pytest.MonkeyPatch):
    without(monkeypatch, deepspeed=None)
    code, output = call("--build-ops")
    assert code == 1
    assert "there is nothing to build. Run pip install 'train-launcher[deepspeed]'." in output


def test_looking_imports_nothing_heavy_before_it_is_needed():
    code = "import launcher.doctor, launcher.cli.doctor, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "deepspeed", "transformers", "numpy"} & set(loaded)


@pytest.mark.slow
@needs_deepspeed
def test_a_machine_without_a_compiler_is_told_so_and_no_traceback(tmp_path: Path):
    done = script("--build-ops", folder=tmp_path, path=str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "cpu_adam cannot be built: g++ is not found. Install a C++ compiler." in done.stdout
    assert "building cpu_adam" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@needs_deepspeed
@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_adam_is_built_once_and_then_found(tmp_path: Path):
    first = script("--build-ops", folder=tmp_path, path=os.environ["PATH"])
    assert first.returncode == 0, first.stdout + first.stderr
    assert (tmp_path / "cpu_adam" / "cpu_adam.so").is_file()
    second = script("--build-ops", "--json", folder=tmp_path, path=os.environ["PATH"])
    assert report(second.stdout)["cpu_adam"]["text"] == "built before"
    assert "building cpu_adam" not in second.stderr
