from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from typing import NamedTuple

import msgspec
import pytest
from kafka import KafkaAdminClient
from kafka.admin import MemberToRemove, NewPartitions

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import ConsumerClient, Partition
from tests.conftest import Broker
from tests.streaming.kafka.helpers import Events, fill, gather, joined, poll_until

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

    def member(self, name: str, kafka: KafkaSettings, topic: str) -> AbstractContextManager[ConsumerClient]:
        def assigned(partitions: list[Partition]) -> None:
            self.offences += [
                f"{partition} to {name}, of {self.of[partition]}"
                for partition in partitions
                if self.of.get(partition, name) != name
            ]
            self.of.update(dict.fromkeys(partitions, name))

        def revoked(partitions: list[Partition]) -> None:
            for partition in partitions:
                assert self.of.pop(partition) == name

        def lost(partitions: list[Partition]) -> None:
            self.lost += [(name, partition) for partition in partitions]

        return joined(kafka, topic, assigned, revoked, lost)


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


class Pair(NamedTuple):
    """Two members with a partition each."""

    owners: Owners
    first: ConsumerClient
    second: ConsumerClient


@pytest.fixture
def pair(kafka: KafkaSettings, topic: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    # so long that a busy machine differs from a member that is waited for
    monkeypatch.setattr("streaming.kafka.limits.SESSION_TIMEOUT_MS", 45_000)
    monkeypatch.setattr("streaming.kafka.kafka_consumer.CLOSE_TIMEOUT_S", 45.0)
    owners = Owners()
    with owners.member("first", kafka, topic) as first, owners.member("second", kafka, topic) as second:
        poll_until([first, second], lambda: sorted(owners.of.values()) == ["first", "second"] and not joins(first))
        yield Pair(owners, first, second)


@pytest.fixture
def third(kafka: KafkaSettings, topic: str, pair: Pair) -> Iterator[ConsumerClient]:
    """A third member; the first has noticed that it joins, and the second does not poll: the join waits for it."""
    with joined(kafka, topic) as consumer:
        consumer.poll(0.5, 1)
        deadline_s = time.monotonic() + 30
        while not joins(pair.first):
            assert time.monotonic() < deadline_s
            pair.first.poll(0.05, 1)
        yield consumer


def test_an_owned_partition_is_fetched_and_committed_while_a_join_waits(
    kafka: KafkaSettings, topic: str, pair: Pair, third: ConsumerClient
) -> None:
    _, first, second = pair
    (owned,) = first.assignment()
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
    kafka: KafkaSettings, topic: str, pair: Pair, third: ConsumerClient
) -> None:
    owners, first, second = pair
    (owned,) = first.assignment()
    fill(kafka, topic, 60)
    first.poll(0.1, 1)
    started_s = time.monotonic()
    first.commit({owned: (9, "at the end")})
    first.close()
    assert time.monotonic() - started_s < 20
    assert owned not in owners.of
    poll_until([second, third], lambda: len(second.assignment()) == len(third.assignment()) == 1)
    assert second.committed([owned]) == {owned: (9, "at the end")}
    assert time.monotonic() - started_s < 30


def test_waiting_for_a_join_does_not_spin(pair: Pair, third: ConsumerClient) -> None:
    _, first, second = pair
    # heartbeats rest meanwhile: an overdue one must not turn the wait into a loop
    time.sleep(2.5)
    cpu_s = time.thread_time()
    assert first.poll(1.0, 10) == []
    assert time.thread_time() - cpu_s < 0.3
    poll_until([first, second, third], lambda: not joins(first))


def test_a_member_that_is_thrown_out_while_it_joins_loses_its_partitions(
    kafka: KafkaSettings, pair: Pair, third: ConsumerClient
) -> None:
    owners, first, second = pair
    (owned,) = first.assignment()
    throw_out(kafka, first)
    poll_until([first, second, third], lambda: owners.lost != [])
    assert owners.lost == [("first", owned)]


def test_a_member_that_comes_back_leaves_its_partitions_to_their_new_owner(kafka: KafkaSettings, pair: Pair) -> None:
    owners, first, second = pair
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
    with joined(kafka, topic) as consumer:
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
    callbacks = [events.note(kind) for kind in ("assigned", "revoked", "lost")]
    with joined(named, topic) as before, joined(kafka, topic, *callbacks) as other:
        poll_until([before, other], lambda: len(before.assignment()) == len(other.assignment()) == 1)
        poll_until([before, other], lambda: not joins(before) and not joins(other))
        seen, owned = list(events.seen), before.assignment()
        with joined(named, topic) as after:
            poll_until([after, other], lambda: after.assignment() == owned)
            assert events.seen == seen
            with pytest.raises(BrokerError):
                before.commit(dict.fromkeys(owned, (1, "")))
            with pytest.raises(BrokerError, match=r"kafka\.instance"):
                poll_until([before], lambda: False, 10)


def test_closing_under_a_name_does_not_leave_the_group(kafka: KafkaSettings, topic: str) -> None:
    events = Events()
    with joined(kafka, topic, events.note("assigned"), events.note("revoked")) as other:
        with joined(msgspec.structs.replace(kafka, instance="worker-8"), topic) as before:
            poll_until([before, other], lambda: len(before.assignment()) == len(other.assignment()) == 1)
            poll_until([before, other], lambda: not joins(before) and not joins(other))
            seen = list(events.seen)
        deadline_s = time.monotonic() + 3
        while time.monotonic() < deadline_s:
            other.poll(0.2, 10)
        assert events.seen == seen


def test_a_join_whose_reason_is_gone_before_the_next_poll_is_still_taken_up(kafka: KafkaSettings, topic: str) -> None:
    """The leader rejoins because its topic has grown; the join itself, over between two polls, ends that reason."""
    with joined(kafka, topic) as consumer:
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
