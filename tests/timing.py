"""Waiting on a machine that other processes use too, and a clock that a test sets."""

from __future__ import annotations

import time
from collections.abc import Callable


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
