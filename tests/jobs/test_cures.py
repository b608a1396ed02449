"""What is said about failures that everybody meets: the texts are those of real errors, as people reported them."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from launcher.cli import status
from launcher.jobs import supervisor
from launcher.jobs.console import Console
from launcher.jobs.cures import CURES, cure
from launcher.jobs.ending import Ending
from launcher.run.directory import RunDirectory

LIGER = """\
  File "/opt/app-root/lib64/python3.12/site-packages/liger_kernel/transformers/model/gemma.py", line 9, in <module>
    from transformers.models.gemma.modeling_gemma import _CONFIG_FOR_DOC
ImportError: cannot import name '_CONFIG_FOR_DOC' from 'transformers.models.gemma.modeling_gemma'"""

# error, words of the sentence that is to be said
SEEN = [
    (  # sgl-project/sglang#1117
        "/tmp/tmps1rkq3y3/main.c:5:10: fatal error: Python.h: No such file or directory\n    5 | #include <Python.h>\n"
        "compilation terminated.",
        "apt install python3-dev",
    ),
    ("RuntimeError: Failed to find C compiler. Please specify via CC environment variable.", "apt install gcc"),
    ("AssertionError: libcuda.so cannot found!", "ldconfig"),
    ("RuntimeError: Ninja is required to load C++ extensions", "pip install ninja"),  # deepspeedai/DeepSpeed#1644
    (  # deepspeedai/DeepSpeed#3969
        "AttributeError: 'DeepSpeedCPUAdam' object has no attribute 'ds_opt_adam'",
        "launcher doctor --build-ops",
    ),
    ("RuntimeError: Error building extension 'cpu_adam'", "launcher doctor --build-ops"),
    (  # bitsandbytes-foundation/bitsandbytes#1190
        "OSError: /usr/local/lib/python3.10/dist-packages/bitsandbytes/libbitsandbytes_cpu.so: cannot open shared "
        "object file: No such file or directory",
        "pip install -U bitsandbytes",
    ),
    (  # bitsandbytes-foundation/bitsandbytes#778
        "RuntimeError: CUDA Setup failed despite GPU being available. Please run the following command",
        "pip install -U bitsandbytes",
    ),
    (LIGER, "liger-kernel and transformers do not fit"),  # huggingface/trl#3480
    (  # IDEA-Research/Rex-Omni#180
        "ImportError: cannot import name 'apply_liger_kernel_to_qwen2_5_vl' from 'liger_kernel.transformers'",
        "liger-kernel and transformers do not fit",
    ),
    ("liger-kernel requires transformers >= 4.52.0, got 4.48.2", "liger-kernel and transformers do not fit"),
    (
        "ImportError: flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN3c104cuda9SetDeviceEi",
        "another torch",
    ),
    (
        "RuntimeError: Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use "
        "the 'spawn' start method",
        "spawn",
    ),
    ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "defective"),
    ("RuntimeError: CUDA error: invalid device ordinal", "--gpus-per-node"),
    (
        "torch.distributed.DistBackendError: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1a000",
        "share",
    ),
    ("RuntimeError: CUDA error: no kernel image is available for execution on the device", "not built for this GPU"),
    (
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040).",
        "a newer driver",
    ),
    ("RuntimeError: No CUDA GPUs are available", "nvidia-smi"),
    ("RuntimeError: CUDA error: an illegal memory access was encountered", "CUDA_LAUNCH_BLOCKING=1"),
    (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.32 GiB. GPU 0 has a total capacity of 79.15 "
        "GiB of which 1.02 GiB is free.",
        "train.micro_batch_size",
    ),
    (  # NVIDIA/nccl-tests#206
        "misc/ibvwrap.cc:278 NCCL WARN Call to ibv_reg_mr_iova2 failed with error Cannot allocate memory",
        "ulimit -l unlimited",
    ),
    (  # pytorch/ci-infra#490
        "misc/shmutils.cc:88 NCCL WARN Error: failed to extend /dev/shm/nccl-WU88OE to 9637892 bytes, error: No space "
        "left on device (28)",
        "--shm-size",
    ),
    ("rank 3 said nothing before its end: killed by SIGBUS", "--shm-size"),
    ("RuntimeError: DataLoader worker (pid 91) is killed by signal: Bus error.", "--shm-size"),
    (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 34359738368 bytes. Error code 12 (Cannot allocate memory)",
        "--mem=0",
    ),
    ("OSError: [Errno 28] No space left on device: '/data/runs/x/metrics.jsonl'", "checkpoint.keep_last"),
    ("OSError: [Errno 122] Disk quota exceeded", "quota"),
    ("OSError: [Errno 116] Stale file handle", "dmesg"),
    ("OSError: [Errno 24] Too many open files", "ulimit -n"),
    (
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
        "port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
        "ss -ltnp",
    ),
    ("socket.gaierror: [Errno -2] Name or service not known", "/etc/hosts"),
    (
        "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)",
        "did not come to a collective",
    ),
    (  # NVIDIA/nccl#875
        "RuntimeError: NCCL error in: ProcessGroupNCCL.cpp:1191, unhandled system error, NCCL version 2.10.3\n"
        "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.",
        "cluster.network_interface",
    ),
    (  # NVIDIA/nccl#975
        "misc/socket.cc:483 NCCL WARN socketStartConnect: Connect to fe80::966d:ae03:a2:8cf0%ib1<17943> failed : "
        "Software caused connection abort",
        "cluster.network_interface",
    ),
    (
        "RuntimeError: Gloo connectFullMesh failed with [../third_party/gloo/gloo/transport/tcp/pair.cc:144] no error",
        "cluster.network_interface",
    ),
    (
        "huggingface_hub.errors.GatedRepoError: 401 Client Error. Cannot access gated repo for url",
        "hf auth login",
    ),
    (
        "OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the "
        "cached files.",
        "hf download",
    ),
]


@pytest.mark.parametrize(("error", "words"), SEEN, ids=lambda text: text[:40])
def test_a_failure_that_everybody_meets_says_what_to_do(error: str, words: str):
    assert words in cure(error)


def test_every_row_of_the_table_is_met_by_a_real_error():
    met = {cure(error) for error, _ in SEEN}
    assert met == {sentence for _, sentence in CURES}


def test_message_and_traceback_are_both_read():
    assert "pip install ninja" in cure(
        "RuntimeError", "Traceback ...\nRuntimeError: Ninja is required to load C++ extensions"
    )


@pytest.mark.parametrize("text", ["", "KeyError: 'run_id'", "the loss of step 7 is not finite", "AssertionError"])
def test_an_error_that_is_not_known_gets_no_advice(text: str):
    assert cure(text) == ""


FULL = Ending(
    status="failed", failure_class="node", step=7, rank=1, node="n1",
    message="OSError: [Errno 28] No space left on device",
    traceback="Traceback ...\n", verdict="requeue", why="the first of its kind",
)  # fmt: skip


def test_the_end_of_a_run_says_what_to_do_below_the_failure(tmp_path: Path):
    said = io.StringIO()
    supervisor.tell(RunDirectory(tmp_path), 1, FULL, Console(said))
    failed, advice, verdict, *_ = [line for line in said.getvalue().splitlines() if "raceback" not in line]
    assert failed == "failed at step 7 by rank 1 on n1 (node): OSError: [Errno 28] No space left on device"
    assert advice.startswith("what to do: Free space or quota where the run lies")
    assert verdict.startswith("verdict: requeue")


def test_status_says_what_to_do_below_the_first_failure():
    failure = {
        "rank": 1,
        "node": "n1",
        "step": 3,
        "time": None,
        "class": "node",
        "message": "RuntimeError",
        "traceback": "... " + FULL.message,
    }
    *_, advice = status._failure(failure)
    assert advice.startswith("what to do: Free space or quota where the run lies")
    assert len(list(status._failure({**failure, "traceback": None}))) == 1


def test_patterns_compile_and_sentences_end():
    for pattern, sentence in CURES:
        re.compile(pattern)
        assert sentence.rstrip("`").endswith((".", "locally."))
