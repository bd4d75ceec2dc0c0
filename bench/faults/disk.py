"""The place for snapshots, with its faults."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from bench.faults.world import NEVER_S, Life, SimCrash, World


@dataclass(frozen=True, slots=True)
class DiskFaults:
    """Shares of writes. `torn`: the file shows under its name, cut short. `slow_s`: how late slow ones are, at most."""

    full_share: float = 0.0
    torn_share: float = 0.0
    slow_share: float = 0.0
    slow_s: float = 2.0


class SimDisk:
    """What is on the disk, for all processes; it outlives them."""

    def __init__(self, world: World, faults: DiskFaults) -> None:
        self.world = world
        self.faults = faults
        self.content: dict[str, bytes] = {}


class SimFiles:
    """Files of one process on the disk."""

    def __init__(self, disk: SimDisk, life: Life) -> None:
        self._disk, self._life = disk, life

    def names(self) -> list[str]:
        """See Files."""
        self._life.point("list files")
        return list(self._disk.content)

    def read(self, name: str) -> bytes:
        """See Files."""
        self._life.point(f"read {name}")
        found = self._disk.content.get(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        return found

    def read_start(self, name: str, size: int) -> bytes:
        """See Files."""
        return self.read(name)[:size]

    def write(self, name: str, octets: bytes) -> None:
        """See Files; where it is torn the promise is broken, as disks do that lose what they had acknowledged."""
        disk, world = self._disk, self._disk.world
        self._life.point(f"write {name}")
        if world.happens(disk.faults.full_share):
            world.fire("disk-full")
            raise OSError(errno.ENOSPC, "no space left on device", name)
        if world.happens(disk.faults.torn_share):
            world.fire("snapshot-torn")
            octets = octets[: world.chance.randrange(len(octets))]
        disk.content[name] = octets
        self._life.point(f"wrote {name}")

    def remove(self, name: str) -> None:
        """See Files."""
        self._life.point(f"remove {name}")
        self._disk.content.pop(name, None)


def submitter(disk: SimDisk, life: Life) -> Callable[[Callable[[], None]], Future[None]]:
    """Runs background work of a process: at once, or later, and never if the process is gone by then.

    A crash in the work is a crash of the process, found at its next call.
    """
    world = disk.world

    def submit(work: Callable[[], None]) -> Future[None]:
        done = PatientFuture(life)

        def run() -> None:
            if life.dead:
                return
            try:
                work()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        if world.happens(disk.faults.slow_share):
            world.fire("snapshot-slow")
            world.at(disk.faults.slow_s * world.chance.random(), lambda: _contained(run))
        else:
            run()
        return done

    return submit


def _contained(run: Callable[[], None]) -> None:
    try:
        run()
    except SimCrash:
        return


class PatientFuture(Future[None]):
    """A future whose `result` lets simulated time pass until it is there."""

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
