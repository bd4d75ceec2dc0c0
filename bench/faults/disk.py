"""The disk that holds the snapshots, with its faults."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from bench.faults.world import NEVER_S, Life, SimCrash, World


@dataclass(frozen=True, slots=True)
class DiskFaults:
    """Shares of writes that fail; a torn write leaves a truncated file. `slow_s`: the longest delay of slow writes."""

    full_share: float = 0.0
    torn_share: float = 0.0
    slow_share: float = 0.0
    slow_s: float = 2.0


@dataclass(frozen=True, slots=True)
class SimDisk:
    """The disk that all processes share, and that outlives them. `content`: files by name."""

    world: World
    faults: DiskFaults
    content: dict[str, bytes] = field(default_factory=dict)


class SimFiles:
    """One process's access to the disk; implements Files."""

    def __init__(self, disk: SimDisk, life: Life) -> None:
        self._disk, self._life = disk, life

    def names(self) -> list[str]:
        """See Files."""
        self._life.fault_point("list files")
        return list(self._disk.content)

    def read(self, name: str) -> bytes:
        """See Files."""
        self._life.fault_point(f"read {name}")
        found = self._disk.content.get(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        return found

    def read_start(self, name: str, size: int) -> bytes:
        """See Files."""
        return self.read(name)[:size]

    def write(self, name: str, octets: bytes) -> None:
        """See Files. A torn write breaks its promise, like a disk that loses acknowledged writes."""
        disk, world = self._disk, self._disk.world
        self._life.fault_point(f"write {name}")
        if world.happens(disk.faults.full_share):
            world.fire("disk-full")
            raise OSError(errno.ENOSPC, "no space left on device", name)
        if world.happens(disk.faults.torn_share):
            world.fire("snapshot-torn")
            octets = octets[: world.chance.randrange(len(octets))]
        disk.content[name] = octets
        self._life.fault_point(f"wrote {name}")

    def remove(self, name: str) -> None:
        """See Files."""
        self._life.fault_point(f"remove {name}")
        self._disk.content.pop(name, None)


def submitter(disk: SimDisk, life: Life) -> Callable[[Callable[[], None]], Future[None]]:
    """Returns a function that runs background work of a process: at once or later, and not at all in a dead process.

    A crash in the work shows at the process's next external call.
    """
    world = disk.world

    def submit(work: Callable[[], None]) -> Future[None]:
        done = SimFuture(life)

        def run() -> None:
            if life.dead:
                return
            try:
                work()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        def run_later() -> None:
            with suppress(SimCrash):
                run()

        if world.happens(disk.faults.slow_share):
            world.fire("snapshot-slow")
            world.at(disk.faults.slow_s * world.chance.random(), run_later)
        else:
            run()
        return done

    return submit


class SimFuture(Future[None]):
    """A future whose `result` lets simulated time pass until the work is done."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self._life = life

    def result(self, timeout: float | None = None) -> None:
        """See Future."""
        world = self._life.world
        give_up_s = NEVER_S if timeout is None else world.now_s + timeout
        while not self.done():
            if world.now_s >= give_up_s:
                raise TimeoutError
            world.wait(world.now_s + 0.01)
            self._life.check()
        super().result(timeout)
