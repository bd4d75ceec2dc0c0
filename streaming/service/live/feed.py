"""Frames of a service's metrics, sampled while a page asks."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry

from streaming.health_state import HealthState
from streaming.service.scrape import Frame, Scrape, UnreachableError

INTERVAL_S: Final = 2.0
# Five minutes of frames.
FRAMES_MAX: Final = 150
# The window begins at one of these scrapes, stored every half minute: some 60 kB each for a worker.
MARK_S: Final = 30.0
MARKS_MAX: Final = 11
# After a longer pause no frame is computed: it would average a time that no page has shown.
GAP_S_MAX: Final = 15.0


class LiveFeed:
    """Returns the frames since a given one; for any thread, and all callers share the samples.

    A frame covers two seconds. The window is a frame of the time without a pause, up to about five minutes: two seconds
    are too short for percentiles of rare decisions and for budgets. `clock`: seconds since the epoch.
    """

    def __init__(self, registry: CollectorRegistry, state: HealthState, clock: Callable[[], float] = time.time) -> None:
        self._registry, self._state, self._clock = registry, state, clock
        self._lock = threading.Lock()
        self._last: Scrape | None = None
        self._marks: deque[Scrape] = deque(maxlen=MARKS_MAX)
        self._window: Frame | None = None
        # encoded once for all callers
        self._frames: deque[tuple[int, msgspec.Raw]] = deque(maxlen=FRAMES_MAX)
        self._number = 0

    def since(self, number: int) -> bytes:
        """Returns JSON: the frames after that number (0: all), the window, and the health of the components.

        An unknown figure is null. `newest` is the last frame's number; it falls if the service was restarted.
        """
        with self._lock:
            self._sample()
            newest, window = self._number, self._window
            frames = [frame for frame_number, frame in self._frames if frame_number > number]
        components = self._state.components()
        answer: dict[str, Any] = {
            "at_s": self._clock(),
            "newest": newest,
            "failing": self._state.not_alive(),
            "ready": not self._state.not_ready(),
            "components": [
                {"name": name, "status": component.status, "text": component.text}
                for name, component in sorted(components.items())
            ],
            "window": window,
            "frames": frames,
        }
        return msgspec.json.encode(answer)

    def _sample(self) -> None:
        """Adds a frame if the last one is old enough; the first scrape after a pause adds none."""
        now_s = self._clock()
        if self._last is not None and 0.0 <= now_s - self._last.at_s < 0.9 * INTERVAL_S:
            return
        try:
            now = Scrape.read(self._registry, now_s)
        except UnreachableError:  # no metrics yet: the service is starting
            return
        before, self._last = self._last, now
        if before is None or not _follows(before, now):
            self._marks.clear()
            self._marks.append(now)
            self._window = None
            return
        frame = Frame.between(before, now)
        self._window = Frame.between(self._marks[0], now)
        if now_s - self._marks[-1].at_s >= MARK_S:
            self._marks.append(now)
        self._number += 1
        content = {"number": self._number, "at_s": now_s, **msgspec.to_builtins(frame)}
        self._frames.append((self._number, msgspec.Raw(msgspec.json.encode(content))))


def _follows(before: Scrape, now: Scrape) -> bool:
    """Whether the time between is a frame: without a pause, and without a start or an end of a worker."""
    starts = [scrape.by("cascade_start_time_seconds", "worker") for scrape in (before, now)]
    return 0.0 < now.at_s - before.at_s <= GAP_S_MAX and starts[0] == starts[1]
