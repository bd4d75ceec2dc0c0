"""Files for snapshots, in a directory or, through fsspec, in an object store."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from typing import Protocol

import fsspec

from cascade.errors import SettingError

_UNFINISHED = ".part"
# An older unfinished file was left by a killed process.
UNFINISHED_MAX = timedelta(hours=1)


class Files(Protocol):
    """Files by name; every call may raise OSError."""

    def names(self) -> list[str]:
        """The names of all finished files, in any order."""
        ...

    def read(self, name: str) -> bytes:
        """The whole file."""
        ...

    def read_start(self, name: str, size: int) -> bytes:
        """The first `size` bytes, or all where there are fewer."""
        ...

    def write(self, name: str, octets: bytes) -> None:
        """Writes a file, which gets its name when it is finished."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file, if it exists."""
        ...


class FsspecFiles:
    """Files in a directory or below a URL; raises SettingError if it cannot be used."""

    def __init__(self, url: str) -> None:
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
            self._fs.makedirs(self._root, exist_ok=True)
            self._sweep()
        except (OSError, ValueError, ImportError) as error:
            problem, remedy = f"cannot be used ({error})", "set it to a writable directory or URL"
            raise SettingError("configuration", "state.snapshots", url, problem, remedy) from error

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
            # on a full disk the unfinished file would take the space of the next one
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
            # an object store has no directory before its first file
            return []
        return paths

    def _sweep(self) -> None:
        """Removes the unfinished files of killed processes."""
        for path in self._paths():
            if path.endswith(_UNFINISHED):
                with contextlib.suppress(FileNotFoundError, NotImplementedError):
                    if datetime.now(UTC) - self._fs.modified(path) > UNFINISHED_MAX:
                        self._fs.rm(path)
