"""Which class of failure an exception is: what the supervisor's decision to restart rests on."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from launcher.errors import UserError

if TYPE_CHECKING:
    from launcher.run.control import FailureClass
    from launcher.run.left_out import Reason

_NETWORK = (
    "gloo", "nccl", "connection reset", "connection closed", "connection refused", "broken pipe", "socket",
    "rendezvous", "tcpstore", "timed out waiting", "wait timeout", "peer",
)  # fmt: skip
_MEMORY = ("out of memory", "can't allocate memory", "defaultcpuallocator", "cannot allocate memory")
_DEVICE = (  # a GPU that another process, or another node, has to take up again: what the driver logs as an Xid
    "cuda error", "uncorrectable ecc", "device-side assert", "illegal memory access", "unspecified launch failure",
    "nvlink", "devices are busy or unavailable", "cublas_status", "cudnn_status",
)  # fmt: skip
_NODE = (errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite and the run is to stop, or too many global batches in a row were no use."""


class SpikeError(RuntimeError):
    """The loss of a step is far above those before it and `train.on_spike` is `stop`."""


class RollBack(RuntimeError):
    """The run is to go back to its last checkpoint and to leave global batches out.

    steps: of the updates that they would have made, from 1; reason, loss, limit: see `launcher.run.left_out`
    """

    def __init__(self, text: str, steps: list[int], reason: Reason, loss: float, limit: float | None) -> None:
        super().__init__(text)
        self.steps, self.reason, self.loss, self.limit = steps, reason, loss, limit


class ReplicaError(RuntimeError):
    """Ranks that must hold the same weights hold different ones; the run goes on from its last checkpoint."""


class DataError(RuntimeError):
    """A row cannot be read or laid out."""


class SaveError(RuntimeError):
    """A checkpoint that the run cannot end without could not be written."""


def is_known(error: BaseException) -> bool:
    """Whether its message says all there is to say; the traceback of any other exception is shown."""
    from launcher.run.ledger import StaleAttempt
    from launcher.trainer.checkpoint.format import CheckpointError

    guards = (NonFiniteError, SpikeError, RollBack, ReplicaError)
    return isinstance(error, (UserError, *guards, DataError, SaveError, StaleAttempt, CheckpointError))


def rolls_back(error: BaseException) -> bool:
    """Whether going on from the last checkpoint mends it."""
    return isinstance(error, (RollBack, ReplicaError))


def failure_class(error: BaseException) -> FailureClass:
    """One word of those that `control/outcome` allows."""
    import torch
    import torch.distributed as dist

    text = f"{type(error).__name__}: {error}".lower()
    if isinstance(error, UserError):
        return "user"
    if isinstance(error, DataError) or type(error).__name__ == "CheckpointError":
        return "data"
    if isinstance(error, (NonFiniteError, SpikeError, RollBack)):
        return "non_finite"
    if isinstance(error, ReplicaError):
        return "unknown"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in text for word in _MEMORY):
        return "out_of_memory"
    if isinstance(error, SaveError) or type(error).__name__ == "StaleAttempt":
        return "node"
    if isinstance(error, (dist.DistError, ConnectionError)) or any(word in text for word in _NETWORK):
        return "communication"
    if isinstance(error, OSError) and error.errno in _NODE:
        return "node"
    if any(word in text for word in _DEVICE):
        return "node"
    return "unknown"
