"""What is read of a service's processes: CPU time and page faults, each with its children."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil


class Held:
    """Keeps a process and its children from running, for less than a group's session: a context manager."""

    def __init__(self, pid: int | None) -> None:
        self._processes = _family([pid])

    def __enter__(self) -> None:
        for one in self._processes:
            one.suspend()

    def __exit__(self, *_: object) -> None:
        for one in self._processes:
            with suppress(psutil.NoSuchProcess):
                one.resume()


def cpu_s_of(pids: Sequence[int | None]) -> float:
    """CPU seconds of the processes so far."""
    total = 0.0
    for process in _family(pids):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def page_faults_of(pids: Sequence[int | None]) -> int:
    """How often the processes so far touched memory that was not there yet, and waited for the system to bring it."""
    total = 0
    for process in _family(pids):
        with suppress(OSError):
            # the program's name, in brackets, may hold anything; see proc_pid_stat(5)
            after_name = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            total += int(after_name[7]) + int(after_name[9])
    return total


def _family(pids: Sequence[int | None]) -> list[psutil.Process]:
    found = []
    for pid in pids:
        if pid is not None:
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(pid)
                found += [parent, *parent.children(recursive=True)]
    return found
