"""From fetched records to one micro-batch in order of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cascade.columns import Array, Bool, ColumnBatch, Float64, Int64
from streaming.clients import FetchedBatch, Partition
from streaming.codecs import Codec, Reject
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
    decision before a restart and are read only to rebuild the state.
    """

    batch: ColumnBatch
    partitions: list[Partition]
    source: Int64
    offsets: Int64
    appended_ms: Float64
    undecided: Bool
    rejected: list[Rejected]


def take_in(
    fetched: Sequence[FetchedBatch], codec: Codec, event_time: str, decided: Mapping[Partition, Decided]
) -> Intake:
    """Decode what was fetched; `decided` names the records of a partition that have their decision.

    Rows of several partitions are merged by event time. Within a partition the order of the log stays: a row counts
    with the latest event time of its partition up to it.
    """
    batches, sources, offsets, appended, order_keys, undecided, rejected = [], [], [], [], [], [], []
    partitions = [(one.topic, one.partition) for one in fetched]
    for position, one in enumerate(fetched):
        decoded = codec.decode(one.values)
        batches.append(decoded.batch)
        sources.append(np.full(decoded.batch.rows, position, np.int64))
        offsets.append(one.offsets[decoded.rows])
        appended.append(one.timestamps_ms[decoded.rows].astype(np.float64))
        order_keys.append(np.maximum.accumulate(decoded.batch[event_time]))
        known = decided.get(partitions[position], NOTHING_DECIDED).mask(one.offsets)
        undecided.append(~known[decoded.rows])
        fresh = [reject for reject in decoded.rejects if not known[reject.index]]
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
        rejected=rejected,
    )


def _concatenate(batches: list[ColumnBatch]) -> ColumnBatch:
    if len(batches) == 1:
        return batches[0]
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0].columns}
    return ColumnBatch(columns, sum(batch.rows for batch in batches))
