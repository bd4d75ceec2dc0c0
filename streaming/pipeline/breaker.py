"""The circuit breaker of the deep model: while most calls fail, none is made, and the screener decides at once.

Closed: calls are made, and their outcomes counted. Open: no call is made for a pause. Half-open: a trial call is made;
if it succeeds the breaker closes, else it opens again for twice as long. Pauses are shortened at random, so that
workers that lost the same server do not call it at the same moment.

Source: Nygard, "Release It!", 2nd edition, 2018, chapter 5.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from cascade.config import BreakerSettings

State = Literal["closed", "open", "half-open"]
# Share of a pause that is random.
JITTER_SHARE = 0.5
_random = random.SystemRandom()


@dataclass(eq=False)
class CircuitBreaker:
    """Decides by the outcomes of the last calls whether the next call may be made; for one thread.

    >>> now_s = 0.0
    >>> breaker = CircuitBreaker(BreakerSettings(calls=2, pause_ms=100), lambda: now_s, lambda: 0.0)
    >>> for _ in range(2):
    ...     breaker.failed()
    >>> breaker.state, breaker.allows()
    ('open', False)
    >>> now_s = 0.1
    >>> breaker.allows(), breaker.allows()
    (True, False)
    >>> breaker.succeeded()
    >>> breaker.state
    'closed'
    """

    _settings: BreakerSettings
    _clock: Callable[[], float] = time.monotonic
    _chance: Callable[[], float] = _random.random
    _until_s: float = field(default=0.0, init=False)
    state: State = field(default="closed", init=False)
    opened: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._outcomes: deque[bool] = deque(maxlen=self._settings.calls)
        self._pause_s = self._settings.pause_ms / 1e3

    def allows(self) -> bool:
        """Whether a call may be made now; in the half-open state that call is the trial."""
        if self.state == "closed":
            return True
        if self._clock() < self._until_s:
            return False
        self.state = "half-open"
        # a trial without an outcome must not block all calls for ever
        self._until_s = self._clock() + self._settings.pause_ms_max / 1e3
        return True

    def succeeded(self) -> None:
        """Counts a call that was answered in time."""
        if self.state == "half-open":
            self.state = "closed"
            self._outcomes.clear()
            self._pause_s = self._settings.pause_ms / 1e3
        elif self.state == "closed":
            self._outcomes.append(True)

    def failed(self) -> None:
        """Counts a call that failed or was not answered in time."""
        if self.state == "half-open":
            self._pause_s = min(2 * self._pause_s, self._settings.pause_ms_max / 1e3)
            self._open()
        elif self.state == "closed":
            self._outcomes.append(False)
            failures = self._outcomes.count(False)
            full = len(self._outcomes) == self._settings.calls
            if full and failures >= self._settings.failures_share * self._settings.calls:
                self._open()

    def _open(self) -> None:
        self.state = "open"
        self.opened += 1
        self._until_s = self._clock() + self._pause_s * (1 - JITTER_SHARE * self._chance())
