"""From fetched records to one micro-batch in order of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cascade.columns import Array, Bool, ColumnBatch, Float64, Int64
from streaming.clients import FetchedBatch, Partition
from streaming.codecs import Codec, Reject, RejectReason
from streaming.codecs.validate import too_far_ahead
from streaming.offsets import NOTHING_DECIDED, Decided


@dataclass(frozen=True, slots=True)
class Rejected:
    """The rejects of one fetched batch, with the batch that holds their bytes."""

    fetched: FetchedBatch
    rejects: list[Reject]


@dataclass(frozen=True, slots=True)
class Intake:
    """One micro-batch: its readable rows in the order in which they are folded, and what could not be read.

    `source` int64 [rows]: position of the row's partition in `partitions`. `offsets` int64 [rows]. `appended_ms`
    float64 [rows]: the record's time, ms since the epoch. `undecided` bool [rows]: False for records that had their
    decision before a restart and are read only to rebuild the state. `held` bool [rows]: True for records that had
    none yet when later ones of their partition had theirs: they were escalated.
    """

    batch: ColumnBatch
    partitions: list[Partition]
    source: Int64
    offsets: Int64
    appended_ms: Float64
    undecided: Bool
    held: Bool
    rejected: list[Rejected]

    @property
    def numbers(self) -> Int64:
        """int64 [rows]: the number of each row's partition."""
        return np.array([number for _, number in self.partitions], np.int64)[self.source]

    def with_batch(self, batch: ColumnBatch) -> Intake:
        """The same, with other columns of the same rows."""
        return replace(self, batch=batch)

    def take(self, index: Array) -> Intake:
        """Some of the rows, by positions or mask, and nothing that could not be read."""
        return Intake(
            self.batch.take(index), self.partitions, self.source[index], self.offsets[index],
            self.appended_ms[index], self.undecided[index], self.held[index], [],
        )  # fmt: skip


def take_in(
    fetched: Sequence[FetchedBatch],
    codec: Codec,
    event_time: str,
    decided: Mapping[Partition, Decided],
    ahead_ms_max: int,
) -> Intake:
    """Decode what was fetched; `decided` names the records of a partition that have their decision.

    Rows of several partitions are merged by event time. Within a partition the order of the log stays: a row counts
    with the latest event time of its partition up to it. An event that is more than `ahead_ms_max` ahead of its
    record's time is refused.
    """
    batches, sources, offsets, appended, order_keys = [], [], [], [], []
    undecided, held, rejected = [], [], []
    partitions = [(one.topic, one.partition) for one in fetched]
    for position, one in enumerate(fetched):
        decoded = codec.decode(one.values)
        batch, rows, rejects = decoded.batch, decoded.rows, decoded.rejects
        ahead = too_far_ahead(batch[event_time], one.timestamps_ms[rows], ahead_ms_max)
        if ahead.any():
            detail = f"{event_time}: more than {ahead_ms_max} ms after the record's own time"
            early = [Reject(int(row), RejectReason.FUTURE_EVENT, detail) for row in rows[ahead]]
            rejects = sorted([*rejects, *early], key=lambda reject: reject.index)
            batch, rows = batch.take(~ahead), rows[~ahead]
        batches.append(batch)
        sources.append(np.full(batch.rows, position, np.int64))
        offsets.append(one.offsets[rows])
        appended.append(one.timestamps_ms[rows].astype(np.float64))
        order_keys.append(np.maximum.accumulate(batch[event_time]))
        before = decided.get(partitions[position], NOTHING_DECIDED)
        known = before.mask(one.offsets)
        undecided.append(~known[rows])
        held.append(before.held(one.offsets)[rows])
        fresh = [reject for reject in rejects if not known[reject.index]]
        if fresh:
            rejected.append(Rejected(one, fresh))
    source = np.concatenate(sources)
    offset = np.concatenate(offsets)
    order: Array = (
        np.arange(len(source)) if len(fetched) == 1 else np.argsort(np.concatenate(order_keys), kind="stable")
    )
    return Intake(
        batch=_concatenate(batches).take(order),
        partitions=partitions,
        source=source[order],
        offsets=offset[order],
        appended_ms=np.concatenate(appended)[order],
        undecided=np.concatenate(undecided)[order],
        held=np.concatenate(held)[order],
        rejected=rejected,
    )


def _concatenate(batches: list[ColumnBatch]) -> ColumnBatch:
    if len(batches) == 1:
        return batches[0]
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0].columns}
    return ColumnBatch(columns, sum(batch.rows for batch in batches))
