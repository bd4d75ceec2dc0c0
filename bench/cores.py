"""Who used the machine's cores in a measured time, and how long the service waited for one."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import msgspec
import psutil

from bench.pipeline.processes import cpu_s_of, family

# This process: it sends the load, and waits for the decisions.
LOAD, OTHERS = "load", "others"
_NS = 1e9


class Cores(msgspec.Struct, frozen=True, kw_only=True):
    """The use of `cores` cores.

    used: cores that each process and its children used on average, by name; `load` is this process, `others` are all
    that are not named.
    waited_share: of the time in which threads of the first process had work, the share in which they waited for a core;
    None where the system does not say.
    """

    cores: int
    used: dict[str, float]
    waited_share: float | None


class CoreWatch(msgspec.Struct, frozen=True):
    """What the processes have used so far: by name, their ids and CPU seconds; and the times of the whole machine."""

    pids: dict[str, list[int | None]]
    taken_s: float
    used_s: dict[str, float]
    machine_s: float
    first_ran_s: float
    first_waited_s: float | None

    @classmethod
    def now(cls, pids: Mapping[str, Sequence[int | None]]) -> Self:
        """The present use; pids: ids of processes by name, in the order of the report."""
        found = {name: list(ids) for name, ids in pids.items()}
        used_s = {name: cpu_s_of(ids) for name, ids in found.items()} | {LOAD: time.process_time()}
        machine = psutil.cpu_times()
        busy_s = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0) - getattr(machine, "guest", 0.0)
        ran_s, waited_s = _scheduled(next(iter(found.values())))
        return cls(found, time.monotonic(), used_s, busy_s, ran_s, waited_s)

    def cores(self) -> Cores:
        """The use from then until now."""
        later = type(self).now(self.pids)
        elapsed_s = later.taken_s - self.taken_s
        used = {name: (used_s - self.used_s[name]) / elapsed_s for name, used_s in later.used_s.items()}
        used[OTHERS] = max((later.machine_s - self.machine_s) / elapsed_s - sum(used.values()), 0.0)
        waited_share = None
        if self.first_waited_s is not None and later.first_waited_s is not None:
            ran_s, waited_s = later.first_ran_s - self.first_ran_s, later.first_waited_s - self.first_waited_s
            waited_share = waited_s / (ran_s + waited_s) if ran_s + waited_s else 0.0
        return Cores(cores=os.cpu_count() or 1, used=used, waited_share=waited_share)


def _scheduled(pids: Sequence[int | None]) -> tuple[float, float | None]:
    """Seconds in which the threads of the processes ran, and waited for a core: proc(5), schedstat."""
    ran_ns, waited_ns, known = 0, 0, False
    for process in family(pids):
        for path in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
            with suppress(OSError, ValueError):  # the thread has ended
                ran, waited, _ = map(int, path.read_text().split())
                ran_ns, waited_ns, known = ran_ns + ran, waited_ns + waited, True
    return ran_ns / _NS, waited_ns / _NS if known else None
