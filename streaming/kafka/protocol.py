"""The protocol classes of a Kafka client library; every failure is a BrokerError, a line of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cascade.columns import Int64

Partition = tuple[str, int]
"""Topic and partition id."""

Offsets = Mapping[Partition, tuple[int, str]]
"""The next offset to read and metadata, by partition."""

Headers = Sequence[tuple[str, bytes | None]]
PartitionsCallback = Callable[[list[Partition]], None]


@dataclass(slots=True)
class FetchedBatch:
    """Consecutive records of a partition, an element each in every sequence.

    `offsets`: int64, ascending, sometimes with gaps. `timestamps_ms`: int64, ms since the epoch; by the topic's
    `message.timestamp.type` the append time or the producer's. `keys`, `values`: bytes or None; a ByteColumn where the
    client does not make Python objects. `headers`: of each record.
    """

    topic: str
    partition: int
    offsets: Int64
    timestamps_ms: Int64
    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    headers: Sequence[Headers]

    def __len__(self) -> int:
        return len(self.values)

    def part(self, start: int, stop: int) -> FetchedBatch:
        """Returns the records with indexes `start` to `stop` - 1."""
        if start == 0 and stop == len(self):
            return self
        names = ("offsets", "timestamps_ms", "keys", "values", "headers")
        columns: dict[str, Any] = {name: getattr(self, name)[start:stop] for name in names}
        return replace(self, **columns)


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic to create: `replication` -1 takes the broker's default; `settings`: the topic's configuration."""

    name: str
    partitions: int = 1
    replication: int = -1
    settings: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class GroupMember:
    """A consumer's membership in its group, for `TransactionalProducerClient.commit`.

    The broker refuses offsets from an earlier generation. This fences a worker that has lost its partitions and has not
    noticed it yet. `vendor`: the client library's object; None if the consumer is not a member any more.
    """

    vendor: object


class ConsumerClient(Protocol):
    """A consumer, for one thread; its isolation level is `read_committed`."""

    def subscribe(
        self,
        topics: Sequence[str],
        on_assigned: PartitionsCallback,
        on_revoked: PartitionsCallback,
        on_lost: PartitionsCallback | None = None,
    ) -> None:
        """Joins the group; partitions start at the committed offset, else at the beginning.

        topics: to subscribe. on_assigned: called with the partitions that were gained. on_revoked: called with those
        that must be given back; the member still owns them, and can commit. on_lost: called with those that others
        already own; by default `on_revoked`.

        With librdkafka rebalances are cooperative: the other partitions stay assigned, and `poll` returns their records
        meanwhile. With kafka-python they are eager: `on_revoked` gets all partitions, `poll` returns nothing until the
        group has joined, and `on_assigned` gets all that the member owns then, at their committed offsets.

        The callbacks run within `poll` or `close`, never beside the caller's code. They may commit, seek and pause;
        `poll` or `close` raises their errors.
        """
        ...

    def assign(self, partitions: Sequence[Partition]) -> None:
        """Reads exactly these partitions, outside any group, from the beginning or the offset of a later `seek`."""
        ...

    def assignment(self) -> set[Partition]:
        """The partitions that are assigned now."""
        ...

    def joined(self) -> bool:
        """Whether this consumer has joined the group and got its assignment, which may be empty.

        May be False for the duration of a later rebalance.
        """
        ...

    def poll(self, timeout_s: float, rows_max: int) -> list[FetchedBatch]:
        """Returns at most `rows_max` records, a batch for each partition; empty after `timeout_s` without records.

        During a join kafka-python waits for a second, if `timeout_s` is shorter.
        Must be called within `max.poll.interval.ms`, with paused partitions too, or the group expels the member.
        """
        ...

    def wake(self) -> None:
        """Ends a `poll` that waits for records, or else the next one, without records; any thread may call it."""
        ...

    def pause(self, partitions: Iterable[Partition]) -> None:
        """Fetches no records of these partitions until `resume`."""
        ...

    def resume(self, partitions: Iterable[Partition]) -> None:
        """Fetches records of these partitions again."""
        ...

    def seek(self, partition: Partition, offset: int) -> None:
        """Continues with the record at `offset`; drops records that were fetched ahead."""
        ...

    def position(self, partition: Partition) -> int:
        """The offset of the next record that `poll` returns."""
        ...

    def committed(self, partitions: Iterable[Partition]) -> dict[Partition, tuple[int, str]]:
        """Returns committed offset and metadata, from the broker, of the partitions that have them.

        Waits for open transactions that contain such an offset.
        """
        ...

    def member(self) -> GroupMember:
        """The present membership of this consumer in its group."""
        ...

    def commit(self, offsets: Offsets) -> None:
        """Commits the next offset to read and metadata, by partition; returns when the broker has stored them."""
        ...

    def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The first offset of the log, by partition."""
        ...

    def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The end of the log, by partition; with open transactions, the first offset of the oldest one."""
        ...

    def offsets_at(self, partitions: Iterable[Partition], time_ms: int) -> dict[Partition, int]:
        """The first offset with a timestamp of `time_ms` or later, else the end of the log, by partition."""
        ...

    def partitions_for(self, topic: str) -> list[Partition]:
        """The topic's partitions, ascending; raises BrokerError if the topic is missing."""
        ...

    def close(self) -> None:
        """Leaves the group and releases connections and threads; does not commit."""
        ...


class Delivery(Protocol):
    """The delivery of some records."""

    def done(self) -> bool:
        """Whether the broker has acknowledged all of them; raises BrokerError if a delivery failed."""
        ...

    @property
    def done_s(self) -> float:
        """When the last of them was acknowledged, seconds since the epoch; defined once `done` is True."""
        ...


class ProducerClient(Protocol):
    """An idempotent producer with acks=all.

    The number of records in flight is limited: at the limit `send` waits, then raises. After a failed delivery every
    later call raises, so that no offset is committed after it.
    """

    def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        timestamp_ms: int | None = None,
    ) -> Delivery:
        """Queues a record; `timestamp_ms`: ms since the epoch, None for the present time."""
        ...

    def send_many(
        self,
        topic: str,
        keys: Sequence[bytes | None],
        values: Sequence[bytes | None],
        timestamps_ms: Sequence[int] | None = None,
    ) -> Delivery:
        """Queues records of a topic, in order; a ByteColumn is the quickest form of `keys` and `values`."""
        ...

    def undelivered(self) -> int:
        """An upper bound of the number of records that are queued and not acknowledged."""
        ...

    def flush(self, timeout_s: float) -> None:
        """Returns when all records are acknowledged; raises BrokerError after a failed delivery or `timeout_s`."""
        ...

    def close(self, timeout_s: float) -> None:
        """Flushes, and releases connections and threads."""
        ...


class TransactionalProducerClient(ProducerClient, Protocol):
    """A producer whose records and offsets are committed together or not at all.

    The constructor fences an earlier producer with the same transactional id, and completes or aborts its transaction.
    Records belong to the open transaction. Any error of `begin`, `send`, `send_many` or `commit` is final for this
    producer: close it and make a new one.
    """

    def begin(self) -> None:
        """Begins a transaction."""
        ...

    def commit(self, offsets: Offsets, member: GroupMember) -> bool:
        """Commits the records, and `offsets` with metadata for the member's group.

        Returns False if the group refuses the offsets, because `member` is of an earlier generation or no member any
        more. The transaction is then aborted, and the producer can begin another one.

        Raises ProducerFencedError, CommitUnknownError (the outcome is unknown), TransactionAbortedError, or another
        BrokerError, before anything was committed.
        """
        ...

    def abort(self) -> None:
        """Aborts the open transaction, if there is one. Raises BrokerError."""
        ...
