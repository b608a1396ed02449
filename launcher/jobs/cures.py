"""What to do about failures that everybody meets once: a table from the words of an error to a sentence.

The words are those of real errors (tests/jobs/test_cures.py holds one of each); the first row that matches counts, so
the narrower stands above the wider.
"""

from __future__ import annotations

import re

_SHM = "Give the container more /dev/shm: --shm-size=8g or --ipc=host; in a pod, an emptyDir with medium Memory."
_INTERFACE = (
    "The nodes do not reach each other where NCCL or gloo tried: `launcher doctor --nodes` names the interface of each "
    "node, cluster.network_interface sets it, NCCL_DEBUG=INFO in the environment shows what was tried."
)
_DRIVER = "Install a torch built for this driver, or a newer driver: https://pytorch.org/get-started/locally."

CURES: tuple[tuple[str, str], ...] = (
    # compilers and packages
    (
        r"Python\.h: No such file|include file 'Python\.h' not found",
        "Python's headers are missing, which triton compiles against: apt install python3-dev (dnf: python3-devel), "
        "of the version in use. model.compile=false and model.liger=false do without.",
    ),
    (
        r"Failed to find C compiler",
        "triton needs a C compiler for model.compile and model.liger: apt install gcc, or set CC.",
    ),
    (
        r"libcuda\.so(\.1)? (cannot found|cannot open)|libcuda\.so cannot be found",
        "triton finds no libcuda.so: run ldconfig on the host, or start the container with its GPUs (--gpus all).",
    ),
    (
        r"Ninja is required to load C\+\+ extensions",
        "Run pip install ninja, then launcher doctor --build-ops, which compiles ahead of the job.",
    ),
    (
        r"has no attribute 'ds_opt_adam'|Error building extension '(cpu_adam|async_io|pin_memory|quantizer)'",
        "DeepSpeed's operator could not be compiled: launcher doctor --build-ops on that node says why.",
    ),
    (
        r"libbitsandbytes_\w+\.so|bitsandbytes CUDA binary|CUDA Setup failed despite (GPU|CUDA) being available",
        "bitsandbytes brings no library for this CUDA: pip install -U bitsandbytes; python -m bitsandbytes says what "
        "it looked for.",
    ),
    (
        r"liger[-_]kernel requires transformers|liger_kernel[\s\S]*cannot import name '\w+' from 'transformers"
        r"|cannot import name '\w+' from 'liger_kernel",
        "liger-kernel and transformers do not fit: launcher doctor names the versions that do, model.liger=false does "
        "without.",
    ),
    (
        r"GLIBCXX_[\d.]+' not found|undefined symbol: _ZN\w*(c10|torch|at)\w*",
        "A compiled package was built against another torch or C++ library: install it again for this torch, without "
        "a cached wheel (pip install --no-cache-dir --force-reinstall).",
    ),
    # GPUs
    (
        r"Cannot re-initialize CUDA in forked subprocess",
        "Something used a GPU in a process that forked afterwards: touch CUDA neither while a module is imported nor "
        "in sitecustomize, and start own processes by spawn.",
    ),
    (
        r"uncorrectable ECC error|CUDA error: (ECC|.*hardware)|NVLink error",
        "This GPU is defective: leave its node out (cluster.slurm.exclude) and have it looked at.",
    ),
    (
        r"invalid device ordinal",
        "A rank has no GPU of its number: let each node show all its GPUs (Slurm: --gpus-per-node, not "
        "--gpus-per-task), and look at CUDA_VISIBLE_DEVICES.",
    ),
    (
        r"Duplicate GPU detected",
        "Two ranks share a GPU: lower cluster.nproc_per_node to the GPUs of a node.",
    ),
    (
        r"no kernel image is available for execution|is not compatible with the current PyTorch installation",
        "This torch was not built for this GPU: https://pytorch.org/get-started/locally.",
    ),
    (r"driver on your system is too old|CUDA driver version is insufficient", _DRIVER),
    (
        r"No CUDA GPUs are available|no CUDA-capable device is detected|Found no NVIDIA driver",
        "torch sees no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES, and start a container with its GPUs "
        "(--gpus all, --nv).",
    ),
    (
        r"CUDA error: an illegal memory access|unspecified launch failure",
        "A kernel failed, and the line shown is only where it was noticed: CUDA_LAUNCH_BLOCKING=1 shows the place, "
        "model.compile=false and model.liger=false leave out the likeliest.",
    ),
    # memory
    (
        r"CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        "The GPU's memory is full: lower train.micro_batch_size (accumulation makes up for it), set "
        "model.gradient_checkpointing=full, or shard or offload more (strategy.kind, strategy.offload). `launcher "
        "plan` says what takes how much; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True helps where much is reserved "
        "but unallocated.",
    ),
    (
        r"ibv_\w+ failed with error Cannot allocate memory|failed to (lock|pin) memory",
        "Too little memory may be page-locked: ulimit -l unlimited (memlock in /etc/security/limits.conf, "
        "LimitMEMLOCK=infinity in slurmd's unit, --ulimit memlock=-1 for containers).",
    ),
    (
        r"insufficient shared memory \(shm\)|shared memory segment /dev/shm|failed to extend /dev/shm|Bus error|SIGBUS"
        r"|unable to (write to|open|mmap \d+ bytes from the) file </torch_",
        _SHM,
    ),
    (
        r"DefaultCPUAllocator: can't allocate memory|Cannot allocate memory|std::bad_alloc",
        "The node's memory is full: ask for more (Slurm: --mem=0; a pod: resources.limits.memory), offload less, or "
        "set checkpoint.async_save=false. `launcher plan` says what is planned.",
    ),
    # disks and files
    (
        r"No space left on device|Disk quota exceeded",
        "Free space or quota where the run lies, or lower checkpoint.keep_last; `launcher resume` then goes on.",
    ),
    (
        r"Stale file handle|Input/output error|Read-only file system",
        "The file system under the run has a fault: look at it from that node (dmesg), then resume.",
    ),
    (
        r"Too many open files",
        "Raise the limit before the job: ulimit -n 65536, as a line of cluster.setup or in limits.conf.",
    ),
    # network
    (
        r"[Aa]ddress already in use|EADDRINUSE",
        "Another process holds the port (ss -ltnp names it): end what an earlier job has left, or choose another port "
        "in --rendezvous.",
    ),
    (
        r"Name or service not known|Temporary failure in name resolution|No address associated with hostname"
        r"|[Uu]nable to resolve hostname",
        "A host's name is not known on that node: add it to /etc/hosts or DNS, or give an address in --rendezvous.",
    ),
    (
        r"Watchdog caught collective operation timeout",
        "A rank did not come to a collective: the cause is in the log of the rank that stopped earlier (launcher logs "
        "RUN --rank N), often slow storage or a GPU that fell off.",
    ),
    (
        r"ncclSystemError|unhandled system error|ncclRemoteError|socketStartConnect|Gloo connectFullMesh failed"
        r"|No route to host|Network is unreachable",
        _INTERFACE,
    ),
    # the hub
    (
        r"GatedRepoError|401 Client Error|Access to model .* is restricted",
        "The hub wants to know who asks: hf auth login on the node, or HF_TOKEN in cluster.env, for somebody who has "
        "accepted the model's terms.",
    ),
    (
        r"OfflineModeIsEnabled|couldn't connect to 'https://huggingface\.co'",
        "The node has no way to the hub: fetch the model on one that has (hf download), and give its folder in "
        "model.name.",
    ),
)  # fmt: skip


def cure(*texts: str) -> str:
    """What to do about an error, from its message and traceback; empty where nothing is known."""
    text = "\n".join(texts)
    return next((sentence for pattern, sentence in CURES if re.search(pattern, text)), "")
