"""kafka-python's rebalances, which are eager: what they do to partitions, and that none has two owners."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, suppress
from typing import Any, NamedTuple

import msgspec
import pytest
from kafka import KafkaAdminClient
from kafka.admin import MemberToRemove, NewPartitions

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import ConsumerClient, Partition
from tests.streaming.kafka.helpers import (
    Events,
    fill,
    gather,
    joined,
    kafka_python_only,
    poll_until,
)

pytestmark = pytest.mark.kafka


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
            for partition in partitions:
                self.of.pop(partition)

        return joined(kafka, topic, assigned, revoked, lost)


class Pair(NamedTuple):
    """Two members with a partition each."""

    owners: Owners
    first: ConsumerClient
    second: ConsumerClient

    def settle(self, *others: ConsumerClient) -> None:
        """Until each member of three has its share."""
        members = [self.first, self.second, *others]
        poll_until(members, lambda: all(member.joined() for member in members) and len(self.owners.of) == 2)


@pytest.fixture
def pair(kafka: KafkaSettings, topic: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    # so long that a busy machine differs from a member that is waited for
    monkeypatch.setattr("streaming.kafka.limits.SESSION_TIMEOUT_MS", 45_000)
    owners = Owners()
    with owners.member("first", kafka, topic) as first, owners.member("second", kafka, topic) as second:
        poll_until([first, second], lambda: sorted(owners.of.values()) == ["first", "second"])
        yield Pair(owners, first, second)


def throw_out(kafka: KafkaSettings, consumer: ConsumerClient) -> None:
    vendor: Any = consumer.member().vendor
    with closing(KafkaAdminClient(bootstrap_servers=kafka.servers)) as admin:
        admin.remove_group_members(kafka.group, [MemberToRemove(member_id=vendor.member_id)])


@kafka_python_only
def test_kafka_python_returns_nothing_while_a_join_waits_and_does_not_spin(
    kafka: KafkaSettings, topic: str, pair: Pair
) -> None:
    owners, first, second = pair
    with joined(kafka, topic) as third:
        poll_until([third, first], lambda: not first.joined())
        assert first.assignment() == set()
        fill(kafka, topic, 40)
        cpu_s, started_s = time.thread_time(), time.monotonic()
        assert first.poll(0.05, 10) == []
        # a poll goes on during a join: what ends between two of them is begun again
        assert time.monotonic() - started_s > 0.9
        assert time.thread_time() - cpu_s < 0.3
        pair.settle(third)
        ends = third.end_offsets([(topic, 0), (topic, 1)])
        for member in (first, second, third):
            for partition in member.assignment():
                member.seek(partition, 0)
                assert sum(map(len, gather(member, ends.pop(partition)))) > 0
        assert ends == {}
    assert owners.offences == []


@kafka_python_only
def test_a_member_that_is_closed_while_it_joins_has_committed_and_is_waited_for_no_longer_than_its_session(
    kafka: KafkaSettings, topic: str, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.kafka.kafka_consumer.CLOSE_TIMEOUT_S", 2.0)
    owners, first, second = pair
    (owned,) = first.assignment()
    with joined(kafka, topic) as third:
        first.commit({owned: (0, "before")})
        poll_until([third, first], lambda: not first.joined())
        assert owned not in owners.of
        started_s = time.monotonic()
        first.close()
        assert time.monotonic() - started_s < 20
        poll_until([second, third], lambda: second.joined() and third.joined(), 90)
        assert second.committed([owned]) == {owned: (0, "before")}


@kafka_python_only
def test_a_member_that_is_thrown_out_loses_its_partitions_and_comes_back(kafka: KafkaSettings, pair: Pair) -> None:
    owners, first, second = pair
    (gone,) = first.assignment()
    throw_out(kafka, first)
    poll_until([first], lambda: owners.lost != [])
    poll_until([first, second], lambda: sorted(owners.of.values()) == ["first", "second"])
    assert owners.lost == [("first", gone)]
    assert owners.offences == []


@kafka_python_only
def test_a_commit_of_a_member_that_was_thrown_out_is_refused(kafka: KafkaSettings, topic: str) -> None:
    with joined(kafka, topic) as consumer:
        poll_until([consumer], lambda: len(consumer.assignment()) == 2)
        throw_out(kafka, consumer)
        with pytest.raises(BrokerError) as caught:
            consumer.commit({(topic, 0): (1, "")})
        assert "\n" not in str(caught.value)


@kafka_python_only
def test_a_restart_under_the_same_name_gets_its_partitions_and_fences_the_earlier_member(
    kafka: KafkaSettings, topic: str
) -> None:
    named = msgspec.structs.replace(kafka, instance="worker-7")
    events = Events()
    callbacks = [events.note(kind) for kind in ("assigned", "revoked", "lost")]
    with joined(named, topic) as before, joined(kafka, topic, *callbacks) as other:
        poll_until([before, other], lambda: len(before.assignment()) == len(other.assignment()) == 1)
        seen, owned = list(events.seen), before.assignment()
        with joined(named, topic) as after:
            poll_until([after, other], lambda: after.assignment() == owned)
            assert events.seen == seen
            with pytest.raises(BrokerError):
                before.commit(dict.fromkeys(owned, (1, "")))


@kafka_python_only
def test_closing_under_a_name_does_not_leave_the_group(kafka: KafkaSettings, topic: str) -> None:
    events = Events()
    with joined(kafka, topic, events.note("assigned"), events.note("revoked")) as other:
        with joined(msgspec.structs.replace(kafka, instance="worker-8"), topic) as before:
            poll_until([before, other], lambda: len(before.assignment()) == len(other.assignment()) == 1)
            seen = list(events.seen)
        deadline_s = time.monotonic() + 3
        while time.monotonic() < deadline_s:
            other.poll(0.2, 10)
        assert events.seen == seen


@kafka_python_only
def test_a_topic_that_has_grown_is_assigned_anew_by_this_session_or_the_next(
    kafka: KafkaSettings, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.kafka.kafka_consumer.JOIN_S_MAX", 5.0)
    with joined(kafka, topic) as consumer:
        poll_until([consumer], lambda: len(consumer.assignment()) == 2)
        with closing(KafkaAdminClient(bootstrap_servers=kafka.servers)) as admin:
            admin.create_partitions({topic: NewPartitions(3)})
        vendor: Any = consumer._consumer  # type: ignore[attr-defined]
        with suppress(BrokerError):
            # asks for the metadata, which the consumer does itself every five minutes
            poll_until([consumer], lambda: bool(vendor.topics()) and len(consumer.assignment()) == 3)
    with joined(kafka, topic) as consumer:
        poll_until([consumer], lambda: len(consumer.assignment()) == 3)


@kafka_python_only
def test_a_join_that_does_not_end_ends_the_session(
    kafka: KafkaSettings, topic: str, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.kafka.kafka_consumer.JOIN_S_MAX", 2.0)
    with joined(kafka, topic) as third, pytest.raises(BrokerError, match="joining the group: not done after 2 s"):
        # the second does not poll
        poll_until([pair.first, third], lambda: False)
