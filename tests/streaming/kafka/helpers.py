"""What the tests of the clients share: filling a topic, gathering from it, and settling a group."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import numpy as np
import pytest

from cascade.config import KafkaSettings
from streaming.kafka import (
    ConsumerClient,
    Delivery,
    FetchedBatch,
    Partition,
    PartitionsCallback,
    ProducerClient,
    make_consumer,
    make_producer,
)

# what only one library does; each test for librdkafka alone stands beside one of what kafka-python does instead
kafka_python_only = pytest.mark.parametrize("kafka", ["kafka-python"], indirect=True)
librdkafka_only = pytest.mark.parametrize("kafka", ["librdkafka"], indirect=True)


@contextmanager
def joined(kafka: KafkaSettings, topic: str, *callbacks: PartitionsCallback) -> Iterator[ConsumerClient]:
    """A member of the group; `callbacks`: of its partitions, as in `subscribe`."""
    with closing(make_consumer(kafka, kafka.group)) as consumer:
        consumer.subscribe([topic], *(callbacks or (ignore, ignore)))
        yield consumer


def fill(kafka: KafkaSettings, topic: str, count: int) -> None:
    producer = make_producer(kafka)
    producer.send_many(topic, [b"%d" % row for row in range(count)], [b"value %d" % row for row in range(count)])
    producer.close(20)


def most_waiting(producer: ProducerClient, topic: str, count: int) -> int:
    """Send records one by one; the most that were unacknowledged at any time.

    They have one key, so they stay in order. `undelivered` would not do: it is an upper bound.
    """
    most, waiting = 0, deque[Delivery]()
    for _ in range(count):
        waiting.append(producer.send(topic, b"k", b"v"))
        while waiting and waiting[0].done():
            waiting.popleft()
        most = max(most, len(waiting))
    return most


def gather(consumer: ConsumerClient, count: int, timeout_s: float = 20.0) -> list[FetchedBatch]:
    batches: list[FetchedBatch] = []
    deadline_s = time.monotonic() + timeout_s
    while sum(map(len, batches)) < count and time.monotonic() < deadline_s:
        batches += consumer.poll(0.1, 1_000)
    return batches


def gather_joined(consumer: ConsumerClient, count: int) -> FetchedBatch:
    """`count` records of one partition as one batch: in how many they were sent and fetched is a matter of time."""
    batches = gather(consumer, count)
    assert len({(batch.topic, batch.partition) for batch in batches}) == 1
    return FetchedBatch(
        batches[0].topic,
        batches[0].partition,
        np.concatenate([batch.offsets for batch in batches]),
        np.concatenate([batch.timestamps_ms for batch in batches]),
        [key for batch in batches for key in batch.keys],
        [value for batch in batches for value in batch.values],
        [headers for batch in batches for headers in batch.headers],
    )


def values(batches: list[FetchedBatch]) -> list[bytes | None]:
    return sorted((value for batch in batches for value in batch.values), key=lambda value: value or b"")


def poll_until(consumers: list[ConsumerClient], condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Polls each consumer in a thread of its own, as workers do: a poll may wait for another member's."""
    deadline_s, settled = time.monotonic() + timeout_s, threading.Event()

    def poll(consumer: ConsumerClient) -> None:
        while not settled.is_set() and time.monotonic() < deadline_s:
            consumer.poll(0.05, 100)

    with ThreadPoolExecutor(len(consumers)) as threads:
        polls = [threads.submit(poll, consumer) for consumer in consumers]
        try:
            while not condition():
                for failed in (future for future in polls if future.done()):
                    failed.result()
                assert time.monotonic() < deadline_s, "the group did not settle"
                time.sleep(0.005)
        finally:
            settled.set()


class Events:
    def __init__(self) -> None:
        self.seen: list[tuple[str, list[Partition]]] = []

    def note(self, kind: str) -> Callable[[list[Partition]], None]:
        return lambda partitions: self.seen.append((kind, partitions))


def ignore(partitions: list[Partition]) -> None:
    del partitions


def visible(kafka: KafkaSettings, topic: str) -> list[bytes | None]:
    """All values that a reader of what is committed sees."""
    with closing(make_consumer(kafka, None)) as reader:
        partitions = reader.partitions_for(topic)
        reader.assign(partitions)
        found = []
        deadline_s = time.monotonic() + 20
        while any(reader.position(partition) < end for partition, end in reader.end_offsets(partitions).items()):
            assert time.monotonic() < deadline_s, "readers are delayed"
            found += reader.poll(0.1, 1_000)
        return values(found)
