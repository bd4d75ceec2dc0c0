"""Sessions: a worker with its connections; after an error of the broker, a new worker with new connections.

A lost broker, a fenced producer, a commit with an unknown outcome, a failed check of the worker's own state: we never
repair a session in place. We close everything, and the next worker resumes from the committed offsets.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import ExitStack

import structlog

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from cascade.ledger import Ledger
from cascade.protocols import Clock
from streaming.health_state import HealthState
from streaming.worker.boundaries import InvariantError
from streaming.worker.loop import Worker

log = structlog.get_logger()
PAUSES_S = (0.2, 5.0)
# Share of a pause that is random, so that workers that lost the same broker do not reconnect at the same moment.
JITTER_SHARE = 0.5
_random = random.SystemRandom()


class Sessions:
    """Runs sessions, each with a new worker, turn by turn, until a worker has drained or the process stops.

    open_worker: connects and returns a worker, and registers on the stack what to close after it; None if the process
    stops meanwhile. kafka: for `lost` and `lost_s_max`. ledger: its decisions count as progress. health: shows the
    broker's error between sessions. clock: monotonic time. stopping: whether the process stops. chance: random numbers
    in [0, 1). pauses_s: between two sessions, the first and the longest; each failure without progress doubles it.

    `worker`: of the present session, else None. `error`: that ended the last session, if one did.
    """

    def __init__(
        self,
        open_worker: Callable[[ExitStack], Worker | None],
        kafka: KafkaSettings,
        ledger: Ledger,
        health: HealthState,
        clock: Clock,
        stopping: Callable[[], bool],
        chance: Callable[[], float] = _random.random,
        pauses_s: tuple[float, float] = PAUSES_S,
    ) -> None:
        self.worker: Worker | None = None
        self.error: BrokerError | InvariantError | None = None
        self._open_worker, self._kafka, self._ledger, self._health = open_worker, kafka, ledger, health
        self._clock, self._stopping, self._chance, self._pauses_s = clock, stopping, chance, pauses_s
        self._session = ExitStack()
        self._decided, self._since_s, self._pause_s = -1, clock.monotonic(), pauses_s[0]
        self._connected_s = 0.0

    def run(self, pause: Callable[[float], None]) -> None:
        """Takes turns until the end; `pause`: sleeps, in seconds. Raises as `turn` does."""
        try:
            while (pause_s := self.turn()) is not None:
                if pause_s:
                    pause(pause_s)
        finally:
            self.close()

    def turn(self) -> float | None:
        """Opens a session, or steps its worker, or, after a stop, drains it and ends the session.

        Returns the seconds to pause before the next turn, None after the last one. Raises the error of a session if
        `kafka.lost` is "exit", or after `kafka.lost_s_max` seconds without a decision. A session that lasts longer
        than that counts as progress too: an idle worker and a spare decide nothing.
        """
        try:
            if self.worker is None:
                return 0.0 if self._open() else None
            if not self.worker.stopping:
                self.worker.step()
                return 0.0
            self.worker.drain()
            self.close()
            return None
        except (BrokerError, InvariantError) as error:
            return self._pause_after(error)

    def close(self) -> None:
        """Closes the connections of the present session, if there is one."""
        self.worker = None
        self._session.close()

    def _open(self) -> bool:
        """Begins a session; False if the process stops."""
        self._connected_s = math.inf
        if self._stopping():
            return False
        worker = self._open_worker(self._session)
        self._connected_s = self._clock.monotonic()
        if worker is None:
            return False
        self.worker = worker
        worker.start()
        return True

    def _pause_after(self, error: BrokerError | InvariantError) -> float:
        """Ends the session; returns the pause before the next one, or raises the error."""
        self.error = error
        if isinstance(error, InvariantError):
            log.error("a check of the worker's own state failed", reason=str(error))
        self.close()
        now_s, count = self._clock.monotonic(), self._ledger.counters().decisions
        if count != self._decided or now_s - self._connected_s > self._kafka.lost_s_max:
            self._decided, self._since_s, self._pause_s = count, now_s, self._pauses_s[0]
        if self._kafka.lost == "exit" or now_s - self._since_s > self._kafka.lost_s_max:
            raise error
        log.warning("session ended: reconnecting", reason=str(error))
        self._health.waiting("broker", str(error))
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, self._pauses_s[1])
        return pause_s * (1 - JITTER_SHARE * self._chance())
