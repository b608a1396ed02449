"""Another tool's checkpoint as one of ours: one file, one parameter in memory at a time, committed like any other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.convert.fit import Fit
from launcher.convert.source import MOMENTS, Source, taken_apart
from launcher.errors import UserError
from launcher.run import ledger
from launcher.run.directory import RunDirectory
from launcher.trainer.checkpoint.format import CheckpointError, Snapshot, layout
from launcher.trainer.checkpoint.reader import VERSION, Manifest, header_metadata
from launcher.trainer.checkpoint.saving import Save, carry_out, make_folder


def write_checkpoint(
    run: RunDirectory, attempt: int, source: Source, fit: Fit, params: Mapping[str, Mapping[str, Any]], *,
    moments: bool, meta: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Write and commit the checkpoint; its folder.

    Args:
        params: name -> {shape, dtype, trainable}, all that a checkpoint of the run holds
        moments: take them from the source; else they begin at zero, as in a new optimizer
        meta: more for the manifest
    Raises:
        UserError: it cannot be written, or the source cannot be read to its end.
    """
    step, updates = source.step or 0, (source.updates or 0) if moments else 0
    manifest: Manifest = {
        "version": VERSION, **meta, "run_id": run.read_json(run.run_file.name)["run_id"], "optimizer": "adamw",
        "engine": f"import: {source.title}", "step": step, "attempt": attempt, "world_size": 1, "params": dict(params),
        "trainer_state": {"step": step, "optimizer_step": updates, "loss_scale": None},
    }  # fmt: skip
    rows = [
        (name, kind, getattr(torch, entry["dtype"]), math.prod(entry["shape"]))
        for name, entry in params.items()
        for kind in ("value", *(MOMENTS if entry["trainable"] else ()))
    ]
    rows.sort(key=lambda row: -row[2].itemsize)  # wide types first keeps all aligned
    head, elements = layout(
        [(name, kind, 0, dtype, count) for name, kind, dtype, count in rows], header_metadata(manifest, 0)
    )

    def ranges() -> Iterator[Tensor]:
        for name, kind, dtype, count in rows:
            if kind != "value" and not moments:
                tensor = torch.zeros(count, dtype=dtype)
            else:
                with taken_apart(f"{source.title}: {name} {kind}"):
                    tensor = source.read(fit.names[name], kind).to(dtype).reshape(-1).contiguous()
            if tensor.numel() != count:
                raise UserError(f"{source.title}: {name} {kind}: expected {count} elements, found {tensor.numel()}.")
            yield tensor.view(torch.uint8)

    size = len(head) + sum(dtype.itemsize * count for _, _, dtype, count in rows)
    folder = run.checkpoint(step, attempt)
    try:
        make_folder(folder)
        fence = partial(ledger.fenced, run, attempt)
        carry_out(Save(folder, 0, 1, Snapshot(head, ranges, size, elements), manifest, 60.0, fence))
    except CheckpointError as error:
        raise UserError(f"{folder}: {error}") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error
    return folder
