"""Fails calls at their deadlines, for a stage whose own thread may be busy then."""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from concurrent.futures import Future, InvalidStateError

from cascade.columns import Float64
from cascade.errors import DeepStageError


class Deadlines:
    """Fails futures with `error` at their deadlines, in a thread of its own; for any thread.

    The thread sleeps until the earliest deadline. A new one wakes it only if it is earlier than that.
    """

    def __init__(self, error: str) -> None:
        self._error = error
        self._order = itertools.count()
        self._futures: list[tuple[float, int, Future[Float64]]] = []
        self._wakes_s = math.inf
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="deep deadlines", daemon=True)
        self._thread.start()

    def add(self, future: Future[Float64], deadline_s: float) -> None:
        """Fail `future` at `deadline_s` of the monotonic clock, unless it is done by then."""
        with self._changed:
            self._drop_done()
            heapq.heappush(self._futures, (deadline_s, next(self._order), future))
            if deadline_s < self._wakes_s:
                self._changed.notify()

    def _run(self) -> None:
        while (future := self._next_due()) is not None:
            complete(future, DeepStageError("deadline", self._error))

    def _next_due(self) -> Future[Float64] | None:
        """Wait for the next future whose deadline has come; None at the end."""
        with self._changed:
            while not self._closed:
                self._drop_done()
                self._wakes_s = self._futures[0][0] if self._futures else math.inf
                remaining_s = self._wakes_s - time.monotonic()
                if remaining_s <= 0:
                    return heapq.heappop(self._futures)[2]
                self._changed.wait(remaining_s if self._futures else None)
        return None

    def _drop_done(self) -> None:
        while self._futures and self._futures[0][2].done():
            heapq.heappop(self._futures)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()


def complete(future: Future[Float64], outcome: Float64 | DeepStageError) -> bool:
    """Complete a future that another thread may complete at the same time. Returns whether this call did."""
    try:
        if isinstance(outcome, DeepStageError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        return False
    return True
