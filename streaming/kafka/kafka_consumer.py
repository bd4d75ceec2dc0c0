"""The consumer on kafka-python 3."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from kafka import AsyncConsumerRebalanceListener, KafkaConsumer, TopicPartition
from kafka.errors import CorruptRecordError, KafkaTimeoutError, RebalanceInProgressError
from kafka.future import Future as VendorFuture
from kafka.protocol.consumer import IsolationLevel
from kafka.structs import MemberState, OffsetAndMetadata

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import limits
from streaming.kafka.cooperative_rebalance import (
    OwnedPartitionsAssignor,
    fix_cooperative_rebalance,
    leave_during_join,
)
from streaming.kafka.fetcher import CorrectedFetcher
from streaming.kafka.kafka_errors import translated
from streaming.kafka.protocol import FetchedBatch, GroupMember, Offsets, Partition, PartitionsCallback
from streaming.kafka.settings import connection_settings
from streaming.kafka.static_members import end_unfinished_membership

# Between the end of a join and the leader's SyncGroup the broker refuses commits: for milliseconds, usually.
REBALANCING_COMMIT_S = 2.0
# How long a poll may take to notice `wake`.
WAKE_S = 0.02
REBALANCING_PAUSE_S = 0.02
CLOSE_TIMEOUT_S = 10.0


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]  # the vendor has no types
    """Runs the callbacks in a thread while the caller waits in `poll` or `close`.

    kafka-python 3 calls listeners on its event loop, where every blocking call of the consumer raises. The loop awaits
    the thread, and stays free for heartbeats and for the callback's commits.
    """

    def __init__(
        self, loop: Any, assigned: PartitionsCallback, revoked: PartitionsCallback, lost: PartitionsCallback
    ) -> None:
        self._loop = loop
        self._assigned, self._revoked, self._lost = assigned, revoked, lost
        self._errors: list[BaseException] = []

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        await self._run(self._assigned, assigned)

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        await self._run(self._revoked, revoked)

    async def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        await self._run(self._lost, lost)

    async def _run(self, callback: PartitionsCallback, partitions: Iterable[TopicPartition]) -> None:
        plain = sorted(tuple(partition) for partition in partitions)
        if not plain:
            return
        finished = VendorFuture()

        def work() -> None:
            try:
                callback(plain)
            except BaseException as error:
                # raised from `poll`: kafka-python would wrap it and log a traceback
                self._errors.append(error)
            finally:
                # set on the loop: set from this thread, it would not wake the loop before its next timer, seconds later
                self._loop.call_soon_threadsafe(lambda: finished.success(None))

        threading.Thread(target=work, name="cascade-rebalance", daemon=True).start()
        await finished

    def raise_error(self) -> None:
        """Raises the first error of a callback since the last call."""
        if self._errors:
            error = self._errors[0]
            self._errors.clear()
            raise error


class KafkaPythonConsumer:
    """ConsumerClient on kafka-python; `group` None reads outside any group.

    With `kafka.instance` it is a static member: `close` does not leave the group, and a consumer that joins with the
    same name within the session timeout (10 s) gets its partitions; `poll` and `commit` of the earlier one then raise.
    While `on_revoked` runs, the revoked partitions are no longer in `assignment`.
    """

    def __init__(self, kafka: KafkaSettings, group: str | None) -> None:
        self._servers = kafka.bootstrap
        self._kafka, self._group = kafka, group
        self._listener: _Listener | None = None
        self._unreadable: BrokerError | None = None
        self._woken = threading.Event()
        with self._translated("connecting"):
            self._consumer = KafkaConsumer(
                **connection_settings(kafka, "cascade-consumer"),
                group_id=group,
                enable_auto_commit=False,
                # never skip records silently: without a committed offset we seek, after a truncation we stop
                auto_offset_reset="none",
                allow_auto_create_topics=False,
                isolation_level="read_committed",
                partition_assignment_strategy=(OwnedPartitionsAssignor(),),
                group_instance_id=kafka.instance if group is not None and kafka.instance else None,
                session_timeout_ms=limits.SESSION_TIMEOUT_MS,
                heartbeat_interval_ms=limits.HEARTBEAT_INTERVAL_MS,
                request_timeout_ms=limits.REQUEST_TIMEOUT_MS,
                bootstrap_timeout_ms=int(limits.BOOTSTRAP_TIMEOUT_S * 1_000),
                fetch_min_bytes=1,
                fetch_max_wait_ms=limits.FETCH_WAIT_MS,
                fetch_max_bytes=limits.FETCH_BYTES_MAX,
                metrics_enabled=False,
            )
        self._consumer._fetcher.__class__ = CorrectedFetcher
        fix_cooperative_rebalance(self._consumer._coordinator)

    def subscribe(
        self,
        topics: Sequence[str],
        on_assigned: PartitionsCallback,
        on_revoked: PartitionsCallback,
        on_lost: PartitionsCallback | None = None,
    ) -> None:
        """See ConsumerClient."""
        # loads the metadata first: a join without it assigns nothing, and a second rebalance follows
        wanted = [partition for topic in topics for partition in self.partitions_for(topic)]
        end_unfinished_membership(self._kafka, self._group, wanted)

        def assigned(partitions: list[Partition]) -> None:
            self._seek_to_beginning(self._never_committed(partitions))
            on_assigned(partitions)

        self._listener = _Listener(self._consumer._net, assigned, on_revoked, on_lost or on_revoked)
        with self._translated("subscribing"):
            self._consumer.subscribe(list(topics), listener=self._listener)

    def assign(self, partitions: Sequence[Partition]) -> None:
        """See ConsumerClient."""
        with self._translated("assigning partitions"):
            self._consumer.assign([TopicPartition(*partition) for partition in partitions])
        self._seek_to_beginning(partitions)

    def assignment(self) -> set[Partition]:
        """See ConsumerClient."""
        return {tuple(partition) for partition in self._consumer.assignment()}

    def joined(self) -> bool:
        """See ConsumerClient."""
        return self._listener is not None and self._consumer._coordinator.state is MemberState.STABLE

    def poll(self, timeout_s: float, rows_max: int) -> list[FetchedBatch]:
        """See ConsumerClient."""
        if self._unreadable is not None:
            raise self._unreadable
        give_up_s = time.monotonic() + timeout_s
        try:
            with self._translated("fetching"):
                while True:
                    left_s = max(give_up_s - time.monotonic(), 0.0)
                    records = self._consumer.poll(timeout_ms=min(left_s, WAKE_S) * 1_000, max_records=rows_max)
                    if records or left_s <= WAKE_S or self._woken.is_set():
                        break
        except BrokerError as error:
            if isinstance(error.__cause__, CorruptRecordError):
                # kafka-python's next poll would never return
                self._unreadable = error
            raise
        self._woken.clear()
        self._raise_callback_error()
        return [_fetched(partition, found) for partition, found in records.items()]

    def wake(self) -> None:
        """See ConsumerClient."""
        self._woken.set()

    def pause(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient; ignores partitions that are not assigned any more."""
        with self._translated("pausing"):
            self._consumer.pause(*self._still_assigned(partitions))

    def resume(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient; ignores partitions that are not assigned any more."""
        with self._translated("resuming"):
            self._consumer.resume(*self._still_assigned(partitions))

    def seek(self, partition: Partition, offset: int) -> None:
        """See ConsumerClient."""
        with self._translated(f"seeking {_name(partition)} to {offset}"):
            self._consumer.seek(TopicPartition(*partition), int(offset))

    def position(self, partition: Partition) -> int:
        """See ConsumerClient."""
        with self._translated(f"asking for the position of {_name(partition)}"):
            position = self._consumer.position(TopicPartition(*partition), timeout_ms=limits.REQUEST_TIMEOUT_MS)
            if position is None:
                raise KafkaTimeoutError("no position in time")
        return int(position)

    def committed(self, partitions: Iterable[Partition]) -> dict[Partition, tuple[int, str]]:
        """See ConsumerClient."""
        with self._translated("asking for committed offsets"):
            found = self._consumer._coordinator.fetch_committed_offsets(
                _vendor(partitions), limits.COMMITTED_TIMEOUT_S * 1_000
            )
        return {tuple(partition): (int(stored.offset), stored.metadata or "") for partition, stored in found.items()}

    def member(self) -> GroupMember:
        """See ConsumerClient."""
        with self._translated("asking for the membership"):
            metadata = self._consumer.group_metadata()
        return GroupMember(metadata, self._consumer._coordinator.state is not MemberState.REBALANCING)

    def commit(self, offsets: Offsets) -> None:
        """See ConsumerClient; an error during a rebalance can be retried."""
        wanted = {
            TopicPartition(*partition): OffsetAndMetadata(int(offset), metadata, -1)
            for partition, (offset, metadata) in offsets.items()
        }
        deadline_s = time.monotonic() + REBALANCING_COMMIT_S
        while wanted:
            with self._translated("committing offsets"):
                try:
                    self._consumer.commit(wanted, timeout_ms=limits.REQUEST_TIMEOUT_MS)
                    return
                except RebalanceInProgressError:
                    if time.monotonic() > deadline_s:
                        raise
            time.sleep(REBALANCING_PAUSE_S)

    def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """See ConsumerClient."""
        with self._translated("asking for the first offsets"):
            return _plain(self._consumer.beginning_offsets(_vendor(partitions), timeout_ms=limits.REQUEST_TIMEOUT_MS))

    def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """See ConsumerClient."""
        with self._translated("asking for the end offsets"):
            return _plain(self._consumer.end_offsets(_vendor(partitions), timeout_ms=limits.REQUEST_TIMEOUT_MS))

    def offsets_at(self, partitions: Iterable[Partition], time_ms: int) -> dict[Partition, int]:
        """See ConsumerClient."""
        wanted = list(partitions)
        with self._translated("asking for the offsets of a time"):
            found = self._consumer.offsets_for_times(dict.fromkeys(_vendor(wanted), time_ms), limits.REQUEST_TIMEOUT_MS)
        beyond = [partition for partition in wanted if found.get(TopicPartition(*partition)) is None]
        ends = self.end_offsets(beyond) if beyond else {}
        return ends | {
            partition: int(found[TopicPartition(*partition)].offset) for partition in wanted if partition not in ends
        }

    def partitions_for(self, topic: str) -> list[Partition]:
        """See ConsumerClient."""
        with self._translated(f"asking for the partitions of {topic}"):
            found = self._consumer.partitions_for_topic(topic)
        if not found:
            raise BrokerError(f"Kafka at {self._servers}: no topic {topic}; create it, or name another in kafka.topics")
        return [(topic, number) for number in sorted(found)]

    def close(self) -> None:
        """See ConsumerClient."""
        leave_during_join(self._consumer._coordinator)
        with self._translated("leaving the group"):
            self._consumer.close(autocommit=False, timeout_ms=CLOSE_TIMEOUT_S * 1_000)
        self._raise_callback_error()

    def _never_committed(self, partitions: Sequence[Partition]) -> list[Partition]:
        """Returns the partitions without a committed offset; does not wait for open transactions."""
        coordinator = self._consumer._coordinator
        with self._translated("asking for committed offsets"):
            level, coordinator._isolation_level = coordinator._isolation_level, IsolationLevel.READ_UNCOMMITTED
            try:
                found = coordinator.fetch_committed_offsets(_vendor(partitions), limits.REQUEST_TIMEOUT_MS)
            finally:
                coordinator._isolation_level = level
        return [partition for partition in partitions if TopicPartition(*partition) not in found]

    def _still_assigned(self, partitions: Iterable[Partition]) -> list[TopicPartition]:
        assigned = self._consumer.assignment()
        return [partition for partition in _vendor(partitions) if partition in assigned]

    def _seek_to_beginning(self, partitions: Sequence[Partition]) -> None:
        if partitions:
            for partition, offset in self.beginning_offsets(partitions).items():
                self.seek(partition, offset)

    def _raise_callback_error(self) -> None:
        if self._listener is not None:
            self._listener.raise_error()

    def _translated(self, action: str) -> contextlib.AbstractContextManager[None]:
        return translated(action, self._servers)


def _fetched(partition: TopicPartition, records: Sequence[Any]) -> FetchedBatch:
    rows = len(records)
    return FetchedBatch(
        topic=partition.topic,
        partition=partition.partition,
        offsets=np.fromiter((record.offset for record in records), np.int64, rows),
        timestamps_ms=np.fromiter((record.timestamp for record in records), np.int64, rows),
        keys=[record.key for record in records],
        values=[record.value for record in records],
        headers=[record.headers for record in records],
    )


def _vendor(partitions: Iterable[Partition]) -> list[TopicPartition]:
    return [TopicPartition(*partition) for partition in partitions]


def _plain(offsets: Mapping[TopicPartition, int]) -> dict[Partition, int]:
    return {(partition.topic, partition.partition): int(offset) for partition, offset in offsets.items()}


def _name(partition: Partition) -> str:
    return f"{partition[0]}-{partition[1]}"
