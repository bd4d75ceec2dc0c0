"""The producer on librdkafka (confluent-kafka).

Each record has a delivery callback, which runs while this thread polls. Callbacks take half of the CPU time of
producing in Python; they show when all records of a call are acknowledged, whatever is sent after them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.clients.kafka_errors import REQUEST_TIMEOUT_MS
from streaming.clients.protocol import DELIVERY_TIMEOUT_S, Delivery, Headers
from streaming.clients.rdkafka_settings import Connection, connection_settings, vendor_error

# As for kafka-python, for the same reasons.
LINGER_MS = 1
MESSAGE_BYTES_MAX = 2 * 1024 * 1024
UNDELIVERED_MAX = 50_000
# librdkafka reports purged records within milliseconds.
ABANDON_TIMEOUT_S = 1.0
_ROOM_PAUSE_S = 0.005
# Positional arguments of the binding take a third less time.
_ANY_PARTITION, _NOW_MS = -1, 0


class _Sent:
    """The Delivery of some records; counts librdkafka's delivery reports."""

    __slots__ = ("_left", "_producer")

    def __init__(self, producer: RdkafkaProducer, records: int) -> None:
        self._producer, self._left = producer, records

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
        return not self._left


class RdkafkaProducer:
    """ProducerClient on librdkafka; a record with timestamp 0 gets the present time."""

    def __init__(
        self,
        kafka: KafkaSettings,
        undelivered_max: int = UNDELIVERED_MAX,
        bootstrap_timeout_s: float = 30.0,
        vendor_settings: Mapping[str, Any] | None = None,
        delivery_timeout_s: float = DELIVERY_TIMEOUT_S,
    ) -> None:
        self._connection = Connection(kafka)
        self._servers = kafka.bootstrap
        self._undelivered_max = undelivered_max
        self._failure: BrokerError | None = None
        self.refused: tuple[KafkaError, Message] | None = None
        self.aborting = False
        with self._connection.translated("connecting"):
            self._producer: Any = Producer(
                {
                    **connection_settings(kafka, "cascade-producer", self._connection.on_error),
                    "acks": "all",
                    "enable.idempotence": True,
                    "linger.ms": LINGER_MS,
                    "message.max.bytes": MESSAGE_BYTES_MAX,
                    "delivery.timeout.ms": int(delivery_timeout_s * 1_000),
                    # the partitioner of the Java client and of kafka-python
                    "partitioner": "murmur2_random",
                    "queue.buffering.max.messages": 2 * UNDELIVERED_MAX,
                    **(vendor_settings or {}),
                }
            )
        try:
            self._connection.wait(self._producer, bootstrap_timeout_s)
        except BaseException:
            self._abandon()
            raise

    def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        timestamp_ms: int | None = None,
    ) -> Delivery:
        """See ProducerClient; a header value None is sent as empty bytes, as by the other client."""
        self._make_room(1)
        pairs = [(name, octets if octets is not None else b"") for name, octets in headers]
        sent = _Sent(self, 1)
        with self._sending(topic):
            self._producer.produce(
                topic, value, key, _ANY_PARTITION, sent.reported, None, timestamp_ms or _NOW_MS, pairs or None
            )
        return sent

    def send_many(
        self,
        topic: str,
        keys: Sequence[bytes | None],
        values: Sequence[bytes | None],
        timestamps_ms: Sequence[int] | None = None,
    ) -> Delivery:
        """See ProducerClient."""
        self._make_room(len(values))
        sent = _Sent(self, len(values))
        reported = sent.reported
        times = [_NOW_MS] * len(values) if timestamps_ms is None else timestamps_ms
        with self._sending(topic):
            # The binding's call for several records takes no timestamps, and half as long again. `produce` is not bound
            # to a name: an error's traceback would keep the name, and so librdkafka, alive.
            for key, value, time_ms in zip(keys, values, times, strict=True):
                self._producer.produce(topic, value, key, _ANY_PARTITION, reported, None, time_ms)
        return sent

    def undelivered(self) -> int:
        """See ProducerClient."""
        if self._producer is None:
            return 0
        self.reap()
        return len(self._producer)

    def flush(self, timeout_s: float) -> None:
        """See ProducerClient."""
        self._check_usable()
        with self._fatal_errors_latched():
            self._flush(timeout_s)
        self.refuse_after_failure()

    def close(self, timeout_s: float) -> None:
        """See ProducerClient; releases all resources even if the flush fails."""
        try:
            if self._producer is not None or self._failure is not None:
                self.flush(timeout_s)
        finally:
            self._abandon()

    def reap(self) -> None:
        """Processes the delivery reports."""
        if self._producer is not None:
            with self._fatal_errors_latched():
                self._producer.poll(0)

    def refuse_after_failure(self) -> None:
        """Raises the failure that ended this producer, if there is one."""
        if self._failure is None and self.refused is not None:
            error, message = self.refused
            action = f"a record was not delivered to {message.topic()}"
            self._failure = self._ended(self._connection.error(action, error))
        if self._failure is not None:
            raise self._failure

    def _check_usable(self) -> None:
        self.refuse_after_failure()
        if self._producer is None:
            raise BrokerError(f"Kafka at {self._servers}: the producer is closed")

    def _flush(self, timeout_s: float) -> None:
        left = self._producer.flush(timeout_s)
        # the count includes librdkafka's own events that were not polled yet
        if left and (left := len(self._producer)):
            raise KafkaException(
                KafkaError(KafkaError._TIMED_OUT, f"{left} records were not acknowledged within {timeout_s:g} s")
            )

    @contextlib.contextmanager
    def _fatal_errors_latched(self) -> Iterator[None]:
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

    def _ended(self, error: BrokerError) -> BrokerError:
        """The error that every later call raises."""
        return error

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
            self._producer.flush(ABANDON_TIMEOUT_S)
        self._producer = None

    def _translated(self, action: str) -> contextlib.AbstractContextManager[None]:
        return self._connection.translated(action, self._fatal)

    def _fatal(self) -> KafkaException | None:
        """librdkafka's fatal error; outside transactions the binding has no call that returns it."""
        return None

    def _sending(self, topic: str) -> contextlib.AbstractContextManager[None]:
        return self._translated(f"sending to {topic}")

    def _make_room(self, records: int) -> None:
        self._check_usable()
        self.reap()
        self.refuse_after_failure()
        give_up_s = time.monotonic() + REQUEST_TIMEOUT_MS / 1_000
        # a call with more records than the bound goes through once nothing else waits
        while (waiting := len(self._producer)) and waiting + records > self._undelivered_max:
            with self._fatal_errors_latched():
                self._producer.poll(_ROOM_PAUSE_S)
            self.refuse_after_failure()
            if time.monotonic() > give_up_s:
                raise BrokerError(
                    f"Kafka at {self._servers}: {waiting} records wait to be delivered, at most "
                    f"{self._undelivered_max}; the broker is slow or gone"
                )
