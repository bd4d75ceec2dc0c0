"""CPU time, page faults and context switches of processes and their children, and a way to suspend them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil


class Switches(NamedTuple):
    """Context switches: `voluntary`, the thread waited for something; `involuntary`, the system gave way to another."""

    voluntary: int
    involuntary: int


@contextmanager
def suspended(pid: int | None) -> Iterator[None]:
    """Suspends a process and its children within the block, for less than a group's session timeout."""
    processes = family([pid])
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
    for process in family(pids):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def page_faults_of(pids: Sequence[int | None]) -> int:
    """Page faults of the processes so far, minor and major: accesses to memory that the system had to provide first."""
    total = 0
    for process in family(pids):
        with suppress(OSError):
            # the program's name, in brackets, may contain brackets and spaces: proc_pid_stat(5)
            after_name = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            total += int(after_name[7]) + int(after_name[9])
    return total


def switches_of(pids: Sequence[int | None]) -> dict[int, Switches]:
    """Context switches so far of each thread of the processes, by thread id."""
    found = {}
    for process in family(pids):
        for status in Path(f"/proc/{process.pid}/task").glob("*/status"):
            with suppress(OSError):  # the thread has ended
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                counts = int(fields["voluntary_ctxt_switches"]), int(fields["nonvoluntary_ctxt_switches"])
                found[int(fields["Pid"])] = Switches(*counts)
    return found


def switches_between(before: Mapping[int, Switches], after: Mapping[int, Switches]) -> Switches:
    """Context switches of all threads between two results of `switches_of`.

    Without those of threads that ended in between: the system forgets the counts of a thread when it ends.
    """
    started = Switches(0, 0)
    pairs = [(before.get(thread, started), counts) for thread, counts in after.items()]
    return Switches(
        voluntary=sum(later.voluntary - earlier.voluntary for earlier, later in pairs),
        involuntary=sum(later.involuntary - earlier.involuntary for earlier, later in pairs),
    )


def family(pids: Sequence[int | None]) -> list[psutil.Process]:
    """The processes that run, and their children."""
    processes = []
    for pid in pids:
        if pid is not None:
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(pid)
                processes += [parent, *parent.children(recursive=True)]
    return processes
