"""Kafka behind protocol classes; the client library is chosen by `kafka.client`."""

from __future__ import annotations

from typing import overload

from cascade.config import KafkaSettings
from cascade.errors import SettingError
from cascade.plugins import CLIENTS
from streaming.kafka.clients import KafkaClient, client_named
from streaming.kafka.limits import DELIVERY_TIMEOUT_S
from streaming.kafka.protocol import (
    ConsumerClient,
    Delivery,
    FetchedBatch,
    GroupMember,
    Headers,
    Partition,
    PartitionsCallback,
    ProducerClient,
    TopicSpec,
    TransactionalProducerClient,
)
from streaming.kafka.topics import describe_topics, ensure_topics, missing_topics, wait_for_broker

__all__ = [
    "ConsumerClient",
    "Delivery",
    "FetchedBatch",
    "GroupMember",
    "Headers",
    "KafkaClient",
    "Partition",
    "PartitionsCallback",
    "ProducerClient",
    "TopicSpec",
    "TransactionalProducerClient",
    "client_named",
    "describe_topics",
    "ensure_topics",
    "make_consumer",
    "make_producer",
    "missing_topics",
    "wait_for_broker",
]


def make_consumer(kafka: KafkaSettings, group: str | None) -> ConsumerClient:
    """Makes a consumer of `group`, or outside any group; raises BrokerError if no broker answers."""
    return client_named(kafka.client).consumer(kafka, group)


@overload
def make_producer(kafka: KafkaSettings, *, delivery_timeout_s: float = ...) -> ProducerClient: ...
@overload
def make_producer(kafka: KafkaSettings, transactional_id: str) -> TransactionalProducerClient: ...
@overload
def make_producer(
    kafka: KafkaSettings, transactional_id: str | None
) -> ProducerClient | TransactionalProducerClient: ...
def make_producer(
    kafka: KafkaSettings, transactional_id: str | None = None, *, delivery_timeout_s: float = DELIVERY_TIMEOUT_S
) -> ProducerClient | TransactionalProducerClient:
    """Makes a producer, a transactional one if it has an id; raises BrokerError if no broker answers.

    An earlier producer with the same transactional id is then fenced, and its transaction completed or aborted. A
    record of a producer without an id that is not acknowledged within `delivery_timeout_s` fails. Raises SettingError
    for a transactional producer of a client that has none.
    """
    client = client_named(kafka.client)
    if transactional_id is None:
        return client.producer(kafka, delivery_timeout_s)
    if not client.exactly_once:
        remedy = 'set it to "librdkafka"'
        raise SettingError("configuration", CLIENTS.key, kafka.client, "has no exactly-once delivery", remedy)
    return client.transactional_producer(kafka, transactional_id)
