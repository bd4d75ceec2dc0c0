"""What a process waits for at its start, and how it is told to stop."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import structlog

from cascade.config import Config
from cascade.errors import BrokerError, ModelServerError
from cascade.protocols import DeepStage
from streaming.clients.topics import wait_for_broker
from streaming.health import HealthState

log = structlog.get_logger()
# One attempt; while it lasts the service says in health and log what it waits for, and then tries again.
WAIT_ATTEMPT_S = 5.0
# Health hears of every attempt, the log of the first one and then ever less often.
LOG_PAUSE_FIRST_S, LOG_PAUSE_MAX_S = 2.0, 30.0


class _StopRequested(Exception):
    """The process was told to stop while it was waiting."""


class Stopping:
    """Whether to stop; tells those who asked to hear of it."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._listeners: list[Callable[[], None]] = []

    def set(self) -> None:
        """Stop."""
        self._event.set()
        for listener in self._listeners:
            listener()

    def is_set(self) -> bool:
        """Whether to stop."""
        return self._event.is_set()

    def wait(self, timeout_s: float) -> None:
        """Return when it is time to stop, or after so long."""
        self._event.wait(timeout_s)

    def on_set(self, listener: Callable[[], None]) -> None:
        """Call it when it is time to stop; at once, where it is already."""
        self._listeners.append(listener)
        if self.is_set():
            listener()


@contextmanager
def stop_signals() -> Iterator[Stopping]:
    """SIGTERM and SIGINT ask to stop; a second one ends the process at once."""
    stopping = Stopping()

    def handle(number: int, frame: FrameType | None) -> None:
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, signal.SIG_DFL)
        stopping.set()

    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def await_broker(config: Config, health: HealthState, stopping: Stopping, patience_s: float = math.inf) -> None:
    """Return once the broker answers, or when told to stop; raises BrokerError after `patience_s`, or if refused."""
    log_s = time.monotonic()
    give_up_s, pause_s = log_s + patience_s, LOG_PAUSE_FIRST_S

    def report(text: str) -> None:
        nonlocal log_s, pause_s
        if stopping.is_set():
            raise _StopRequested
        health.progress()
        health.waiting("broker", text)
        if time.monotonic() >= log_s:
            log.warning(text)
            log_s, pause_s = time.monotonic() + pause_s, min(2 * pause_s, LOG_PAUSE_MAX_S)

    while not stopping.is_set():
        try:
            wait_for_broker(config.kafka, WAIT_ATTEMPT_S, report, sleep=stopping.wait)
        except _StopRequested:
            return
        except BrokerError as error:
            if error.__cause__ is not None or time.monotonic() > give_up_s:
                raise  # refused: waiting does not help; or waited for long enough
            report(str(error))
            continue
        return


def await_model(deep: DeepStage, health: HealthState, stopping: Stopping, patience_s: float) -> None:
    """Return once the model answers, when told to stop, or after `patience_s`: then the breaker finds it later.

    Transactions without a decision are worse than decisions of the screener.
    """
    give_up_s = time.monotonic() + patience_s
    while not stopping.is_set():
        health.progress()
        try:
            deep.wait_ready(WAIT_ATTEMPT_S)
        except ModelServerError as error:
            health.waiting("deep model", str(error))
            log.warning("waiting for the deep model", reason=str(error))
            if time.monotonic() > give_up_s:
                log.warning("starting without the deep model: the screener decides alone", waited_s=patience_s)
                return
            stopping.wait(1.0)
            continue
        health.ok("deep model")
        return
