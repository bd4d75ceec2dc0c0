"""Frames of a service's metrics, sampled while somebody watches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry, generate_latest

from streaming.health import HealthState
from streaming.scrape import Frame, Scrape, UnreachableError

INTERVAL_S: Final = 2.0
# Five minutes of frames.
FRAMES_MAX: Final = 150
# After such a pause in watching a frame would be of a time that nobody has seen the beginning of.
GAP_S_MAX: Final = 15.0


class LiveFeed:
    """Answers what has happened since a frame that the asker has; any thread may ask, and all share the samples.

    `clock`: seconds since the epoch.
    """

    def __init__(self, registry: CollectorRegistry, state: HealthState, clock: Callable[[], float] = time.time) -> None:
        self._registry, self._state, self._clock = registry, state, clock
        self._lock = threading.Lock()
        self._last: Scrape | None = None
        self._frames: deque[tuple[int, float, Frame]] = deque(maxlen=FRAMES_MAX)
        self._number = 0

    def since(self, number: int) -> bytes:
        """JSON: the frames after that number (0: all that are kept), and how the service's parts are now."""
        with self._lock:
            self._sample()
            frames = [
                {"number": place, "at_s": at_s, **msgspec.to_builtins(frame)}
                for place, at_s, frame in self._frames
                if place > number
            ]
        parts = self._state.components()
        answer: dict[str, Any] = {
            "at_s": self._clock(),
            "interval_s": INTERVAL_S,
            "ready": not self._state.not_ready(),
            "components": [
                {"name": name, "status": part.status, "text": part.text} for name, part in sorted(parts.items())
            ],
            "frames": frames,
        }
        return msgspec.json.encode(answer)

    def _sample(self) -> None:
        """Another frame where the last one is old enough; the first scrape after a pause makes none."""
        now_s = self._clock()
        if self._last is not None and 0.0 <= now_s - self._last.at_s < 0.9 * INTERVAL_S:
            return
        try:
            now = Scrape.of(generate_latest(self._registry).decode(), now_s)
        except UnreachableError:  # no metrics yet: the service is starting
            return
        before, self._last = self._last, now
        if before is not None and 0.0 < now_s - before.at_s <= GAP_S_MAX:
            self._number += 1
            self._frames.append((self._number, now_s, Frame.between(before, now)))
