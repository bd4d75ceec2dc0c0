"""The consumer on librdkafka (confluent-kafka)."""

from __future__ import annotations

import gc
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence
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
from streaming.kafka import limits
from streaming.kafka.protocol import FetchedBatch, GroupMember, Headers, Offsets, Partition, PartitionsCallback
from streaming.kafka.rdkafka_settings import Connection, connection_settings, vendor_error
from streaming.kafka.static_members import end_unfinished_membership

# Limits what librdkafka fetches ahead of `poll`, over all partitions.
QUEUED_KBYTES_MAX = 32 * 1024
# How long a poll may take to notice `wake`.
WAKE_S = 0.02
# librdkafka applies an assignment in its own thread, and refuses a seek before that.
SEEK_TIMEOUT_S, SEEK_PAUSE_S = 5.0, 0.002
REQUEST_S = limits.REQUEST_TIMEOUT_MS / 1_000
# Unassigning needs no broker, but the event follows the fetched records in the queue; these are dropped.
UNASSIGN_S_MAX, UNASSIGN_PAUSE_S = 10.0, 0.005
ROWS_DROPPED_AT_ONCE = 10_000


class RdkafkaConsumer:
    """ConsumerClient on librdkafka; `group` None reads outside any group.

    With `kafka.instance` it is a static member, as KafkaPythonConsumer is.
    """

    def __init__(self, kafka: KafkaSettings, group: str | None) -> None:
        self._kafka, self._group = kafka, group
        self._connection = Connection(kafka)
        self._admin_client: AdminClient | None = None
        self._next: dict[Partition, int] = {}
        self._callback_error: BaseException | None = None
        self._woken = threading.Event()
        self._subscribed = self._joined = self._closing = False
        settings = {
            **connection_settings(kafka, "cascade-consumer", self._connection.on_error),
            # librdkafka requires a group id; nothing is ever committed under this one
            "group.id": group if group is not None else f"cascade-no-group-{uuid.uuid4().hex}",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            # control records may follow the last record; only this event gives their offsets
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": limits.SESSION_TIMEOUT_MS,
            "heartbeat.interval.ms": limits.HEARTBEAT_INTERVAL_MS,
            "fetch.min.bytes": 1,
            "fetch.wait.max.ms": limits.FETCH_WAIT_MS,
            "fetch.max.bytes": limits.FETCH_BYTES_MAX,
            "fetch.queue.backoff.ms": 5,
            "queued.max.messages.kbytes": QUEUED_KBYTES_MAX,
        }
        if group is not None and kafka.instance:
            settings["group.instance.id"] = kafka.instance
        with self._connection.translated("connecting"):
            self._consumer = Consumer(settings)
        try:
            self._connection.wait(self._consumer)
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
            # librdkafka calls back for an empty assignment too
            self._joined = True
            gained = sorted(map(_plain, partitions))
            if not gained or self._closing:
                return  # the binding assigns them, and `close` unassigns them
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
                lost = sorted(self._next.keys() & set(map(_plain, partitions)))
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

    def joined(self) -> bool:
        """See ConsumerClient."""
        return self._joined

    def poll(self, timeout_s: float, rows_max: int) -> list[FetchedBatch]:
        """See ConsumerClient."""
        give_up_s = time.monotonic() + timeout_s
        while True:
            left_s = max(give_up_s - time.monotonic(), 0.0)
            with self._connection.translated("fetching"):
                # for more than a message librdkafka waits until all are there, or for the whole timeout
                first = self._consumer.consume(1, min(left_s, WAKE_S))
                messages = first + self._consumer.consume(rows_max - 1, 0) if first and rows_max > 1 else first
            self._raise_callback_error()
            batches = self._taken(messages)
            # all messages may have been end-of-partition events
            ended = not messages and (left_s <= WAKE_S or self._woken.is_set())
            if batches or ended:
                self._woken.clear()
                return batches

    def wake(self) -> None:
        """See ConsumerClient."""
        self._woken.set()

    def _taken(self, messages: list[Message]) -> list[FetchedBatch]:
        ends: list[Message] = []
        # by truth value: a comparison with the binding's errors raises an exception that surfaces elsewhere
        if any(map(Message.error, messages)):
            ends = self._ends(messages)
            messages = [message for message in messages if message.error() is None]
        # drops records that were fetched under an earlier assignment
        by_partition = _by_partition(messages)
        batches = [_fetched(partition, found) for partition, found in by_partition.items() if partition in self._next]
        for batch in batches:
            self._next[batch.topic, batch.partition] = int(batch.offsets[-1]) + 1
        for end in ends:
            partition = (end.topic(), end.partition())
            if partition in self._next:
                self._next[partition] = max(self._next[partition], end.offset())
        return batches

    def _ends(self, messages: Iterable[Message]) -> list[Message]:
        """Returns the end-of-partition events; raises the error of any other event that librdkafka does not retry."""
        ends = []
        for message in messages:
            error = message.error()
            if error is None:
                continue
            if error.code() == KafkaError._PARTITION_EOF:
                ends.append(message)
            elif error.fatal() or not error.retriable():
                # librdkafka retries the others itself
                raise self._connection.error("fetching", error)
        return ends

    def pause(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient; ignores partitions that are not assigned any more."""
        with self._connection.translated("pausing"):
            self._consumer.pause(_vendor(partition for partition in partitions if partition in self._next))

    def resume(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient; ignores partitions that are not assigned any more."""
        with self._connection.translated("resuming"):
            self._consumer.resume(_vendor(partition for partition in partitions if partition in self._next))

    def seek(self, partition: Partition, offset: int) -> None:
        """See ConsumerClient."""
        give_up_s = time.monotonic() + SEEK_TIMEOUT_S
        while True:
            try:
                with self._connection.translated(f"seeking {partition[0]}-{partition[1]} to {offset}"):
                    self._consumer.seek(TopicPartition(*partition, int(offset)))
            except BrokerError as error:
                cause = vendor_error(error)
                if cause is None or cause.code() != KafkaError._STATE or time.monotonic() > give_up_s:
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
            found = self._consumer.committed(_vendor(partitions), timeout=limits.COMMITTED_TIMEOUT_S)
        self._check(found, "asking for committed offsets")
        return {_plain(stored): (stored.offset, stored.metadata or "") for stored in found if stored.offset >= 0}

    def member(self) -> GroupMember:
        """See ConsumerClient."""
        with self._connection.translated("asking for the membership"):
            # with other metadata the broker takes the client for a simple consumer and checks nothing
            is_member = self._group is not None and bool(self._consumer.memberid())
            return GroupMember(self._consumer.consumer_group_metadata() if is_member else None)

    def commit(self, offsets: Offsets) -> None:
        """See ConsumerClient; an error during a rebalance can be retried."""
        if not offsets:
            return
        wanted = [
            TopicPartition(*partition, int(offset), metadata) for partition, (offset, metadata) in offsets.items()
        ]
        with self._connection.translated("committing offsets"):
            answer = self._consumer.commit(offsets=wanted, asynchronous=False)
        self._check(answer, "committing offsets")

    def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """See ConsumerClient."""
        return self._offsets_of(partitions, OffsetSpec.earliest(), "asking for the first offsets")

    def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """See ConsumerClient."""
        return self._offsets_of(partitions, OffsetSpec.latest(), "asking for the end offsets")

    def offsets_at(self, partitions: Iterable[Partition], time_ms: int) -> dict[Partition, int]:
        """See ConsumerClient."""
        found = self._offsets_of(partitions, OffsetSpec.for_timestamp(int(time_ms)), "asking for the offsets of a time")
        return found | self.end_offsets(partition for partition, offset in found.items() if offset < 0)

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
                self._unassign()
        finally:
            with self._connection.translated("leaving the group"):
                self._consumer.close()
        self._admin_client = None
        self._raise_callback_error()

    def _unassign(self) -> None:
        """Unassigns the partitions, and then leaves the group.

        librdkafka's `close`, with an assignment that is not processed yet, leaves the group before it revokes the
        partitions: commits then fail, or the call never returns and keeps the interpreter lock (librdkafka 4884).
        """
        if not self._subscribed:
            return
        self._closing = True
        self._consumer.unsubscribe()
        give_up_s = time.monotonic() + UNASSIGN_S_MAX
        while True:
            self._consumer.consume(ROWS_DROPPED_AT_ONCE, UNASSIGN_PAUSE_S)
            if not self._consumer.assignment() or time.monotonic() > give_up_s:
                return

    def _starts(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """Returns the first offset to read of assigned partitions; does not wait for open transactions."""
        action = "asking for committed offsets"
        asked = ConsumerGroupTopicPartitions(self._group, _vendor(partitions))
        with self._connection.translated(action):
            answer = self._admin().list_consumer_group_offsets([asked], require_stable=False, request_timeout=REQUEST_S)
            found = answer[self._group].result().topic_partitions
        self._check(found, action)
        offsets = {_plain(stored): stored.offset for stored in found}
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
            return {_plain(partition): answer.result().offset for partition, answer in asked.items()}

    def _admin(self) -> AdminClient:
        """A separate connection for queries: on the consumer's connection they wait for its fetches, 50 ms each."""
        if self._admin_client is None:
            self._admin_client = AdminClient(
                connection_settings(self._kafka, "cascade-admin", self._connection.on_error)
            )
        return self._admin_client

    def _call(self, callback: PartitionsCallback, partitions: list[Partition]) -> None:
        """Stores a callback's error for the caller of `poll` or `close`, since librdkafka must finish the rebalance."""
        try:
            callback(partitions)
        except BaseException as error:
            self._callback_error = self._callback_error or error

    def _raise_callback_error(self) -> None:
        if self._callback_error is not None:
            error, self._callback_error = self._callback_error, None
            raise error

    def _check(self, partitions: Iterable[TopicPartition] | None, action: str) -> None:
        for partition in partitions or ():
            if partition.error is not None:
                raise self._connection.error(action, partition.error)


def _by_partition(messages: list[Message]) -> dict[Partition, list[Message]]:
    """Groups messages by partition, in order of first appearance; messages come in long runs of a partition."""
    found: defaultdict[Partition, list[Message]] = defaultdict(list)
    partitions = zip(map(Message.topic, messages), map(Message.partition, messages), strict=True)
    for partition, run in groupby(zip(partitions, messages, strict=True), itemgetter(0)):
        found[partition].extend(map(itemgetter(1), run))
    return found


def _fetched(partition: Partition, messages: list[Message]) -> FetchedBatch:
    # map() avoids a Python step for each record and field, which would cost more than librdkafka's own work
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
    """Returns a record's headers; names that are not UTF-8 become a question mark.

    The binding raises once for such a record, and caches tuples whose name is a null pointer: reading it would crash
    the interpreter. The tuple's referents, as the garbage collector sees them, show whether the name is there.
    """
    try:
        found = message.headers()
    except (SystemError, UnicodeDecodeError):
        found = message.headers()
    return [(pair[0] if len(gc.get_referents(pair)) == 2 else "?", pair[1]) for pair in found or ()]


def _vendor(partitions: Iterable[Partition]) -> list[TopicPartition]:
    return [TopicPartition(*partition) for partition in partitions]


def _plain(partition: TopicPartition) -> Partition:
    return partition.topic, partition.partition
