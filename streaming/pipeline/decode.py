"""Step 2, decode: fetched messages become rows of the table, in order of time, or rejects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cascade.columns import Array, ColumnBatch, Int64
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


@dataclass(slots=True)
class _Part:
    """The rows of a fetched batch; `order_keys` (int64, [rows]): the latest event time up to each."""

    rows: Array
    batch: ColumnBatch
    order_keys: Int64
    undecided: int
    rejects: Sequence[Reject] = ()


@dataclass(frozen=True, slots=True)
class Decoder:
    """Decodes fetched batches, and merges their rows by event time.

    Within a partition the order of the log stays: a row counts with the latest event time of its partition up to it.

    codec: of the messages. event_time: name of the event-time field. ahead_ms_max: an event that is further ahead of
    its record's timestamp is rejected. from_append: whether deadlines count from the record's timestamp, and not from
    the micro-batch. bundle: the version that decides.
    """

    codec: Codec
    event_time: str
    ahead_ms_max: int
    from_append: bool
    bundle: str

    def decode(
        self, fetched: Sequence[FetchedBatch], decided: Sequence[Decided], now_ms: float
    ) -> tuple[Table, int, list[Rejected]]:
        """Returns the table of the readable records, with the columns of the steps `fetch` and `decode`.

        Also returns how many of the rows are undecided.

        fetched: batches of one topic, at most one a partition. decided: for each of them, the records that have their
        decision; their rejects are dropped. now_ms: when the micro-batch began, ms since the epoch.
        """
        parts = [self._part(part, before, now_ms) for part, before in zip(fetched, decided, strict=True)]
        rejected = [Rejected(batch, part.rejects) for batch, part in zip(fetched, parts, strict=True) if part.rejects]
        only = parts[0]
        if len(parts) == 1:
            return Table(fetched[0].topic, only.rows, only.batch, (self.bundle,)), only.undecided, rejected
        rows, batch = np.concatenate([part.rows for part in parts]), _concatenate([part.batch for part in parts])
        order = np.argsort(np.concatenate([part.order_keys for part in parts]), kind="stable")
        table = Table(fetched[0].topic, rows, batch, (self.bundle,)).take(order)
        return table, sum(part.undecided for part in parts), rejected

    def _part(self, fetched: FetchedBatch, before: Decided, now_ms: float) -> _Part:
        """The readable records of a fetch, and the rejects that have no decision yet."""
        decoded = self.codec.decode(fetched.values)
        batch, records, rejects = decoded.batch, decoded.rows, decoded.rejects
        part, ahead = self._filled(fetched, batch, records, before, now_ms)
        if ahead:
            early = too_far_ahead(batch[self.event_time], fetched.timestamps_ms[records], self.ahead_ms_max)
            detail = f"{self.event_time}: more than {self.ahead_ms_max} ms after the record's own time"
            rejects = [*rejects, *(Reject(int(row), RejectReason.FUTURE_EVENT, detail) for row in records[early])]
            rejects = sorted(rejects, key=lambda reject: reject.index)
            part, _ = self._filled(fetched, batch.take(~early), records[~early], before, now_ms)
        if rejects:
            known = before.mask(fetched.offsets)
            part.rejects = [reject for reject in rejects if not known[reject.index]]
        return part

    def _filled(
        self, fetched: FetchedBatch, batch: ColumnBatch, records: Int64, before: Decided, now_ms: float
    ) -> tuple[_Part, int]:
        """The rows of the readable `records`, and the number of those that are too far ahead."""
        rows, order_keys = np.zeros(len(records), ROW), np.empty(len(records), np.int64)
        undecided, ahead = kernels.fill(
            rows, records, batch[self.event_time], fetched.partition, fetched.offsets, fetched.timestamps_ms,
            before.until, before.ahead, now_ms, self.from_append, self.ahead_ms_max, order_keys,
        )  # fmt: skip
        return _Part(rows, batch, order_keys, undecided), ahead


def _concatenate(batches: list[ColumnBatch]) -> ColumnBatch:
    if len(batches) == 1:
        return batches[0]
    columns: dict[str, Array] = {
        name: np.concatenate([batch[name] for batch in batches]) for name in batches[0].columns
    }
    return ColumnBatch(columns, sum(batch.rows for batch in batches))
