"""The client libraries behind the names of `kafka.client`; each loads where it is used."""

from __future__ import annotations

from functools import cache
from typing import Protocol

from cascade.config import KafkaSettings
from cascade.plugins import CLIENTS
from streaming.kafka.protocol import ConsumerClient, ProducerClient, TransactionalProducerClient


class KafkaClient(Protocol):
    """A client library. The entry point is a class with these attributes, which is called without arguments.

    `exactly_once`: whether it has transactional producers. `distribution`: the installed package, whose version
    `cascade doctor` shows. `limits`: what the library cannot do, with a remedy, for `cascade doctor`; empty if nothing.
    """

    exactly_once: bool
    distribution: str
    limits: str

    def consumer(self, kafka: KafkaSettings, group: str | None) -> ConsumerClient:
        """See `make_consumer`."""
        ...

    def producer(self, kafka: KafkaSettings, delivery_timeout_s: float) -> ProducerClient:
        """See `make_producer`."""
        ...

    def transactional_producer(self, kafka: KafkaSettings, transactional_id: str) -> TransactionalProducerClient:
        """See `make_producer`; not called without `exactly_once`."""
        ...

    def warm_up(self) -> None:
        """Compiles ahead of the first record what the client would compile then; no broker is needed."""
        ...


@cache
def client_named(name: str) -> KafkaClient:
    """The client library of this name. Raises SettingError if it is not registered or cannot be imported."""
    client: KafkaClient = CLIENTS.load(name)()
    return client


class LibrdkafkaClient:
    """librdkafka, by its C API and confluent-kafka."""

    exactly_once = True
    distribution = "confluent-kafka"
    limits = ""

    def consumer(self, kafka: KafkaSettings, group: str | None) -> ConsumerClient:
        """See KafkaClient."""
        from streaming.kafka.rdkafka_consumer import RdkafkaConsumer

        return RdkafkaConsumer(kafka, group)

    def producer(self, kafka: KafkaSettings, delivery_timeout_s: float) -> ProducerClient:
        """See KafkaClient."""
        from streaming.kafka.rdkafka_producer import RdkafkaProducer

        return RdkafkaProducer(kafka, delivery_timeout_s=delivery_timeout_s)

    def transactional_producer(self, kafka: KafkaSettings, transactional_id: str) -> TransactionalProducerClient:
        """See KafkaClient."""
        from streaming.kafka.rdkafka_transactions import RdkafkaTransactionalProducer

        return RdkafkaTransactionalProducer(kafka, transactional_id)

    def warm_up(self) -> None:
        """See KafkaClient."""
        from streaming.kafka.rdkafka_compilation import compile_client_kernels

        compile_client_kernels()


class KafkaPythonClient:
    """kafka-python, by its public methods alone."""

    exactly_once = False
    distribution = "kafka-python"
    limits = (
        "anyone who may write to the transactions topic stops a partition with a header name that is not UTF-8; each"
        " rebalance revokes all partitions, and nothing is decided until it ends; a worker that closes during one"
        " delays it by up to 10 s; a fenced worker learns it at its next commit; records of a lost session may still be"
        ' delivered for 60 s; no exactly-once; set kafka.client to "librdkafka", which has none of these limits'
    )

    def consumer(self, kafka: KafkaSettings, group: str | None) -> ConsumerClient:
        """See KafkaClient."""
        from streaming.kafka.kafka_consumer import KafkaPythonConsumer

        return KafkaPythonConsumer(kafka, group)

    def producer(self, kafka: KafkaSettings, delivery_timeout_s: float) -> ProducerClient:
        """See KafkaClient."""
        from streaming.kafka.kafka_producer import KafkaPythonProducer

        return KafkaPythonProducer(kafka, delivery_timeout_s=delivery_timeout_s)

    def transactional_producer(self, kafka: KafkaSettings, transactional_id: str) -> TransactionalProducerClient:
        """Raises NotImplementedError: kafka-python has no transactional producer that Cascade can use."""
        raise NotImplementedError("kafka-python has no exactly-once delivery")

    def warm_up(self) -> None:
        """Does nothing: there is nothing to compile."""
