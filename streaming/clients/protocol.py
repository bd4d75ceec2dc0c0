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


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic to be made: `replication` -1 takes the broker's default, `settings` are the topic's own."""

    name: str
    partitions: int = 1
    replication: int = -1
    settings: Mapping[str, str] | None = None


class ConsumerClient(Protocol):
    """One consumer, used by one thread."""

    def subscribe(
        self,
        topics: Sequence[str],
        on_assigned: PartitionsCallback,
        on_revoked: PartitionsCallback,
        on_lost: PartitionsCallback | None = None,
    ) -> None:
        """Join the group and share its partitions; they start at the committed offset, else at the beginning.

        The callbacks run while `poll` or `close` of this client is waiting for them, so never beside the caller's
        own code, and may use the client (commit, seek, pause). What they raise comes out of `poll` or `close`.
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
        """Committed offset and metadata of those partitions that have one, asked from the broker."""
        ...

    def commit(self, offsets: Mapping[Partition, tuple[int, str]]) -> None:
        """Commit for each partition the offset of the next record to read, with metadata; returns when it is kept."""
        ...

    def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The first offset that the log still holds."""
        ...

    def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The offset that the next record will get."""
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
