"""Following the labels topic: every worker reads all of it, outside the group, from its beginning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from cascade.columns import ColumnBatch
from cascade.errors import BrokerError
from cascade.protocols import Clock
from streaming.clients import ConsumerClient, FetchedBatch, Partition
from streaming.codecs import Codec, Reject

ROWS_MAX = 10_000
# Waiting for labels that the broker has said are there; longer means that something is broken.
CATCH_UP_TIMEOUT_S = 60.0
POLL_S = 0.02
# Where labels act as they arrive, looking for them more often than this would only slow down the transactions.
ARRIVAL_INTERVAL_S = 0.05


class LabelFollower:
    """Feeds label messages to `fold`, and what cannot be read to `reject`.

    With `alignment` "exact" every label that was in the topic when `catch_up` was called is folded when it returns;
    with "arrival" only those that have arrived. Labels act by their event time and delay, so reading one early changes
    nothing.
    """

    def __init__(
        self,
        consumer: ConsumerClient,
        topic: str,
        codec: Codec,
        alignment: Literal["arrival", "exact"],
        fold: Callable[[ColumnBatch], None],
        reject: Callable[[FetchedBatch, list[Reject]], None],
        clock: Clock,
        group_consumer: ConsumerClient,
    ) -> None:
        self._consumer = consumer
        self.partitions: list[Partition] = consumer.partitions_for(topic)
        self._codec = codec
        self._exact = alignment == "exact"
        self._fold = fold
        self._reject = reject
        self._clock = clock
        # commits belong to the group, which the labels' own consumer is not a member of
        self._consumer_of_commits = group_consumer
        # offsets below which unreadable messages are dead letters already, in this run or an earlier one
        self._buried_until: dict[Partition, int] = {}
        self._buries = False
        # the next record of each partition that is not yet folded
        self.positions: dict[Partition, int] = {}
        self._look_again_s = 0.0
        consumer.assign(self.partitions)

    def beginnings(self) -> dict[Partition, int]:
        """The first offsets that the labels' log still holds."""
        return self._consumer.beginning_offsets(self.partitions)

    def rewind(self, positions: Mapping[Partition, int] | None = None) -> None:
        """Read labels again: from `positions` on, for a state that holds those before, else all of them.

        Labels that are read twice change nothing; where we bury, reading begins no later than what is buried.
        """
        beginnings = self.beginnings()
        self.positions = {}
        for partition, beginning in beginnings.items():
            offset = beginning if positions is None else max(positions.get(partition, beginning), beginning)
            if self._buries:
                offset = max(min(offset, self._buried_until.get(partition, beginning)), beginning)
            self.positions[partition] = offset
            self._consumer.seek(partition, offset)

    def go_back(self, positions: Mapping[Partition, int]) -> None:
        """Read from `positions` on, where a snapshot that was taken in stands, unless we are at an earlier place.

        The state forgets frauds that are too old for the newest transaction. A partition that is taken in anew stands
        at an older one: its snapshot brings those frauds again, and with them some that were taken back since.
        """
        here = self.positions.items()
        self.rewind({one: min(offset, positions.get(one, 0)) for one, offset in here} if here else positions)

    def bury(self, ours: bool) -> None:
        """Whether unreadable labels are ours to bury: every worker reads all labels, one of them buries.

        Which ones have their dead letter is in the group's commits, so that the next to bury goes on from there.
        """
        if ours == self._buries:
            return
        self._buries = ours
        if ours:
            committed = self._consumer_of_commits.committed(self.partitions)
            self._buried_until = {partition: offset for partition, (offset, _) in committed.items()}
            if self.positions:
                self.rewind(self.positions)

    def buried_until(self) -> dict[Partition, int]:
        """What is to be committed for the labels; empty where another buries."""
        return dict(self._buried_until) if self._buries else {}

    def catch_up(self) -> int:
        """Fold the labels that are there; returns how many. Raises BrokerError where they do not come.

        Before the first `rewind` there is no state to fold them into.
        """
        if not self.positions:
            return 0
        if self._exact:
            return self._read_to_end()
        now_s = self._clock.monotonic()
        if now_s < self._look_again_s:
            return 0
        self._look_again_s = now_s + ARRIVAL_INTERVAL_S
        return self._read(0.0)

    def _read_to_end(self) -> int:
        count = 0
        ends = self._consumer.end_offsets(self.partitions)
        give_up_s = self._clock.monotonic() + CATCH_UP_TIMEOUT_S
        while any(self._consumer.position(partition) < end for partition, end in ends.items()):
            count += self._read(POLL_S)
            if self._clock.monotonic() > give_up_s:
                raise BrokerError(
                    f"the labels topic has records that did not come within {CATCH_UP_TIMEOUT_S:.0f} s; is the broker"
                    ' well? (labels.alignment = "arrival" does not wait for them)'
                )
        return count

    def close(self) -> None:
        """Release the consumer."""
        self._consumer.close()

    def _read(self, timeout_s: float) -> int:
        count = 0
        for fetched in self._consumer.poll(timeout_s, ROWS_MAX):
            decoded = self._codec.decode(fetched.values)
            if decoded.batch.rows:
                self._fold(decoded.batch)
                count += decoded.batch.rows
            # a rewind reads them a second time: a message is a dead letter once
            partition = (fetched.topic, fetched.partition)
            self.positions[partition] = int(fetched.offsets[-1]) + 1
            if self._buries:
                buried = self._buried_until.get(partition, 0)
                fresh = [reject for reject in decoded.rejects if fetched.offsets[reject.index] >= buried]
                if fresh:
                    self._reject(fetched, fresh)
                self._buried_until[partition] = max(buried, self.positions[partition])
        return count
