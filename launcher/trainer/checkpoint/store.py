"""Files in another store, reached through fsspec: read, written, listed and removed. What they mean is `mirror.py`'s.

A file is copied in chunks and hashed on its way, so memory is bounded and a copy that differs is noticed. In a store
that is a folder, what is written is durable; object stores are so by themselves.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import xxhash

from launcher.errors import UserError
from launcher.run.files import sync_folder, write_atomic
from launcher.trainer.checkpoint.verify import CheckpointError, open_plain, why

_CHUNK = 1 << 22


class StoreError(Exception):
    """The store cannot be reached, or refuses; the text says where and why."""


class Interrupted(Exception):
    """The copy was given up because its caller ends."""


class _Sink(Protocol):
    def write(self, data: bytes) -> Any: ...


class Store:
    """One folder, or prefix, of a store; names are relative to it.

    Args:
        url: absolute path, or URL as s3://bucket/folder
        ended: asked between chunks; true: copies are given up
    Raises:
        UserError: the package for it is not installed, or it is no URL.
    """

    def __init__(self, url: str, *, ended: Callable[[], bool] = lambda: False) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.url, self._ended = url, ended
        try:
            self._system, self._base = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            fix = "Install the extra: pip install 'train-launcher[cloud]'."
            raise UserError(f"checkpoint.mirror = {url}: cannot be opened: {error}. {fix}") from error
        self._local = isinstance(self._system, LocalFileSystem)

    def read(self, name: str) -> bytes | None:
        """A small file; None if it is not there."""
        with self._told():
            try:
                return bytes(self._system.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Replace a small file: a reader sees the old one or the new one."""
        with self._told(missing=False):
            if self._local:
                write_atomic(self._made(name), data)
            else:
                self._system.pipe_file(self._path(name), data)

    def put(self, source: Path, name: str, *, num_bytes: int, xxh3_128: str) -> None:
        """Copy a file there.

        Raises:
            CheckpointError: the source is not what it should be; the copy is gone.
            Interrupted: the caller ends; what was written is no whole file.
        """
        try:
            read = open_plain(source)
        except OSError as error:
            raise CheckpointError(f"{source.parent.name}/{source.name}: {why(error)}") from error
        with read, self._told(missing=False):
            path = self._made(name) if self._local else self._path(name)
            with open(path, "wb") if self._local else self._system.open(path, "wb") as written:
                found = self._copy(read, written)
                if self._local:
                    written.flush()
                    os.fsync(written.fileno())
        if found != (num_bytes, xxh3_128):
            with contextlib.suppress(StoreError):
                self.remove(name)
            raise CheckpointError(f"{source.parent.name}/{source.name}: its content is not what the manifest says")

    def get(self, name: str, target: Path, *, num_bytes: int, xxh3_128: str) -> None:
        """Copy a file from there; it appears whole, durable and as it should be, or not at all.

        Raises:
            CheckpointError: the copy is missing or not what it should be; OSError: it cannot be written here.
        """
        fresh = target.with_name(f".{target.name}.fetched")
        try:
            with open(fresh, "wb") as written:
                with self._told():
                    try:
                        source = self._system.open(self._path(name), "rb")
                    except FileNotFoundError:
                        raise CheckpointError(f"{self.url}/{name}: is missing") from None
                with source:
                    found = self._copy(_Told(self, source), written)
                written.flush()
                os.fsync(written.fileno())
            if found != (num_bytes, xxh3_128):
                raise CheckpointError(f"{self.url}/{name}: its content is not what the manifest says")
            os.replace(fresh, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh)
        sync_folder(target.parent)

    def sizes(self, folder: str) -> dict[str, int]:
        """Every file below a folder, by its name from there, with its size; empty where there is no such folder."""
        with self._told():
            self._system.invalidate_cache()
            try:
                found = self._system.find(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
        start = len(self._path(folder).strip("/")) + 1
        return {path.lstrip("/")[start:]: int(info.get("size") or 0) for path, info in found.items()}

    def remove(self, name: str) -> None:
        """Delete a file or a folder; nothing happens if it is not there."""
        with self._told(), contextlib.suppress(FileNotFoundError):
            if not self._local:
                self._system.rm(self._path(name), recursive=True)
            elif os.path.isdir(path := self._path(name)):
                shutil.rmtree(path)  # refuses symbolic links
            else:
                os.unlink(path)
                sync_folder(Path(path).parent)

    def _path(self, name: str) -> str:
        return f"{self._base.rstrip('/')}/{name}"

    def _made(self, name: str) -> Path:
        """Where a file of a local store goes, its folders being made and durable."""
        path = Path(self._path(name))
        missing = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)
        return path

    def _copy(self, source: Any, target: _Sink) -> tuple[int, str]:
        digest, size = xxhash.xxh3_128(), 0
        while chunk := source.read(_CHUNK):
            if self._ended():
                raise Interrupted
            target.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        return size, digest.hexdigest()

    @contextlib.contextmanager
    def _told(self, *, missing: bool = True) -> Iterator[None]:
        """Each store has errors of its own; they become one, but for what is missing where that may be."""
        try:
            yield
        except (CheckpointError, Interrupted, StoreError):
            raise
        except Exception as error:
            if missing and isinstance(error, FileNotFoundError):
                raise
            text = why(error) if isinstance(error, OSError) else next(iter(str(error).splitlines()), "")
            raise StoreError(f"{self.url}: {type(error).__name__}: {text}".rstrip(": ")) from error


class _Told:
    """A file of the store whose read errors are the store's, while what is written here has its own."""

    def __init__(self, store: Store, file: Any) -> None:
        self._store, self._file = store, file

    def read(self, count: int) -> bytes:
        with self._store._told():
            return bytes(self._file.read(count))
