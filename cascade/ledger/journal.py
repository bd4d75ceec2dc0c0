"""The ledger on disk: every so often a line with the account so far, so that a crash costs the last interval at most.

A *life* is a ledger from its construction to its end. Its lines are cumulative: the last one has all of it, the
difference of two is what happened between them, and what is deleted or torn is told by the lines after it. Accounts of
several lives, workers and machines merge.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Final

from cascade.errors import DataError, SettingError
from cascade.ledger.account import Account, merge_accounts

SUFFIX: Final = ".ledger.jsonl"
LOCK: Final = "lock"


class Journal:
    """Writes the lines of one life into `directory`, which is made and locked: one service writes to it at a time.

    `account` gives the account so far. A file that has grown beyond `file_bytes_max` is followed by a new one, and of
    the directory's files, of earlier lives too, the newest `files_max` stay. `write` may be called from any thread.
    Raises SettingError where the directory cannot be written to, or another service writes to it.
    """

    def __init__(self, directory: Path, account: Callable[[], Account], file_bytes_max: int, files_max: int) -> None:
        self._directory, self._account = directory, account
        self._file_bytes_max, self._files_max = file_bytes_max, files_max
        self._writing = threading.Lock()
        self._life = ""
        self._number = 0
        self._file: FileIO | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = (directory / LOCK).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise SettingError(
                "configuration", "ledger.directory", str(directory), "another service writes to it",
                "give each service a directory of its own; `cascade ledger merge` takes several",
            ) from error  # fmt: skip
        except OSError as error:
            raise SettingError(
                "configuration", "ledger.directory", str(directory), f"cannot be written to ({error.strerror})",
                "name a directory of the service's own",
            ) from error  # fmt: skip

    def write(self) -> None:
        """Add a line and have it on the disk; raises OSError where that fails, and begins a new file the next time."""
        account = self._account()
        line = account.to_json() + b"\n"
        with self._writing:
            try:
                file = self._file if self._file is not None else self._next_file(account.started)
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
                if file.tell() > self._file_bytes_max:
                    self._end_file()
            except OSError:
                # half a line may be there: it has to be the file's last
                self._end_file()
                raise

    def close(self) -> None:
        """Write the last line; raises OSError where that fails. The directory is free again in any case."""
        try:
            self.write()
        finally:
            self._end_file()
            self._lock.close()

    def _next_file(self, started: datetime) -> FileIO:
        self._life = self._life or f"{started:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        path = self._directory / f"{self._life}-{self._number:06}{SUFFIX}"
        self._number += 1
        # unbuffered: a line is one write
        self._file = path.open("xb", buffering=0)
        for old in _files_of(self._directory)[: -self._files_max]:
            old.unlink(missing_ok=True)
        return self._file

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True, slots=True)
class Life:
    """The accounts of one ledger, each with more in it than the one before; `torn`: lines that a crash cut off."""

    name: str
    accounts: Sequence[Account]
    torn: int

    def between(self, start: datetime | None, end: datetime | None) -> Account | None:
        """What happened after the last line up to `start` and up to the last line up to `end`; None where nothing is.

        Both are moments with a time zone, or None for the beginning and the end.
        """
        last = len(self.accounts) if end is None else self._told_up_to(end)
        first = 0 if start is None else self._told_up_to(start)
        if not last or last <= first:
            return None
        found = self.accounts[last - 1]
        return found if not first else found.since(self.accounts[first - 1])

    def _told_up_to(self, moment: datetime) -> int:
        return bisect_right(self.accounts, moment, key=lambda account: account.ended)


def read_journal(paths: Iterable[Path]) -> list[Life]:
    """The lives in files and directories, by their beginning.

    A line that was cut off by a crash is passed over, where it is a file's last. Raises DataError, one line, for what
    cannot be read, for anything else that is no account, and where there is no account at all.
    """
    accounts: dict[str, list[Account]] = {}
    torn: dict[str, int] = {}
    files = [file for path in paths for file in (_files_of(path) if path.is_dir() else [path])]
    for file in dict.fromkeys(files):
        name = file.name.removesuffix(SUFFIX).rpartition("-")[0] or file.name
        found, cut = _read(file)
        accounts.setdefault(name, []).extend(found)
        torn[name] = torn.get(name, 0) + cut
    lives = [
        Life(name, sorted(found, key=lambda account: account.ended), torn[name])
        for name, found in accounts.items()
        if found
    ]
    if not lives:
        raise DataError("ledger journal: no account in " + (", ".join(map(str, paths)) or "no file"))
    return sorted(lives, key=lambda life: (life.accounts[0].started, life.name))


def merged_between(lives: Iterable[Life], start: datetime | None = None, end: datetime | None = None) -> Account | None:
    """One account of what all lives had between two moments; None where there is nothing."""
    parts = [part for life in lives if (part := life.between(start, end)) is not None]
    return merge_accounts(parts) if parts else None


def _files_of(directory: Path) -> list[Path]:
    """By name, which is by time."""
    return sorted(directory.glob(f"*{SUFFIX}"))


def _read(file: Path) -> tuple[list[Account], int]:
    try:
        *lines, rest = file.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(Account.from_json(line))
        except DataError as error:
            raise DataError(f"{file}, line {number}: {error}") from error
    return found, int(bool(rest))
