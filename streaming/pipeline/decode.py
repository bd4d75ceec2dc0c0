"""Step 2, decode: fetched messages become rows of the table, in order of time, or rejects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cascade.columns import Array, ColumnBatch, Float64, Int64
from streaming.codecs import Codec, Reject, RejectReason
from streaming.codecs.ahead import too_far_ahead
from streaming.kafka import FetchedBatch
from streaming.pipeline import table_kernels as kernels
from streaming.pipeline.offsets import Decided
from streaming.pipeline.row import ROW
from streaming.pipeline.table import Table


@dataclass(frozen=True, slots=True)
class Rejected:
    """The rejects of a fetched batch, with the batch that has their bytes."""

    fetched: FetchedBatch
    rejects: Sequence[Reject]


class _Part(NamedTuple):
    """The rows of a fetched batch; `order_keys` (int64, [rows]): the latest event time up to each."""

    rows: Array
    batch: ColumnBatch
    order_keys: Int64
    undecided: int


class Decoder:
    """Decodes fetched batches, and merges their rows by event time; for one thread.

    Within a partition the order of the log stays: a row counts with the latest event time of its partition up to it.
    """

    def __init__(self, codec: Codec, event_time: str, ahead_ms_max: int, from_append: bool, bundle: str) -> None:
        """Arguments of a decoder.

        codec: of the messages. event_time: name of the event-time field. ahead_ms_max: an event that is further ahead
        of its record's timestamp is rejected. from_append: whether deadlines count from the record's timestamp, and not
        from the micro-batch. bundle: the version that decides.
        """
        self._codec, self._event_time, self._ahead_ms_max = codec, event_time, ahead_ms_max
        self._from_append, self._bundles = from_append, (bundle,)
        self._arrivals = _no_arrivals()

    def decode(
        self, fetched: Sequence[FetchedBatch], decided: Sequence[Decided], now_ms: float
    ) -> tuple[Table, int, list[Rejected]]:
        """Returns the table of the readable records, with the columns of the steps `fetch` and `decode`.

        Also returns how many of the rows are undecided.

        fetched: batches of one topic, at most one a partition. decided: for each of them, the records that have their
        decision; their rejects are dropped. now_ms: when the micro-batch began, ms since the epoch.
        """
        rejected: list[Rejected] = []
        parts = [self._part(part, before, now_ms, rejected) for part, before in zip(fetched, decided, strict=True)]
        if len(parts) == 1:
            rows, batch, _, undecided = parts[0]
            return Table(fetched[0].topic, rows, batch, self._bundles), undecided, rejected
        rows, batch = np.concatenate([part.rows for part in parts]), _concatenate([part.batch for part in parts])
        order = np.argsort(np.concatenate([part.order_keys for part in parts]), kind="stable")
        table = Table(fetched[0].topic, rows, batch, self._bundles).take(order)
        return table, sum(part.undecided for part in parts), rejected

    def arrivals(self) -> tuple[float, int] | None:
        """The least wait, in seconds, of the records since the last call, and how many had a timestamp ahead of now.

        The wait is from a record's timestamp to its micro-batch. None without a record that has a timestamp.
        """
        least_ms, early = self._arrivals.tolist()
        if least_ms == math.inf:
            return None
        self._arrivals = _no_arrivals()
        return least_ms / 1e3, int(early)

    def _part(self, fetched: FetchedBatch, before: Decided, now_ms: float, rejected: list[Rejected]) -> _Part:
        """The readable records of a fetch; adds the rejects that have no decision yet."""
        decoded = self._codec.decode(fetched.values)
        batch, records, rejects = decoded.batch, decoded.rows, decoded.rejects
        rows, order_keys = np.zeros(len(records), ROW), np.empty(len(records), np.int64)
        undecided, ahead = kernels.fill(
            rows, records, batch.columns[self._event_time], fetched.partition, fetched.offsets, fetched.timestamps_ms,
            before.until, before.ahead, now_ms, self._from_append, self._ahead_ms_max, order_keys, self._arrivals,
        )  # fmt: skip
        if ahead:
            early = too_far_ahead(batch[self._event_time], fetched.timestamps_ms[records], self._ahead_ms_max)
            detail = f"{self._event_time}: more than {self._ahead_ms_max} ms after the record's own time"
            rejects = [*rejects, *(Reject(int(row), RejectReason.FUTURE_EVENT, detail) for row in records[early])]
            rejects = sorted(rejects, key=lambda reject: reject.index)
            rows, batch = rows[~early], batch.take(~early)
            order_keys = np.maximum.accumulate(batch[self._event_time])
            undecided = int(np.count_nonzero(rows["undecided"]))
        if rejects:
            known = before.mask(fetched.offsets)
            rejects = [reject for reject in rejects if not known[reject.index]]
            if rejects:
                rejected.append(Rejected(fetched, rejects))
        return _Part(rows, batch, order_keys, undecided)


def _no_arrivals() -> Float64:
    return np.array([math.inf, 0.0])


def _concatenate(batches: list[ColumnBatch]) -> ColumnBatch:
    if len(batches) == 1:
        return batches[0]
    columns: dict[str, Array] = {
        name: np.concatenate([batch[name] for batch in batches]) for name in batches[0].columns
    }
    return ColumnBatch(columns, sum(batch.rows for batch in batches))
