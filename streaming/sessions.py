"""Sessions: a worker with its connections, and another one with new ones where the broker was lost.

A lost broker, a fenced producer, a commit whose outcome is not known: none of these is mended in place. Everything is
closed and made anew, and the next worker goes on from what the broker says is committed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack

import structlog

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from cascade.ledger import Ledger
from cascade.protocols import Clock
from streaming.health import HealthState
from streaming.worker import Worker

log = structlog.get_logger()
PAUSE_S_FIRST, PAUSE_S_MAX = 0.2, 5.0
# Share of a pause that chance takes away, so that workers that lost the same broker do not come back as one.
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
    """Run workers that `make` makes, one after another, until one ends by itself, or `stopping`.

    `make` puts on the stack what is to be closed after the worker's end; None: it was told to stop. Raises BrokerError
    where `kafka.lost` is `exit`, or nothing was decided for `kafka.lost_s_max` seconds of trying.
    """
    decided, since_s, pause_s = -1, clock.monotonic(), PAUSE_S_FIRST
    while not stopping():
        try:
            with ExitStack() as stack:
                worker = make(stack)
                if worker is not None:
                    worker.run()
            return
        except BrokerError as error:
            now_s, count = clock.monotonic(), ledger.counters().decisions
            if count != decided:
                decided, since_s, pause_s = count, now_s, PAUSE_S_FIRST
            if kafka.lost == "exit" or now_s - since_s > kafka.lost_s_max:
                raise
            log.warning("session over: all connections are made anew", reason=str(error))
            health.waiting("broker", str(error))
        pause(pause_s * (1 - JITTER_SHARE * _random.random()))
        pause_s = min(2 * pause_s, PAUSE_S_MAX)
