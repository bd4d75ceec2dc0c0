"""The consumer on librdkafka, by its C API."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import limits
from streaming.kafka.protocol import FetchedBatch, GroupMember, Offsets, Partition, PartitionsCallback
from streaming.kafka.rdkafka_group import GroupMetadata, member_id
from streaming.kafka.rdkafka_handle import Handle
from streaming.kafka.rdkafka_library import (
    ANY_PARTITION,
    CONSUMER,
    NO_OFFSET,
    REBALANCE_CALLBACK,
    Listed,
    Partitions,
    check,
    check_error,
    decoded,
    listed,
    milliseconds,
    offset_list,
    partition_list,
    rdkafka,
)
from streaming.kafka.rdkafka_messages import Event, MessageReader
from streaming.kafka.rdkafka_settings import Connection, connection_settings, vendor_error
from streaming.kafka.static_members import end_unfinished_membership

# Limits what librdkafka fetches ahead of `poll`, over all partitions.
QUEUED_KBYTES_MAX = 1024
# A poll waits at most this long at once: Python runs the handlers of signals between two calls of librdkafka.
WAIT_S_MAX = 0.5
# librdkafka applies an assignment in its own thread, and refuses a seek before that.
SEEK_TIMEOUT_S, SEEK_PAUSE_S = 5.0, 0.002
REQUEST_S = limits.REQUEST_TIMEOUT_MS / 1_000
# librdkafka does not ask again where the leader of a partition has just changed, or a topic is new.
LEADER_PAUSE_S = 0.05
_LEADER_MOVES = (
    KafkaError._NOENT,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
)
# A commit is sent again to a coordinator that moves; then the caller learns that there was no answer.
COMMIT_S_MAX = 2 * REQUEST_S
# Unassigning needs no broker, but the event follows the fetched records in the queue; these are dropped.
UNASSIGN_S_MAX, UNASSIGN_PAUSE_S = 10.0, 0.005
ROWS_DROPPED_AT_ONCE = 10_000
LEAVE_S_MAX = 10.0


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
        self._on_assigned: PartitionsCallback | None = None
        self._on_revoked: PartitionsCallback | None = None
        self._on_lost: PartitionsCallback | None = None
        self._woken = self._joined = self._closing = False
        # no other thread wakes the queue while it is destroyed
        self._waking = threading.Lock()
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
        rebalanced = REBALANCE_CALLBACK(_weakly(self._rebalanced))
        with self._connection.translated("connecting"):
            self._client = Handle(
                CONSUMER,
                settings,
                lambda configuration: rdkafka.conf_set_rebalance_cb(configuration, rebalanced),
                kept=rebalanced,
            )
        try:
            self._connection.wait(self._client)
            self._queue = self._client.consumer_queue()
            self._reader = MessageReader(self._queue)
        except BaseException:
            self._client.destroy()
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
        if self._group is not None:
            end_unfinished_membership(self._kafka, self._connection, self._admin(), self._group, wanted)
        self._on_assigned, self._on_revoked, self._on_lost = on_assigned, on_revoked, on_lost or on_revoked
        with (
            self._connection.translated("subscribing"),
            partition_list((topic, ANY_PARTITION) for topic in topics) as subscribed,
        ):
            check(rdkafka.subscribe(self._client.address, subscribed))

    def assign(self, partitions: Sequence[Partition]) -> None:
        """See ConsumerClient."""
        starts = self.beginning_offsets(partitions)
        with self._connection.translated("assigning partitions"), _offset_list(starts) as assigned:
            check(rdkafka.assign(self._client.address, assigned))
        self._next = starts

    def assignment(self) -> set[Partition]:
        """See ConsumerClient."""
        return set(self._next)

    def joined(self) -> bool:
        """See ConsumerClient."""
        return self._joined

    def poll(self, timeout_s: float, rows_max: int) -> list[FetchedBatch]:
        """See ConsumerClient."""
        give_up_s, left_s = time.monotonic() + timeout_s, timeout_s
        while True:
            wait_s = 0.0 if self._woken else WAIT_S_MAX if left_s > WAIT_S_MAX else left_s
            fetched, events = self._reader.read(wait_s, rows_max)
            if self._callback_error is not None:
                self._raise_callback_error()
            batches = []
            for batch in fetched:
                partition = (batch.topic, batch.partition)
                # drops records that were fetched under an earlier assignment
                if partition in self._next:
                    self._next[partition] = batch.offsets.item(-1) + 1
                    batches.append(batch)
            for event in events:
                self._take_event(event)
            # callbacks and ends of partitions interrupt the wait too
            if batches or self._woken or (left_s := give_up_s - time.monotonic()) <= 0.0:
                self._woken = False
                return batches

    def wake(self) -> None:
        """See ConsumerClient."""
        with self._waking:
            if not self._closing:
                self._woken = True
                rdkafka.queue_yield(self._queue)

    def _take_event(self, event: Event) -> None:
        """Notes an end of a partition; raises any other event."""
        if event.error.code() != KafkaError._PARTITION_EOF:
            raise self._connection.error("fetching", event.error)
        if event.partition in self._next:
            self._next[event.partition] = max(self._next[event.partition], event.offset)

    def pause(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient; ignores partitions that are not assigned any more."""
        with self._connection.translated("pausing"), partition_list(self._owned(partitions)) as paused:
            check(rdkafka.pause_partitions(self._client.address, paused))

    def resume(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient; ignores partitions that are not assigned any more."""
        owned = self._owned(partitions)
        with self._connection.translated("resuming"), partition_list(owned) as resumed:
            check(rdkafka.resume_partitions(self._client.address, resumed))
        self._begin_fetching(owned)

    def _begin_fetching(self, partitions: Iterable[Partition]) -> None:
        """Wakes the threads of the brokers that lead these partitions.

        To resume does not: a thread without a partition to fetch looks again after up to a second (librdkafka 2.16). A
        request wakes it, and its answer, for which nobody waits, is dropped.
        """
        low, high = ctypes.c_int64(), ctypes.c_int64()
        for topic, partition_id in partitions:
            rdkafka.query_watermark_offsets(
                self._client.address, topic.encode(), partition_id, ctypes.byref(low), ctypes.byref(high), 0
            )

    def seek(self, partition: Partition, offset: int) -> None:
        """See ConsumerClient."""
        give_up_s = time.monotonic() + SEEK_TIMEOUT_S
        action = f"seeking {partition[0]}-{partition[1]} to {offset}"
        while True:
            try:
                with self._connection.translated(action), _offset_list({partition: int(offset)}) as sought:
                    check_error(rdkafka.seek_partitions(self._client.address, sought, milliseconds(SEEK_TIMEOUT_S)))
                    for found in listed(sought):
                        if found.error is not None:
                            raise KafkaException(found.error)
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
        action = "asking for committed offsets"
        with self._connection.translated(action):
            found = _committed(self._client.address, partitions, limits.COMMITTED_TIMEOUT_S)
        self._check(found, action)
        return {stored.partition: (stored.offset, stored.metadata) for stored in found if stored.offset >= 0}

    def member(self) -> GroupMember:
        """See ConsumerClient."""
        client = self._client.address
        # first: a membership that ends is not followed by another before the next poll
        metadata = GroupMetadata(client)
        # with other metadata the broker takes the client for a simple consumer and checks nothing
        is_member = self._group is not None and bool(member_id(client)) and not rdkafka.assignment_lost(client)
        return GroupMember(metadata if is_member else None)

    def commit(self, offsets: Offsets) -> None:
        """See ConsumerClient; an error during a rebalance can be retried."""
        if not offsets:
            return
        action = "committing offsets"
        with self._connection.translated(action):
            self._check(_commit(self._client.address, offsets), action)

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
            found = self._admin().list_topics(topic, timeout=REQUEST_S).topics.get(topic)
        if found is None or found.error is not None or not found.partitions:
            raise BrokerError(
                f"Kafka at {self._kafka.bootstrap}: no topic {topic}; create it, or name another in kafka.topics"
            )
        return [(topic, number) for number in sorted(found.partitions)]

    def close(self) -> None:
        """See ConsumerClient."""
        with self._waking:
            if self._closing:
                return
            self._closing = True
        try:
            with self._connection.translated("leaving the group"):
                self._unassign()
                self._leave()
        finally:
            self._client.destroy()
            self._admin_client = None
        self._raise_callback_error()

    def _leave(self) -> None:
        """Leaves the group; after LEAVE_S_MAX the client is left behind, and KafkaException is raised.

        librdkafka waits for the answers to all commits, without a time limit if the broker is gone. It calls back only
        while this queue is read, so that no thread calls back into an interpreter that has ended.
        """
        queue = self._client.new_queue()
        check_error(rdkafka.consumer_close_queue(self._client.address, queue))
        reader, give_up_s = MessageReader(queue), time.monotonic() + LEAVE_S_MAX
        while not rdkafka.consumer_closed(self._client.address):
            reader.drop(UNASSIGN_PAUSE_S, ROWS_DROPPED_AT_ONCE)
            if time.monotonic() > give_up_s:
                self._client.leave_behind()
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"no answer within {LEAVE_S_MAX:g} s"))

    def _unassign(self) -> None:
        """Unassigns the partitions, and then leaves the group.

        librdkafka's `close`, with an assignment that is not processed yet, leaves the group before it revokes the
        partitions: commits then fail, or the call never returns (librdkafka 4884).
        """
        if self._on_assigned is None:
            return
        check(rdkafka.unsubscribe(self._client.address))
        give_up_s = time.monotonic() + UNASSIGN_S_MAX
        while True:
            self._reader.drop(UNASSIGN_PAUSE_S, ROWS_DROPPED_AT_ONCE)
            if not _assignment(self._client.address) or time.monotonic() > give_up_s:
                return

    def _rebalanced(self, code: int, partitions: Any) -> None:
        """Carries out a rebalance of the group, and stores an error for the caller of `poll` or `close`."""
        changed = sorted(found.partition for found in listed(partitions))
        try:
            if code == KafkaError._ASSIGN_PARTITIONS:
                self._gain(changed)
            elif code == KafkaError._REVOKE_PARTITIONS:
                self._give_up(changed, partitions)
            else:
                check(rdkafka.assign(self._client.address, None))
        except BaseException as error:  # no exception passes through librdkafka
            self._callback_error = self._callback_error or error
        # ends the poll: its caller has work to do for partitions that it has gained
        self._woken = True

    def _gain(self, gained: list[Partition]) -> None:
        # librdkafka calls back for an empty assignment too
        self._joined = True
        starts: dict[Partition, int] = {}
        try:
            # `close` unassigns what is assigned meanwhile
            starts = {} if self._closing else self._starts(gained)
        finally:
            with _offset_list(dict.fromkeys(gained, NO_OFFSET) | starts) as assigned:
                check_error(rdkafka.incremental_assign(self._client.address, assigned))
        if starts and self._on_assigned is not None:
            self._next.update(starts)
            self._on_assigned(gained)

    def _give_up(self, gone: list[Partition], partitions: Any) -> None:
        lost = bool(rdkafka.assignment_lost(self._client.address))
        callback = self._on_lost if lost else self._on_revoked
        owned = self._owned(gone)
        for partition in owned:
            del self._next[partition]
        try:
            if owned and callback is not None:
                callback(owned)
        finally:
            check_error(rdkafka.incremental_unassign(self._client.address, partitions))

    def _owned(self, partitions: Iterable[Partition]) -> list[Partition]:
        return [partition for partition in partitions if partition in self._next]

    def _starts(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """Returns the first offset to read of assigned partitions; does not wait for open transactions."""
        if not partitions:
            return {}
        action = "asking for committed offsets"
        # A consumer of its own, which does not join: this one would wait for open transactions. An AdminClient ends the
        # process where the coordinator has moved (librdkafka 5040).
        settings = connection_settings(self._kafka, "cascade-offsets", self._connection.on_error)
        with self._connection.translated(action):
            asking = Handle(CONSUMER, {**settings, "group.id": self._group, "isolation.level": "read_uncommitted"})
            try:
                found = _committed(asking.address, partitions, REQUEST_S)
            finally:
                asking.destroy()
        self._check(found, action)
        offsets = {stored.partition: stored.offset for stored in found if stored.offset >= 0}
        return offsets | self.beginning_offsets(partition for partition in partitions if partition not in offsets)

    def _offsets_of(self, partitions: Iterable[Partition], spec: OffsetSpec, action: str) -> dict[Partition, int]:
        wanted = dict.fromkeys(_vendor(partitions), spec)
        if not wanted:
            return {}
        give_up_s = time.monotonic() + REQUEST_S
        while True:
            try:
                with self._connection.translated(action):
                    asked = self._admin().list_offsets(
                        wanted, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=REQUEST_S
                    )
                    return {(found.topic, found.partition): answer.result().offset for found, answer in asked.items()}
            except BrokerError as error:
                cause = vendor_error(error)
                if cause is None or cause.code() not in _LEADER_MOVES or time.monotonic() > give_up_s:
                    raise
            time.sleep(LEADER_PAUSE_S)

    def _admin(self) -> AdminClient:
        """A separate connection for queries: on the consumer's connection they wait for its fetches."""
        if self._admin_client is None:
            self._admin_client = AdminClient(
                connection_settings(self._kafka, "cascade-admin", self._connection.on_error)
            )
        return self._admin_client

    def _raise_callback_error(self) -> None:
        error, self._callback_error = self._callback_error, None
        if error is not None:
            raise error

    def _check(self, partitions: Iterable[Listed], action: str) -> None:
        for found in partitions:
            if found.error is not None:
                raise self._connection.error(action, found.error)


def _committed(client: int, partitions: Iterable[Partition], timeout_s: float) -> list[Listed]:
    """The committed offsets of the client's group; raises KafkaException."""
    with partition_list(partitions) as asked:
        check(rdkafka.committed(client, asked, milliseconds(timeout_s)))
        return listed(asked)


def _commit(client: int, offsets: Offsets) -> list[Listed]:
    """Commits offsets, and returns the answer for each partition; raises KafkaException."""
    queue = rdkafka.queue_new(client)
    event = None
    try:
        with offset_list(offsets) as wanted:
            check(rdkafka.commit_queue(client, wanted, queue, None, None))
        event = rdkafka.queue_poll(queue, milliseconds(COMMIT_S_MAX))
        if event is None:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"no answer within {COMMIT_S_MAX:g} s"))
        answer = listed(rdkafka.event_topic_partition_list(event))
        code = rdkafka.event_error(event)
        if code and not any(found.error for found in answer):
            raise KafkaException(KafkaError(code, decoded(rdkafka.event_error_string(event))))
        return answer
    finally:
        if event is not None:
            rdkafka.event_destroy(event)
        rdkafka.queue_destroy(queue)


def _assignment(client: int) -> list[Listed]:
    found = Partitions()
    check(rdkafka.assignment(client, ctypes.byref(found)))
    assigned = listed(found)
    rdkafka.topic_partition_list_destroy(found)
    return assigned


def _weakly(rebalanced: Callable[[int, Any], None]) -> Callable[..., None]:
    """A callback of librdkafka that does not keep the consumer alive."""
    method = weakref.WeakMethod(rebalanced)

    def called(client: int, code: int, partitions: Any, opaque: int | None) -> None:
        bound = method()
        if bound is not None:
            bound(code, partitions)

    return called


def _offset_list(offsets: Mapping[Partition, int]) -> contextlib.AbstractContextManager[Any]:
    return offset_list({partition: (offset, "") for partition, offset in offsets.items()})


def _vendor(partitions: Iterable[Partition]) -> list[TopicPartition]:
    return [TopicPartition(*partition) for partition in partitions]
