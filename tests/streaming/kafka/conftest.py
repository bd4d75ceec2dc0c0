"""A group, a topic of two partitions and a consumer outside any group, new for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing

import pytest

from cascade.config import KafkaSettings
from streaming.kafka import ConsumerClient, TopicSpec, ensure_topics, make_consumer
from tests.conftest import Broker


@pytest.fixture(params=["librdkafka", "kafka-python"])
def kafka(broker: Broker, request: pytest.FixtureRequest) -> KafkaSettings:
    return KafkaSettings(bootstrap=broker.bootstrap, client=request.param, group=f"g-{uuid.uuid4().hex}")


@pytest.fixture
def topic(kafka: KafkaSettings) -> str:
    name = f"t-{uuid.uuid4().hex}"
    ensure_topics(kafka, [TopicSpec(name, 2)])
    return name


@pytest.fixture
def outsider(kafka: KafkaSettings) -> Iterator[ConsumerClient]:
    with closing(make_consumer(kafka, None)) as consumer:
        yield consumer


@pytest.fixture
def reader(outsider: ConsumerClient, topic: str) -> ConsumerClient:
    """The consumer outside any group, which reads the topic from its beginning."""
    outsider.assign(outsider.partitions_for(topic))
    return outsider
