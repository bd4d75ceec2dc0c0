"""What the tests of the clients share: filling a topic, gathering from it, and settling a group."""

from __future__ import annotations

import time
from collections.abc import Callable

from cascade.config import KafkaSettings
from streaming.clients import ConsumerClient, FetchedBatch, Partition, make_producer


def fill(kafka: KafkaSettings, topic: str, count: int) -> None:
    producer = make_producer(kafka)
    producer.send_many(topic, [b"%d" % row for row in range(count)], [b"value %d" % row for row in range(count)])
    producer.flush(20)
    producer.close(5)


def gather(consumer: ConsumerClient, count: int, timeout_s: float = 20.0) -> list[FetchedBatch]:
    batches: list[FetchedBatch] = []
    deadline_s = time.monotonic() + timeout_s
    while sum(map(len, batches)) < count and time.monotonic() < deadline_s:
        batches += consumer.poll(0.1, 1_000)
    return batches


def values(batches: list[FetchedBatch]) -> list[bytes | None]:
    return sorted((value for batch in batches for value in batch.values), key=lambda value: value or b"")


def poll_until(consumers: list[ConsumerClient], condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the group did not settle"
        for consumer in consumers:
            consumer.poll(0.05, 100)


class Events:
    def __init__(self) -> None:
        self.seen: list[tuple[str, list[Partition]]] = []

    def note(self, kind: str) -> Callable[[list[Partition]], None]:
        return lambda partitions: self.seen.append((kind, partitions))


def ignore(partitions: list[Partition]) -> None:
    del partitions
