"""The ledger on disk: a line with the account at each interval, so that a crash loses at most the last interval.

A *run* lasts from the construction of a ledger to its end. The lines of a run are cumulative: the last line contains
the whole run, and the difference of two lines is what happened between them. The lines after a deleted or torn line
therefore make up for it. Accounts of several runs, workers and machines can be merged.
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
NO_ACCOUNT: Final = "the journal has no account between these times: a service writes one every ledger.interval_s"


class Journal:
    """Writes the lines of one run.

    directory: created if absent, and locked, so that only one service writes to it.
    account: returns the account up to now.
    file_bytes_max: size in bytes above which a new file follows.
    files_max: number of files that remain in the directory, the newest, with those of earlier runs.

    Any thread may call `write`. Raises SettingError if the directory is not writable or another service writes to it.
    """

    def __init__(self, directory: Path, account: Callable[[], Account], file_bytes_max: int, files_max: int) -> None:
        self._directory, self._account = directory, account
        self._file_bytes_max, self._files_max = file_bytes_max, files_max
        self._writing = threading.Lock()
        self._run = ""
        self._number = 0
        self._file: FileIO | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = (directory / LOCK).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            problem = "another service writes to it"
            remedy = "give each service its own directory; `cascade ledger merge` accepts several"
            raise SettingError("configuration", "ledger.directory", str(directory), problem, remedy) from error
        except OSError as error:
            problem = f"cannot be written to ({error.strerror})"
            remedy = "name a directory that the service may write to"
            raise SettingError("configuration", "ledger.directory", str(directory), problem, remedy) from error

    def write(self) -> None:
        """Writes a line and syncs it to the disk. Raises OSError if that fails; the next line begins a new file."""
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
                # readers accept a torn line only at the end of a file
                self._end_file()
                raise

    def close(self) -> None:
        """Writes the last line and unlocks the directory. Raises OSError if the line cannot be written."""
        try:
            self.write()
        finally:
            self._end_file()
            self._lock.close()

    def _next_file(self, started: datetime) -> FileIO:
        self._run = self._run or f"{started:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        path = self._directory / f"{self._run}-{self._number:06}{SUFFIX}"
        self._number += 1
        # without a buffer each line is one write
        self._file = path.open("xb", buffering=0)
        for old in _files_of(self._directory)[: -self._files_max]:
            old.unlink(missing_ok=True)
        return self._file

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True, slots=True)
class Run:
    """The accounts of one ledger in the order of time. `torn`: number of lines that a crash has cut off."""

    name: str
    accounts: Sequence[Account]
    torn: int

    def between(self, start: datetime | None, end: datetime | None) -> Account | None:
        """The account from the last line up to `start` to the last line up to `end`; None if there is no line between.

        Both are moments with a time zone; None is the beginning or the end of the run.
        """
        last = len(self.accounts) if end is None else self._lines_up_to(end)
        first = 0 if start is None else self._lines_up_to(start)
        if not last or last <= first:
            return None
        account = self.accounts[last - 1]
        return account if not first else account.since(self.accounts[first - 1])

    def _lines_up_to(self, moment: datetime) -> int:
        return bisect_right(self.accounts, moment, key=lambda account: account.ended)


def read_journal(paths: Iterable[Path]) -> list[Run]:
    """The runs in files and directories, in the order of their beginnings.

    A torn line at the end of a file is skipped. Raises DataError if a file cannot be read, if any other line is not an
    account, or if there is no account at all.
    """
    accounts: dict[str, list[Account]] = {}
    torn: dict[str, int] = {}
    files = [file for path in paths for file in (_files_of(path) if path.is_dir() else [path])]
    for file in dict.fromkeys(files):
        name = file.name.removesuffix(SUFFIX).rpartition("-")[0] or file.name
        lines, torn_lines = _read(file)
        accounts.setdefault(name, []).extend(lines)
        torn[name] = torn.get(name, 0) + torn_lines
    runs = [
        Run(name, sorted(lines, key=lambda account: account.ended), torn[name])
        for name, lines in accounts.items()
        if lines
    ]
    if not runs:
        raise DataError(f"ledger journal: no account in {', '.join(map(str, paths))}")
    return sorted(runs, key=lambda run: (run.accounts[0].started, run.name))


def merged_between(runs: Iterable[Run], start: datetime | None = None, end: datetime | None = None) -> Account | None:
    """The merged account of all runs between two moments; None if no run has one. Raises as `merge_accounts`."""
    parts = [part for run in runs if (part := run.between(start, end)) is not None]
    return merge_accounts(parts) if parts else None


def _files_of(directory: Path) -> list[Path]:
    """The files in the order of their names, which is the order of time."""
    return sorted(directory.glob(f"*{SUFFIX}"))


def _read(file: Path) -> tuple[list[Account], int]:
    """The accounts of a file, and the number of torn lines at its end: 0 or 1."""
    try:
        *lines, rest = file.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    accounts = []
    for number, line in enumerate(lines, 1):
        try:
            accounts.append(Account.from_json(line))
        except DataError as error:
            raise DataError(f"{file}, line {number}: {error}") from error
    return accounts, int(bool(rest))
