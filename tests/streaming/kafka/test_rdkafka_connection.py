from __future__ import annotations

import time

import pytest
from confluent_kafka import KafkaError, KafkaException

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka.rdkafka_settings import Connection


class RefusedClient:
    """A fake that injects the order in which librdkafka reports an access error on a busy machine."""

    def __init__(self, connection: Connection, polls: list[list[int]]) -> None:
        self._connection, self._polls = connection, polls

    def ask_metadata(self, timeout_s: float) -> None:
        raise KafkaException(KafkaError(KafkaError._TRANSPORT, f"no broker within {timeout_s:g} s"))

    def poll(self) -> None:
        for code in self._polls.pop(0) if self._polls else []:
            self._connection.on_error(KafkaError(code))


@pytest.mark.parametrize(
    "polls",
    [
        [[KafkaError._AUTHENTICATION, KafkaError._ALL_BROKERS_DOWN]],
        [[KafkaError._SSL], [KafkaError._ALL_BROKERS_DOWN]],
        [[KafkaError._TRANSPORT], [], [KafkaError._ALL_BROKERS_DOWN, KafkaError._AUTHENTICATION]],
    ],
)
def test_an_access_error_is_raised_at_once_whatever_follows_it(polls: list[list[int]]) -> None:
    connection = Connection(KafkaSettings(bootstrap="localhost:9"))
    started_s = time.monotonic()
    with pytest.raises(BrokerError, match=r"kafka\.security"):
        connection.wait(RefusedClient(connection, polls))
    assert time.monotonic() - started_s < 20.0
