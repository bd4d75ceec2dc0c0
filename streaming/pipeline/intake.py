"""Turns fetched records into a micro-batch in order of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cascade.columns import Array, Bool, ColumnBatch, Float64, Int64
from streaming.codecs import Codec, Reject, RejectReason
from streaming.codecs.validate import too_far_ahead
from streaming.kafka import FetchedBatch, Partition
from streaming.worker.offsets import NOTHING_DECIDED, Decided


@dataclass(frozen=True, slots=True)
class Rejected:
    """The rejects of a fetched batch, with the batch that has their bytes."""

    fetched: FetchedBatch
    rejects: list[Reject]


@dataclass(frozen=True, slots=True)
class Intake:
    """A micro-batch: its readable rows in the order in which they are folded, and the rejected messages.

    `partition_index` (int64, [rows]): index into `partitions`. Not Kafka's partition number, which is `partition_id`.
    `offsets` (int64, [rows]). `appended_ms` (float64, [rows], ms since the epoch): the record's timestamp. `undecided`
    (bool, [rows]): False for records that had their decision before a restart, and are read only to rebuild the state.
    `escalated` (bool, [rows]): True for records that had no decision at the last commit while later records of their
    partition had theirs; the previous owner had escalated them.
    """

    batch: ColumnBatch
    partitions: list[Partition]
    partition_index: Int64
    offsets: Int64
    appended_ms: Float64
    undecided: Bool
    escalated: Bool
    rejected: list[Rejected]

    @property
    def partition_ids(self) -> Int64:
        """Kafka's partition number of each row, int64 [rows]."""
        return np.array([partition_id for _, partition_id in self.partitions], np.int64)[self.partition_index]

    def with_batch(self, batch: ColumnBatch) -> Intake:
        """Returns the same rows with other columns."""
        return replace(self, batch=batch)

    def take(self, index: Array) -> Intake:
        """Returns some of the rows, by index or mask, without the rejected messages."""
        names = ("partition_index", "offsets", "appended_ms", "undecided", "escalated")
        columns: dict[str, Any] = {name: getattr(self, name)[index] for name in names}
        return replace(self, batch=self.batch.take(index), rejected=[], **columns)


def take_in(
    fetched: Sequence[FetchedBatch],
    codec: Codec,
    event_time: str,
    decided: Mapping[Partition, Decided],
    ahead_ms_max: int,
) -> Intake:
    """Decodes fetched batches and merges their rows by event time.

    Within a partition the order of the log stays: a row counts with the latest event time of its partition up to it.

    fetched: batches, at most one a partition. codec: of their messages. event_time: name of the event-time field.
    decided: the records that have their decision, by partition. ahead_ms_max: an event that is further ahead of its
    record's timestamp is rejected.
    """
    batches, indexes, offsets, appended, order_keys = [], [], [], [], []
    undecided, escalated, rejected = [], [], []
    partitions = [(part.topic, part.partition) for part in fetched]
    for index, part in enumerate(fetched):
        decoded = codec.decode(part.values)
        batch, rows, rejects = decoded.batch, decoded.rows, decoded.rejects
        ahead = too_far_ahead(batch[event_time], part.timestamps_ms[rows], ahead_ms_max)
        if ahead.any():
            detail = f"{event_time}: more than {ahead_ms_max} ms after the record's own time"
            early = [Reject(int(row), RejectReason.FUTURE_EVENT, detail) for row in rows[ahead]]
            rejects = sorted([*rejects, *early], key=lambda reject: reject.index)
            batch, rows = batch.take(~ahead), rows[~ahead]
        batches.append(batch)
        indexes.append(np.full(batch.rows, index, np.int64))
        offsets.append(part.offsets[rows])
        appended.append(part.timestamps_ms[rows].astype(np.float64))
        order_keys.append(np.maximum.accumulate(batch[event_time]))
        before = decided.get(partitions[index], NOTHING_DECIDED)
        known = before.mask(part.offsets)
        undecided.append(~known[rows])
        escalated.append(before.escalated(part.offsets)[rows])
        fresh = [reject for reject in rejects if not known[reject.index]]
        if fresh:
            rejected.append(Rejected(part, fresh))
    order: Array = np.argsort(np.concatenate(order_keys), kind="stable")
    return Intake(
        batch=_concatenate(batches).take(order),
        partitions=partitions,
        partition_index=np.concatenate(indexes)[order],
        offsets=np.concatenate(offsets)[order],
        appended_ms=np.concatenate(appended)[order],
        undecided=np.concatenate(undecided)[order],
        escalated=np.concatenate(escalated)[order],
        rejected=rejected,
    )


def _concatenate(batches: list[ColumnBatch]) -> ColumnBatch:
    if len(batches) == 1:
        return batches[0]
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0].columns}
    return ColumnBatch(columns, sum(batch.rows for batch in batches))
