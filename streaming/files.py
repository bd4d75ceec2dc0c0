"""The little that snapshots ask of a place for files: a directory or, through fsspec, an object store."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from typing import Protocol

import fsspec

from cascade.errors import SettingError

_UNFINISHED = ".part"
# A file that has been in the making for so long was left by a process that was killed.
UNFINISHED_MAX = timedelta(hours=1)


class Files(Protocol):
    """Files by name; every call may raise OSError."""

    def names(self) -> list[str]:
        """The names of all files that are whole, in no particular order."""
        ...

    def read(self, name: str) -> bytes:
        """The whole file."""
        ...

    def read_start(self, name: str, size: int) -> bytes:
        """The first `size` bytes, or all where there are fewer."""
        ...

    def write(self, name: str, octets: bytes) -> None:
        """Write a file that shows under its name only when it is whole."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file; one that is gone already is no error."""
        ...


class FsspecFiles:
    """Files below a directory or URL; raises SettingError where that cannot be used."""

    def __init__(self, url: str) -> None:
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
            self._fs.makedirs(self._root, exist_ok=True)
            self._sweep()
        except (OSError, ValueError, ImportError) as error:
            raise SettingError(
                "configuration",
                "state.snapshots",
                url,
                f"cannot be used ({error})",
                "name a directory or URL to write to",
            ) from error

    def names(self) -> list[str]:
        """See Files."""
        return [path.rpartition("/")[2] for path in self._paths() if not path.endswith(_UNFINISHED)]

    def read(self, name: str) -> bytes:
        """See Files."""
        octets: bytes = self._fs.cat_file(f"{self._root}/{name}")
        return octets

    def read_start(self, name: str, size: int) -> bytes:
        """See Files."""
        octets: bytes = self._fs.cat_file(f"{self._root}/{name}", start=0, end=size)
        return octets

    def write(self, name: str, octets: bytes) -> None:
        """See Files."""
        path = f"{self._root}/{name}"
        try:
            self._fs.pipe_file(path + _UNFINISHED, octets)
            self._fs.mv(path + _UNFINISHED, path)
        except OSError:
            # on a full disk its beginning would take the room of the next one
            with contextlib.suppress(OSError):
                self._fs.rm(path + _UNFINISHED)
            raise

    def remove(self, name: str) -> None:
        """See Files."""
        try:
            self._fs.rm(f"{self._root}/{name}")
        except FileNotFoundError:
            return

    def _paths(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            paths: list[str] = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            # an object store has no folder before it has a file
            return []
        return paths

    def _sweep(self) -> None:
        """Remove what killed processes left unfinished."""
        for path in self._paths():
            if path.endswith(_UNFINISHED):
                with contextlib.suppress(FileNotFoundError, NotImplementedError):
                    if datetime.now(UTC) - self._fs.modified(path) > UNFINISHED_MAX:
                        self._fs.rm(path)
