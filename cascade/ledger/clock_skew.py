"""How far the worker's clock may be from the one that stamps records, by what records seem to have waited.

Records are stamped by the broker (`LogAppendTime`, as Cascade makes the topics), else by their producer (`CreateTime`).
A record that is taken when the worker's clock says `now` has waited now - stamp = delay + offset, where offset is by
how much the worker's clock is ahead of the other. No delay is negative, so the least wait of many bounds the offset
from above: the worker's clock is ahead by at most that, and where it is below zero, behind by at least as much. (After
V. Paxson, On Calibrating Measurements of Packet Transit Times, SIGMETRICS 1998.)

One way it cannot tell a delay that all records have from an offset, and behind a backlog, where every record waits, the
bound is as loose as the backlog is long. Kafka's stamps are whole milliseconds, cut off, so the bound is up to one too
high.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

WINDOW_S: Final = 60.0
# A clock that was set right is believed after ten minutes.
WINDOWS: Final = 10


class LeastWait:
    """The least wait of the last ten minutes, by windows of a minute, so that its memory is bounded.

    `clock`: seconds, never going back.

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
        """A record had waited `wait_s` seconds, negative where its stamp is ahead."""
        window = int(self._clock() // WINDOW_S)
        if self._windows and self._windows[-1][0] == window:
            wait_s = min(wait_s, self._windows.pop()[1])
        self._windows.append((window, wait_s))

    @property
    def least_s(self) -> float | None:
        """The least of the windows that are not older than ten minutes; None where no record came."""
        if not self._windows:
            return None
        oldest = int(self._clock() // WINDOW_S) - WINDOWS + 1
        return min((least for window, least in self._windows if window >= oldest), default=None)
