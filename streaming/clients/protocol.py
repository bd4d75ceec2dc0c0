"""What the worker asks of a Kafka client library; every failure is a BrokerError, one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cascade.columns import Int64

Partition = tuple[str, int]
"""Topic and number of a partition."""

Headers = Sequence[tuple[str, bytes | None]]
PartitionsCallback = Callable[[list[Partition]], None]


@dataclass(frozen=True, slots=True)
class FetchedBatch:
    """Consecutive records of one partition, a position each in every sequence.

    `offsets` int64, ascending, not always without gaps. `timestamps_ms` int64, ms since the epoch: the time of
    append where the topic says so, else the producer's. `keys`, `values`: bytes or None. `headers`: as on the
    record.
    """

    topic: str
    partition: int
    offsets: Int64
    timestamps_ms: Int64
    keys: list[bytes | None]
    values: list[bytes | None]
    headers: list[Headers]

    def __len__(self) -> int:
        return len(self.values)

    def part(self, start: int, stop: int) -> FetchedBatch:
        """The records at positions from `start` on and before `stop`."""
        if start == 0 and stop == len(self):
            return self
        chosen = slice(start, stop)
        return FetchedBatch(
            self.topic, self.partition, self.offsets[chosen], self.timestamps_ms[chosen], self.keys[chosen],
            self.values[chosen], self.headers[chosen],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic to be made: `replication` -1 takes the broker's default, `settings` are the topic's own."""

    name: str
    partitions: int = 1
    replication: int = -1
    settings: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class GroupMember:
    """A consumer's membership in its group, for `TransactionalProducerClient.commit`.

    A transaction that carries the membership of an earlier generation is refused by the broker: that is what shuts out
    a worker that does not know yet that its partitions are another's. `vendor`: the client library's own object.
    `settled`: False while the member joins, when its generation may be over before it knows the next.
    """

    vendor: object
    settled: bool = True


class ConsumerClient(Protocol):
    """One consumer, used by one thread. It reads what is committed only (`read_committed`)."""

    def subscribe(
        self,
        topics: Sequence[str],
        on_assigned: PartitionsCallback,
        on_revoked: PartitionsCallback,
        on_lost: PartitionsCallback | None = None,
    ) -> None:
        """Join the group and share its partitions; they start at the committed offset, else at the beginning.

        Rebalances are cooperative: `on_assigned` names the partitions that were gained, `on_revoked` and `on_lost`
        those that go; the others are kept, and are polled meanwhile. The callbacks run while `poll` or `close` of this
        client is waiting for them, so never beside the caller's own code, and may use the client (commit, seek,
        pause). What they raise comes out of `poll` or `close`.
        `on_revoked`: the partitions are still ours, commits are accepted. `on_lost`: they already belong to others;
        without it, `on_revoked` is called.
        """
        ...

    def assign(self, partitions: Sequence[Partition]) -> None:
        """Read exactly these partitions, outside any group, from the beginning unless `seek` says otherwise."""
        ...

    def assignment(self) -> set[Partition]:
        """The partitions that this client has now."""
        ...

    def poll(self, timeout_s: float, rows_max: int) -> list[FetchedBatch]:
        """Up to `rows_max` records in all, a batch a partition; empty after `timeout_s` without any.

        It must be called within `max.poll.interval.ms` of the last time, paused or not, or the group takes the
        partitions away.
        """
        ...

    def pause(self, partitions: Iterable[Partition]) -> None:
        """Fetch nothing from these partitions until `resume`."""
        ...

    def resume(self, partitions: Iterable[Partition]) -> None:
        """Fetch from these partitions again."""
        ...

    def seek(self, partition: Partition, offset: int) -> None:
        """Continue with the record at `offset`; what was fetched ahead is dropped."""
        ...

    def position(self, partition: Partition) -> int:
        """The offset of the next record that `poll` returns."""
        ...

    def committed(self, partitions: Iterable[Partition]) -> dict[Partition, tuple[int, str]]:
        """Committed offset and metadata of those partitions that have one, asked from the broker.

        Waits for transactions under way that hold such an offset.
        """
        ...

    def member(self) -> GroupMember:
        """This consumer's membership in its group, as of now."""
        ...

    def commit(self, offsets: Mapping[Partition, tuple[int, str]]) -> None:
        """Commit for each partition the offset of the next record to read, with metadata; returns when it is kept."""
        ...

    def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The first offset that the log still holds."""
        ...

    def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The offset that the next record will get; with transactions under way, where the first of them began."""
        ...

    def offsets_at(self, partitions: Iterable[Partition], time_ms: int) -> dict[Partition, int]:
        """The first offset whose record is of `time_ms` or later; of partitions without one, the end."""
        ...

    def partitions_for(self, topic: str) -> list[Partition]:
        """The topic's partitions, ascending; raises BrokerError where the topic is missing."""
        ...

    def close(self) -> None:
        """Leave the group and release connections and threads; commits nothing by itself."""
        ...


class Delivery(Protocol):
    """Some records on their way."""

    def done(self) -> bool:
        """Whether all of them are kept by the broker; raises BrokerError where one was not."""
        ...


class ProducerClient(Protocol):
    """One idempotent producer; a record counts as sent when all in-sync replicas have it.

    What waits to be delivered is bounded: at the bound `send` waits, then raises. After a failed delivery every
    further call raises: what was decided upon it must not be committed.
    """

    def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        timestamp_ms: int | None = None,
    ) -> Delivery:
        """Queue one record; `timestamp_ms` is its time, now where None."""
        ...

    def send_many(
        self,
        topic: str,
        keys: Sequence[bytes | None],
        values: Sequence[bytes | None],
        timestamps_ms: Sequence[int] | None = None,
    ) -> Delivery:
        """Queue records of one topic, in order."""
        ...

    def undelivered(self) -> int:
        """An upper bound on the records that are queued and not yet confirmed."""
        ...

    def flush(self, timeout_s: float) -> None:
        """Return when every record sent so far is kept; raises BrokerError where one is not, or not in time."""
        ...

    def close(self, timeout_s: float) -> None:
        """Flush and release connections and threads."""
        ...


class TransactionalProducerClient(ProducerClient, Protocol):
    """A producer whose records and offsets are kept together or not at all.

    Making one ends what an earlier producer of the same transactional id has begun: it is committed or aborted when
    the constructor returns, and that producer is fenced. What is sent belongs to the transaction that is open.
    Any error of `begin`, `send`, `send_many` or `commit` is final for this producer: close it and make another.
    """

    def begin(self) -> None:
        """Open a transaction."""
        ...

    def commit(self, offsets: Mapping[Partition, tuple[int, str]], member: GroupMember) -> None:
        """Commit what was sent, and `offsets` (with metadata) of the member's group; returns when all is kept.

        Raises ProducerFencedError, CommitUnknownError (the outcome is not known), TransactionAbortedError (nothing is
        kept), or another BrokerError before anything was committed.
        """
        ...

    def abort(self) -> None:
        """Undo the open transaction; harmless where none is. Raises BrokerError."""
        ...
