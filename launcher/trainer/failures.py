"""Which class of failure an exception is: what the supervisor's decision to restart rests on."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from launcher.errors import UserError

if TYPE_CHECKING:
    from launcher.run.control import FailureClass

_NETWORK = (
    "gloo", "nccl", "connection reset", "connection closed", "connection refused", "broken pipe", "socket",
    "rendezvous", "tcpstore", "timed out waiting", "wait timeout", "peer",
)  # fmt: skip
_MEMORY = ("out of memory", "can't allocate memory", "defaultcpuallocator", "cannot allocate memory")
_NODE = (errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class NonFiniteError(RuntimeError):
    """The loss or the gradient of a step is not finite and `train.on_nonfinite` is `stop`."""


class DataError(RuntimeError):
    """A row cannot be read or laid out."""


class SaveError(RuntimeError):
    """A checkpoint that the run cannot end without could not be written."""


def is_known(error: BaseException) -> bool:
    """Whether its message says all there is to say; the traceback of any other exception is shown."""
    from launcher.run.ledger import StaleAttempt
    from launcher.trainer.checkpoint.format import CheckpointError

    return isinstance(error, (UserError, NonFiniteError, DataError, SaveError, StaleAttempt, CheckpointError))


def failure_class(error: BaseException) -> FailureClass:
    """One word of those that `control/outcome` allows."""
    import torch
    import torch.distributed as dist

    text = f"{type(error).__name__}: {error}".lower()
    if isinstance(error, UserError):
        return "user"
    if isinstance(error, DataError) or type(error).__name__ == "CheckpointError":
        return "data"
    if isinstance(error, NonFiniteError):
        return "non_finite"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in text for word in _MEMORY):
        return "out_of_memory"
    if isinstance(error, SaveError) or type(error).__name__ == "StaleAttempt":
        return "node"
    if isinstance(error, (dist.DistError, ConnectionError)) or any(word in text for word in _NETWORK):
        return "communication"
    if isinstance(error, OSError) and error.errno in _NODE:
        return "node"
    return "unknown"
