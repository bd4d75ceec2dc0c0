"""The clock of one simulated process."""

from __future__ import annotations

from bench.faults.world import CALL_S, Life

# Simulated time begins at 2026-01-01T00:00:00Z; seconds since the epoch.
EPOCH_S = 1_767_225_600.0


class SimClock:
    """A Clock whose wall time may jump. Only simulated waiting moves its monotonic time.

    >>> from bench.faults.world import World
    >>> clock = SimClock(Life(World(1), "worker"))
    >>> clock.jump(-3_600.0)
    >>> clock.sleep(1.5)
    >>> round(clock.time() - EPOCH_S, 3), round(clock.monotonic(), 3)
    (-3598.5, 1.5)
    """

    def __init__(self, life: Life) -> None:
        self._life = life
        self._started_s = life.world.now_s
        self._offset_s = 0.0

    def jump(self, seconds: float) -> None:
        """Move the wall clock forwards, or backwards if negative."""
        self._offset_s += seconds

    def time(self) -> float:
        """See Clock."""
        return EPOCH_S + self._life.world.now_s + self._offset_s

    def monotonic(self) -> float:
        """See Clock."""
        return self._life.world.now_s - self._started_s

    def sleep(self, seconds: float) -> None:
        """See Clock."""
        world = self._life.world
        self._life.fault_point("sleep")
        world.wait(world.now_s + max(seconds, CALL_S))
        self._life.check()
