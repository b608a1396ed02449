"""`cluster.snapshot`: the code is copied into the run when a job is handed over, and the job runs from the copy.

A copy lies in `job/code-<hash>` and is named by its content, so the same code is copied once: the launcher itself in
`package/`, the files of the current git repository, tracked or new but not ignored, in `repository/`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import launcher
from launcher.errors import UserError
from launcher.jobs.spec import JobSpec, places
from launcher.recipe.schema import Recipe
from launcher.run import provenance
from launcher.run.directory import RunDirectory
from launcher.run.files import sync_folder
from launcher.shipped import folder as shipped

LIMIT_MIB = 512
_BESIDE = ("recipes", "configs", "slurm")  # of the launcher, beside its package in a checkout


@dataclass(frozen=True, slots=True)
class Tree:
    """What would be copied. files: path in the copy to where it lies; root: of the repository, if there is one"""

    files: dict[str, Path]
    root: Path | None
    hash: str


def planned(spec: JobSpec) -> JobSpec:
    """A job that runs from the copy that `copy` will make, if its recipe asks for one.

    Raises:
        UserError: the repository's files are too large to be copied.
    """
    if not spec.cluster.snapshot:
        return spec
    code = Path(spec.run, "job", f"code-{look(leave_out=Path(spec.run).parent).hash}")
    return replace(spec, code=str(code))


def copy(spec: JobSpec) -> None:
    """Make the copy that a planned job runs from, unless it is there.

    Raises:
        UserError: the code was changed meanwhile, or cannot be read.
    """
    if spec.code is not None:
        _copy(look(leave_out=Path(spec.run).parent), Path(spec.code))


def enter(run: RunDirectory, recipe: Recipe) -> bool:
    """For a run on this machine: copy the code and let processes that are started from here on import it.

    Returns:
        Whether the recipe asks for it.
    """
    if not recipe.cluster.snapshot:
        return False
    tree = look(leave_out=run.path.parent)
    code = run.path / "job" / f"code-{tree.hash}"
    _copy(tree, code)
    os.environ["PYTHONPATH"] = os.pathsep.join([*places(code), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["PYTHONSAFEPATH"] = "1"  # not the directory it is started in
    return True


def look(*, leave_out: Path, start: Path | None = None) -> Tree:
    """What lies there now.

    leave_out: where runs lie, which are no code
    start: a folder in the repository; None: the current directory
    Raises:
        UserError: it is too large.
    """
    files = {f"package/{name}": path for name, path in _launcher_files()}
    root = None
    if (top := provenance.git(start or Path.cwd(), "rev-parse", "--show-toplevel")) is not None:
        root = Path(top.rstrip("\n"))
        files |= {f"repository/{name}": path for name, path in _repository_files(root, leave_out.resolve())}
    _require_small(files)
    return Tree(files, root, _hash(files))


def _launcher_files() -> Iterator[tuple[str, Path]]:
    package = Path(launcher.__file__).parent
    folders = {"launcher": package}
    for name in _BESIDE:
        try:
            place = shipped(name)
        except FileNotFoundError:
            continue
        if package not in place.parents:
            folders[name] = place
    for name, place in folders.items():
        for path in place.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield str(Path(name, path.relative_to(place))), path


def _repository_files(root: Path, leave_out: Path) -> Iterator[tuple[str, Path]]:
    """Tracked files, and new ones that are not ignored and whose names do not look like a secret's."""
    tracked = provenance.git(root, "ls-files", "-z") or ""
    new = provenance.git(root, "ls-files", "--others", "--exclude-standard", "-z") or ""
    names = [*tracked.split("\0"), *(name for name in new.split("\0") if not provenance.is_secret(name))]
    for name in filter(None, names):
        path = root / name
        if leave_out not in path.parents and (path.is_symlink() or path.is_file()):  # a deleted one is neither
            yield name, path


def _require_small(files: dict[str, Path]) -> None:
    sizes = {name: path.lstat().st_size for name, path in files.items()}
    if (total := sum(sizes.values())) > LIMIT_MIB << 20:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UserError(
            f"cluster.snapshot = true: expected at most {LIMIT_MIB} MiB of code, here are {total >> 20} MiB. The "
            f"largest file is {files[largest]} ({sizes[largest] >> 20} MiB): let .gitignore name it, or remove the key."
        )


def _hash(files: dict[str, Path]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for name, path in sorted(files.items()):
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        kind = "link" if path.is_symlink() else "x" if os.access(path, os.X_OK) else "-"
        found.update(f"{name}\0{kind}\0{len(content)}\0".encode() + content)
    return found.hexdigest()


def _copy(tree: Tree, code: Path) -> None:
    """Whole or not at all."""
    if code.exists():
        return
    fresh = code.with_name(f".{code.name}.{uuid.uuid4().hex[:8]}")
    try:
        for name, path in tree.files.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, fresh / name, follow_symlinks=False)
        provenance.record(fresh, source=tree.root)
        copied = _hash({name: fresh / name for name in tree.files})
        if f"code-{copied}" != code.name:
            raise UserError("cluster.snapshot: the code was changed while it was copied. Submit again.")
        sync_folder(fresh)
        os.rename(fresh, code)
    except OSError as error:
        if code.exists():  # somebody else was first
            return
        raise UserError(f"cluster.snapshot: {error.filename}: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
