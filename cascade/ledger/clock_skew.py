"""A bound on the offset between the worker's clock and the clock that stamps records, from the waits of records.

The broker stamps records (`LogAppendTime`, the setting of Cascade's topics), else their producer does (`CreateTime`).
If the worker takes a record at `now` of its own clock, then now - stamp = delay + offset, where `offset` is by how much
the worker's clock is ahead. No delay is negative, so the least wait of many records bounds the offset from above: the
worker's clock is ahead by at most the least wait; if the least wait is negative, it is behind by at least as much.
Source: V. Paxson, On Calibrating Measurements of Packet Transit Times, SIGMETRICS 1998.

Measurements in one direction cannot separate the offset from a delay that all records have. With a backlog every record
waits, so the bound is as loose as the backlog is long. Kafka truncates stamps to milliseconds, so the bound is up to
1 ms too high.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

WINDOW_S: Final = 60.0
# After a clock is corrected, the bound is correct again ten minutes later.
WINDOWS: Final = 10


class LeastWait:
    """The least wait of the last ten minutes, by windows of a minute, in bounded memory.

    `clock`: seconds that never go back.

    >>> seconds = iter([0.0, 30.0, 300.0, 301.0, 630.0, 2_000.0])
    >>> waits = LeastWait(lambda: next(seconds))
    >>> for wait_s in (0.004, 0.002, 0.003):
    ...     waits.record(wait_s)
    >>> waits.least_s, waits.least_s, waits.least_s
    (0.002, 0.003, None)
    """

    __slots__ = ("_clock", "_windows")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._windows: deque[tuple[int, float]] = deque(maxlen=WINDOWS)

    def record(self, wait_s: float) -> None:
        """Adds a record that has waited `wait_s` seconds, negative if its stamp is ahead of the worker's clock."""
        window = int(self._clock() // WINDOW_S)
        if self._windows and self._windows[-1][0] == window:
            if wait_s >= self._windows[-1][1]:
                return
            self._windows.pop()
        self._windows.append((window, wait_s))

    @property
    def least_s(self) -> float | None:
        """The least wait in seconds of the last ten minutes; None without a record."""
        if not self._windows:
            return None
        oldest = int(self._clock() // WINDOW_S) - WINDOWS + 1
        return min((least for window, least in self._windows if window >= oldest), default=None)
