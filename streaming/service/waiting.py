"""Waits for broker, topics and deep model at the start, and stops the process at a signal."""

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
from cascade.errors import BrokerError, MissingTopicsError, ModelServerError
from cascade.protocols import DeepStage
from streaming.health_state import HealthState
from streaming.kafka.topics import wait_for_broker, wait_for_leaders
from streaming.service.topics import check_topics_once, is_retriable, topic_specs

log = structlog.get_logger()
# Length of an attempt; before the next one, health and log name what the service waits for.
WAIT_ATTEMPT_S = 5.0
# Of a deep model that is there, connecting takes less.
MODEL_ATTEMPT_S_MIN = 1.0
# Health shows every attempt; the log has the first one, and then fewer and fewer.
LOG_PAUSE_FIRST_S, LOG_PAUSE_MAX_S = 2.0, 30.0
TOPICS_PAUSE_S = 2.0


class _StopRequested(Exception):
    """The process must stop while it is waiting."""


class _WaitLog:
    """Logs what the service waits for: the first time at once, and then fewer and fewer times."""

    def __init__(self) -> None:
        self._due_s, self._pause_s = 0.0, LOG_PAUSE_FIRST_S

    def warn(self, text: str) -> None:
        now_s = time.monotonic()
        if now_s >= self._due_s:
            log.warning(text)
            self._due_s, self._pause_s = now_s + self._pause_s, min(2 * self._pause_s, LOG_PAUSE_MAX_S)


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
    give_up_s, wait_log = time.monotonic() + wait_s_max, _WaitLog()

    def report(text: str) -> None:
        if stopping.is_set():
            raise _StopRequested
        health.progress()
        health.waiting("broker", text)
        wait_log.warn(text)

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


def await_topics(config: Config, create_partitions: int, health: HealthState, stopping: Stopping) -> None:
    """Waits until others have created the topics, or for `stopping`; creates them itself with `create_partitions`.

    Asks again after errors that Kafka calls retriable, such as a lost broker; raises any other BrokerError.
    """
    wait_log, waited = _WaitLog(), False
    while not stopping.is_set():
        health.progress()
        # it stops at once and shows progress; the calls below wait for a lost broker in silence
        await_broker(config, health, stopping)
        if stopping.is_set():
            return
        try:
            check_topics_once(config, create_partitions)
            if waited:
                wait_for_leaders(config.kafka, [spec.name for spec in topic_specs(config, 1)])
        except MissingTopicsError as error:
            waited = True
            health.ok("broker")
            health.waiting("topics", str(error))
            wait_log.warn(f"waiting for topics: {error}")
        except BrokerError as error:
            if not is_retriable(error):
                raise
            health.waiting("broker", str(error))
            wait_log.warn(str(error))
        else:
            health.ok("broker")
            health.ok("topics")
            if waited:
                log.info("the topics are there")
            return
        stopping.wait(TOPICS_PAUSE_S)


def await_model(deep: DeepStage, health: HealthState, stopping: Stopping, wait_s_max: float) -> None:
    """Waits for the deep model, for `stopping`, or for `wait_s_max`.

    The service then starts without the model: decisions of the screener are better than none. The circuit breaker finds
    the model when it is back.
    """
    give_up_s = time.monotonic() + wait_s_max
    while not stopping.is_set():
        health.progress()
        try:
            deep.wait_ready(min(WAIT_ATTEMPT_S, max(wait_s_max, MODEL_ATTEMPT_S_MIN)))
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
