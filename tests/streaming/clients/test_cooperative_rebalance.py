from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, closing

import msgspec
import pytest
from kafka import KafkaAdminClient
from kafka.admin import MemberToRemove, NewPartitions

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.clients import ConsumerClient, Partition, make_consumer
from tests.conftest import Broker
from tests.streaming.clients.helpers import Events, fill, gather, ignore, poll_until

pytestmark = pytest.mark.kafka


@pytest.fixture
def kafka(broker: Broker) -> KafkaSettings:
    """Of kafka-python alone: it is that library's rebalances that are mended, and looked into, here."""
    return KafkaSettings(bootstrap=broker.bootstrap, group=f"g-{uuid.uuid4().hex}")


class Owners:
    """Who has which partition, by the callbacks; gaining one that another has is an offence."""

    def __init__(self) -> None:
        self.of: dict[Partition, str] = {}
        self.offences: list[str] = []
        self.lost: list[tuple[str, Partition]] = []

    def member(self, name: str, kafka: KafkaSettings, topic: str) -> ConsumerClient:
        consumer = make_consumer(kafka, kafka.group)
        consumer.subscribe([topic], self._gained(name), self._given_up(name), self._thrown_out(name))
        return consumer

    def _gained(self, name: str) -> Callable[[list[Partition]], None]:
        def assigned(partitions: list[Partition]) -> None:
            self.offences += [
                f"{partition} to {name}, of {self.of[partition]}"
                for partition in partitions
                if self.of.get(partition, name) != name
            ]
            self.of.update(dict.fromkeys(partitions, name))

        return assigned

    def _given_up(self, name: str) -> Callable[[list[Partition]], None]:
        def revoked(partitions: list[Partition]) -> None:
            for partition in partitions:
                assert self.of.pop(partition) == name

        return revoked

    def _thrown_out(self, name: str) -> Callable[[list[Partition]], None]:
        def lost(partitions: list[Partition]) -> None:
            self.lost += [(name, partition) for partition in partitions]

        return lost


def throw_out(kafka: KafkaSettings, consumer: ConsumerClient) -> None:
    member_id = consumer.member().vendor.member_id  # type: ignore[attr-defined]
    with closing(KafkaAdminClient(bootstrap_servers=kafka.servers)) as admin:
        admin.remove_group_members(kafka.group, [MemberToRemove(member_id=member_id)])


def joins(consumer: ConsumerClient) -> bool:
    return bool(consumer._consumer._coordinator.need_rejoin())  # type: ignore[attr-defined]


def claims(consumer: ConsumerClient) -> list[Partition]:
    """The owned partitions that the consumer sends to the group's leader."""
    ((_, message),) = consumer._consumer._coordinator.group_protocols()  # type: ignore[attr-defined]
    return [(topic.topic, number) for topic in message.owned_partitions for number in topic.partitions]


def until_joining(consumer: ConsumerClient) -> None:
    deadline_s = time.monotonic() + 30
    while not joins(consumer):
        assert time.monotonic() < deadline_s
        consumer.poll(0.05, 1)


@pytest.fixture
def pair(
    kafka: KafkaSettings, topic: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Owners, ConsumerClient, ConsumerClient, ExitStack]:
    """Two members with a partition each."""
    # so long that a busy machine differs from a member that is waited for
    monkeypatch.setattr("streaming.clients.limits.SESSION_TIMEOUT_MS", 45_000)
    monkeypatch.setattr("streaming.clients.kafka_consumer.CLOSE_TIMEOUT_S", 45.0)
    owners, stack = Owners(), ExitStack()
    first, second = (stack.enter_context(closing(owners.member(name, kafka, topic))) for name in ("first", "second"))
    poll_until([first, second], lambda: sorted(owners.of.values()) == ["first", "second"] and not joins(first))
    return owners, first, second, stack


def test_an_owned_partition_is_fetched_and_committed_while_a_join_waits(
    kafka: KafkaSettings, topic: str, pair: tuple[Owners, ConsumerClient, ConsumerClient, ExitStack]
) -> None:
    _, first, second, stack = pair
    with stack, closing(make_consumer(kafka, kafka.group)) as third:
        (owned,) = first.assignment()
        third.subscribe([topic], ignore, ignore)
        third.poll(0.5, 1)
        until_joining(first)
        # the second member does not poll: the join waits for it
        fill(kafka, topic, 40)
        batches = gather(first, first.end_offsets([owned])[owned], 5)
        assert {(batch.topic, batch.partition) for batch in batches} == {owned}
        assert joins(first)
        first.commit({owned: (7, "while joining")})
        assert first.committed([owned]) == {owned: (7, "while joining")}
        poll_until([first, second, third], lambda: not joins(first))
        assert first.assignment() == {owned}
        first.commit({owned: (8, "after")})


def test_a_member_that_is_closed_while_it_joins_commits_and_leaves_at_once(
    kafka: KafkaSettings, topic: str, pair: tuple[Owners, ConsumerClient, ConsumerClient, ExitStack]
) -> None:
    owners, first, second, stack = pair
    fill(kafka, topic, 60)
    with stack, closing(make_consumer(kafka, kafka.group)) as third:
        (owned,) = first.assignment()
        third.subscribe([topic], ignore, ignore)
        third.poll(0.5, 1)
        until_joining(first)
        first.poll(0.1, 1)
        started_s = time.monotonic()
        first.commit({owned: (9, "at the end")})
        first.close()
        assert time.monotonic() - started_s < 20
        assert owned not in owners.of
        poll_until([second, third], lambda: len(second.assignment()) == len(third.assignment()) == 1)
        assert second.committed([owned]) == {owned: (9, "at the end")}
        assert time.monotonic() - started_s < 30


def test_waiting_for_a_join_does_not_spin(
    kafka: KafkaSettings, topic: str, pair: tuple[Owners, ConsumerClient, ConsumerClient, ExitStack]
) -> None:
    _, first, second, stack = pair
    with stack, closing(make_consumer(kafka, kafka.group)) as third:
        third.subscribe([topic], ignore, ignore)
        third.poll(0.5, 1)
        until_joining(first)
        # heartbeats rest meanwhile: an overdue one must not turn the wait into a loop
        time.sleep(2.5)
        cpu_s = time.thread_time()
        assert first.poll(1.0, 10) == []
        assert time.thread_time() - cpu_s < 0.3
        poll_until([first, second, third], lambda: not joins(first))


def test_a_member_that_is_thrown_out_while_it_joins_loses_its_partitions(
    kafka: KafkaSettings, topic: str, pair: tuple[Owners, ConsumerClient, ConsumerClient, ExitStack]
) -> None:
    owners, first, second, stack = pair
    with stack, closing(make_consumer(kafka, kafka.group)) as third:
        (owned,) = first.assignment()
        third.subscribe([topic], ignore, ignore)
        third.poll(0.5, 1)
        until_joining(first)
        throw_out(kafka, first)
        poll_until([first, second, third], lambda: owners.lost != [])
        assert owners.lost == [("first", owned)]


def test_a_member_that_comes_back_leaves_its_partitions_to_their_new_owner(
    kafka: KafkaSettings, topic: str, pair: tuple[Owners, ConsumerClient, ConsumerClient, ExitStack]
) -> None:
    owners, first, second, stack = pair
    with stack:
        (gone,) = first.assignment()
        assert claims(first) == [gone]
        throw_out(kafka, first)
        poll_until([first], lambda: owners.lost != [])
        assert claims(first) == []
        owners.of.pop(gone)
        poll_until([first, second], lambda: sorted(owners.of.values()) == ["first", "second"] and not joins(second))
        assert owners.lost == [("first", gone)]
        assert owners.offences == []


def test_a_commit_of_a_member_that_was_thrown_out_is_refused(kafka: KafkaSettings, topic: str) -> None:
    with closing(make_consumer(kafka, kafka.group)) as consumer:
        consumer.subscribe([topic], ignore, ignore)
        poll_until([consumer], lambda: len(consumer.assignment()) == 2)
        throw_out(kafka, consumer)
        with pytest.raises(BrokerError) as caught:
            consumer.commit({(topic, 0): (1, "")})
        assert "\n" not in str(caught.value)


def test_a_restart_under_the_same_name_gets_its_partitions_and_fences_the_earlier_member(
    kafka: KafkaSettings, topic: str
) -> None:
    named = msgspec.structs.replace(kafka, instance="worker-7")
    events = Events()
    with closing(make_consumer(named, kafka.group)) as before, closing(make_consumer(kafka, kafka.group)) as other:
        before.subscribe([topic], ignore, ignore)
        other.subscribe([topic], events.note("assigned"), events.note("revoked"), events.note("lost"))
        poll_until([before, other], lambda: len(before.assignment()) == len(other.assignment()) == 1)
        poll_until([before, other], lambda: not joins(before) and not joins(other))
        seen, owned = list(events.seen), before.assignment()
        with closing(make_consumer(named, kafka.group)) as after:
            after.subscribe([topic], ignore, ignore)
            poll_until([after, other], lambda: after.assignment() == owned)
            assert events.seen == seen
            with pytest.raises(BrokerError):
                before.commit(dict.fromkeys(owned, (1, "")))
            with pytest.raises(BrokerError, match=r"kafka\.instance"):
                poll_until([before], lambda: False, 10)


def test_closing_under_a_name_does_not_leave_the_group(kafka: KafkaSettings, topic: str) -> None:
    named = msgspec.structs.replace(kafka, instance="worker-8")
    events = Events()
    with closing(make_consumer(kafka, kafka.group)) as other:
        before = make_consumer(named, kafka.group)
        before.subscribe([topic], ignore, ignore)
        other.subscribe([topic], events.note("assigned"), events.note("revoked"))
        poll_until([before, other], lambda: len(before.assignment()) == len(other.assignment()) == 1)
        poll_until([before, other], lambda: not joins(before) and not joins(other))
        seen = list(events.seen)
        before.close()
        deadline_s = time.monotonic() + 3
        while time.monotonic() < deadline_s:
            other.poll(0.2, 10)
        assert events.seen == seen


def test_a_join_whose_reason_is_gone_before_the_next_poll_is_still_taken_up(kafka: KafkaSettings, topic: str) -> None:
    """The leader rejoins because its topic has grown; the join itself, over between two polls, ends that reason."""
    with closing(make_consumer(kafka, kafka.group)) as consumer:
        consumer.subscribe([topic], ignore, ignore)
        poll_until([consumer], lambda: len(consumer.assignment()) == 2)
        with closing(KafkaAdminClient(bootstrap_servers=kafka.servers)) as admin:
            admin.create_partitions({topic: NewPartitions(3)})
        vendor = consumer._consumer  # type: ignore[attr-defined]
        deadline_s = time.monotonic() + 20
        while len(consumer.assignment()) < 3:
            assert time.monotonic() < deadline_s, "the join was begun and never taken up"
            vendor._coordinator._cluster.request_update()
            time.sleep(0.3)
            consumer.poll(0.0, 1)
        beats_from_s = time.monotonic()
        while vendor._coordinator.heartbeat.last_receive < beats_from_s:
            assert time.monotonic() < beats_from_s + 30, "no heartbeat after the join"
            consumer.poll(0.1, 1)
