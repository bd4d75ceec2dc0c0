"""What the producers of both client libraries share: the wait for room, and the failure that ends them."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import limits
from streaming.kafka.protocol import Delivery, Headers


class Producer(ABC):
    """The common part of a ProducerClient."""

    _producer: Any

    def __init__(self, kafka: KafkaSettings) -> None:
        self._servers = kafka.bootstrap
        self._failure: BrokerError | None = None

    def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        timestamp_ms: int | None = None,
    ) -> Delivery:
        """See ProducerClient; a header value None is sent as empty bytes, since kafka-python requires bytes."""
        pairs = [(name, octets if octets is not None else b"") for name, octets in headers]
        return self._send(topic, [key], [value], None if timestamp_ms is None else [timestamp_ms], pairs)

    def send_many(
        self,
        topic: str,
        keys: Sequence[bytes | None],
        values: Sequence[bytes | None],
        timestamps_ms: Sequence[int] | None = None,
    ) -> Delivery:
        """See ProducerClient."""
        return self._send(topic, keys, values, timestamps_ms)

    def flush(self, timeout_s: float) -> None:
        """See ProducerClient."""
        self._check_usable()
        with self._waiting_for_deliveries():
            self._deliver(timeout_s)
        self.refuse_after_failure()

    def close(self, timeout_s: float) -> None:
        """See ProducerClient; releases all resources even if the flush fails."""
        try:
            self.flush(timeout_s)
        finally:
            self._abandon()

    def refuse_after_failure(self) -> None:
        """Raises the failure that ended this producer, if there is one."""
        if self._failure is not None:
            raise self._failure

    @abstractmethod
    def undelivered(self) -> int:
        """See ProducerClient."""

    @abstractmethod
    def _send(
        self,
        topic: str,
        keys: Sequence[bytes | None],
        values: Sequence[bytes | None],
        times_ms: Sequence[int] | None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> Delivery:
        """Queues records, each with these headers; `times_ms`: None or 0 for the present time."""

    @abstractmethod
    def _deliver(self, timeout_s: float) -> None:
        """Waits until the broker has acknowledged all records, and processes the delivery reports."""

    @abstractmethod
    def _wait_for_delivery(self, timeout_s: float) -> None:
        """Waits until a delivery may have been reported."""

    @abstractmethod
    def _translated(self, action: str) -> contextlib.AbstractContextManager[None]:
        """Raises the library's errors as BrokerError."""

    @abstractmethod
    def _abandon(self) -> None:
        """Drops queued records and ends the library's threads."""

    def _waiting_for_deliveries(self) -> contextlib.AbstractContextManager[None]:
        return self._translated("waiting for deliveries")

    def _sending(self, topic: str) -> contextlib.AbstractContextManager[None]:
        return self._translated(f"sending to {topic}")

    def _ended(self, error: BrokerError) -> BrokerError:
        """The error that every later call raises, for the first one."""
        return error

    def _check_usable(self) -> None:
        self.refuse_after_failure()

    def _make_room(self, records: int) -> None:
        self._check_usable()
        give_up_s = time.monotonic() + limits.REQUEST_TIMEOUT_MS / 1_000
        while True:
            waiting = self.undelivered()
            self.refuse_after_failure()
            # a call with more records than the limit passes when no other record is in flight
            if not waiting or waiting + records <= limits.UNDELIVERED_MAX:
                return
            left_s = give_up_s - time.monotonic()
            if left_s <= 0:
                raise BrokerError(
                    f"Kafka at {self._servers}: {waiting} records wait to be delivered, at most "
                    f"{limits.UNDELIVERED_MAX}; the broker is slow or gone"
                )
            self._wait_for_delivery(left_s)
