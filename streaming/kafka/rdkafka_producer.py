"""The producer on librdkafka (confluent-kafka).

Each record has a delivery callback, which runs while this thread polls. Callbacks take half of the CPU time of
producing in Python; they show when all records of a call are acknowledged, whatever is sent after them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message
from confluent_kafka import Producer as VendorProducer

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import limits
from streaming.kafka.producer import Producer, Record
from streaming.kafka.protocol import Delivery
from streaming.kafka.rdkafka_settings import Connection, connection_settings, vendor_error

_ROOM_PAUSE_S = 0.005
# Positional arguments of the binding take a third less time.
_ANY_PARTITION, _NOW_MS = -1, 0


class _Sent:
    """The Delivery of some records; counts librdkafka's delivery reports."""

    __slots__ = ("_left", "_producer", "done_s")

    def __init__(self, producer: RdkafkaProducer, records: int) -> None:
        self._producer, self._left = producer, records
        self.done_s = 0.0

    def reported(self, error: KafkaError | None, message: Message) -> None:
        """The delivery report of a record.

        This method must not call a function: after a fatal error the binding runs it with an exception set, and every
        call fails (see Connection.translated).
        """
        if error is None:
            self._left -= 1
            return
        # the records of an aborted transaction are dropped on purpose
        producer = self._producer
        if producer.refused is None and not producer.aborting:
            producer.refused = error, message

    def done(self) -> bool:
        self._producer.reap()
        # any failure is this delivery's too: no offset may be committed after it
        self._producer.refuse_after_failure()
        if not self._left and not self.done_s:
            self.done_s = time.time()
        return not self._left


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
        self.refused: tuple[KafkaError, Message] | None = None
        self.aborting = False
        with self._connection.translated("connecting"):
            self._producer = VendorProducer(
                {
                    **connection_settings(kafka, "cascade-producer", self._connection.on_error),
                    "acks": "all",
                    "enable.idempotence": True,
                    "linger.ms": limits.LINGER_MS,
                    "message.max.bytes": limits.REQUEST_BYTES_MAX,
                    "delivery.timeout.ms": int(delivery_timeout_s * 1_000),
                    # the partitioner of the Java client and of kafka-python
                    "partitioner": "murmur2_random",
                    "queue.buffering.max.messages": 2 * limits.UNDELIVERED_MAX,
                    **(vendor_settings or {}),
                }
            )
        try:
            self._connection.wait(self._producer)
        except BaseException:
            self._abandon()
            raise

    def _send(
        self, topic: str, count: int, records: Iterable[Record], headers: list[tuple[str, bytes]] | None = None
    ) -> Delivery:
        self._make_room(count)
        sent = _Sent(self, count)
        reported, headers = sent.reported, headers or None
        with self._sending(topic):
            # The binding's call for several records takes no timestamps, and half as long again. `produce` is not bound
            # to a name: an error's traceback would keep the name, and so librdkafka, alive.
            for key, value, time_ms in records:
                self._producer.produce(topic, value, key, _ANY_PARTITION, reported, None, time_ms or _NOW_MS, headers)
        return sent

    def undelivered(self) -> int:
        """See ProducerClient."""
        if self._producer is None:
            return 0
        self.reap()
        return len(self._producer)

    def close(self, timeout_s: float) -> None:
        """See ProducerClient; does nothing if it is closed."""
        if self._producer is not None or self._failure is not None:
            super().close(timeout_s)

    def reap(self) -> None:
        """Processes the delivery reports."""
        if self._producer is not None:
            with self._waiting_for_deliveries():
                self._producer.poll(0)

    def refuse_after_failure(self) -> None:
        """Raises the failure that ended this producer, if there is one."""
        if self._failure is None and self.refused is not None:
            error, message = self.refused
            action = f"a record was not delivered to {message.topic()}"
            self._failure = self._ended(self._connection.error(action, error))
        super().refuse_after_failure()

    def _check_usable(self) -> None:
        super()._check_usable()
        if self._producer is None:
            raise BrokerError(f"Kafka at {self._servers}: the producer is closed")

    def _deliver(self, timeout_s: float) -> None:
        left = self._producer.flush(timeout_s)
        # the count includes librdkafka's own events that were not polled yet
        if left and (left := len(self._producer)):
            raise KafkaException(
                KafkaError(KafkaError._TIMED_OUT, f"{left} records were not acknowledged within {timeout_s:g} s")
            )

    @contextlib.contextmanager
    def _waiting_for_deliveries(self) -> Iterator[None]:
        """Latches every error but a timeout: whichever call polls librdkafka next raises a fatal error."""
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
        """Drops queued records and ends librdkafka's threads.

        The binding's `close` would wait for an open transaction without a limit. Without `close`, librdkafka ends with
        the last reference; pending delivery reports have one, so they are purged first.
        """
        if self._producer is None:
            return
        self.aborting = True
        with contextlib.suppress(KafkaException, RuntimeError, SystemError):
            self._producer.purge()
            self._producer.flush(limits.ABANDON_TIMEOUT_S)
        self._producer = None

    def _translated(self, action: str) -> contextlib.AbstractContextManager[None]:
        return self._connection.translated(action, self._fatal)

    def _fatal(self) -> KafkaException | None:
        """librdkafka's fatal error; outside transactions the binding has no call that returns it."""
        return None

    def _wait_for_delivery(self, timeout_s: float) -> None:
        with self._waiting_for_deliveries():
            self._producer.poll(min(timeout_s, _ROOM_PAUSE_S))
