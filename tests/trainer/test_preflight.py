"""What ranks find out together before the first step, and that the training after it does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import UserError
from launcher.run.directory import RunDirectory
from launcher.trainer import preflight
from launcher.trainer.distributed import Ranks
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def report(**changes: Any) -> preflight.Report:
    values: dict[str, Any] = {
        "nodes": ["n0", "n0", "n1", "n1"], "versions": {"torch": "2.13.0"}, "all_reduce_bytes": 64 << 20,
        "all_reduce_s": 0.001, "matmul_tflops": [600.0] * 4, "seconds": 0.5,
    }  # fmt: skip
    return preflight.Report(**{**values, **changes})


def test_one_line_says_what_was_seen():
    (line,) = report().lines()
    assert line == (
        "preflight: 4 ranks on 2 nodes: torch 2.13.0, all-reduce of 64 MiB at 101 GB/s, "
        "products at 600 TFLOP/s (0.50 s)"
    )


def test_a_rank_below_four_fifths_of_the_median_is_slow():
    assert preflight.slow_ones([600, 600, 479, 600]) == [2]
    assert preflight.slow_ones([600, 600, 481, 600]) == []
    assert preflight.slow_ones([]) == []


def test_a_slow_rank_is_named_with_its_node_and_what_to_do():
    _, line = report(matmul_tflops=[600, 600, 300, 600], slow=[2]).lines()
    assert line.startswith("warning: rank 2 on n1 multiplies at 300 TFLOP/s, the median is 600")
    assert "nvidia-smi" in line


def test_versions_that_must_agree_refuse_and_others_only_warn():
    assert report(differences=[("driver", "driver 580 on n0, 570 on n1")]).refusal is None
    assert list(report(differences=[("driver", "driver 580 on n0, 570 on n1")]).lines())[1] == (
        "warning: versions differ: driver 580 on n0, 570 on n1"
    )
    refused = report(differences=[("torch", "torch 2.13.0 on n0, 2.12.1 on n1")])
    assert refused.refusal == (
        "the ranks' versions differ: torch 2.13.0 on n0, 2.12.1 on n1. Install one version on all nodes."
    )
    assert list(refused.lines()) == []


def test_nodes_of_one_name_are_numbered_and_a_rank_with_other_versions_stands_for_itself():
    assert preflight._nodes([("a", 0), ("a", 0), ("b", 1)]) == ["a", "a", "b"]
    assert preflight._nodes([("a", 0), ("a", 1)]) == ["a (node 0)", "a (node 1)"]
    old, new = {"torch": "1"}, {"torch": "2"}
    assert preflight._by_node(["a", "a", "b"], [new, old, new]) == {"a": new, "a (rank 1)": old, "b": new}


def on_two(rank: int, world_size: int, folder: str, odd: dict[str, Any]) -> tuple[Any, ...]:
    """One rank of a preflight whose measured times and versions are set; what came of it."""
    places = Ranks(rank=rank, local_rank=0, world_size=world_size, local_world_size=1, node=rank)
    run = RunDirectory(Path(folder))
    if "matmul_s" in odd:
        preflight.matmul_s = lambda device: odd["matmul_s"][rank]  # type: ignore[assignment]
    if "torch" in odd:
        real = preflight._versions
        preflight._versions = lambda device: {**real(device), "torch": odd["torch"][rank]}  # type: ignore[assignment]
    before = (torch.get_rng_state(), torch.get_num_threads(), torch.get_float32_matmul_precision())
    try:
        preflight.preflight(run, 1, ranks=places, device=CPU, node=f"n{rank}")
        said = ""
    except UserError as error:
        said = str(error)
    after = (torch.get_rng_state(), torch.get_num_threads(), torch.get_float32_matmul_precision())
    return said, torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.mark.gloo
def test_two_ranks_measure_and_rank_0_keeps_it_while_random_numbers_stay(tmp_path: Path):
    assert run_ranks(on_two, 2, str(tmp_path), {}) == [("", True), ("", True)]
    kept = json.loads((tmp_path / "job" / "attempt-1" / "preflight.json").read_text())
    assert kept["nodes"] == ["n0", "n1"]
    assert kept["all_reduce_bytes"] == 4 << 20
    assert kept["bus_gb_per_s"] > 0
    assert (kept["matmul_tflops"], kept["slow"], kept["differences"]) == ([], [], [])


@pytest.mark.gloo
def test_a_slow_rank_is_kept_by_its_number(tmp_path: Path):
    run_ranks(on_two, 2, str(tmp_path), {"matmul_s": [0.001, 0.002]})
    assert json.loads((tmp_path / "job" / "attempt-1" / "preflight.json").read_text())["slow"] == [1]


@pytest.mark.gloo
def test_ranks_of_different_torch_are_refused_on_every_rank_alike(tmp_path: Path):
    words = "the ranks' versions differ: torch 2.13.0 on n0, 2.12.1 on n1. Install one version on all nodes."
    assert [said for said, _ in run_ranks(on_two, 2, str(tmp_path), {"torch": ["2.13.0", "2.12.1"]})] == [words] * 2


def test_the_longest_names_fit_into_one_message():
    words = dict.fromkeys((*preflight.versions.installed(), "node"), "\u00e9" * 300)
    text = preflight._text({**words, "group": 10**6})
    assert len(text) == preflight._TEXT_BYTES
    assert json.loads(text)["node"] == "?" * preflight._WORD


def test_a_rank_alone_on_a_cpu_measures_nothing():
    alone = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1, node=0)
    found = preflight.examine(ranks=alone, device=CPU, node="here")
    assert (found.all_reduce_s, found.matmul_tflops, found.nodes) == (None, [], ["here"])


@pytest.mark.gpu
def test_on_a_gpu_memory_and_random_numbers_are_left_as_they_were():
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    before = (torch.cuda.get_rng_state(), torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated())
    alone = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1, node=0)
    found = preflight.examine(ranks=alone, device=device, node="here")
    assert found.matmul_tflops[0] > 1
    assert torch.equal(before[0], torch.cuda.get_rng_state())
    assert before[1:] == (torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated())
