"""The producer on kafka-python 3."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.clients.kafka_errors import REQUEST_TIMEOUT_MS, fenced_error, is_fenced, translated, worded
from streaming.clients.protocol import DELIVERY_TIMEOUT_S, Delivery, Headers
from streaming.clients.settings import connection_settings

# The largest batch of a partition. The idempotent producer has one batch in flight for each partition, so that each
# small one would take a round trip; this one has room for a thousand decisions.
PRODUCE_BATCH_BYTES = 512 * 1024
# A micro-batch is appended record by record. Without lingering, the sender sends the first records at once and competes
# with the rest for the interpreter. A millisecond is a fifth of the screened p99 limit.
LINGER_MS = 1
# Larger than the broker's default, so that the dead letter of a message at the limit can be sent.
REQUEST_BYTES_MAX = 2 * 1024 * 1024
UNDELIVERED_MAX = 50_000
# kafka-python's thread ends within milliseconds after `force_close`, unless it waits for a connection.
ABANDON_TIMEOUT_S = 1.0


class _Sent:
    """The Delivery of some records; checks them from the first unacknowledged one on."""

    def __init__(self, servers: str, futures: list[Any]) -> None:
        self._servers, self._futures, self._acknowledged = servers, futures, 0

    def done(self) -> bool:
        while self._acknowledged < len(self._futures):
            future = self._futures[self._acknowledged]
            if not future.is_done:
                return False
            if future.exception is not None:
                raise delivery_error(self._servers, future.exception)
            self._acknowledged += 1
        return True


def delivery_error(servers: str, error: BaseException) -> BrokerError:
    """The error of a record that was not delivered."""
    if is_fenced(error):
        return fenced_error(servers)
    return BrokerError(f"Kafka at {servers}: a record was not delivered: {worded(error)}")


class KafkaPythonProducer:
    """ProducerClient on kafka-python, which has no limit of its own: `undelivered_max` records may be in flight."""

    def __init__(
        self,
        kafka: KafkaSettings,
        undelivered_max: int = UNDELIVERED_MAX,
        bootstrap_timeout_s: float = 30.0,
        vendor_settings: Mapping[str, Any] | None = None,
        delivery_timeout_s: float = DELIVERY_TIMEOUT_S,
    ) -> None:
        self._servers = kafka.bootstrap
        self._undelivered_max = undelivered_max
        self._undelivered: deque[Any] = deque()
        self._failure: BrokerError | None = None
        with translated("connecting", self._servers):
            self._producer = KafkaProducer(
                **connection_settings(kafka, "cascade-producer"),
                acks="all",
                enable_idempotence=True,
                linger_ms=LINGER_MS,
                batch_size=PRODUCE_BATCH_BYTES,
                max_request_size=REQUEST_BYTES_MAX,
                request_timeout_ms=REQUEST_TIMEOUT_MS,
                delivery_timeout_ms=int(delivery_timeout_s * 1_000),
                max_block_ms=REQUEST_TIMEOUT_MS,
                bootstrap_timeout_ms=int(bootstrap_timeout_s * 1_000),
                allow_auto_create_topics=False,
                metrics_enabled=False,
                **(vendor_settings or {}),
            )

    def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        timestamp_ms: int | None = None,
    ) -> Delivery:
        """See ProducerClient; a header value None is sent as empty bytes, since kafka-python requires bytes."""
        self._make_room(1)
        pairs = [(name, octets if octets is not None else b"") for name, octets in headers]
        with self._sending(topic):
            future = self._producer.send(topic, key=key, value=value, headers=pairs, timestamp_ms=timestamp_ms)
        self._undelivered.append(future)
        return _Sent(self._servers, [future])

    def send_many(
        self,
        topic: str,
        keys: Sequence[bytes | None],
        values: Sequence[bytes | None],
        timestamps_ms: Sequence[int] | None = None,
    ) -> Delivery:
        """See ProducerClient."""
        self._make_room(len(values))
        send = self._producer.send
        times: Sequence[int | None] = timestamps_ms if timestamps_ms is not None else [None] * len(values)
        futures: list[Any] = []
        try:
            with self._sending(topic):
                for key, value, time_ms in zip(keys, values, times, strict=True):
                    futures.append(send(topic, key=key, value=value, timestamp_ms=time_ms))
        finally:
            self._undelivered.extend(futures)
        return _Sent(self._servers, futures)

    def undelivered(self) -> int:
        """See ProducerClient."""
        self._reap()
        return len(self._undelivered)

    def flush(self, timeout_s: float) -> None:
        """See ProducerClient."""
        with translated("waiting for deliveries", self._servers):
            self._producer.flush(timeout=timeout_s)
        self._reap()
        self._refuse_after_failure()

    def close(self, timeout_s: float) -> None:
        """See ProducerClient; releases all resources even if the flush fails."""
        try:
            self.flush(timeout_s)
        except BrokerError:
            self._abandon()
            raise
        with contextlib.suppress(KafkaError):
            self._producer.close(timeout=timeout_s)

    def _abandon(self) -> None:
        """Ends kafka-python's thread and drops its records; after a failure its `close` leaves the thread running."""
        sender = self._producer._sender
        sender.force_close()
        sender.join(ABANDON_TIMEOUT_S)
        self._producer._unregister_cleanup()
        self._producer._closed = True

    def _sending(self, topic: str) -> contextlib.AbstractContextManager[None]:
        return translated(f"sending to {topic}", self._servers)

    def _refuse_after_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _make_room(self, records: int) -> None:
        self._reap()
        self._refuse_after_failure()
        deadline_s = time.monotonic() + REQUEST_TIMEOUT_MS / 1_000
        # a call with more records than the limit passes when no other record is in flight
        while self._undelivered and len(self._undelivered) + records > self._undelivered_max:
            left_s = deadline_s - time.monotonic()
            with translated("waiting for room in the send queue", self._servers), contextlib.suppress(KafkaError):
                self._undelivered[0].get(timeout=max(left_s, 0))
            self._reap()
            self._refuse_after_failure()
            if self._undelivered and left_s <= 0:
                raise BrokerError(
                    f"Kafka at {self._servers}: {len(self._undelivered)} records wait to be delivered, at most "
                    f"{self._undelivered_max}; the broker is slow or gone"
                )

    def _reap(self) -> None:
        waiting = self._undelivered
        while waiting and waiting[0].is_done:
            error = waiting.popleft().exception
            if error is not None and self._failure is None:
                self._failure = self._not_delivered(error)

    def _not_delivered(self, error: BaseException) -> BrokerError:
        """The error that every later call raises after this failed delivery."""
        return delivery_error(self._servers, error)
