from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
from kafka import TopicPartition
from kafka.errors import InvalidProducerEpochError, KafkaConnectionError, OutOfOrderSequenceNumberError
from kafka.net.compat import KafkaNetClient
from kafka.structs import OffsetAndMetadata

from cascade.config import KafkaSettings
from cascade.errors import BrokerError, CommitUnknownError, ProducerFencedError, TransactionAbortedError
from streaming.clients import (
    ConsumerClient,
    GroupMember,
    Partition,
    TopicSpec,
    TransactionalProducerClient,
    ensure_topics,
    make_consumer,
    make_producer,
)
from streaming.clients.kafka_transactions import KafkaPythonTransactionalProducer
from streaming.local_broker import LocalBroker
from tests.streaming.clients.helpers import fill, ignore, most_waiting, poll_until, visible

pytestmark = pytest.mark.kafka
# what these look at or put faults into is that library's own
kafka_python_only = pytest.mark.parametrize("kafka", ["kafka-python"], indirect=True)
librdkafka_only = pytest.mark.parametrize("kafka", ["librdkafka"], indirect=True)
# Waits of the clients for an answer, made far longer than a busy machine takes: what ends within AT_ONCE_S kept none.
AT_ONCE_S = 20.0


@pytest.fixture
def transactional_id() -> str:
    return f"tx-{uuid.uuid4().hex}"


@pytest.fixture
def long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for wait in ("ABORT", "FAILURE_ABORT"):
        monkeypatch.setattr(f"streaming.clients.limits.{wait}_TIMEOUT_S", 3 * AT_ONCE_S)


@pytest.fixture
def out(kafka: KafkaSettings) -> str:
    name = f"out-{uuid.uuid4().hex}"
    ensure_topics(kafka, [TopicSpec(name, 1)])
    return name


@pytest.fixture
def member(kafka: KafkaSettings, topic: str) -> Iterator[ConsumerClient]:
    """The only member of the group, which has both partitions of the topic."""
    with closing(make_consumer(kafka, kafka.group)) as consumer:
        consumer.subscribe([topic], ignore, ignore)
        poll_until([consumer], lambda: len(consumer.assignment()) == 2)
        yield consumer


@pytest.fixture
def producer(kafka: KafkaSettings, transactional_id: str) -> Iterator[TransactionalProducerClient]:
    made = make_producer(kafka, transactional_id)
    yield made
    made.close(1)


def committed(kafka: KafkaSettings, partition: Partition) -> tuple[int, str] | None:
    with closing(make_consumer(kafka, kafka.group)) as reader:
        return reader.committed([partition]).get(partition)


def test_records_offsets_and_metadata_of_a_commit_show_together(
    kafka: KafkaSettings, topic: str, out: str, member: ConsumerClient, producer: TransactionalProducerClient
) -> None:
    producer.begin()
    producer.send_many(out, [b"k"] * 3, [b"a", b"b", b"c"])
    producer.send(out, b"k", b"d", [("reason", b"r")])
    producer.flush(10)
    assert visible(kafka, out) == []
    metadata = "ahead:" + "é" * 1_000
    producer.commit({(topic, 0): (3, metadata), (topic, 1): (0, "")}, member.member())
    assert visible(kafka, out) == [b"a", b"b", b"c", b"d"]
    assert member.committed([(topic, 0), (topic, 1)]) == {(topic, 0): (3, metadata), (topic, 1): (0, "")}
    assert producer.undelivered() == 0


def test_an_aborted_transaction_shows_nothing_and_the_next_one_does(
    kafka: KafkaSettings, topic: str, out: str, member: ConsumerClient, producer: TransactionalProducerClient
) -> None:
    for delivered_before in (True, False):
        producer.begin()
        producer.send_many(out, [b"k"] * 2_000, [b"undone"] * 2_000)
        if delivered_before:
            producer.flush(10)
        producer.abort()
        producer.abort()
        assert producer.undelivered() == 0
    producer.begin()
    producer.send(out, b"k", b"committed")
    producer.commit({(topic, 0): (1, "m")}, member.member())
    assert visible(kafka, out) == [b"committed"]
    assert committed(kafka, (topic, 0)) == (1, "m")
    # a flush that the vendor leaves begun would make every record a batch of its own from now on
    if isinstance(producer, KafkaPythonTransactionalProducer):
        assert not producer._producer._accumulator.flush_in_progress()


@kafka_python_only
def test_committed_waits_for_a_transaction_with_the_offset(
    kafka: KafkaSettings, topic: str, member: ConsumerClient, producer: TransactionalProducerClient
) -> None:
    assert isinstance(producer, KafkaPythonTransactionalProducer)
    producer.begin()
    member.commit({(topic, 0): (1, "before")})
    vendor: Any = member.member().vendor
    producer._producer.send_offsets_to_transaction({TopicPartition(topic, 0): OffsetAndMetadata(2, "in", -1)}, vendor)
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.append(member.committed([(topic, 0)])))
    asking.start()
    time.sleep(0.5)
    assert answers == []
    producer.abort()
    asking.join(10)
    assert answers == [{(topic, 0): (1, "before")}]


def test_a_second_producer_of_the_same_id_fences_the_first_for_good(
    kafka: KafkaSettings, topic: str, out: str, member: ConsumerClient, transactional_id: str
) -> None:
    first = make_producer(kafka, transactional_id)
    first.begin()
    first.send(out, b"k", b"of the zombie")
    first.flush(10)
    second = make_producer(kafka, transactional_id)
    first.send(out, b"k", b"more of the zombie")
    with pytest.raises(ProducerFencedError) as caught:
        # where a record is refused, the vendor would ask for a new epoch, and so fence the second
        first.flush(10)
    assert "\n" not in str(caught.value)
    for attempt in (lambda: first.send(out, b"k", b"v"), first.begin, lambda: first.flush(1)):
        with pytest.raises(ProducerFencedError):
            attempt()
    first.abort()
    first.close(5)
    second.begin()
    second.send(out, b"k", b"of the successor")
    second.commit({(topic, 0): (2, "successor")}, member.member())
    second.close(5)
    assert visible(kafka, out) == [b"of the successor"]
    assert committed(kafka, (topic, 0)) == (2, "successor")


@librdkafka_only
@pytest.mark.parametrize("hear", [lambda producer: producer.flush(10), lambda producer: producer.commit({}, None)])
def test_a_fenced_producer_raises_fenced_where_the_exception_of_its_binding_is_lost(
    kafka: KafkaSettings, out: str, transactional_id: str, hear: Callable[[Any], None]
) -> None:
    first = make_producer(kafka, transactional_id)
    first.begin()
    first.send(out, b"k", b"of the zombie")
    first.flush(10)
    second = make_producer(kafka, transactional_id)
    first.send(out, b"k", b"more of the zombie")
    # an attribute that is not found in the cache of types is looked up as if no exception were raised, and drops it
    sys._clear_type_cache()
    with pytest.raises(ProducerFencedError):
        hear(first)
    first.close(5)
    second.begin()
    second.send(out, b"k", b"of the successor")
    second.commit({}, cast(GroupMember, None))
    second.close(5)
    assert visible(kafka, out) == [b"of the successor"]


@kafka_python_only
def test_a_producer_whose_epoch_is_over_never_asks_for_another(producer: TransactionalProducerClient) -> None:
    # brokers before 2.7 would give it one, and the successor would be fenced
    manager = producer._producer._transaction_manager  # type: ignore[attr-defined]
    for error in (InvalidProducerEpochError, OutOfOrderSequenceNumberError):
        assert manager.classify_batch_error(error, None) == manager.ERROR_CLASS_FATAL


def test_a_fenced_producer_learns_it_at_the_commit(
    kafka: KafkaSettings, topic: str, out: str, member: ConsumerClient, transactional_id: str
) -> None:
    first = make_producer(kafka, transactional_id)
    first.begin()
    first.send(out, b"k", b"of the zombie")
    first.flush(10)
    make_producer(kafka, transactional_id).close(5)
    with pytest.raises(ProducerFencedError):
        first.commit({(topic, 0): (1, "zombie")}, member.member())
    first.close(5)
    assert visible(kafka, out) == []
    assert committed(kafka, (topic, 0)) is None


def test_a_member_of_an_earlier_generation_is_refused(
    kafka: KafkaSettings, topic: str, out: str, member: ConsumerClient, transactional_id: str
) -> None:
    earlier = member.member()
    with closing(make_consumer(kafka, kafka.group)) as second:
        second.subscribe([topic], ignore, ignore)
        poll_until([member, second], lambda: len(second.assignment()) == 1)
        producer = make_producer(kafka, transactional_id)
        producer.begin()
        producer.send(out, b"k", b"of an earlier generation")
        with pytest.raises(TransactionAbortedError, match=r"IllegalGeneration|generation id is not valid"):
            producer.commit({(topic, 0): (5, "stale"), (topic, 1): (5, "stale")}, earlier)
        # it was undone at once, not when its time was out: readers get past it
        fill(kafka, out, 1)
        assert visible(kafka, out) == [b"value 0"]
        assert second.committed([(topic, 0), (topic, 1)]) == {}
        with pytest.raises(TransactionAbortedError):
            producer.begin()
        producer.close(5)
        again = make_producer(kafka, transactional_id)
        again.begin()
        again.send(out, b"k", b"of this one")
        again.commit({(topic, 0): (6, "")}, member.member())
        again.close(5)
    assert visible(kafka, out) == [b"of this one", b"value 0"]


def test_who_is_no_member_any_more_commits_nothing(
    kafka: KafkaSettings, topic: str, out: str, producer: TransactionalProducerClient, outsider: ConsumerClient
) -> None:
    # the broker checks nothing for a client that names no member
    producer.begin()
    producer.send(out, b"k", b"of a stranger")
    with pytest.raises(TransactionAbortedError, match="not a member"):
        producer.commit({(topic, 0): (5, "stranger")}, outsider.member())
    assert visible(kafka, out) == []
    assert committed(kafka, (topic, 0)) is None


@pytest.mark.usefixtures("long_waits")
def test_a_record_that_is_refused_aborts_the_whole(
    kafka: KafkaSettings, topic: str, out: str, member: ConsumerClient, producer: TransactionalProducerClient
) -> None:
    small = f"small-{uuid.uuid4().hex}"
    ensure_topics(kafka, [TopicSpec(small, 1, settings={"max.message.bytes": "1000"})])
    producer.begin()
    producer.send(out, b"k", b"fine")
    producer.send(small, b"k", b"x" * 5_000)
    with pytest.raises(TransactionAbortedError, match=r"MessageSizeTooLarge|Message size too large") as caught:
        producer.commit({(topic, 0): (1, "")}, member.member())
    assert "\n" not in str(caught.value)
    started_s = time.monotonic()
    producer.abort()
    producer.close(3 * AT_ONCE_S)
    assert time.monotonic() - started_s < AT_ONCE_S
    assert visible(kafka, out) == []
    assert committed(kafka, (topic, 0)) is None


@kafka_python_only
def test_a_record_whose_time_ran_out_aborts_the_whole(
    kafka: KafkaSettings, topic: str, out: str, member: ConsumerClient, producer: TransactionalProducerClient
) -> None:
    assert isinstance(producer, KafkaPythonTransactionalProducer)
    producer.begin()
    producer.send(out, b"k", b"in time")
    producer.flush(10)
    # a fault put in: the sender thread may not take the batch, as where no leader is known
    accumulator = producer._producer._accumulator
    drain, accumulator.drain = accumulator.drain, lambda *arguments, **named: {}
    accumulator.config["delivery_timeout_ms"] = 300
    producer.send(out, b"k", b"too late")
    late = producer._undelivered[-1]
    deadline_s = time.monotonic() + 10
    while not late.is_done:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    accumulator.drain = drain
    with pytest.raises(TransactionAbortedError, match="not delivered"):
        producer.commit({(topic, 0): (2, "")}, member.member())
    assert visible(kafka, out) == []


@kafka_python_only
@pytest.mark.usefixtures("long_waits")
def test_a_commit_whose_answer_is_lost_is_unknown_and_the_next_producer_finds_it_applied(
    kafka: KafkaSettings,
    topic: str,
    out: str,
    member: ConsumerClient,
    transactional_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streaming.clients.limits.COMMIT_TIMEOUT_S", 1.0)
    first = make_producer(kafka, transactional_id)
    first.begin()
    first.send(out, b"k", b"once")
    first.flush(10)
    with monkeypatch.context() as faults:
        faults.setattr(
            "kafka.producer.transaction_manager.EndTxnHandler.on_complete", lambda handler, number, answer: None
        )
        with pytest.raises(CommitUnknownError):
            first.commit({(topic, 0): (1, "first")}, member.member())
        with pytest.raises(CommitUnknownError):
            first.begin()
        started_s = time.monotonic()
        first.abort()
        first.close(3 * AT_ONCE_S)
        assert time.monotonic() - started_s < AT_ONCE_S
    second = make_producer(kafka, transactional_id)
    assert member.committed([(topic, 0)]) == {(topic, 0): (1, "first")}
    second.begin()
    second.send(out, b"k", b"twice")
    second.commit({(topic, 0): (2, "second")}, member.member())
    second.close(5)
    assert visible(kafka, out) == [b"once", b"twice"]


class Unanswered:
    """A fault put in: the node stands still while this producer commits."""

    def __init__(self, vendor: Any, broker: LocalBroker) -> None:
        self._vendor, self._broker = vendor, broker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vendor, name)

    def commit_transaction(self, timeout_s: float) -> None:
        self._broker.freeze_node(0)
        try:
            self._vendor.commit_transaction(timeout_s)
        finally:
            self._broker.thaw_node(0)


def test_with_librdkafka_too_an_unanswered_commit_is_unknown_and_final(
    kafka_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.clients.limits.COMMIT_TIMEOUT_S", 2.0)
    with LocalBroker(tmp_path, parts_dir=kafka_parts) as broker:
        kafka = KafkaSettings(bootstrap=broker.bootstrap, group="g", client="librdkafka")
        ensure_topics(kafka, [TopicSpec("in", 1), TopicSpec("out", 1)])
        with closing(make_consumer(kafka, kafka.group)) as consumer:
            consumer.subscribe(["in"], ignore, ignore)
            poll_until([consumer], lambda: len(consumer.assignment()) == 1)
            first = make_producer(kafka, "tx")
            first.begin()
            first.send("out", b"k", b"once or never")
            first._producer = Unanswered(first._producer, broker)  # type: ignore[attr-defined]
            with pytest.raises(CommitUnknownError):
                first.commit({("in", 0): (1, "first")}, consumer.member())
            with pytest.raises(CommitUnknownError):
                first.begin()
            first.abort()
            first.close(5)
            second = make_producer(kafka, "tx")
            found = consumer.committed([("in", 0)])
            second.begin()
            second.send("out", b"k", b"second")
            second.commit({("in", 0): (2, "second")}, consumer.member())
            second.close(5)
        assert found in ({("in", 0): (1, "first")}, {})
        assert visible(kafka, "out") == ([b"once or never"] if found else []) + [b"second"]


class Stuck:
    """A fault put in, as seen when a coordinator's node was killed: offsets are never sent, whatever the limit."""

    def __init__(self, vendor: Any) -> None:
        self._vendor, self.end = vendor, threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vendor, name)

    def __len__(self) -> int:
        return len(self._vendor)

    def send_offsets_to_transaction(self, *_: object) -> None:
        self.end.wait(60)


@librdkafka_only
def test_a_vendor_that_exceeds_its_limit_is_left_behind(
    kafka: KafkaSettings,
    topic: str,
    out: str,
    member: ConsumerClient,
    transactional_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    producer = make_producer(kafka, transactional_id)
    producer.begin()
    producer.send(out, b"k", b"undone")
    producer.flush(10)
    monkeypatch.setattr("streaming.clients.limits.COMMIT_TIMEOUT_S", 0.5)
    stuck = producer._producer = Stuck(producer._producer)  # type: ignore[attr-defined]
    started_s = time.monotonic()
    with pytest.raises(TransactionAbortedError, match="no answer within"):
        producer.commit({(topic, 0): (1, "")}, member.member())
    producer.close(5)
    assert time.monotonic() - started_s < AT_ONCE_S
    stuck.end.set()
    make_producer(kafka, transactional_id).close(5)
    assert visible(kafka, out) == []
    assert committed(kafka, (topic, 0)) is None


def test_sending_outside_a_transaction_is_refused(out: str, producer: TransactionalProducerClient) -> None:
    with pytest.raises(TransactionAbortedError, match="sending to"):
        producer.send(out, b"k", b"v")


def test_an_open_transaction_is_undone_by_close(kafka: KafkaSettings, out: str, transactional_id: str) -> None:
    producer = make_producer(kafka, transactional_id)
    producer.begin()
    producer.send(out, b"k", b"undone")
    producer.flush(10)
    producer.close(5)
    assert visible(kafka, out) == []


def test_what_waits_to_be_delivered_is_bounded_in_a_transaction_too(
    kafka: KafkaSettings,
    topic: str,
    out: str,
    member: ConsumerClient,
    transactional_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streaming.clients.limits.UNDELIVERED_MAX", 100)
    producer = make_producer(kafka, transactional_id)
    producer.begin()
    most = most_waiting(producer, out, 1_000)
    producer.commit({(topic, 0): (1, "")}, member.member())
    producer.close(5)
    assert most <= 100
    assert len(visible(kafka, out)) == 1_000


def running_threads() -> Counter[str]:
    """Threads by name, those of librdkafka among them."""
    names = Counter(thread.name for thread in threading.enumerate())
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            name = (task / "comm").read_text().strip()
            names[name] += name.startswith("rdk:")
    return names


def test_no_thread_is_left_where_the_id_cannot_be_taken_up(
    kafka: KafkaSettings, transactional_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = running_threads()
    monkeypatch.setattr("streaming.clients.limits.INIT_TIMEOUT_S", 0.0)
    with pytest.raises(BrokerError, match="taking up the transactional id") as caught:
        make_producer(kafka, transactional_id)
    assert "\n" not in str(caught.value)
    assert running_threads() <= before


def test_closing_leaves_no_thread(kafka: KafkaSettings, out: str, transactional_id: str) -> None:
    before = running_threads()
    producer = make_producer(kafka, transactional_id)
    producer.begin()
    delivery = producer.send(out, b"k", b"undone")
    assert running_threads() > before
    producer.close(5)
    assert running_threads() <= before
    del delivery


def test_offsets_of_a_time(kafka: KafkaSettings, outsider: ConsumerClient) -> None:
    name = f"t-{uuid.uuid4().hex}"
    ensure_topics(kafka, [TopicSpec(name, 2)])
    plain = make_producer(kafka)
    for time_ms in (1_000, 2_000, 3_000):
        plain.send(name, b"k", b"v", timestamp_ms=time_ms)
    plain.flush(10)
    plain.close(5)
    full, empty = sorted([(name, 0), (name, 1)], key=lambda partition: -outsider.end_offsets([partition])[partition])
    assert outsider.offsets_at([full, empty], 1_500) == {full: 1, empty: 0}
    assert outsider.offsets_at([full], 3_001) == {full: 3}


@kafka_python_only
def test_a_request_to_an_unreachable_coordinator_is_retried(
    kafka: KafkaSettings,
    topic: str,
    out: str,
    member: ConsumerClient,
    transactional_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a fault put in: connections are refused now and then, when a request of a transaction is about to be sent
    await_ready, calls = KafkaNetClient.await_ready, itertools.count()

    def await_ready_or_fail(client: Any, node: object, timeout_ms: float = 30_000) -> Any:
        if next(calls) % 3 == 2:
            raise KafkaConnectionError("refused")
        return await_ready(client, node, timeout_ms)

    monkeypatch.setattr(KafkaNetClient, "await_ready", await_ready_or_fail)
    producer = make_producer(kafka, transactional_id)
    for number in range(5):
        producer.begin()
        producer.send(out, b"k", b"%d" % number)
        producer.commit({(topic, 0): (number, "")}, member.member())
    producer.close(5)
    assert visible(kafka, out) == [b"0", b"1", b"2", b"3", b"4"]
