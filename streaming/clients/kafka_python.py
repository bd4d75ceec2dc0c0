"""The client on kafka-python 3; its errors are translated to BrokerError here and nowhere else."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from kafka import AsyncConsumerRebalanceListener, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.coordinator.assignors.range import RangePartitionAssignor
from kafka.errors import CorruptRecordError, KafkaError, KafkaTimeoutError, OffsetOutOfRangeError
from kafka.future import Future as VendorFuture
from kafka.structs import OffsetAndMetadata

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.clients.lenient_records import LenientPartitionRecords
from streaming.clients.prompt_fetch import look_again_before_sleeping
from streaming.clients.protocol import Delivery, FetchedBatch, Headers, Partition, PartitionsCallback
from streaming.clients.settings import connection_settings
from streaming.clients.steady_join import keep_finished_joins

# How long one request may take before it is tried again elsewhere; the vendor's 30 s would hide a dead broker.
REQUEST_TIMEOUT_MS = 15_000
# A record that is not kept after this long is a failure that stops the worker, instead of a queue that grows.
DELIVERY_TIMEOUT_MS = 60_000
# A worker that was killed is missed after this long, and its partitions stand still until then. The broker accepts
# no less than 6 s; below 10 s a loaded machine loses partitions for no reason.
SESSION_TIMEOUT_MS = 10_000
HEARTBEAT_INTERVAL_MS = 2_000
# The broker answers a fetch as soon as it has a byte, so this is no latency in the steady state. It is the time that
# a partition which was just resumed or sought waits behind the fetch that left without it.
FETCH_WAIT_MS = 50
# Bounds what one fetch may bring into memory, over all partitions.
FETCH_BYTES_MAX = 8 * 1024 * 1024
# The sender thread takes up to this much of a partition at a time. The idempotent producer has one such batch in
# flight a partition, so small ones would cost a round trip each; a thousand decisions fit.
PRODUCE_BATCH_BYTES = 512 * 1024
# A micro-batch is appended record by record; with 0 the sender runs off with the first ones and contends for the
# interpreter with the rest. One millisecond is a fifth of the screened p99 limit.
LINGER_MS = 1
# Larger than what the broker takes by default, so that a dead letter of a message at the limit is not stopped here.
REQUEST_BYTES_MAX = 2 * 1024 * 1024
UNDELIVERED_MAX = 50_000
CLOSE_TIMEOUT_S = 10.0


@contextlib.contextmanager
def _translated(action: str, servers: str) -> Iterator[None]:
    try:
        yield
    except OffsetOutOfRangeError as error:
        raise BrokerError(
            f"Kafka at {servers}: {action}: the log no longer holds the wanted offsets ({_worded(error)}); "
            "records were deleted before they were read: commit a newer offset for the group to go on without them"
        ) from error
    except (KafkaError, OSError, ValueError, TypeError, AssertionError) as error:
        raise BrokerError(f"Kafka at {servers}: {action}: {_worded(error)}") from error


def _worded(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]  # the vendor has no types
    """Runs our callbacks in a thread of their own while the caller is held in `poll` or `close`.

    kafka-python 3 calls listeners on its event loop, where every blocking call of the consumer raises. Awaiting
    keeps that loop free for heartbeats and for the commits that the callback makes.
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
                # handed to the caller of `poll`: the vendor would wrap it, and log it with a stack
                self._errors.append(error)
            finally:
                # completed on the loop: from here it would sleep on until its next timer, seconds later
                self._loop.call_soon_threadsafe(lambda: finished.success(None))

        threading.Thread(target=work, name="cascade-rebalance", daemon=True).start()
        await finished

    def raise_error(self) -> None:
        """Raise what a callback raised since the last time."""
        if self._errors:
            error = self._errors[0]
            self._errors.clear()
            raise error


class KafkaPythonConsumer:
    """ConsumerClient on kafka-python; `group` None reads outside any group."""

    def __init__(self, kafka: KafkaSettings, group: str | None, bootstrap_timeout_s: float = 30.0) -> None:
        self._servers = kafka.bootstrap
        self._group = group
        self._listener: _Listener | None = None
        self._unreadable: BrokerError | None = None
        with self._translated("connecting"):
            self._consumer = KafkaConsumer(
                **connection_settings(kafka, "cascade-consumer"),
                group_id=group,
                enable_auto_commit=False,
                # never skip silently: where there is no committed offset we seek, where the log was cut we stop
                auto_offset_reset="none",
                allow_auto_create_topics=False,
                partition_assignment_strategy=(RangePartitionAssignor,),
                session_timeout_ms=SESSION_TIMEOUT_MS,
                heartbeat_interval_ms=HEARTBEAT_INTERVAL_MS,
                request_timeout_ms=REQUEST_TIMEOUT_MS,
                bootstrap_timeout_ms=int(bootstrap_timeout_s * 1_000),
                fetch_min_bytes=1,
                fetch_max_wait_ms=FETCH_WAIT_MS,
                fetch_max_bytes=FETCH_BYTES_MAX,
                metrics_enabled=False,
            )
        self._consumer._fetcher.PartitionRecords = LenientPartitionRecords
        keep_finished_joins(self._consumer._coordinator)
        look_again_before_sleeping(self._consumer._fetcher)

    def subscribe(
        self,
        topics: Sequence[str],
        on_assigned: PartitionsCallback,
        on_revoked: PartitionsCallback,
        on_lost: PartitionsCallback | None = None,
    ) -> None:
        """See ConsumerClient."""

        def assigned(partitions: list[Partition]) -> None:
            uncommitted = set(partitions) - set(self.committed(partitions))
            self._seek_to_beginning(sorted(uncommitted))
            on_assigned(partitions)

        self._listener = _Listener(self._consumer._net, assigned, on_revoked, on_lost or on_revoked)
        with self._translated("subscribing"):
            self._consumer.subscribe(list(topics), listener=self._listener)
        for topic in topics:
            # a group that is joined before the topics are known assigns nothing, and then rebalances
            self.partitions_for(topic)

    def assign(self, partitions: Sequence[Partition]) -> None:
        """See ConsumerClient."""
        with self._translated("assigning partitions"):
            self._consumer.assign([TopicPartition(*partition) for partition in partitions])
        self._seek_to_beginning(partitions)

    def assignment(self) -> set[Partition]:
        """See ConsumerClient."""
        return {tuple(partition) for partition in self._consumer.assignment()}

    def poll(self, timeout_s: float, rows_max: int) -> list[FetchedBatch]:
        """See ConsumerClient."""
        if self._unreadable is not None:
            raise self._unreadable
        try:
            with self._translated("fetching"):
                records = self._consumer.poll(timeout_ms=timeout_s * 1_000, max_records=rows_max)
        except BrokerError as error:
            if isinstance(error.__cause__, CorruptRecordError):
                # the vendor's next poll would never return
                self._unreadable = error
            raise
        self._raise_callback_error()
        return [_fetched(partition, found) for partition, found in records.items()]

    def pause(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient."""
        with self._translated("pausing"):
            self._consumer.pause(*(TopicPartition(*partition) for partition in partitions))

    def resume(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient."""
        with self._translated("resuming"):
            self._consumer.resume(*(TopicPartition(*partition) for partition in partitions))

    def seek(self, partition: Partition, offset: int) -> None:
        """See ConsumerClient."""
        with self._translated(f"seeking {_name(partition)} to {offset}"):
            self._consumer.seek(TopicPartition(*partition), int(offset))

    def position(self, partition: Partition) -> int:
        """See ConsumerClient."""
        with self._translated(f"asking for the position of {_name(partition)}"):
            position = self._consumer.position(TopicPartition(*partition), timeout_ms=REQUEST_TIMEOUT_MS)
            if position is None:
                raise KafkaTimeoutError("no position in time")
        return int(position)

    def committed(self, partitions: Iterable[Partition]) -> dict[Partition, tuple[int, str]]:
        """See ConsumerClient."""
        found: dict[Partition, tuple[int, str]] = {}
        with self._translated("asking for committed offsets"):
            for partition in partitions:
                kept = self._consumer.committed(
                    TopicPartition(*partition), metadata=True, timeout_ms=REQUEST_TIMEOUT_MS
                )
                if kept is not None and kept.offset >= 0:
                    found[partition] = (int(kept.offset), kept.metadata or "")
        return found

    def commit(self, offsets: Mapping[Partition, tuple[int, str]]) -> None:
        """See ConsumerClient."""
        wanted = {
            TopicPartition(*partition): OffsetAndMetadata(int(offset), metadata, -1)
            for partition, (offset, metadata) in offsets.items()
        }
        if wanted:
            with self._translated("committing offsets"):
                self._consumer.commit(wanted, timeout_ms=REQUEST_TIMEOUT_MS)

    def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """See ConsumerClient."""
        with self._translated("asking for the first offsets"):
            return _plain(self._consumer.beginning_offsets(_vendor(partitions), timeout_ms=REQUEST_TIMEOUT_MS))

    def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """See ConsumerClient."""
        with self._translated("asking for the end offsets"):
            return _plain(self._consumer.end_offsets(_vendor(partitions), timeout_ms=REQUEST_TIMEOUT_MS))

    def partitions_for(self, topic: str) -> list[Partition]:
        """See ConsumerClient."""
        with self._translated(f"asking for the partitions of {topic}"):
            found = self._consumer.partitions_for_topic(topic)
        if not found:
            raise BrokerError(f"Kafka at {self._servers}: no topic {topic}; create it, or name another in kafka.topics")
        return [(topic, number) for number in sorted(found)]

    def close(self) -> None:
        """See ConsumerClient."""
        with self._translated("leaving the group"):
            self._consumer.close(autocommit=False, timeout_ms=CLOSE_TIMEOUT_S * 1_000)
        self._raise_callback_error()

    def _seek_to_beginning(self, partitions: Sequence[Partition]) -> None:
        if partitions:
            for partition, offset in self.beginning_offsets(partitions).items():
                self.seek(partition, offset)

    def _raise_callback_error(self) -> None:
        if self._listener is not None:
            self._listener.raise_error()

    def _translated(self, action: str) -> contextlib.AbstractContextManager[None]:
        return _translated(action, self._servers)


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


class _Sent:
    """Delivery of some records, looked through from the first that is not known to be kept."""

    def __init__(self, servers: str, futures: list[Any]) -> None:
        self._servers, self._futures, self._kept = servers, futures, 0

    def done(self) -> bool:
        while self._kept < len(self._futures):
            future = self._futures[self._kept]
            if not future.is_done:
                return False
            if future.exception is not None:
                raise _delivery_error(self._servers, future.exception)
            self._kept += 1
        return True


def _delivery_error(servers: str, error: BaseException) -> BrokerError:
    return BrokerError(f"Kafka at {servers}: a record was not delivered: {_worded(error)}")


class KafkaPythonProducer:
    """ProducerClient on kafka-python, which itself bounds nothing: `undelivered_max` records are the bound here."""

    def __init__(
        self, kafka: KafkaSettings, undelivered_max: int = UNDELIVERED_MAX, bootstrap_timeout_s: float = 30.0
    ) -> None:
        self._servers = kafka.bootstrap
        self._undelivered_max = undelivered_max
        self._undelivered: deque[Any] = deque()
        self._failure: BrokerError | None = None
        with _translated("connecting", self._servers):
            self._producer = KafkaProducer(
                **connection_settings(kafka, "cascade-producer"),
                acks="all",
                enable_idempotence=True,
                linger_ms=LINGER_MS,
                batch_size=PRODUCE_BATCH_BYTES,
                max_request_size=REQUEST_BYTES_MAX,
                request_timeout_ms=REQUEST_TIMEOUT_MS,
                delivery_timeout_ms=DELIVERY_TIMEOUT_MS,
                max_block_ms=REQUEST_TIMEOUT_MS,
                bootstrap_timeout_ms=int(bootstrap_timeout_s * 1_000),
                allow_auto_create_topics=False,
                metrics_enabled=False,
            )

    def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        timestamp_ms: int | None = None,
    ) -> Delivery:
        """See ProducerClient; a header without a value is sent with an empty one, since the vendor takes no other."""
        self._make_room(1)
        pairs = [(name, octets if octets is not None else b"") for name, octets in headers]
        with _translated(f"sending to {topic}", self._servers):
            future = self._producer.send(topic, key=key, value=value, headers=pairs, timestamp_ms=timestamp_ms)
        self._undelivered.append(future)
        return _Sent(self._servers, [future])

    def send_many(
        self,
        topic: str,
        keys: Sequence[bytes | None],
        values: Sequence[bytes | None],
        timestamps_ms: Sequence[int] | None = None,
    ) -> Delivery:
        """See ProducerClient."""
        self._make_room(len(values))
        send = self._producer.send
        times: Sequence[int | None] = timestamps_ms if timestamps_ms is not None else [None] * len(values)
        futures: list[Any] = []
        try:
            with _translated(f"sending to {topic}", self._servers):
                for key, value, time_ms in zip(keys, values, times, strict=True):
                    futures.append(send(topic, key=key, value=value, timestamp_ms=time_ms))
        finally:
            self._undelivered.extend(futures)
        return _Sent(self._servers, futures)

    def undelivered(self) -> int:
        """See ProducerClient."""
        self._reap()
        return len(self._undelivered)

    def flush(self, timeout_s: float) -> None:
        """See ProducerClient."""
        with _translated("waiting for deliveries", self._servers):
            self._producer.flush(timeout=timeout_s)
        self._reap()
        if self._failure is not None:
            raise self._failure

    def close(self, timeout_s: float) -> None:
        """See ProducerClient; releases everything even where the flush fails."""
        try:
            self.flush(timeout_s)
        finally:
            # the flush above said what there is to say about records that were not delivered
            with contextlib.suppress(KafkaError):
                self._producer.close(timeout=timeout_s)

    def _make_room(self, records: int) -> None:
        self._reap()
        if self._failure is not None:
            raise self._failure
        deadline_s = time.monotonic() + REQUEST_TIMEOUT_MS / 1_000
        # a call with more records than the bound goes through once nothing else waits
        while self._undelivered and len(self._undelivered) + records > self._undelivered_max:
            left_s = deadline_s - time.monotonic()
            with _translated("waiting for room in the send queue", self._servers), contextlib.suppress(KafkaError):
                self._undelivered[0].get(timeout=max(left_s, 0))
            self._reap()
            if self._failure is not None:
                raise self._failure
            if self._undelivered and left_s <= 0:
                raise BrokerError(
                    f"Kafka at {self._servers}: {len(self._undelivered)} records wait to be delivered, at most "
                    f"{self._undelivered_max}; the broker is slow or gone"
                )

    def _reap(self) -> None:
        waiting = self._undelivered
        while waiting and waiting[0].is_done:
            error = waiting.popleft().exception
            if error is not None and self._failure is None:
                self._failure = _delivery_error(self._servers, error)
