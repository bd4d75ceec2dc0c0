"""Sessions: a worker with its connections; after a BrokerError, a new worker with new connections.

A lost broker, a fenced producer, a commit with an unknown outcome: we never repair a connection in place. We close
everything, and the next worker resumes from the committed offsets.
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
from streaming.worker.loop import Worker

log = structlog.get_logger()
PAUSE_S_FIRST, PAUSE_S_MAX = 0.2, 5.0
# Share of a pause that is random, so that workers that lost the same broker do not reconnect at the same moment.
JITTER_SHARE = 0.5
_random = random.SystemRandom()


def run_sessions(
    make: Callable[[ExitStack], Worker | None],
    kafka: KafkaSettings,
    ledger: Ledger,
    health: HealthState,
    clock: Clock,
    stopping: Callable[[], bool],
    pause: Callable[[float], None],
) -> None:
    """Runs sessions, each with a new worker, until a worker ends without an error or `stopping()` is true.

    make: connects and returns a worker, and registers on the stack what to close after it; None if the process stops
    meanwhile. kafka: for `lost` and `lost_s_max`. ledger: its decisions count as progress. health: shows the broker's
    error between sessions. clock: monotonic time. stopping: whether the process stops. pause: sleeps, in seconds.

    Raises the BrokerError if `kafka.lost` is "exit", or after `kafka.lost_s_max` seconds without a decision. A session
    that lasts longer than that counts as progress too: an idle worker and a spare decide nothing.
    """
    decided, since_s, pause_s = -1, clock.monotonic(), PAUSE_S_FIRST
    while not stopping():
        connected_s = math.inf
        try:
            with ExitStack() as stack:
                worker = make(stack)
                connected_s = clock.monotonic()
                if worker is not None:
                    worker.run()
            return
        except BrokerError as error:
            now_s, count = clock.monotonic(), ledger.counters().decisions
            if count != decided or now_s - connected_s > kafka.lost_s_max:
                decided, since_s, pause_s = count, now_s, PAUSE_S_FIRST
            if kafka.lost == "exit" or now_s - since_s > kafka.lost_s_max:
                raise
            log.warning("session ended: reconnecting", reason=str(error))
            health.waiting("broker", str(error))
        pause(pause_s * (1 - JITTER_SHARE * _random.random()))
        pause_s = min(2 * pause_s, PAUSE_S_MAX)
