"""The consumer on librdkafka (confluent-kafka)."""

from __future__ import annotations

import gc
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    Message,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.clients.protocol import FetchedBatch, GroupMember, Headers, Partition, PartitionsCallback
from streaming.clients.rdkafka_settings import REQUEST_TIMEOUT_MS, Connection, connection_settings, vendor_error
from streaming.clients.static_members import end_unfinished_membership

# As for kafka-python: a worker that was killed is missed after this long.
SESSION_TIMEOUT_MS = 10_000
HEARTBEAT_INTERVAL_MS = 2_000
FETCH_WAIT_MS = 50
FETCH_BYTES_MAX = 8 * 1024 * 1024
# What is fetched ahead of the loop, over all partitions.
QUEUED_KBYTES_MAX = 32 * 1024
COMMITTED_TIMEOUT_S = 30.0
# An assignment takes hold in librdkafka's own thread; a seek before then is refused.
SEEK_TIMEOUT_S, SEEK_PAUSE_S = 5.0, 0.002
REQUEST_S = REQUEST_TIMEOUT_MS / 1_000
# Giving partitions back needs no broker; what is fetched already stands before it in the queue, and is dropped.
GIVE_BACK_S, GIVE_BACK_PAUSE_S = 10.0, 0.005
ROWS_DROPPED_AT_ONCE = 10_000


class RdkafkaConsumer:
    """ConsumerClient on librdkafka; `group` None reads outside any group.

    With `kafka.instance` it is a static member, as KafkaPythonConsumer is.
    """

    def __init__(self, kafka: KafkaSettings, group: str | None, bootstrap_timeout_s: float = 30.0) -> None:
        self._kafka, self._group = kafka, group
        self._connection = Connection(kafka)
        self._asking: AdminClient | None = None
        self._next: dict[Partition, int] = {}
        self._callback_error: BaseException | None = None
        self._subscribed = self._closing = False
        settings = {
            **connection_settings(kafka, "cascade-consumer", self._connection.told),
            # without one there is no consumer; nothing is ever committed under this one
            "group.id": group if group is not None else f"cascade-no-group-{uuid.uuid4().hex}",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            # behind the last record may stand marks of transactions, which only this tells
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": SESSION_TIMEOUT_MS,
            "heartbeat.interval.ms": HEARTBEAT_INTERVAL_MS,
            "fetch.min.bytes": 1,
            "fetch.wait.max.ms": FETCH_WAIT_MS,
            "fetch.max.bytes": FETCH_BYTES_MAX,
            "fetch.queue.backoff.ms": 5,
            "queued.max.messages.kbytes": QUEUED_KBYTES_MAX,
        }
        if group is not None and kafka.instance:
            settings["group.instance.id"] = kafka.instance
        with self._connection.translated("connecting"):
            self._consumer = Consumer(settings)
        try:
            self._connection.wait(self._consumer, bootstrap_timeout_s)
        except BaseException:
            self._consumer.close()
            raise

    def subscribe(
        self,
        topics: Sequence[str],
        on_assigned: PartitionsCallback,
        on_revoked: PartitionsCallback,
        on_lost: PartitionsCallback | None = None,
    ) -> None:
        """See ConsumerClient."""
        wanted = [partition for topic in topics for partition in self.partitions_for(topic)]
        end_unfinished_membership(self._kafka, self._group, wanted)

        def assigned(_: Any, partitions: list[TopicPartition]) -> None:
            gained = sorted((one.topic, one.partition) for one in partitions)
            if not gained or self._closing:
                return  # the binding takes them, and they are given back next
            starts = self._starts(gained)
            self._consumer.incremental_assign(
                [TopicPartition(topic, number, starts[(topic, number)]) for topic, number in gained]
            )
            self._next.update(starts)
            self._call(on_assigned, gained)

        def going(callback: PartitionsCallback) -> Any:
            def gone(_: Any, partitions: list[TopicPartition]) -> None:
                if not partitions:
                    return
                lost = sorted(self._next.keys() & {(one.topic, one.partition) for one in partitions})
                for partition in lost:
                    del self._next[partition]
                if lost:
                    self._call(callback, lost)
                self._consumer.incremental_unassign(partitions)

            return gone

        with self._connection.translated("subscribing"):
            self._consumer.subscribe(
                list(topics), on_assign=assigned, on_revoke=going(on_revoked), on_lost=going(on_lost or on_revoked)
            )
        self._subscribed = True

    def assign(self, partitions: Sequence[Partition]) -> None:
        """See ConsumerClient."""
        starts = self.beginning_offsets(partitions)
        with self._connection.translated("assigning partitions"):
            self._consumer.assign([TopicPartition(*partition, starts[partition]) for partition in partitions])
        self._next = starts

    def assignment(self) -> set[Partition]:
        """See ConsumerClient."""
        return set(self._next)

    def poll(self, timeout_s: float, rows_max: int) -> list[FetchedBatch]:
        """See ConsumerClient."""
        give_up_s = time.monotonic() + timeout_s
        while True:
            with self._connection.translated("fetching"):
                # asked for many, librdkafka waits for all of them or the whole time
                first = self._consumer.consume(1, max(give_up_s - time.monotonic(), 0.0))
                messages = first + self._consumer.consume(rows_max - 1, 0) if first and rows_max > 1 else first
            self._raise_callback_error()
            batches = self._taken(messages)
            # all that came may be word that a partition's end was reached
            if batches or not messages:
                return batches

    def _taken(self, messages: list[Message]) -> list[FetchedBatch]:
        ends: list[Message] = []
        # by truth: compared to anything, the binding's errors raise what comes out elsewhere
        if any(map(Message.error, messages)):
            ends = self._ends(messages)
            messages = [message for message in messages if message.error() is None]
        # what was fetched under an earlier assignment is another's
        batches = [_fetched(one, found) for one, found in _by_partition(messages).items() if one in self._next]
        for batch in batches:
            self._next[batch.topic, batch.partition] = int(batch.offsets[-1]) + 1
        for end in ends:
            partition = (end.topic(), end.partition())
            if partition in self._next:
                self._next[partition] = max(self._next[partition], end.offset())
        return batches

    def _ends(self, messages: Iterable[Message]) -> list[Message]:
        """Those that say that their partition's end was reached, and where that is; raises what others say."""
        ends = []
        for message in messages:
            error = message.error()
            if error is None:
                continue
            if error.code() == KafkaError._PARTITION_EOF:
                ends.append(message)
            elif error.fatal() or not error.retriable():
                # the rest librdkafka tries again by itself
                raise self._connection.error("fetching", error)
        return ends

    def pause(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient; a partition that was taken away is passed over."""
        with self._connection.translated("pausing"):
            self._consumer.pause(_vendor(one for one in partitions if one in self._next))

    def resume(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient; a partition that was taken away is passed over."""
        with self._connection.translated("resuming"):
            self._consumer.resume(_vendor(one for one in partitions if one in self._next))

    def seek(self, partition: Partition, offset: int) -> None:
        """See ConsumerClient."""
        give_up_s = time.monotonic() + SEEK_TIMEOUT_S
        while True:
            try:
                with self._connection.translated(f"seeking {partition[0]}-{partition[1]} to {offset}"):
                    self._consumer.seek(TopicPartition(*partition, int(offset)))
            except BrokerError as error:
                told = vendor_error(error)
                if told is None or told.code() != KafkaError._STATE or time.monotonic() > give_up_s:
                    raise
                time.sleep(SEEK_PAUSE_S)
                continue
            self._next[partition] = int(offset)
            return

    def position(self, partition: Partition) -> int:
        """See ConsumerClient."""
        if partition not in self._next:
            raise BrokerError(f"Kafka at {self._kafka.bootstrap}: {partition[0]}-{partition[1]} is not assigned")
        return self._next[partition]

    def committed(self, partitions: Iterable[Partition]) -> dict[Partition, tuple[int, str]]:
        """See ConsumerClient."""
        with self._connection.translated("asking for committed offsets"):
            found = self._consumer.committed(_vendor(partitions), timeout=COMMITTED_TIMEOUT_S)
        self._check(found, "asking for committed offsets")
        return {(one.topic, one.partition): (one.offset, one.metadata or "") for one in found if one.offset >= 0}

    def member(self) -> GroupMember:
        """See ConsumerClient."""
        with self._connection.translated("asking for the membership"):
            # the broker would take it for a client outside the group's protocol, and check nothing
            is_member = self._group is not None and bool(self._consumer.memberid())
            return GroupMember(self._consumer.consumer_group_metadata() if is_member else None)

    def commit(self, offsets: Mapping[Partition, tuple[int, str]]) -> None:
        """See ConsumerClient; it may raise while the group rebalances, and can then be tried again."""
        if not offsets:
            return
        wanted = [
            TopicPartition(*partition, int(offset), metadata) for partition, (offset, metadata) in offsets.items()
        ]
        with self._connection.translated("committing offsets"):
            kept = self._consumer.commit(offsets=wanted, asynchronous=False)
        self._check(kept, "committing offsets")

    def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """See ConsumerClient."""
        return self._offsets_of(partitions, OffsetSpec.earliest(), "asking for the first offsets")

    def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """See ConsumerClient."""
        return self._offsets_of(partitions, OffsetSpec.latest(), "asking for the end offsets")

    def offsets_at(self, partitions: Iterable[Partition], time_ms: int) -> dict[Partition, int]:
        """See ConsumerClient."""
        found = self._offsets_of(partitions, OffsetSpec.for_timestamp(int(time_ms)), "asking for the offsets of a time")
        return found | self.end_offsets(one for one, offset in found.items() if offset < 0)

    def partitions_for(self, topic: str) -> list[Partition]:
        """See ConsumerClient."""
        with self._connection.translated(f"asking for the partitions of {topic}"):
            found = self._consumer.list_topics(topic, timeout=REQUEST_S).topics.get(topic)
        if found is None or found.error is not None or not found.partitions:
            raise BrokerError(
                f"Kafka at {self._kafka.bootstrap}: no topic {topic}; create it, or name another in kafka.topics"
            )
        return [(topic, number) for number in sorted(found.partitions)]

    def close(self) -> None:
        """See ConsumerClient."""
        try:
            with self._connection.translated("leaving the group"):
                self._give_back()
        finally:
            with self._connection.translated("leaving the group"):
                self._consumer.close()
        self._asking = None
        self._raise_callback_error()

    def _give_back(self) -> None:
        """End the membership, partitions given back first.

        The vendor's `close` with an assignment that was not taken yet has the group left before the partitions are
        given back: commits then fail, or the call, with the interpreter's lock, waits without end (librdkafka 4884).
        """
        if not self._subscribed:
            return
        self._closing = True
        self._consumer.unsubscribe()
        give_up_s = time.monotonic() + GIVE_BACK_S
        while True:
            self._consumer.consume(ROWS_DROPPED_AT_ONCE, GIVE_BACK_PAUSE_S)
            if not self._consumer.assignment() or time.monotonic() > give_up_s:
                return

    def _starts(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """Where gained partitions begin: what is committed now, without waiting for transactions under way."""
        action = "asking for committed offsets"
        asked = ConsumerGroupTopicPartitions(self._group, _vendor(partitions))
        with self._connection.translated(action):
            answer = self._admin().list_consumer_group_offsets([asked], require_stable=False, request_timeout=REQUEST_S)
            found = answer[self._group].result().topic_partitions
        self._check(found, action)
        offsets = {(one.topic, one.partition): one.offset for one in found}
        never = [partition for partition in partitions if offsets.get(partition, -1) < 0]
        return offsets | self.beginning_offsets(never)

    def _offsets_of(self, partitions: Iterable[Partition], spec: OffsetSpec, action: str) -> dict[Partition, int]:
        wanted = dict.fromkeys(_vendor(partitions), spec)
        if not wanted:
            return {}
        with self._connection.translated(action):
            asked = self._admin().list_offsets(
                wanted, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=REQUEST_S
            )
            return {(one.topic, one.partition): answer.result().offset for one, answer in asked.items()}

    def _admin(self) -> AdminClient:
        """A connection of its own for questions: on the consumer's they wait behind its fetches, 50 ms each."""
        if self._asking is None:
            self._asking = AdminClient(connection_settings(self._kafka, "cascade-admin", self._connection.told))
        return self._asking

    def _call(self, callback: PartitionsCallback, partitions: list[Partition]) -> None:
        """What a callback raises is kept for the caller of `poll` or `close`: librdkafka must finish the rebalance."""
        try:
            callback(partitions)
        except BaseException as error:
            self._callback_error = self._callback_error or error

    def _raise_callback_error(self) -> None:
        if self._callback_error is not None:
            error, self._callback_error = self._callback_error, None
            raise error

    def _check(self, partitions: Iterable[TopicPartition] | None, action: str) -> None:
        for one in partitions or ():
            if one.error is not None:
                raise self._connection.error(action, one.error)


def _by_partition(messages: list[Message]) -> dict[Partition, list[Message]]:
    """In the order of first appearance; they come in long runs of one partition."""
    found: defaultdict[Partition, list[Message]] = defaultdict(list)
    homes = zip(map(Message.topic, messages), map(Message.partition, messages), strict=True)
    for home, run in groupby(zip(homes, messages, strict=True), itemgetter(0)):
        found[home].extend(map(itemgetter(1), run))
    return found


def _fetched(partition: Partition, messages: list[Message]) -> FetchedBatch:
    # a Python step for each record and field would cost more than librdkafka does for all of it
    rows = len(messages)
    return FetchedBatch(
        topic=partition[0],
        partition=partition[1],
        offsets=np.fromiter(map(Message.offset, messages), np.int64, rows),
        timestamps_ms=np.fromiter(map(itemgetter(1), map(Message.timestamp, messages)), np.int64, rows),
        keys=list(map(Message.key, messages)),
        values=list(map(Message.value, messages)),
        headers=_headers(messages),
    )


def _headers(messages: list[Message]) -> list[Headers]:
    try:
        return [found or () for found in map(Message.headers, messages)]
    except (SystemError, UnicodeDecodeError):
        return [_lenient_headers(message) for message in messages]


def _lenient_headers(message: Message) -> Headers:
    """A record's headers where some name is not UTF-8; in its place stands a question mark.

    The binding raises once for such a record, and keeps pairs with a hole for the name: reading it would crash the
    interpreter. What a pair refers to says whether there is one, since the garbage collector has to live with holes.
    """
    try:
        found = message.headers()
    except (SystemError, UnicodeDecodeError):
        found = message.headers()
    return [(pair[0] if len(gc.get_referents(pair)) == 2 else "?", pair[1]) for pair in found or ()]


def _vendor(partitions: Iterable[Partition]) -> list[TopicPartition]:
    return [TopicPartition(*partition) for partition in partitions]
