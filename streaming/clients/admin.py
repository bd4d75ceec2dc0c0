"""A connection for questions about the cluster; kafka-python's with either client, since it is there anyway."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from kafka import KafkaAdminClient

from cascade.config import KafkaSettings
from streaming.clients.kafka_errors import REQUEST_TIMEOUT_MS, translated
from streaming.clients.settings import connection_settings

# A server that says nothing costs an attempt of two seconds five of them before the next is asked.
ATTEMPT_TIMEOUT_S = 20.0


@contextlib.contextmanager
def admin_client(kafka: KafkaSettings, action: str, timeout_s: float = ATTEMPT_TIMEOUT_S) -> Iterator[Any]:
    """The vendor's client, closed at the end; its errors come out as a BrokerError that names the action."""
    with (
        translated(action, kafka.bootstrap),
        contextlib.closing(
            KafkaAdminClient(
                **connection_settings(kafka, "cascade-admin"),
                bootstrap_timeout_ms=int(timeout_s * 1_000),
                request_timeout_ms=REQUEST_TIMEOUT_MS,
            )
        ) as admin,
    ):
        yield admin
