"""Escalates fewer transactions while the deep stage is overloaded: lowers the escalation budget step by step.

Two signs, over the last half of `after_s`: the rows in flight (mean over time, as a share of `in_flight_max`), and the
share of escalated rows without a deep answer in time. They give three zones:

    pressed   a sign is above its limit; after `after_s` the budget is multiplied by `factor_step`
    between   the budget does not change
    calm      both signs are at most half their limits; after `calm_s` it is divided by `factor_step`

The gap between pressed and calm, and the longer wait before a step down, filter noise: the budget falls at most once
in `after_s` and changes direction at most once in `calm_s`. A burst shorter than half of `after_s` changes nothing.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from cascade.config import OverloadSettings
from cascade.protocols import Clock

# A sign up to this part of its limit is calm.
CALM_PART = 0.5
# With fewer outcomes in a window a share has no meaning: 1 late of 2 is no overload.
OUTCOMES_MIN = 5
# After a longer pause of the loop (a rebalance, a suspended machine) the waits start again: rows that piled up then are
# no sign of an overload. By default a turn takes little more than the poll timeout, 100 ms.
PAUSE_S_MAX = 1.0
_BUCKETS = 10
# 0.125 is three steps of 0.5, whatever the last bits of the logarithms.
_ROUNDING = 1e-9


class OverloadControl:
    """Computes which part of the escalation budget is used; for one thread.

    >>> from cascade.protocols import SystemClock
    >>> control = OverloadControl(OverloadSettings(), in_flight_max=100, clock=SystemClock())
    >>> control.observe(in_flight=80, escalated=10, late=0)
    >>> control.factor
    1.0
    """

    def __init__(self, settings: OverloadSettings, in_flight_max: int, clock: Clock) -> None:
        self._settings = settings
        self._in_flight_max = in_flight_max
        self._clock = clock
        self._recent = _Window(settings.after_s / 2)
        self._steps = 0
        self._steps_max = math.ceil(math.log(settings.factor_min) / math.log(settings.factor_step) - _ROUNDING)
        self._observed_s: float | None = None
        self._pressed_s: float | None = None
        self._calm_s: float | None = None
        self._logged = 1.0

    @property
    def factor(self) -> float:
        """The part of the escalation budget that is used, `factor_min` to 1."""
        return max(self._settings.factor_step**self._steps, self._settings.factor_min)

    def observe(self, in_flight: int, escalated: int, late: int) -> None:
        """Adds a turn of the loop.

        in_flight: rows that wait for the deep model now. escalated: rows whose escalation ended since the last call.
        late: those of them that ended with `deadline` or `queue-full`. Rows with `breaker-open` are in neither: fewer
        calls do not help a lost server.
        """
        if not self._steps_max:
            return
        now_s = self._clock.monotonic()
        passed_s = 0.0 if self._observed_s is None else max(now_s - self._observed_s, 0.0)
        self._observed_s = now_s
        self._recent.add(now_s, passed_s, in_flight, escalated, late)
        if passed_s > max(self._settings.after_s, PAUSE_S_MAX):
            self._pressed_s = self._calm_s = None
            return
        self._move(now_s, self._worst())

    def _worst(self) -> float:
        """The greater sign, as a multiple of its limit."""
        waiting_max = self._settings.in_flight_share * self._in_flight_max
        return max(self._recent.in_flight / waiting_max, self._recent.late_share / self._settings.late_share)

    def _move(self, now_s: float, worst: float) -> None:
        """Continues the waits, and changes the budget by a step at the end of a wait."""
        self._pressed_s = _since(self._pressed_s, now_s, worst > 1.0)
        self._calm_s = _since(self._calm_s, now_s, worst <= CALM_PART)
        if self._pressed_s is not None and now_s - self._pressed_s >= self._settings.after_s:
            self._steps = min(self._steps + 1, self._steps_max)
            self._pressed_s = now_s
        elif self._calm_s is not None and now_s - self._calm_s >= self._settings.calm_s:
            self._steps = max(self._steps - 1, 0)
            self._calm_s = now_s

    def changed(self) -> str | None:
        """A line for the log if `factor` has changed since the last call, else None."""
        factor, before = self.factor, self._logged
        self._logged = factor
        if factor == before:
            return None
        if factor < before:
            return (
                f"deep stage overloaded ({self._recent.in_flight:.0f} of at most {self._in_flight_max} rows in flight, "
                f"{self._recent.late_share:.0%} of escalated rows too late): escalation budget at {factor:.1%} of the"
                f" bundle's, at least {self._settings.factor_min:.1%}"
            )
        left = f"at {factor:.1%} of the bundle's" if factor < 1.0 else "back to the bundle's"
        return f"deep stage no longer overloaded: escalation budget {left}"


def _since(start_s: float | None, now_s: float, holds: bool) -> float | None:
    """The time since which `holds` has been true without a break; None if it is false."""
    if not holds:
        return None
    return now_s if start_s is None else start_s


@dataclass(slots=True)
class _Bucket:
    number: int
    seconds: float = 0.0
    row_seconds: float = 0.0
    escalated: int = 0
    late: int = 0


class _Window:
    """Sums over the last `length_s` seconds, in ten buckets; memory does not depend on the number of calls."""

    def __init__(self, length_s: float) -> None:
        self._bucket_s = length_s / _BUCKETS
        self._buckets: deque[_Bucket] = deque(maxlen=_BUCKETS)
        # the sum of all buckets but the newest
        self._older = _Bucket(0)

    @property
    def in_flight(self) -> float:
        """Mean number of rows in flight."""
        seconds = self._older.seconds + self._buckets[-1].seconds
        return (self._older.row_seconds + self._buckets[-1].row_seconds) / seconds if seconds else 0.0

    @property
    def late_share(self) -> float:
        """Share of the escalated rows whose answer was late."""
        outcomes = self._older.escalated + self._buckets[-1].escalated
        return (self._older.late + self._buckets[-1].late) / outcomes if outcomes >= OUTCOMES_MIN else 0.0

    def add(self, now_s: float, passed_s: float, in_flight: int, escalated: int, late: int) -> None:
        number = int(now_s / self._bucket_s)
        if not self._buckets or self._buckets[-1].number != number:
            self._begin(number)
        newest = self._buckets[-1]
        newest.seconds += passed_s
        newest.row_seconds += passed_s * in_flight
        newest.escalated += escalated
        newest.late += late

    def _begin(self, number: int) -> None:
        """Begins a bucket, and drops those that are too old."""
        self._buckets.append(_Bucket(number))
        while self._buckets[0].number <= number - _BUCKETS:
            self._buckets.popleft()
        self._older = older = _Bucket(0)
        for bucket in list(self._buckets)[:-1]:
            older.seconds += bucket.seconds
            older.row_seconds += bucket.row_seconds
            older.escalated += bucket.escalated
            older.late += bucket.late
