"""The client on librdkafka's C API: columns, acknowledgements counted in its threads, and the ends of its objects."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from confluent_kafka import KafkaException

from cascade.columns import ByteColumn
from cascade.config import KafkaSettings
from cascade.errors import BrokerError, SettingError
from streaming.kafka import ConsumerClient, FetchedBatch, ProducerClient, TopicSpec, ensure_topics, make_producer
from streaming.kafka.rdkafka_handle import Handle
from streaming.kafka.rdkafka_library import CONSUMER, check_version
from streaming.kafka.rdkafka_producer import RdkafkaProducer
from tests.conftest import Broker
from tests.streaming.kafka.helpers import fill, gather, gather_joined

pytestmark = pytest.mark.kafka
# What does not wait ends within this time on a busy machine too.
AT_ONCE_S = 5.0


@pytest.fixture
def kafka(broker: Broker) -> KafkaSettings:
    return KafkaSettings(bootstrap=broker.bootstrap, client="librdkafka", group=f"g-{uuid.uuid4().hex}")


@pytest.fixture
def producer(kafka: KafkaSettings) -> Iterator[ProducerClient]:
    with_end = make_producer(kafka)
    yield with_end
    with_end.close(20)


@pytest.fixture
def wide_topic(kafka: KafkaSettings) -> str:
    name = f"t-{uuid.uuid4().hex}"
    ensure_topics(kafka, [TopicSpec(name, 8)])
    return name


def read(consumer: ConsumerClient, rows: int, rows_max: int) -> list[FetchedBatch]:
    """So many records, in polls of at most `rows_max`."""
    batches: list[FetchedBatch] = []
    deadline_s = time.monotonic() + 60
    while sum(map(len, batches)) < rows:
        assert time.monotonic() < deadline_s
        batches += consumer.poll(0.2, rows_max)
    return batches


def test_a_client_ends_after_a_call_of_it_that_does_not_return(kafka: KafkaSettings) -> None:
    client = Handle(CONSUMER, {"bootstrap.servers": kafka.bootstrap, "group.id": kafka.group, "error_cb": print})
    with client.called():
        # another call returns before this one
        with client.called():
            client.destroy()
        client.destroy()
        client.ask_metadata(10.0)
    with pytest.raises(KafkaException, match="the call"), client.called():
        raise KafkaException("the call")
    client.destroy()
    assert not client._end.alive


def test_every_wake_of_another_thread_ends_a_poll(reader: ConsumerClient) -> None:
    reader.poll(0.5, 10)
    chance = np.random.default_rng(1)
    for pause_s in chance.exponential(0.002, 200):
        waker = threading.Timer(pause_s, reader.wake)
        waker.start()
        started_s = time.monotonic()
        # some wakes come before the poll, some while it begins, some while it waits
        time.sleep(float(chance.exponential(0.002)))
        assert reader.poll(60.0, 10) == []
        assert time.monotonic() - started_s < AT_ONCE_S
        waker.join()


def test_a_wake_takes_microseconds_and_none_is_left_over(reader: ConsumerClient) -> None:
    started_s = time.thread_time()
    for _ in range(1_000):
        reader.wake()
    assert (time.thread_time() - started_s) / 1_000 < 100e-6
    assert reader.poll(60.0, 10) == []
    started_s = time.monotonic()
    assert reader.poll(0.3, 10) == []
    assert time.monotonic() - started_s > 0.25


def test_a_closed_consumer_can_be_woken_and_closed_again(outsider: ConsumerClient) -> None:
    outsider.close()
    outsider.wake()
    outsider.close()


@pytest.mark.parametrize("rows_max", [1, 7, 1_000])
def test_keys_values_and_headers_are_those_of_their_record(
    producer: ProducerClient, topic: str, reader: ConsumerClient, rows_max: int
) -> None:
    sent = [
        (b"k", b"v", []),
        (None, b"no key", [("a", b"1"), ("a", b""), ("é", b"\xff")]),
        (b"", b"", []),
        (b"gone", None, [("why", b"tombstone")]),
        (b"\x00" * 300, b"\x00" * 300_000, []),
        (b"k", b"last", [("x" * 300, b"y" * 70_000)]),
    ]
    for key, value, headers in sent:
        producer.send(topic, key, value, headers)
        # one batch of the broker for each, so that those with a random partition have no influence
        producer.flush(20)
    batches = read(reader, len(sent), rows_max)
    found = [row for batch in batches for row in zip(batch.keys, batch.values, map(list, batch.headers), strict=True)]
    assert sorted(found, key=repr) == sorted(sent, key=repr)
    assert all(isinstance(batch.values, ByteColumn) for batch in batches)


def test_parts_of_a_batch_have_their_own_headers(producer: ProducerClient, topic: str, reader: ConsumerClient) -> None:
    for row in range(6):
        producer.send(topic, b"k", b"%d" % row, [("row", b"%d" % row)] * row)
    producer.flush(20)
    batch = gather_joined(reader, 6)
    reader.seek((batch.topic, batch.partition), 0)
    (whole,) = [batch for batch in read(reader, 6, 1_000) if len(batch) == 6] or [batch]
    part = whole.part(2, 5)
    assert list(part.values) == [b"2", b"3", b"4"]
    assert [list(headers) for headers in part.headers] == [[("row", b"%d" % row)] * row for row in (2, 3, 4)]
    assert list(part.headers[-1]) == [("row", b"4")] * 4


def test_a_poll_has_a_batch_for_each_of_many_partitions(
    kafka: KafkaSettings, wide_topic: str, outsider: ConsumerClient
) -> None:
    fill(kafka, wide_topic, 4_000)
    partitions = outsider.partitions_for(wide_topic)
    outsider.assign(partitions)
    time.sleep(1.0)
    batches = read(outsider, 4_000, 5_000)
    seen: dict[int, list[int]] = {}
    for batch in batches:
        seen.setdefault(batch.partition, []).extend(batch.offsets.tolist())
        for key, value in zip(batch.keys, batch.values, strict=True):
            assert value == b"value " + (key or b"")
    ends = outsider.end_offsets(partitions)
    assert seen == {number: list(range(ends[wide_topic, number])) for _, number in partitions}
    assert max(len(batch) for batch in batches) > 1
    assert {partition: outsider.position(partition) for partition in partitions} == ends


def test_columns_are_sent_as_they_are_parts_of_columns_too(
    producer: ProducerClient, topic: str, reader: ConsumerClient
) -> None:
    keys = ByteColumn.of([b"k"] * 5)
    values = ByteColumn.of([b"cut off", b"a", None, b"", b"bc"])
    delivery = producer.send_many(topic, keys[1:], values[1:], [4_000, 0, 2_000, 1_000])
    producer.flush(20)
    assert delivery.done()
    batch = gather_joined(reader, 4)
    assert list(batch.values) == [b"a", None, b"", b"bc"]
    assert batch.timestamps_ms[[0, 2, 3]].tolist() == [4_000, 2_000, 1_000]
    assert abs(batch.timestamps_ms[1] / 1_000 - time.time()) < 60
    with pytest.raises(ValueError, match="3 keys for 4 values"):
        producer.send_many(topic, keys[2:], values[1:])


def test_a_delivery_knows_when_it_was_acknowledged_however_late_it_is_asked(
    producer: ProducerClient, topic: str
) -> None:
    before_s = time.time()
    delivery = producer.send_many(topic, [b"k"] * 100, [b"v"] * 100)
    producer.flush(20)
    after_s = time.time()
    time.sleep(0.3)
    assert delivery.done()
    assert before_s <= delivery.done_s <= after_s


def test_nothing_is_delivered_at_once(producer: ProducerClient, topic: str) -> None:
    before_s = time.time()
    delivery = producer.send_many(topic, [], [])
    assert delivery.done()
    assert before_s - 0.001 <= delivery.done_s <= time.time()


def test_the_counts_of_deliveries_do_not_pile_up(producer: RdkafkaProducer, topic: str) -> None:
    deliveries = [producer.send(topic, b"k", b"v") for _ in range(5_000)]
    producer.flush(30)
    assert all(delivery.done() for delivery in deliveries)
    for _ in range(1_025):
        producer.send(topic, b"k", b"v")
    assert len(producer._deliveries._blocks) <= 2
    assert all(delivery.done() for delivery in deliveries)


def test_more_records_than_may_be_in_flight_go_in_pieces(
    producer: ProducerClient, topic: str, reader: ConsumerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.kafka.limits.UNDELIVERED_MAX", 64)
    values = [b"%04d" % row for row in range(1_000)]
    delivery = producer.send_many(topic, [b"k"] * 1_000, values)
    assert producer.undelivered() <= 64
    producer.flush(20)
    assert delivery.done()
    assert list(gather_joined(reader, 1_000).values) == values


def test_a_record_that_is_too_large_is_refused_and_those_before_it_are_delivered(
    kafka: KafkaSettings, topic: str, reader: ConsumerClient
) -> None:
    producer = make_producer(kafka)
    with pytest.raises(BrokerError, match=rf"sending to {topic}: .*too large") as caught:
        producer.send_many(topic, [b"k"] * 3, [b"fine", b"x" * 3_000_000, b"never sent"])
    assert "\n" not in str(caught.value)
    producer.close(20)
    assert list(gather_joined(reader, 1).values) == [b"fine"]


def test_memory_does_not_grow_with_the_records(kafka: KafkaSettings, topic: str, reader: ConsumerClient) -> None:
    producer = make_producer(kafka)
    rows = 50_000
    values, used = ByteColumn.of([b"v" * 100] * 1_000), []
    for _ in range(rows // 1_000):
        producer.send_many(topic, ByteColumn.of([b"k"] * 1_000), values)
    producer.flush(60)
    (partition,) = {(batch.topic, batch.partition) for batch in read(reader, rows, 5_000)}
    for turn in range(20):
        reader.seek(partition, 0)
        # small batches and large ones are copied in different ways
        read(reader, rows, (1_000, 200)[turn % 2])
        producer.send_many(topic, values, values)
        used.append(psutil.Process().memory_info().rss / 1e6)
    producer.close(60)
    # a message that is not destroyed keeps at least 200 bytes, and the rest of its fetch
    assert used[-1] - used[5] < 30


def test_a_consumer_closes_with_records_that_nobody_took(kafka: KafkaSettings, topic: str) -> None:
    # in a process of its own, where a crash or a wait for ever at the end shows
    fill(kafka, topic, 5_000)
    program = f"""
from cascade.config import KafkaSettings
from streaming.kafka import make_consumer, make_producer
kafka = KafkaSettings(bootstrap={kafka.bootstrap!r}, client="librdkafka", group="closes-{uuid.uuid4().hex}")
closed, left, member = make_consumer(kafka, None), make_consumer(kafka, None), make_consumer(kafka, kafka.group)
member.subscribe([{topic!r}], lambda partitions: None, lambda partitions: None)
for consumer in (closed, left):
    consumer.assign([({topic!r}, 0), ({topic!r}, 1)])
for consumer in (closed, left, member):
    while not (batches := consumer.poll(0.2, 3)):
        pass
closed.close()
producer = make_producer(kafka)
producer.send({topic!r}, b"k", b"never flushed")
print(batches[0].values[0])
"""
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=90, check=False, env=os.environ
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith("b'value")


def test_clients_end_with_the_last_reference(kafka: KafkaSettings, topic: str) -> None:
    def threads() -> int:
        return sum(thread.id != os.getpid() for thread in psutil.Process().threads())

    before = threads()
    producer = make_producer(kafka)
    producer.send(topic, b"k", b"v")
    assert threads() > before
    producer.close(20)
    del producer
    deadline_s = time.monotonic() + AT_ONCE_S
    while threads() > before:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.mark.parametrize("version", [0x010902FF, 0x030000FF])
def test_another_major_version_is_refused_in_a_line(version: int) -> None:
    check_version(0x020000FF)
    with pytest.raises(SettingError, match=r"kafka\.client = 'librdkafka': is librdkafka \d\.\d\.\d, .*2\.x") as caught:
        check_version(version)
    assert "\n" not in str(caught.value)


def test_gathering_reads_on_after_an_empty_poll(kafka: KafkaSettings, topic: str, reader: ConsumerClient) -> None:
    assert reader.poll(0.1, 10) == []
    fill(kafka, topic, 10)
    assert sum(map(len, gather(reader, 10))) == 10
