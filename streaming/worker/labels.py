"""Follows the labels topic: every worker reads all of it, outside the group, from its beginning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cascade.columns import ColumnBatch
from cascade.errors import BrokerError
from cascade.protocols import Clock
from streaming.codecs import Codec, Reject
from streaming.kafka import ConsumerClient, FetchedBatch, Partition

ROWS_MAX = 10_000
# The most that a read up to the end offset may take; a broker that needs longer is broken.
CATCH_UP_TIMEOUT_S = 60.0
POLL_S = 0.02
# With alignment "arrival": more frequent polls would slow down the transactions.
ARRIVAL_INTERVAL_S = 0.05
_LATE = (
    f"the broker did not return all labels within {CATCH_UP_TIMEOUT_S:.0f} s; check the broker, or set"
    ' labels.alignment to "arrival", which does not wait for them'
)


def read_to_end(
    consumer: ConsumerClient,
    partitions: Sequence[Partition],
    read: Callable[[float], int],
    clock: Clock,
    late: str,
) -> int:
    """Calls `read` until the consumer is at the present ends of the partitions; returns the sum of what it returns.

    read: reads once, with a timeout in seconds. late: of the BrokerError that is raised after CATCH_UP_TIMEOUT_S.
    """
    count, ends = 0, consumer.end_offsets(partitions)
    give_up_s = clock.monotonic() + CATCH_UP_TIMEOUT_S
    while any(consumer.position(partition) < end for partition, end in ends.items()):
        count += read(POLL_S)
        if clock.monotonic() > give_up_s:
            raise BrokerError(late)
    return count


@dataclass(eq=False)
class LabelFollower:
    """Passes label messages to `fold`, and unreadable ones to `reject`.

    consumer: outside any group, of the labels topic. topic: the labels topic. codec: of its messages. alignment: with
    "exact", `catch_up` folds every label that was in the topic at the call; with "arrival", those that have arrived. A
    label takes effect by its event time and delay, so reading it early changes nothing. group_consumer: a member of the
    worker's group, whose commits store the label offsets.
    """

    _consumer: ConsumerClient
    _topic: str
    _codec: Codec
    _alignment: Literal["arrival", "exact"]
    _fold: Callable[[ColumnBatch], None]
    _reject: Callable[[FetchedBatch, list[Reject]], None]
    _clock: Clock
    _group_consumer: ConsumerClient
    # unreadable messages below these offsets have their dead letters, from this run or an earlier one
    _dead_lettered_until: dict[Partition, int] = field(default_factory=dict, init=False)
    _owns_dead_letters: bool = field(default=False, init=False)
    # the offset of the next record to fold, by partition
    positions: dict[Partition, int] = field(default_factory=dict, init=False)
    _next_read_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.partitions: list[Partition] = self._consumer.partitions_for(self._topic)
        self._consumer.assign(self.partitions)

    def beginnings(self) -> dict[Partition, int]:
        """Returns the first offset of each partition of the labels topic."""
        return self._consumer.beginning_offsets(self.partitions)

    def rewind(self, positions: Mapping[Partition, int] | None = None) -> None:
        """Seeks to `positions`, the offsets up to which the state contains the labels; None: to the beginning.

        Reading a label twice changes nothing. If this worker owns the dead letters, it seeks no further than the offset
        up to which they were sent.
        """
        beginnings = self.beginnings()
        self.positions = {}
        for partition, beginning in beginnings.items():
            offset = beginning if positions is None else max(positions.get(partition, beginning), beginning)
            if self._owns_dead_letters:
                offset = max(min(offset, self._dead_lettered_until.get(partition, beginning)), beginning)
            self.positions[partition] = offset
            self._consumer.seek(partition, offset)

    def go_back(self, positions: Mapping[Partition, int]) -> None:
        """Seeks to `positions`, the label offsets of a snapshot that was restored, unless the position is lower.

        The state drops frauds that are too old for its newest transaction. A restored partition is at an older
        transaction: its snapshot contains such frauds again, and among them some that were retracted since.
        """
        current = self.positions.items()
        lower = {partition: min(offset, positions.get(partition, 0)) for partition, offset in current}
        self.rewind(lower if current else positions)

    def own_dead_letters(self, owned: bool) -> None:
        """Sets whether this worker sends the labels topic's dead letters: all workers read it, one of them sends.

        The group's committed offsets of the labels topic say which were sent; the next owner continues from them.
        """
        if owned == self._owns_dead_letters:
            return
        self._owns_dead_letters = owned
        if owned:
            committed = self._group_consumer.committed(self.partitions)
            self._dead_lettered_until = {partition: offset for partition, (offset, _) in committed.items()}
            if self.positions:
                self.rewind(self.positions)

    def offsets_to_commit(self) -> dict[Partition, int]:
        """Returns the label offsets to commit. Empty on a worker that does not own the label topic's dead letters."""
        return dict(self._dead_lettered_until) if self._owns_dead_letters else {}

    def catch_up(self) -> int:
        """Folds the labels that are due by `alignment` and returns their number; before the first `rewind`, none.

        Raises BrokerError if the broker does not return them within CATCH_UP_TIMEOUT_S.
        """
        if not self.positions:
            return 0
        if self._alignment == "exact":
            return read_to_end(self._consumer, self.partitions, self._read, self._clock, _LATE)
        now_s = self._clock.monotonic()
        if now_s < self._next_read_s:
            return 0
        self._next_read_s = now_s + ARRIVAL_INTERVAL_S
        return self._read(0.0)

    def close(self) -> None:
        """Closes the consumer."""
        self._consumer.close()

    def _read(self, timeout_s: float) -> int:
        count = 0
        for fetched in self._consumer.poll(timeout_s, ROWS_MAX):
            decoded = self._codec.decode(fetched.values)
            if decoded.batch.rows:
                self._fold(decoded.batch)
                count += decoded.batch.rows
            partition = (fetched.topic, fetched.partition)
            self.positions[partition] = int(fetched.offsets[-1]) + 1
            if self._owns_dead_letters:
                # a rewind reads messages twice: each is dead-lettered once
                until = self._dead_lettered_until.get(partition, 0)
                fresh = [reject for reject in decoded.rejects if fetched.offsets[reject.index] >= until]
                if fresh:
                    self._reject(fetched, fresh)
                self._dead_lettered_until[partition] = max(until, self.positions[partition])
        return count
