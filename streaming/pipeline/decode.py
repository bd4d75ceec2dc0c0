"""Step 2, decode: fetched messages become rows of the table, in order of time, or rejects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cascade.columns import Array, Bool, ColumnBatch, Int64
from streaming.codecs import Codec, Reject, RejectReason
from streaming.codecs.ahead import any_too_far_ahead, too_far_ahead
from streaming.kafka import FetchedBatch
from streaming.pipeline import table_kernels as kernels
from streaming.pipeline.offsets import Decided
from streaming.pipeline.row import ROW
from streaming.pipeline.table import Table


@dataclass(frozen=True, slots=True)
class Rejected:
    """The rejects of a fetched batch, with the batch that has their bytes."""

    fetched: FetchedBatch
    rejects: list[Reject]


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
    ) -> tuple[Table, list[Rejected]]:
        """Returns the table of the readable records, with the columns of the steps `fetch` and `decode`.

        fetched: batches of one topic, at most one a partition. decided: for each of them, the records that have their
        decision; their rejects are dropped. now_ms: when the micro-batch began, ms since the epoch.
        """
        parts = list(map(self._decoded, fetched, decided))
        rows = np.zeros(sum(len(records) for _, records, _ in parts), ROW)
        order_keys = np.empty(len(rows), np.int64)
        start = 0
        for part, before, (batch, records, _) in zip(fetched, decided, parts, strict=True):
            stop = start + len(records)
            kernels.fill(
                rows[start:stop], records, batch[self.event_time], part.partition, part.offsets, part.timestamps_ms,
                before.until, before.ahead, now_ms, self.from_append, order_keys[start:stop],
            )  # fmt: skip
            start = stop
        table = Table(fetched[0].topic, rows, _concatenate([batch for batch, _, _ in parts]), (self.bundle,))
        if len(parts) > 1:
            table = table.take(np.argsort(order_keys, kind="stable"))
        return table, [Rejected(part, rejects) for part, (_, _, rejects) in zip(fetched, parts, strict=True) if rejects]

    def _decoded(self, part: FetchedBatch, before: Decided) -> tuple[ColumnBatch, Int64, list[Reject]]:
        """The readable records of a fetch, their positions in it, and the rejects that have no decision yet."""
        decoded = self.codec.decode(part.values)
        batch, records, rejects = decoded.batch, decoded.rows, decoded.rejects
        ahead = self._too_far_ahead(batch, part.timestamps_ms, records)
        if ahead is not None:
            detail = f"{self.event_time}: more than {self.ahead_ms_max} ms after the record's own time"
            early = [Reject(int(record), RejectReason.FUTURE_EVENT, detail) for record in records[ahead]]
            rejects = sorted([*rejects, *early], key=lambda reject: reject.index)
            batch, records = batch.take(~ahead), records[~ahead]
        if rejects:
            known = before.mask(part.offsets)
            rejects = [reject for reject in rejects if not known[reject.index]]
        return batch, records, rejects

    def _too_far_ahead(self, batch: ColumnBatch, timestamps_ms: Int64, records: Int64) -> Bool | None:
        """The rows whose event is too far ahead of its record, bool [rows]; None if there is none."""
        event_times_ms = batch[self.event_time]
        if not any_too_far_ahead(event_times_ms, timestamps_ms, records, self.ahead_ms_max):
            return None
        return too_far_ahead(event_times_ms, timestamps_ms[records], self.ahead_ms_max)


def _concatenate(batches: list[ColumnBatch]) -> ColumnBatch:
    if len(batches) == 1:
        return batches[0]
    columns: dict[str, Array] = {
        name: np.concatenate([batch[name] for batch in batches]) for name in batches[0].columns
    }
    return ColumnBatch(columns, sum(batch.rows for batch in batches))
