"""Following the labels topic: every worker reads all of it, outside the group, from its beginning."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Literal

from cascade.columns import ColumnBatch
from cascade.errors import BrokerError
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
    ) -> None:
        self._consumer = consumer
        self.partitions: list[Partition] = consumer.partitions_for(topic)
        self._codec = codec
        self._exact = alignment == "exact"
        self._fold = fold
        self._reject = reject
        # offsets below which unreadable messages are dead letters already, in this run or an earlier one
        self.told_until: dict[Partition, int] = {}
        # the next record of each partition that is not yet folded
        self.positions: dict[Partition, int] = {}
        self._look_again_s = 0.0
        consumer.assign(self.partitions)

    def beginnings(self) -> dict[Partition, int]:
        """The first offsets that the labels' log still holds."""
        return self._consumer.beginning_offsets(self.partitions)

    def rewind(self, positions: Mapping[Partition, int] | None = None) -> None:
        """Read labels again: from `positions` on, for a state that holds those before, else all of them."""
        if positions is None:
            positions = self.beginnings()
        self.positions = dict(positions)
        for partition, offset in positions.items():
            self._consumer.seek(partition, offset)

    def catch_up(self) -> int:
        """Fold the labels that are there; returns how many. Raises BrokerError where they do not come."""
        if self._exact:
            return self._read_to_end()
        now_s = time.monotonic()
        if now_s < self._look_again_s:
            return 0
        self._look_again_s = now_s + ARRIVAL_INTERVAL_S
        return self._read(0.0)

    def _read_to_end(self) -> int:
        count = 0
        ends = self._consumer.end_offsets(self.partitions)
        give_up_s = time.monotonic() + CATCH_UP_TIMEOUT_S
        while any(self._consumer.position(partition) < end for partition, end in ends.items()):
            count += self._read(POLL_S)
            if time.monotonic() > give_up_s:
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
            fresh = [r for r in decoded.rejects if fetched.offsets[r.index] >= self.told_until.get(partition, 0)]
            if fresh:
                self._reject(fetched, fresh)
            self.positions[partition] = int(fetched.offsets[-1]) + 1
            self.told_until[partition] = max(self.told_until.get(partition, 0), int(fetched.offsets[-1]) + 1)
        return count
