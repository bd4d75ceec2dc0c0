"""Waits for broker and deep model at the start, and stops the process at a signal."""

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
# Length of an attempt; before the next one, health and log name what the service waits for.
WAIT_ATTEMPT_S = 5.0
# Health shows every attempt; the log has the first one, and then fewer and fewer.
LOG_PAUSE_FIRST_S, LOG_PAUSE_MAX_S = 2.0, 30.0


class _StopRequested(Exception):
    """The process must stop while it is waiting."""


class Stopping:
    """A flag that the process must stop, with listeners."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._listeners: list[Callable[[], None]] = []

    def set(self) -> None:
        """Sets the flag, and calls the listeners."""
        self._event.set()
        for listener in self._listeners:
            listener()

    def is_set(self) -> bool:
        """Whether the process must stop."""
        return self._event.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when the flag is set, or after `timeout_s`, if that is not None."""
        self._event.wait(timeout_s)

    def on_set(self, listener: Callable[[], None]) -> None:
        """Adds a listener; calls it at once if the flag is set."""
        self._listeners.append(listener)
        if self.is_set():
            listener()


@contextmanager
def stop_signals() -> Iterator[Stopping]:
    """Sets the flag at SIGTERM or SIGINT; a second signal ends the process at once."""
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


def await_broker(config: Config, health: HealthState, stopping: Stopping, wait_s_max: float = math.inf) -> None:
    """Waits for the broker or for `stopping`; raises BrokerError after `wait_s_max`, or at an access error."""
    log_s = time.monotonic()
    give_up_s, pause_s = log_s + wait_s_max, LOG_PAUSE_FIRST_S

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
                raise  # an access error, or the end of the wait
            report(str(error))
            continue
        return


def await_model(deep: DeepStage, health: HealthState, stopping: Stopping, wait_s_max: float) -> None:
    """Waits for the deep model, for `stopping`, or for `wait_s_max`.

    The service then starts without the model: decisions of the screener are better than none. The circuit breaker finds
    the model when it is back.
    """
    give_up_s = time.monotonic() + wait_s_max
    while not stopping.is_set():
        health.progress()
        try:
            deep.wait_ready(WAIT_ATTEMPT_S)
        except ModelServerError as error:
            health.waiting("deep model", str(error))
            log.warning("waiting for the deep model", reason=str(error))
            if time.monotonic() > give_up_s:
                log.warning("starting without the deep model: the screener decides alone", waited_s=wait_s_max)
                return
            stopping.wait(1.0)
            continue
        health.ok("deep model")
        return
