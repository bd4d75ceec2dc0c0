"""CPU time and page faults of processes and their children, and a way to suspend them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


@contextmanager
def suspended(pid: int | None) -> Iterator[None]:
    """Suspends a process and its children within the block, for less than a group's session timeout."""
    processes = _family([pid])
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def cpu_s_of(pids: Sequence[int | None]) -> float:
    """CPU seconds of the processes so far."""
    total = 0.0
    for process in _family(pids):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def page_faults_of(pids: Sequence[int | None]) -> int:
    """Page faults of the processes so far, minor and major: accesses to memory that the system had to provide first."""
    total = 0
    for process in _family(pids):
        with suppress(OSError):
            # the program's name, in brackets, may contain brackets and spaces: proc_pid_stat(5)
            after_name = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            total += int(after_name[7]) + int(after_name[9])
    return total


def _family(pids: Sequence[int | None]) -> list[psutil.Process]:
    processes = []
    for pid in pids:
        if pid is not None:
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(pid)
                processes += [parent, *parent.children(recursive=True)]
    return processes
