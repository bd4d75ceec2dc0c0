from __future__ import annotations

import contextlib
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from cascade.config import KafkaSettings
from cascade.errors import BrokerError, CommitUnknownError, ProducerFencedError, SettingError, TransactionAbortedError
from streaming.kafka import (
    ConsumerClient,
    GroupMember,
    TopicSpec,
    TransactionalProducerClient,
    ensure_topics,
    make_consumer,
    make_producer,
)
from streaming.kafka.local_broker import LocalBroker
from tests.conftest import Broker
from tests.streaming.kafka.helpers import fill, joined, most_waiting, poll_until
from tests.streaming.kafka.helpers import visible as visible_in

pytestmark = pytest.mark.kafka
# The waits of the clients for an answer are made far longer than a busy machine takes: what ends within AT_ONCE_S did
# not wait.
AT_ONCE_S = 20.0
NO_MEMBER = cast(GroupMember, None)


@pytest.fixture
def kafka(broker: Broker) -> KafkaSettings:
    """Of librdkafka alone: kafka-python refuses a transactional producer."""
    return KafkaSettings(bootstrap=broker.bootstrap, group=f"g-{uuid.uuid4().hex}")


@dataclass(frozen=True)
class Case:
    """An input topic, whose partition 0 has the offsets, an output topic, and a transactional id."""

    kafka: KafkaSettings
    topic: str
    out: str
    transactional_id: str

    def producer(self) -> TransactionalProducerClient:
        return make_producer(self.kafka, self.transactional_id)

    def begun(self, value: bytes) -> TransactionalProducerClient:
        """A producer with a delivered record in its open transaction."""
        producer = self.producer()
        producer.begin()
        producer.send(self.out, b"k", value)
        producer.flush(10)
        return producer

    def finish(
        self, producer: TransactionalProducerClient, value: bytes, member: GroupMember, offset: int | None = None
    ) -> None:
        """Commits a record, and the offset; then closes the producer."""
        producer.begin()
        producer.send(self.out, b"k", value)
        assert producer.commit(self.offsets(offset) if offset is not None else {}, member)
        producer.close(5)

    def offsets(self, offset: int) -> dict[tuple[str, int], tuple[int, str]]:
        return {(self.topic, 0): (offset, f"m{offset}")}

    def visible(self) -> list[bytes | None]:
        return visible_in(self.kafka, self.out)

    def committed(self) -> dict[tuple[str, int], tuple[int, str]]:
        with closing(make_consumer(self.kafka, self.kafka.group)) as reader:
            return reader.committed([(self.topic, 0), (self.topic, 1)])


@pytest.fixture
def case(kafka: KafkaSettings, topic: str) -> Case:
    out = f"out-{uuid.uuid4().hex}"
    ensure_topics(kafka, [TopicSpec(out, 1)])
    return Case(kafka, topic, out, f"tx-{uuid.uuid4().hex}")


@pytest.fixture
def long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for wait in ("ABORT", "FAILURE_ABORT"):
        monkeypatch.setattr(f"streaming.kafka.limits.{wait}_TIMEOUT_S", 3 * AT_ONCE_S)


@pytest.fixture
def member(kafka: KafkaSettings, topic: str) -> Iterator[ConsumerClient]:
    """The only member of the group, which has both partitions of the topic."""
    with joined(kafka, topic) as consumer:
        poll_until([consumer], lambda: len(consumer.assignment()) == 2)
        yield consumer


@pytest.fixture
def producer(case: Case) -> Iterator[TransactionalProducerClient]:
    made = case.producer()
    yield made
    made.close(1)


def test_kafka_python_refuses_a_transactional_producer(kafka: KafkaSettings) -> None:
    with pytest.raises(SettingError, match="exactly-once") as caught:
        make_producer(msgspec.structs.replace(kafka, client="kafka-python"), "tx")
    assert (caught.value.key, caught.value.value) == ("kafka.client", "kafka-python")


def test_records_offsets_and_metadata_of_a_commit_show_together(
    case: Case, member: ConsumerClient, producer: TransactionalProducerClient
) -> None:
    producer.begin()
    producer.send_many(case.out, [b"k"] * 3, [b"a", b"b", b"c"])
    producer.send(case.out, b"k", b"d", [("reason", b"r")])
    producer.flush(10)
    assert case.visible() == []
    offsets = {(case.topic, 0): (3, "ahead:" + "é" * 1_000), (case.topic, 1): (0, "")}
    producer.commit(offsets, member.member())
    assert case.visible() == [b"a", b"b", b"c", b"d"]
    assert case.committed() == offsets
    assert producer.undelivered() == 0


def test_an_aborted_transaction_shows_nothing_and_the_next_one_does(
    case: Case, member: ConsumerClient, producer: TransactionalProducerClient
) -> None:
    for delivered_before in (True, False):
        producer.begin()
        producer.send_many(case.out, [b"k"] * 2_000, [b"undone"] * 2_000)
        if delivered_before:
            producer.flush(10)
        producer.abort()
        producer.abort()
        assert producer.undelivered() == 0
    producer.begin()
    producer.send(case.out, b"k", b"committed")
    producer.commit(case.offsets(1), member.member())
    assert case.visible() == [b"committed"]
    assert case.committed() == case.offsets(1)


def test_a_second_producer_of_the_same_id_fences_the_first_for_good(case: Case, member: ConsumerClient) -> None:
    first = case.begun(b"of the zombie")
    second = case.producer()
    first.send(case.out, b"k", b"more of the zombie")
    with pytest.raises(ProducerFencedError) as caught:
        # where a record is refused, the vendor would ask for a new epoch, and so fence the second
        first.flush(10)
    assert "\n" not in str(caught.value)
    for attempt in (lambda: first.send(case.out, b"k", b"v"), first.begin, lambda: first.flush(1)):
        with pytest.raises(ProducerFencedError):
            attempt()
    first.abort()
    first.close(5)
    case.finish(second, b"of the successor", member.member(), 2)
    assert case.visible() == [b"of the successor"]
    assert case.committed() == case.offsets(2)


@pytest.mark.parametrize("hear", [lambda producer: producer.flush(10), lambda producer: producer.commit({}, None)])
def test_a_fenced_producer_raises_fenced_where_the_exception_of_its_binding_is_lost(
    case: Case, hear: Callable[[Any], None]
) -> None:
    first = case.begun(b"of the zombie")
    second = case.producer()
    first.send(case.out, b"k", b"more of the zombie")
    # an attribute that is not found in the cache of types is looked up as if no exception were raised, and drops it
    sys._clear_type_cache()
    with pytest.raises(ProducerFencedError):
        hear(first)
    first.close(5)
    case.finish(second, b"of the successor", NO_MEMBER)
    assert case.visible() == [b"of the successor"]


def test_a_fenced_producer_learns_it_at_the_commit(case: Case, member: ConsumerClient) -> None:
    first = case.begun(b"of the zombie")
    case.producer().close(5)
    with pytest.raises(ProducerFencedError):
        first.commit(case.offsets(1), member.member())
    first.close(5)
    assert case.visible() == []
    assert case.committed() == {}


def test_a_producer_goes_on_after_offsets_were_refused_with_records_in_the_queue(
    case: Case, member: ConsumerClient
) -> None:
    producer = case.producer()
    earlier = member.member()
    with joined(case.kafka, case.topic) as second:
        poll_until([member, second], lambda: len(second.assignment()) == 1)
        for _ in range(3):
            producer.begin()
            for _ in range(10):
                producer.send_many(case.out, [b"k"] * 2_000, [b"undone" * 100] * 2_000)
            assert not producer.commit(case.offsets(5), earlier)
        assert producer.undelivered() == 0
        case.finish(producer, b"of this one", member.member(), 6)
    assert case.visible() == [b"of this one"]
    assert case.committed() == case.offsets(6)


def test_a_member_of_an_earlier_generation_is_refused(case: Case, member: ConsumerClient) -> None:
    earlier = member.member()
    with joined(case.kafka, case.topic) as second:
        poll_until([member, second], lambda: len(second.assignment()) == 1)
        producer = case.begun(b"of an earlier generation")
        assert not producer.commit({(case.topic, 0): (5, "stale"), (case.topic, 1): (5, "stale")}, earlier)
        # it was undone at once, not when its time was out: readers get past it
        fill(case.kafka, case.out, 1)
        assert case.visible() == [b"value 0"]
        assert case.committed() == {}
        # and the same producer goes on
        case.finish(producer, b"of this one", member.member(), 6)
    assert case.visible() == [b"of this one", b"value 0"]
    assert case.committed() == case.offsets(6)


def test_who_is_no_member_any_more_commits_nothing(
    case: Case, producer: TransactionalProducerClient, outsider: ConsumerClient
) -> None:
    # the broker checks nothing for a client that names no member
    producer.begin()
    producer.send(case.out, b"k", b"of a stranger")
    assert not producer.commit(case.offsets(5), outsider.member())
    assert case.visible() == []
    assert case.committed() == {}


@pytest.mark.usefixtures("long_waits")
def test_a_record_that_is_refused_aborts_the_whole(
    case: Case, member: ConsumerClient, producer: TransactionalProducerClient
) -> None:
    small = f"small-{uuid.uuid4().hex}"
    ensure_topics(case.kafka, [TopicSpec(small, 1, settings={"max.message.bytes": "1000"})])
    producer.begin()
    producer.send(case.out, b"k", b"fine")
    producer.send(small, b"k", b"x" * 5_000)
    with pytest.raises(TransactionAbortedError, match=r"MessageSizeTooLarge|Message size too large") as caught:
        producer.commit(case.offsets(1), member.member())
    assert "\n" not in str(caught.value)
    ends_at_once(producer)
    assert case.visible() == []
    assert case.committed() == {}


def ends_at_once(producer: TransactionalProducerClient) -> None:
    started_s = time.monotonic()
    producer.abort()
    producer.close(3 * AT_ONCE_S)
    assert time.monotonic() - started_s < AT_ONCE_S


class Altered:
    """librdkafka's producer, with a fault put in."""

    def __init__(self, vendor: Any) -> None:
        self._vendor = vendor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vendor, name)

    def __len__(self) -> int:
        return len(self._vendor)


def test_an_unanswered_commit_is_unknown_and_final(
    kafka_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.kafka.limits.COMMIT_TIMEOUT_S", 2.0)
    with LocalBroker(tmp_path, parts_dir=kafka_parts) as broker:

        class Unanswered(Altered):
            """The node stands still while this producer commits."""

            def commit_transaction(self, timeout_s: float) -> None:
                broker.freeze_node(0)
                try:
                    self._vendor.commit_transaction(timeout_s)
                finally:
                    broker.thaw_node(0)

        kafka = KafkaSettings(bootstrap=broker.bootstrap, group="g", client="librdkafka")
        case = Case(kafka, "in", "out", "tx")
        ensure_topics(kafka, [TopicSpec("in", 1), TopicSpec("out", 1)])
        with joined(kafka, "in") as consumer:
            poll_until([consumer], lambda: len(consumer.assignment()) == 1)
            first: Any = case.producer()
            first.begin()
            first.send("out", b"k", b"once or never")
            first._producer = Unanswered(first._producer)
            with pytest.raises(CommitUnknownError):
                first.commit(case.offsets(1), consumer.member())
            with pytest.raises(CommitUnknownError):
                first.begin()
            first.abort()
            first.close(5)
            second = case.producer()
            found = consumer.committed([("in", 0)])
            case.finish(second, b"second", consumer.member(), 2)
        assert found in (case.offsets(1), {})
        assert case.visible() == ([b"once or never"] if found else []) + [b"second"]


class Stuck(Altered):
    """As seen when a coordinator's node was killed: offsets are never sent, whatever the limit."""

    def __init__(self, vendor: Any) -> None:
        super().__init__(vendor)
        self.end = threading.Event()

    def send_offsets_to_transaction(self, *_: object) -> None:
        self.end.wait(60)


def test_a_vendor_that_exceeds_its_limit_is_left_behind(
    case: Case, member: ConsumerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer: Any = case.begun(b"undone")
    monkeypatch.setattr("streaming.kafka.limits.COMMIT_TIMEOUT_S", 0.5)
    stuck = producer._producer = Stuck(producer._producer)
    started_s = time.monotonic()
    with pytest.raises(TransactionAbortedError, match="no answer within"):
        producer.commit(case.offsets(1), member.member())
    producer.close(5)
    assert time.monotonic() - started_s < AT_ONCE_S
    stuck.end.set()
    case.producer().close(5)
    assert case.visible() == []
    assert case.committed() == {}


def test_sending_outside_a_transaction_is_refused(case: Case, producer: TransactionalProducerClient) -> None:
    with pytest.raises(TransactionAbortedError, match="sending to"):
        producer.send(case.out, b"k", b"v")


def test_an_open_transaction_is_undone_by_close(case: Case) -> None:
    case.begun(b"undone").close(5)
    assert case.visible() == []


def test_what_waits_to_be_delivered_is_bounded_in_a_transaction_too(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.kafka.limits.UNDELIVERED_MAX", 100)
    producer = case.producer()
    producer.begin()
    most = most_waiting(producer, case.out, 1_000)
    producer.commit({}, NO_MEMBER)
    producer.close(5)
    assert most <= 100
    assert len(case.visible()) == 1_000


def running_threads() -> Counter[str]:
    """Threads by name, those of librdkafka among them."""
    names = Counter(thread.name for thread in threading.enumerate())
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            name = (task / "comm").read_text().strip()
            names[name] += name.startswith("rdk:")
    return names


def test_no_thread_is_left_where_the_id_cannot_be_taken_up(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    before = running_threads()
    monkeypatch.setattr("streaming.kafka.limits.INIT_TIMEOUT_S", 0.0)
    with pytest.raises(BrokerError, match="taking up the transactional id") as caught:
        case.producer()
    assert "\n" not in str(caught.value)
    assert running_threads() <= before


def test_closing_leaves_no_thread(case: Case) -> None:
    before = running_threads()
    producer = case.producer()
    producer.begin()
    delivery = producer.send(case.out, b"k", b"undone")
    assert running_threads() > before
    producer.close(5)
    assert running_threads() <= before
    del delivery
