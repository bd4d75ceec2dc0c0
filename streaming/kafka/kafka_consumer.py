"""The consumer on kafka-python 3, by its public methods alone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from kafka import AsyncConsumerRebalanceListener, KafkaConsumer, TopicPartition
from kafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from kafka.errors import CorruptRecordError, KafkaError, KafkaTimeoutError
from kafka.future import Future as VendorFuture
from kafka.structs import MemberState, OffsetAndMetadata

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import limits
from streaming.kafka.kafka_errors import translated
from streaming.kafka.protocol import FetchedBatch, GroupMember, Offsets, Partition, PartitionsCallback
from streaming.kafka.settings import connection_settings

# How long a poll may take to notice `wake`.
WAKE_S = 0.02
# kafka-python forgets a join that ends between two of its polls, and begins another. During a join `poll` therefore
# lasts JOIN_S, in few and long polls of kafka-python.
JOIN_S, JOIN_POLL_S = 1.0, 0.25
# A join that the growth of a topic began, and that ends between two polls, is neither completed nor begun again. So a
# join that lasts longer than the session timeout and the time to revoke ends the session; the next one joins anew.
JOIN_S_MAX = 20.0
CLOSE_TIMEOUT_S = 10.0
# A paused partition whose fetched records were returned in part is never fetched again after `resume`. Each vendor poll
# therefore takes all fetched records; this size limits what waits here.
FETCH_BYTES_MAX = 256 * 1024
# A broker answers a connection's requests in order, so that a question for offsets waits this long for a fetch.
FETCH_WAIT_MS = 50
ALL_ROWS = 2**31 - 1


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]  # the vendor has no types
    """Runs the callbacks in a thread while the caller waits in `poll` or `close`.

    kafka-python 3 calls listeners on its event loop, where every blocking call of the consumer raises. The loop awaits
    the thread, and stays free for heartbeats and for the callback's commits. `wake_loop` makes the loop notice the end.
    """

    def __init__(
        self,
        wake_loop: Callable[[], object],
        assigned: PartitionsCallback,
        revoked: PartitionsCallback,
        lost: PartitionsCallback,
    ) -> None:
        self._wake_loop = wake_loop
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
        finished = VendorFuture()

        def work() -> None:
            try:
                callback(plain)
            except BaseException as error:
                # raised from `poll`: kafka-python would wrap it and log a traceback
                self._errors.append(error)
            finally:
                finished.success(None)
                self._wake_loop()

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

    Rebalances are eager: `on_revoked` gets all partitions, and `poll` returns no records until the group has joined.
    With `kafka.instance` it is a static member: `close` does not leave the group, and a consumer that joins with the
    same name within the session timeout (10 s) gets its partitions; a commit of the earlier one then raises.
    """

    def __init__(self, kafka: KafkaSettings, group: str | None) -> None:
        self._servers = kafka.bootstrap
        self._listener: _Listener | None = None
        self._unreadable: BrokerError | None = None
        self._woken = threading.Event()
        self._joins_since_s = 0.0
        self._assigned: set[Partition] = set()
        self._paused: set[Partition] = set()
        self._waiting: dict[Partition, FetchedBatch] = {}
        with self._translated("connecting"):
            self._consumer = KafkaConsumer(
                **connection_settings(kafka, "cascade-consumer"),
                group_id=group,
                enable_auto_commit=False,
                # never skip records silently: without a committed offset we seek, after a truncation we stop
                auto_offset_reset="none",
                allow_auto_create_topics=False,
                isolation_level="read_committed",
                # eager: its cooperative assignor can give a partition to two members (decision 15)
                partition_assignment_strategy=(StickyPartitionAssignor,),
                group_instance_id=kafka.instance if group is not None and kafka.instance else None,
                session_timeout_ms=limits.SESSION_TIMEOUT_MS,
                heartbeat_interval_ms=limits.HEARTBEAT_INTERVAL_MS,
                request_timeout_ms=limits.REQUEST_TIMEOUT_MS,
                bootstrap_timeout_ms=int(limits.BOOTSTRAP_TIMEOUT_S * 1_000),
                fetch_min_bytes=1,
                fetch_max_wait_ms=FETCH_WAIT_MS,
                fetch_max_bytes=FETCH_BYTES_MAX,
                metrics_enabled=False,
            )

    def subscribe(
        self,
        topics: Sequence[str],
        on_assigned: PartitionsCallback,
        on_revoked: PartitionsCallback,
        on_lost: PartitionsCallback | None = None,
    ) -> None:
        """See ConsumerClient."""
        for topic in topics:
            self.partitions_for(topic)

        def assigned(partitions: list[Partition]) -> None:
            self._joins_since_s = 0.0
            if partitions:
                self._take_up(partitions)
                on_assigned(partitions)
                # ends the poll: its caller has work to do for them
                self._woken.set()

        def gone(callback: PartitionsCallback) -> PartitionsCallback:
            def going(partitions: list[Partition]) -> None:
                # kafka-python names them once more if it is closed during the join
                owned = [partition for partition in partitions if partition in self._assigned]
                self._forget()
                if owned:
                    callback(owned)

            return going

        self._listener = _Listener(self._wake_loop, assigned, gone(on_revoked), gone(on_lost or on_revoked))
        with self._translated("subscribing"):
            self._consumer.subscribe(list(topics), listener=self._listener)
            # loads the metadata of the subscription: if it came after the join, the leader would join once more
            self._consumer.topics()

    def assign(self, partitions: Sequence[Partition]) -> None:
        """See ConsumerClient."""
        with self._translated("assigning partitions"):
            self._consumer.assign([TopicPartition(*partition) for partition in partitions])
        self._forget()
        self._assigned = set(partitions)
        for partition, offset in self.beginning_offsets(partitions).items():
            self.seek(partition, offset)

    def assignment(self) -> set[Partition]:
        """See ConsumerClient."""
        return set(self._assigned)

    def joined(self) -> bool:
        """See ConsumerClient."""
        return self._listener is not None and not self._joins()

    def poll(self, timeout_s: float, rows_max: int) -> list[FetchedBatch]:
        """See ConsumerClient; during a join it returns after JOIN_S at the earliest, and `wake` does not end it."""
        if self._unreadable is not None:
            raise self._unreadable
        started_s = time.monotonic()
        while not (batches := self._take(rows_max)):
            left_s = started_s + timeout_s - time.monotonic()
            self._fetch(JOIN_POLL_S if self._joins() else min(max(left_s, 0.0), WAKE_S))
            self._raise_callback_error()
            if self._joins():
                self._limit_join()
                left_s = started_s + max(timeout_s, JOIN_S) - time.monotonic()
            elif self._woken.is_set():
                left_s = 0.0
            if left_s <= WAKE_S:
                batches = self._take(rows_max)
                break
        self._woken.clear()
        return batches

    def wake(self) -> None:
        """See ConsumerClient."""
        self._woken.set()

    def pause(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient; ignores partitions that are not assigned any more."""
        paused = [partition for partition in partitions if partition in self._assigned]
        with self._translated("pausing"):
            self._consumer.pause(*_vendor(paused))
        self._paused.update(paused)

    def resume(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient; ignores partitions that are not assigned any more."""
        resumed = [partition for partition in partitions if partition in self._assigned]
        with self._translated("resuming"):
            self._consumer.resume(*_vendor(resumed))
        self._paused.difference_update(resumed)

    def seek(self, partition: Partition, offset: int) -> None:
        """See ConsumerClient."""
        self._waiting.pop(partition, None)
        with self._translated(f"seeking {_name(partition)} to {offset}"):
            self._consumer.seek(TopicPartition(*partition), int(offset))

    def position(self, partition: Partition) -> int:
        """See ConsumerClient."""
        if partition in self._waiting:
            return int(self._waiting[partition].offsets[0])
        with self._translated(f"asking for the position of {_name(partition)}"):
            position = self._consumer.position(TopicPartition(*partition), timeout_ms=limits.REQUEST_TIMEOUT_MS)
            if position is None:
                raise KafkaTimeoutError("no position in time")
        return int(position)

    def committed(self, partitions: Iterable[Partition]) -> dict[Partition, tuple[int, str]]:
        """See ConsumerClient."""
        found = {}
        with self._translated("asking for committed offsets"):
            for partition in partitions:
                stored = self._consumer.committed(
                    TopicPartition(*partition), metadata=True, timeout_ms=limits.COMMITTED_TIMEOUT_S * 1_000
                )
                if stored is not None:
                    found[partition] = (int(stored.offset), stored.metadata or "")
        return found

    def member(self) -> GroupMember:
        """See ConsumerClient."""
        with self._translated("asking for the membership"):
            return GroupMember(self._consumer.group_metadata())

    def commit(self, offsets: Offsets) -> None:
        """See ConsumerClient; an error during a rebalance can be retried."""
        wanted = {
            TopicPartition(*partition): OffsetAndMetadata(int(offset), metadata, -1)
            for partition, (offset, metadata) in offsets.items()
        }
        if wanted:
            with self._translated("committing offsets"):
                self._consumer.commit(wanted, timeout_ms=limits.REQUEST_TIMEOUT_MS)

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
        """See ConsumerClient; during a join its group waits for it until the session timeout (10 s)."""
        with self._translated("leaving the group"):
            self._consumer.close(autocommit=False, timeout_ms=CLOSE_TIMEOUT_S * 1_000)
        self._raise_callback_error()

    def _fetch(self, timeout_s: float) -> None:
        """Adds what kafka-python has fetched to `_waiting`, which has none of the partitions that are not paused."""
        try:
            with self._translated("fetching"):
                records = self._consumer.poll(timeout_ms=timeout_s * 1_000, max_records=ALL_ROWS)
        except BrokerError as error:
            if isinstance(error.__cause__, CorruptRecordError):
                # kafka-python's next poll would never return
                self._unreadable = self._worded_unreadable(error)
                raise self._unreadable from error
            raise
        for vendor, found in records.items():
            partition = (vendor.topic, vendor.partition)
            if partition in self._assigned:
                self._waiting[partition] = _fetched(partition, found)

    def _worded_unreadable(self, error: BrokerError) -> BrokerError:
        cause = error.__cause__
        if cause is None or not isinstance(cause.__context__, UnicodeDecodeError):
            return error
        return BrokerError(
            f"Kafka at {self._servers}: fetching: kafka-python cannot read a record whose header name is not UTF-8; set"
            ' kafka.client to "librdkafka"'
        )

    def _take(self, rows_max: int) -> list[FetchedBatch]:
        """Returns at most `rows_max` of the records that wait and whose partition is not paused."""
        taken: list[FetchedBatch] = []
        for partition in [partition for partition in self._waiting if partition not in self._paused]:
            if not rows_max:
                break
            batch = self._waiting.pop(partition)
            taken.append(batch.part(0, min(rows_max, len(batch))))
            rows_max -= len(taken[-1])
            if len(taken[-1]) < len(batch):
                self._waiting[partition] = batch.part(len(taken[-1]), len(batch))
        return taken

    def _take_up(self, partitions: Sequence[Partition]) -> None:
        """Starts assigned partitions at their committed offsets, else at their beginning.

        kafka-python keeps the position of a partition that comes back, which is behind the records that were dropped
        here, and keeps it paused.
        """
        self._assigned = set(partitions)
        starts = {partition: offset for partition, (offset, _) in self.committed(partitions).items()}
        starts |= self.beginning_offsets([partition for partition in partitions if partition not in starts])
        for partition, offset in starts.items():
            self.seek(partition, offset)
        self.resume(partitions)

    def _forget(self) -> None:
        self._assigned, self._paused = set(), set()
        self._waiting.clear()

    def _joins(self) -> bool:
        """Whether it has to join the group, or joins it now."""
        return self._listener is not None and self._consumer.group_metadata().state != MemberState.STABLE

    def _limit_join(self) -> None:
        """Raises BrokerError if this join has taken JOIN_S_MAX."""
        now_s = time.monotonic()
        self._joins_since_s = self._joins_since_s or now_s
        if now_s - self._joins_since_s > JOIN_S_MAX:
            raise BrokerError(f"Kafka at {self._servers}: joining the group: not done after {JOIN_S_MAX:g} s")

    def _wake_loop(self) -> None:
        """Makes kafka-python's loop notice that another thread has set a future.

        Any request to the loop does; a commit of nothing sends nothing. The loop may have ended meanwhile.
        """
        with contextlib.suppress(RuntimeError, KafkaError):
            self._consumer.commit_async({})

    def _raise_callback_error(self) -> None:
        if self._listener is not None:
            self._listener.raise_error()

    def _translated(self, action: str) -> contextlib.AbstractContextManager[None]:
        return translated(action, self._servers)


def _fetched(partition: Partition, records: Sequence[Any]) -> FetchedBatch:
    rows = len(records)
    return FetchedBatch(
        topic=partition[0],
        partition=partition[1],
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
