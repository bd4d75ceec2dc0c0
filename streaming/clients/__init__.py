"""Kafka behind protocol classes; the client library is chosen by `kafka.client`."""

from __future__ import annotations

from cascade.config import KafkaSettings
from streaming.clients.protocol import (
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
from streaming.clients.topics import ensure_topics, missing_topics, wait_for_broker

__all__ = [
    "ConsumerClient",
    "Delivery",
    "FetchedBatch",
    "GroupMember",
    "Headers",
    "Partition",
    "PartitionsCallback",
    "ProducerClient",
    "TopicSpec",
    "TransactionalProducerClient",
    "ensure_topics",
    "make_consumer",
    "make_producer",
    "missing_topics",
    "wait_for_broker",
]


def make_consumer(kafka: KafkaSettings, group: str | None) -> ConsumerClient:
    """A consumer of `group` (usually `kafka.group`), or outside any; raises BrokerError where no broker answers."""
    from streaming.clients.kafka_python import KafkaPythonConsumer

    return KafkaPythonConsumer(kafka, group)


def make_producer(kafka: KafkaSettings) -> ProducerClient:
    """A producer; raises BrokerError where no broker answers."""
    from streaming.clients.kafka_python import KafkaPythonProducer

    return KafkaPythonProducer(kafka)
