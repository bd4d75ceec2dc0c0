"""The producer on kafka-python 3, by its public methods alone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import limits
from streaming.kafka.kafka_errors import is_fenced, translated, worded
from streaming.kafka.producer import Producer
from streaming.kafka.protocol import Delivery
from streaming.kafka.session_errors import fenced_error
from streaming.kafka.settings import connection_settings

# The largest batch of a partition. The idempotent producer has one batch in flight for each partition, so that each
# small one would take a round trip; this one has room for a thousand decisions.
PRODUCE_BATCH_BYTES = 512 * 1024


class _Sent:
    """The Delivery of some records; checks them from the first unacknowledged one on."""

    def __init__(self, servers: str, futures: list[Any]) -> None:
        self._servers, self._futures, self._acknowledged = servers, futures, 0
        self.done_s = 0.0
        for future in futures:
            future.add_callback(self._note_time)

    def done(self) -> bool:
        while self._acknowledged < len(self._futures):
            future = self._futures[self._acknowledged]
            if not future.is_done:
                return False
            if future.exception is not None:
                raise _delivery_error(self._servers, future.exception)
            self._acknowledged += 1
        # a future is done a moment before it calls back
        self.done_s = self.done_s or time.time()
        return True

    def _note_time(self, _: object) -> None:
        """Runs in kafka-python's thread at each acknowledgement."""
        self.done_s = time.time()


def _delivery_error(servers: str, error: BaseException) -> BrokerError:
    if is_fenced(error):
        return fenced_error(servers)
    return BrokerError(f"Kafka at {servers}: a record was not delivered: {worded(error)}")


class KafkaPythonProducer(Producer):
    """ProducerClient on kafka-python, which has no limit of its own for the records in flight."""

    def __init__(self, kafka: KafkaSettings, delivery_timeout_s: float = limits.DELIVERY_TIMEOUT_S) -> None:
        super().__init__(kafka)
        self._delivery_timeout_s = delivery_timeout_s
        self._undelivered: deque[Any] = deque()
        with self._translated("connecting"):
            self._producer = KafkaProducer(
                **connection_settings(kafka, "cascade-producer"),
                acks="all",
                enable_idempotence=True,
                linger_ms=limits.LINGER_MS,
                batch_size=PRODUCE_BATCH_BYTES,
                max_request_size=limits.REQUEST_BYTES_MAX,
                request_timeout_ms=limits.REQUEST_TIMEOUT_MS,
                delivery_timeout_ms=int(delivery_timeout_s * 1_000),
                max_block_ms=limits.REQUEST_TIMEOUT_MS,
                bootstrap_timeout_ms=int(limits.BOOTSTRAP_TIMEOUT_S * 1_000),
                allow_auto_create_topics=False,
                metrics_enabled=False,
            )

    def _send(
        self,
        topic: str,
        keys: Sequence[bytes | None],
        values: Sequence[bytes | None],
        times_ms: Sequence[int] | None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> Delivery:
        self._make_room(len(values))
        times: Sequence[int | None] = [None] * len(values) if times_ms is None else times_ms
        send = self._producer.send
        futures: list[Any] = []
        try:
            with self._sending(topic):
                for key, value, time_ms in zip(keys, values, times, strict=True):
                    futures.append(send(topic, key=key, value=value, headers=list(headers), timestamp_ms=time_ms))
        finally:
            self._undelivered.extend(futures)
        return _Sent(self._servers, futures)

    def undelivered(self) -> int:
        """See ProducerClient."""
        self._reap()
        return len(self._undelivered)

    def _deliver(self, timeout_s: float) -> None:
        self._producer.flush(timeout=timeout_s)
        self._reap()

    def _abandon(self) -> None:
        """Closes kafka-python's producer, which cannot drop records: those that are queued may still be delivered.

        Its `close` raises while records are queued, and leaves its thread running. The thread then ends when all are
        delivered, or have failed after the delivery timeout.
        """
        try:
            self._producer.close(limits.ABANDON_TIMEOUT_S)
        except KafkaError:
            threading.Thread(target=self._close_later, name="cascade-producer-close", daemon=True).start()

    def _close_later(self) -> None:
        with contextlib.suppress(KafkaError):
            self._producer.close(self._delivery_timeout_s + limits.REQUEST_TIMEOUT_MS / 1_000)

    def _translated(self, action: str) -> contextlib.AbstractContextManager[None]:
        return translated(action, self._servers)

    def _wait_for_delivery(self, timeout_s: float) -> None:
        with self._translated("waiting for room in the send queue"), contextlib.suppress(KafkaError):
            self._undelivered[0].get(timeout=timeout_s)

    def _reap(self) -> None:
        waiting = self._undelivered
        while waiting and waiting[0].is_done:
            error = waiting.popleft().exception
            if error is not None and self._failure is None:
                self._failure = self._ended(_delivery_error(self._servers, error))
