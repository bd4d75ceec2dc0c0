"""Waiting on a machine that other processes use too, and a clock that a test sets."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

TURN_S: Final = 0.01


class SetClock:
    """A Clock that moves only when the test moves it."""

    now_s = 0.0

    def time(self) -> float:
        return self.now_s

    monotonic = time

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def wait_until(
    holds: Callable[[], bool],
    what: str = "the condition",
    timeout_s: float = 120.0,
    found: Callable[[], object] = lambda: "",
) -> float:
    """Wait until `holds()` is true, and return the seconds; fails after `timeout_s` with `what` and `found()`.

    Four fifths of the time are left to others: a condition that reads a topic would take a core from the service.
    """
    started_s = asked_s = time.monotonic()
    while not holds():
        now_s = time.monotonic()
        assert now_s - started_s < timeout_s, f"{what}: not within {timeout_s:g} s {found()}"
        time.sleep(max(0.02, 4 * (now_s - asked_s)))
        asked_s = time.monotonic()
    return time.monotonic() - started_s


def wait_within(limit_s: float, holds: Callable[[], bool], what: str) -> float:
    """Wait until `holds()` is true, and return the seconds; fails after `limit_s` with `what`.

    The limit is counted in sleeps of TURN_S. Where other processes leave this one no time they take longer, as does
    all that the condition waits for.
    """
    started_s = time.monotonic()
    for _ in range(round(limit_s / TURN_S)):
        if holds():
            break
        time.sleep(TURN_S)
    assert holds(), f"{what}: not within {limit_s:g} s"
    return time.monotonic() - started_s
