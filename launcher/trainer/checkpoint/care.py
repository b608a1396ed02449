"""Looking after a run's checkpoints from outside: what is there, is good, may go, can be mended. No torch.

All of it works beside a run that trains: what is read is held against deletion, and what is held is not deleted. Only
`repair` wants the run at rest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.run.directory import MARKER, RunDirectory, parse_checkpoint_name
from launcher.run.files import read_json
from launcher.run.lease import current_owner
from launcher.run.ledger import (
    CheckpointRef,
    StaleAttempt,
    latest_attempt,
    lost_beginnings,
    take_over,
    valid_checkpoints,
)
from launcher.run.state import write_state
from launcher.trainer.checkpoint.mirror import BAD, Mirror, set_aside
from launcher.trainer.checkpoint.retention import Hold, is_read, kept, remove
from launcher.trainer.checkpoint.store import StoreError
from launcher.trainer.checkpoint.verify import (
    MANIFEST,
    CheckpointError,
    Manifest,
    all_files,
    problems,
    read_manifest,
    strangers,
    verify_files,
    why,
)

COUNTS = ("committed", "good")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One checkpoint.

    state: `committed` (it counts; its bytes were not read), `good` (all were), `bad`, `void` (an older attempt
        committed it after a newer one had begun), `unfinished` (no marker), `gone` (deleted while it was looked at),
        `mirror` (whole there, not here)
    time: Unix seconds when it was committed, None if it was not or is not here
    ranks, strategy: of those who wrote it, None where its manifest cannot be read
    mirrored: whether it lies whole in the mirror; None: there is none, or it was not asked
    problems: what is wrong, a sentence each
    """

    name: str
    step: int
    attempt: int
    state: str
    time: float | None = None
    bytes: int = 0
    ranks: int | None = None
    strategy: str | None = None
    mirrored: bool | None = None
    problems: list[str] = field(default_factory=list)


def entries(run: RunDirectory, *, verify: bool = False, mirror: Mirror | None = None) -> list[Entry]:
    """Every checkpoint of a run, ascending by (step, attempt).

    Raises:
        StoreError: the mirror cannot be reached.
    """
    there = {ref.path.name: ref for ref in mirror.complete()} if mirror is not None else {}
    here = _names(run)
    found = [_entry(run, name, verify=verify, mirrored=name in there if mirror is not None else None) for name in here]
    found += [
        Entry(name=name, step=ref.step, attempt=ref.attempt, state="mirror", mirrored=True)
        for name, ref in there.items()
        if name not in here
    ]
    return sorted(found, key=lambda entry: (entry.step, entry.attempt))


def resumes_from(found: Sequence[Entry]) -> str | None:
    """The one that the next start would take."""
    return next((entry.name for entry in reversed(found) if entry.state in (*COUNTS, "mirror")), None)


def chosen(run: RunDirectory, which: str) -> list[str]:
    """Names of the checkpoints that a person means: a step, a name, or all that are committed.

    Raises:
        UserError: there is none.
    """
    names = _names(run)
    if which == "all":
        return [name for name in names if (run.checkpoints / name / MARKER).exists()]
    found = [name for name in names if which == name or (which.isdigit() and _key(name)[0] == int(which))]
    if not found:
        has = ", ".join(names) or "none"
        raise UserError(f"{which}: expected a step or the name of a checkpoint of {run.path}, or all. It has {has}.")
    return found


def verified(run: RunDirectory, names: Sequence[str]) -> list[Entry]:
    """These checkpoints, every byte of each having been read and hashed once."""
    return [_entry(run, name, verify=True, mirrored=None) for name in names]


@dataclass(slots=True)
class Pruned:
    """What `prune` did, or would do."""

    deleted: list[str] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    freed: int = 0


def prune(run: RunDirectory, *, keep_last: int, keep_every_steps: int | None, dry_run: bool = False) -> Pruned:
    """Delete what is not to be kept, but nothing that is read; of a run at rest also what is void or unfinished.

    The newest that stay are verified first: bad ones do not count, and stay for `repair`.

    Raises:
        UserError: no checkpoint is good, so none may go; the run was started meanwhile.
    """
    done, attempt = Pruned(), latest_attempt(run)
    refs, good = valid_checkpoints(run), 0
    for ref in reversed(refs):
        if good < keep_last:
            state = _entry(run, ref.path.name, verify=True, mirrored=None).state
            good += state == "good"
            done.bad += [ref.path.name] if state == "bad" else []
    if refs and not good:
        fix = f"Try: launcher checkpoint repair {run.path}"
        raise UserError(f"{run.path}: no checkpoint is good, so none is deleted. {fix}")
    sound = [ref for ref in refs if ref.path.name not in done.bad]
    names = kept(sound, keep_last=keep_last, keep_every_steps=keep_every_steps)
    at_rest = current_owner(run)[1] is False
    counted = {ref.path.name for ref in refs}
    for name in _names(run):
        if name in names or name in done.bad:
            done.kept += [name] if name in names else []
        elif name in counted or at_rest:
            _drop(run, name, attempt, done, dry_run=dry_run)
    return done


def _drop(run: RunDirectory, name: str, attempt: int, done: Pruned, *, dry_run: bool) -> None:
    folder = run.checkpoints / name
    size = _size(folder)
    try:
        gone = not is_read(folder) if dry_run else remove(run, folder, attempt=attempt)
    except StaleAttempt as error:
        raise UserError(f"{error}: nothing more is deleted.") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be deleted: {error.strerror}") from None
    (done.deleted if gone else done.in_use).append(name)
    done.freed += size if gone else 0


@dataclass(slots=True)
class Repaired:
    """What `repair` did, a sentence each, and the newest good checkpoint; None: the run has none at all."""

    did: list[str] = field(default_factory=list)
    newest: str | None = None
    ok: bool = True


def repair(run: RunDirectory, mirror: Mirror | None) -> Repaired:
    """Take a run at rest back to its newest good checkpoint; the caller holds the lease.

    Bad files are replaced from the mirror. What stays bad is put aside with the reason, and newer checkpoints that lie
    whole in the mirror are brought here. Where none is good in the end, nothing is put aside.

    Raises:
        StoreError, AnotherRun: of the mirror.
    """
    done = Repaired()
    if mirror is not None:
        if not run.exists() and mirror.run_id() is not None:
            mirror.fetch_records()
            done.did.append(f"{run.path} was not here and is restored from {mirror.place}")
        mirror.require_own()
    if lost := lost_beginnings(run):
        take_over(run, reason="repair: the ledger was lost")
        done.did.append(f"{run.ledger_file.name}: was lost or cut off; written anew, {', '.join(lost)} count again")
    good: list[CheckpointRef] = []
    bad: dict[str, list[str]] = {}
    for ref in reversed(valid_checkpoints(run)):
        wrong = _mend(run, ref.path, mirror, done)
        if wrong:
            bad[ref.path.name] = wrong
        else:
            good.append(ref)
    for ref in reversed(mirror.complete()) if mirror is not None else ():
        if good and ref <= good[0]:
            break
        if ref.path.name in bad:
            done.did.append(_aside(ref.path, bad.pop(ref.path.name)))
        try:
            assert mirror is not None
            mirror.fetch(ref.path.name)
        except CheckpointError as error:
            done.did.append(f"the mirror's copy is bad: {error}")
            continue
        good.insert(0, ref)
        done.did.append(f"{ref.path.name}: brought here from {mirror.place}, verified")
        break
    done.ok = bool(good) or not bad
    if good:
        done.newest = good[0].path.name
        done.did += [_aside(run.checkpoints / name, wrong) for name, wrong in bad.items()]
        done.did += _taken_back(run, good[0])
    else:
        done.did += [line for wrong in bad.values() for line in wrong]
    return done


def _taken_back(run: RunDirectory, newest: CheckpointRef) -> list[str]:
    """A run that had finished, and whose last checkpoint is bad, has not finished any more."""
    state = read_json(run.state_file) or {}
    if state.get("status") != "finished" or (state.get("step") or 0) <= newest.step:
        return []
    message = f"taken back from step {state['step']} by launcher checkpoint repair"
    write_state(run, "failed", attempt=latest_attempt(run), step=newest.step, message=message)
    return [f"the run was finished at step {state['step']} and is now at step {newest.step}: a resume does the rest"]


def _mend(run: RunDirectory, folder: Path, mirror: Mirror | None, done: Repaired) -> list[str]:
    """What is wrong with a checkpoint after all that could be was replaced."""
    run_id = run.read_json("run.json")["run_id"]
    wrong = problems(folder, run_id=run_id)
    if not wrong or folder.is_symlink():
        return wrong
    try:
        manifest = _sound_manifest(folder, run_id, mirror, done)
        for number, record in enumerate(all_files(manifest)):
            if mirror is not None and verify_files(folder, manifest, [number]):
                mirror.heal(folder, record)
                done.did.append(f"{folder.name}/{record['file']}: replaced by its copy in {mirror.place}")
        for name in strangers(folder, manifest):
            os.rename(folder / name, _strange_place(folder, name))
            done.did.append(f"{folder.name}/{name}: put aside, it does not belong to this checkpoint")
    except (CheckpointError, StoreError, OSError) as error:
        return [*wrong, f"{folder.name}: not mended: {error}"] if mirror is not None else wrong
    return problems(folder, run_id=run_id)


def _sound_manifest(folder: Path, run_id: str, mirror: Mirror | None, done: Repaired) -> Manifest:
    try:
        return read_manifest(folder, run_id=run_id)
    except CheckpointError:
        if mirror is None:
            raise
    mirror.heal_manifest(folder)
    done.did.append(f"{folder.name}/{MANIFEST}: replaced by its copy in {mirror.place}")
    return read_manifest(folder, run_id=run_id)


def _strange_place(folder: Path, name: str) -> Path:
    place = folder.parent / BAD / folder.name
    place.mkdir(parents=True, exist_ok=True)
    return place / name


def _aside(folder: Path, wrong: Collection[str]) -> str:
    if folder.is_symlink():
        return f"{folder.name}: is a symbolic link, left alone; remove it by hand"
    target = set_aside(folder, "\n".join(wrong))
    return f"{folder.name}: put aside as {target} because: {'; '.join(wrong)}"


def _names(run: RunDirectory) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted((name for name in os.listdir(run.checkpoints) if parse_checkpoint_name(name)), key=_key)
    return []


def _key(name: str) -> tuple[int, int]:
    key = parse_checkpoint_name(name)
    assert key is not None
    return key


def _entry(run: RunDirectory, name: str, *, verify: bool, mirrored: bool | None) -> Entry:
    folder, (step, attempt) = run.checkpoints / name, _key(name)
    facts: dict[str, Any] = {"name": name, "step": step, "attempt": attempt, "mirrored": mirrored}
    counts = any(ref.path.name == name for ref in valid_checkpoints(run))
    try:
        with Hold(folder):
            facts |= {"time": os.stat(folder / MARKER).st_mtime, "bytes": _size(folder)}
            return Entry(**facts, **_trust(run, folder, counts=counts, verify=verify))
    except FileNotFoundError:
        if not folder.is_dir():
            return Entry(**facts, state="gone")
        wrong = [f"{name}: has no {MARKER}, as a save that was cut short leaves it: it does not count"]
        return Entry(**facts, state="unfinished", bytes=_size(folder), problems=wrong)
    except OSError as error:
        return Entry(**facts, state="bad", problems=[f"{name}: {MARKER}: {why(error)}"])


def _trust(run: RunDirectory, folder: Path, *, counts: bool, verify: bool) -> dict[str, Any]:
    run_id = run.read_json("run.json")["run_id"]
    try:
        manifest = read_manifest(folder, run_id=run_id)
    except CheckpointError as error:
        return {"state": "bad", "problems": str(error).splitlines()}
    facts = {"ranks": manifest["world_size"], "strategy": manifest.get("engine")}
    if verify and (wrong := problems(folder, run_id=run_id)):
        return {"state": "bad", "problems": wrong, **facts}
    if not counts:
        wrong = [f"{folder.name}: committed by attempt {manifest['attempt']} after a newer one had begun: void"]
        return {"state": "void", "problems": wrong, **facts}
    return {"state": "good" if verify else "committed", **facts}


def _size(folder: Path) -> int:
    with contextlib.suppress(OSError), os.scandir(folder) as files:
        return sum(file.stat(follow_symlinks=False).st_size for file in files)
    return 0
