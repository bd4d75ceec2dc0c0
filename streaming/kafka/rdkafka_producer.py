"""The producer on librdkafka, by its C API."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from confluent_kafka import KafkaError, KafkaException

from cascade.columns import ByteColumn
from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import limits
from streaming.kafka.producer import Producer
from streaming.kafka.protocol import Delivery, Headers
from streaming.kafka.rdkafka_deliveries import Cell, Failure
from streaming.kafka.rdkafka_producer_handle import ProducerHandle
from streaming.kafka.rdkafka_send import DONE_US, FAILED
from streaming.kafka.rdkafka_settings import Connection, connection_settings, vendor_error

# The records of a call are queued before librdkafka's thread has sent the first. With 0 this thread spins while five
# requests are under way, as many as an idempotent producer may have: half of its CPU time at 1,000 records a second.
LINGER_MS = 0.1
_ROOM_PAUSE_S = 0.005
FLUSH_S_MAX = 0.2


class _Sent:
    """The Delivery of some records."""

    __slots__ = ("_cell", "_producer")

    def __init__(self, producer: RdkafkaProducer, cell: Cell) -> None:
        self._producer, self._cell = producer, cell

    def done(self) -> bool:
        # any failure is this delivery's too: no offset may be committed after it
        self._producer.refuse_after_failure()
        block, row, _ = self._cell
        # the time is written last
        return bool(block.item(row, DONE_US)) and not block.item(row, FAILED)

    @property
    def done_s(self) -> float:
        block, row, _ = self._cell
        return block.item(row, DONE_US) / 1e6


class RdkafkaProducer(Producer):
    """ProducerClient on librdkafka; a record with timestamp 0 gets the present time."""

    def __init__(
        self,
        kafka: KafkaSettings,
        vendor_settings: Mapping[str, Any] | None = None,
        delivery_timeout_s: float = limits.DELIVERY_TIMEOUT_S,
    ) -> None:
        super().__init__(kafka)
        self._connection = Connection(kafka)
        with self._connection.translated("connecting"):
            self._producer = ProducerHandle(
                {
                    **connection_settings(kafka, "cascade-producer", self._connection.on_error),
                    "acks": "all",
                    "enable.idempotence": True,
                    "linger.ms": LINGER_MS,
                    "message.max.bytes": limits.REQUEST_BYTES_MAX,
                    "delivery.timeout.ms": int(delivery_timeout_s * 1_000),
                    # the partitioner of the Java client and of kafka-python
                    "partitioner": "murmur2_random",
                    "queue.buffering.max.messages": 2 * limits.UNDELIVERED_MAX,
                    **(vendor_settings or {}),
                }
            )
        self._deliveries = self._producer.deliveries
        try:
            self._connection.wait(self._producer)
        except BaseException:
            self._abandon()
            raise

    def _send(
        self,
        topic: str,
        keys: Sequence[bytes | None],
        values: Sequence[bytes | None],
        times_ms: Sequence[int] | None,
        headers: Headers = (),
    ) -> Delivery:
        keys, values = _column(keys), _column(values)
        rows, queued = len(values.ends), 0
        if len(keys.ends) != rows:
            raise ValueError(f"{len(keys.ends)} keys for {rows} values")
        if self._producer is None or self._failure is not None:
            self._check_usable()
        cell = self._deliveries.open()
        while True:
            count = min(rows - queued, limits.UNDELIVERED_MAX)
            try:
                sent = self._producer.produce(
                    topic, keys, values, times_ms, headers, cell.address, queued, count, limits.UNDELIVERED_MAX
                )
            except KafkaException:
                with self._sending(topic):
                    raise
            queued += sent
            if queued == rows:
                return _Sent(self, cell)
            if not sent:
                # waits; raises after a failure, and if there is no room in time
                self._make_room(count)

    def undelivered(self) -> int:
        """See ProducerClient."""
        return 0 if self._producer is None else len(self._producer)

    def close(self, timeout_s: float) -> None:
        """See ProducerClient; does nothing if it is closed."""
        if self._producer is not None or self._failure is not None:
            super().close(timeout_s)

    def refuse_after_failure(self) -> None:
        """Raises the failure that ended this producer, if there is one."""
        if self._failure is None:
            failure = self._deliveries.failure()
            if failure is None:
                return
            self._failure = self._ended(self._undelivered(failure))
        raise self._failure

    def _undelivered(self, failure: Failure) -> BrokerError:
        """The error of a record that was not delivered; a fatal error is its cause, if there is one."""
        fatal = self._producer.fatal_error()
        if fatal is not None:
            return self._connection.error("waiting for deliveries", fatal.args[0])
        action = f"a record was not delivered to {self._producer.topic_name(failure.topic)}"
        return self._connection.error(action, KafkaError(failure.code))

    def _check_usable(self) -> None:
        super()._check_usable()
        if self._producer is None:
            raise BrokerError(f"Kafka at {self._servers}: the producer is closed")

    def _deliver(self, timeout_s: float) -> None:
        give_up_s = time.monotonic() + timeout_s
        # a signal does not end a wait in C, so it is no longer than this
        while left := self._producer.flush(min(FLUSH_S_MAX, max(give_up_s - time.monotonic(), 0.0))):
            if time.monotonic() < give_up_s:
                continue
            raise KafkaException(
                KafkaError(KafkaError._TIMED_OUT, f"{left} records were not acknowledged within {timeout_s:g} s")
            )

    @contextlib.contextmanager
    def _waiting_for_deliveries(self) -> Iterator[None]:
        """Latches every error but a timeout."""
        try:
            with self._translated("waiting for deliveries"):
                yield
        except BrokerError as error:
            cause = vendor_error(error)
            # records that take longer may still be delivered
            if cause is None or cause.code() != KafkaError._TIMED_OUT:
                self._failure = self._failure or self._ended(error)
                raise self._failure from error
            raise

    def _abandon(self) -> None:
        """Drops queued records, and ends librdkafka's threads with the last reference to the client.

        A thread that was left behind in a call has another reference.
        """
        if self._producer is None:
            return
        self._deliveries.drop(True)
        with contextlib.suppress(KafkaException):
            self._producer.purge()
            self._producer.flush(limits.ABANDON_TIMEOUT_S)
        self._producer = None

    def _translated(self, action: str) -> contextlib.AbstractContextManager[None]:
        return self._connection.translated(action)

    def _wait_for_delivery(self, timeout_s: float) -> None:
        time.sleep(min(timeout_s, _ROOM_PAUSE_S))


def _column(texts: Sequence[bytes | None]) -> ByteColumn:
    """The column of these texts, in an array that can be written: for others numba would compile the kernel anew."""
    if isinstance(texts, ByteColumn):
        return texts
    made = ByteColumn.of(texts)
    return ByteColumn(made.octets.copy(), made.ends, made.absent)
