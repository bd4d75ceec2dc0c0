"""An admin connection: kafka-python's for either client, since it is always installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from kafka import KafkaAdminClient

from cascade.config import KafkaSettings
from streaming.kafka import limits
from streaming.kafka.kafka_errors import translated
from streaming.kafka.settings import connection_settings

# Enough for several addresses: one that does not answer takes 5 s (ADDRESS_TIMEOUT_MS) before the next is tried.
ATTEMPT_TIMEOUT_S = 20.0


@contextlib.contextmanager
def admin_client(kafka: KafkaSettings, action: str, timeout_s: float = ATTEMPT_TIMEOUT_S) -> Iterator[Any]:
    """kafka-python's admin client, closed at the end; raises its errors as BrokerError with the action."""
    with (
        translated(action, kafka.bootstrap),
        contextlib.closing(
            KafkaAdminClient(
                **connection_settings(kafka, "cascade-admin"),
                bootstrap_timeout_ms=int(timeout_s * 1_000),
                request_timeout_ms=limits.REQUEST_TIMEOUT_MS,
            )
        ) as admin,
    ):
        yield admin
