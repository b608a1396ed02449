"""How a run stands, in one dict of a stable shape (docs/json.md): what `status` and `runs` show."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.run.control import first_failure, read_outcomes, read_verdict, stop_reason
from launcher.run.directory import RunDirectory, parse_checkpoint_name
from launcher.run.files import parse_lines, read_json
from launcher.run.lease import current_owner
from launcher.run.ledger import Attempt, CheckpointRef, Failure, attempts, valid_checkpoints
from launcher.run.left_out import left_out
from launcher.run.rehearsal import read_rehearsal
from launcher.run.state import State, read_state

SUMMARY_VERSION = 1
_SET = "eval_loss/"  # before the name of an evaluation set
_TAIL_BYTES = 1 << 16  # some hundred lines of metrics
_LONG_TAIL_BYTES = 1 << 22  # for attempts that were killed: read in some hundredths of a second


def runs_in(folder: Path) -> list[RunDirectory]:
    """The runs in a folder, by name."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [run for name in names if (run := RunDirectory(folder / name)).exists()]


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """Summaries of the runs in a folder, the last changed first."""
    return sorted(map(summarise, runs_in(folder)), key=lambda summary: -(summary["updated"] or 0.0))


def summarise(run: RunDirectory) -> dict[str, Any]:
    """Everything about where a run stands; reads the ends of files only, and waits for nothing."""
    known, state, checkpoints = attempts(run), read_state(run), valid_checkpoints(run)
    owner, alive = current_owner(run)
    logged, evaluated = _last_logged(run.metrics_file, [attempt for attempt in known if attempt.end_step is None])
    metrics = logged[max(logged)] if logged else {}
    record = read_json(run.run_file) or {}
    last = checkpoints[-1] if checkpoints else None
    return {
        "version": SUMMARY_VERSION,
        "run": run.name,
        "path": str(run.path.resolve()),
        "run_id": record.get("run_id"),
        "status": _status(state, alive),
        "step": _step(state, metrics, last),
        "total_steps": _total_steps(run, state),
        "attempt": state.attempt,
        "attempts": [_attempt(attempt, logged.get(attempt.number, {}).get("step")) for attempt in known],
        "last_checkpoint": _checkpoint(last),
        "save_every": state.more.get("save_every"),
        "rehearsal": asdict(rehearsed) if (rehearsed := read_rehearsal(run)) else None,
        "failure": _failure(run, state, known),
        "loss": _finite(metrics.get("loss")),
        "loss_step": metrics.get("step"),
        "evaluation": _evaluation(evaluated),
        "guards": _guards(run, metrics),
        "slow": _slow(run, state),
        "updated": state.time if state.time is not None else record.get("created"),
        "owner": {"host": owner.host, "pid": owner.pid, "alive": alive} if owner and not owner.released else None,
        "stop_requested": stop_reason(run),
        "verdict": read_verdict(run),
    }


def _slow(run: RunDirectory, state: State) -> list[dict[str, Any]]:
    """Ranks that the watch of the latest attempt has named and not found fast again."""
    slow: dict[tuple[Any, Any], dict[str, Any]] = {}
    for line in parse_lines(_tail(run.watch_file, _TAIL_BYTES)):
        if line.get("attempt") != state.attempt or line.get("kind") not in ("straggler", "recovered"):
            continue
        key = line.get("rank"), line.get("what")
        slow.pop(key, None)
        if line["kind"] == "straggler":
            slow[key] = {name: line.get(name) for name in ("rank", "node", "what", "factor", "step")}
    return list(slow.values())


def _status(state: State, alive: bool | None) -> str:
    """The state's word, unless it speaks of a life that is over, or that cannot be seen from this host."""
    if state.status == "queued" and alive:
        return "starting"
    if state.status in ("running", "starting", "restarting"):
        return {True: state.status, False: "interrupted", None: "unknown"}[alive]
    return state.status


def _step(state: State, metrics: dict[str, Any], last: CheckpointRef | None) -> int | None:
    """Finished steps as far as this attempt has told, else where it began or would begin."""
    logged = metrics.get("step") if metrics.get("attempt") == state.attempt else None
    if told := [step for step in (state.step, logged) if isinstance(step, int)]:
        return max(told)  # a killed rank's last state is older than its last figures
    return last.step if last else None


def _total_steps(run: RunDirectory, state: State) -> int | None:
    for values in (state.more, read_json(run.data_file) or {}, read_json(run.plan_file) or {}):
        if isinstance(total := values.get("total_steps"), int):
            return total
    return None


def _attempt(attempt: Attempt, logged: Any) -> dict[str, Any]:
    end = {
        "step": attempt.end_step, "class": attempt.end_class, "verdict": attempt.end_verdict, "why": attempt.end_why,
        "again": attempt.end_again, "first": _first(attempt.end_first), "time": attempt.end_time,
    }  # fmt: skip
    accepted = [found[0] for name in attempt.accepts if (found := parse_checkpoint_name(name))]
    return {
        "number": attempt.number, "target": attempt.target, "job_id": attempt.job_id, "restart": attempt.restart,
        "within": attempt.within, "nodes": attempt.nodes, "first_step": max(accepted, default=0),
        "reason": attempt.reason, "accepts": list(attempt.accepts), "time": attempt.time, "host": attempt.host,
        "pid": attempt.pid, "launcher_version": attempt.launcher_version,
        "end": end if attempt.ended else None,
        "last_step": attempt.end_step if attempt.end_step is not None else logged,
    }  # fmt: skip


def _checkpoint(last: CheckpointRef | None) -> dict[str, Any] | None:
    return {"step": last.step, "attempt": last.attempt, "path": str(last.path.resolve())} if last else None


def _failure(run: RunDirectory, state: State, known: Sequence[Attempt]) -> dict[str, Any] | None:
    """What failed first in the latest attempt: as the launcher judged it in the end, before that as the ranks say."""
    if state.status not in ("failed", "running", "starting", "restarting"):
        return None
    attempt = next((attempt for attempt in known if attempt.number == state.attempt), None)
    if attempt is not None and attempt.end_first is not None:
        return _first(attempt.end_first)
    if found := first_failure(read_outcomes(run, state.attempt)):
        rank, outcome = found
        return {
            "rank": rank, "node": outcome.node or None, "step": outcome.step,
            "class": outcome.failure_class or "unknown", "message": outcome.message,
            "traceback": outcome.traceback or None, "time": outcome.time,
        }  # fmt: skip
    if state.status != "failed":
        return None
    said = {key: state.more.get(key) for key in ("rank", "node", "message", "traceback")}
    ended = attempt.end_class if attempt is not None else None
    return {
        "rank": said["rank"], "node": said["node"], "step": state.step,
        "class": state.more.get("class") or ended or "unknown", "message": said["message"] or "",
        "traceback": said["traceback"], "time": state.time,
    }  # fmt: skip


def _first(failure: Failure | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    return {
        "rank": failure.rank, "node": failure.node or None, "step": failure.step, "class": failure.failure_class,
        "message": failure.message, "traceback": failure.traceback or None, "time": failure.time,
    }  # fmt: skip


def _guards(run: RunDirectory, metrics: dict[str, Any]) -> dict[str, int]:
    """Steps skipped and spikes up to the last logged step, and the global batches that the run leaves out."""
    counts = {"skipped": metrics.get("steps_skipped", 0), "spikes": metrics.get("loss_spikes", 0)}
    return {**counts, "left_out": len(left_out(run))}


def _evaluation(line: dict[str, Any] | None) -> dict[str, Any] | None:
    if line is None:
        return None
    sets = {key.removeprefix(_SET): _finite(loss) for key, loss in line.items() if key.startswith(_SET)}
    return {"step": line.get("step"), "loss": _finite(line["eval_loss"]), "sets": sets}


def _last_logged(
    path: Path, silent: Sequence[Attempt]
) -> tuple[dict[int, dict[str, Any]], dict[str, Any] | None]:  # fmt: skip
    """The last logged step of each attempt in sight, by attempt, and the last evaluation in sight.

    Args:
        silent: attempts without a last step in the ledger; for those before the newest the file is read further back
    """
    found: dict[int, dict[str, Any]] = {}
    evaluation: dict[str, Any] | None = None
    for size in (_TAIL_BYTES, _LONG_TAIL_BYTES):
        for line in parse_lines(_tail(path, size)):
            if "loss" in line:
                found[line.get("attempt") or 0] = line
            elif "eval_loss" in line:
                evaluation = line
        if all(attempt.number in found for attempt in silent):
            break
    return found, evaluation


def _tail(path: Path, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read()
    except FileNotFoundError:
        return b""


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
