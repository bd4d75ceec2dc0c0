"""Screened transactions that have no decision yet, and the deep calls that some of them wait for."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cascade.columns import Array, Bool, ColumnBatch, Float64, Int64
from streaming.kafka import Partition


@dataclass(frozen=True, slots=True)
class Rows:
    """Screened transactions without a decision, a row each.

    `partition_index` (int64, [rows]): index into `partitions`. Not Kafka's partition number, which is `partition_id`.
    `batch`: the transactions. `start_ms` (float64, ms since the epoch): when the deadline begins to count. `queue_ms`,
    `features_ms`, `screener_ms` (float64, ms): time spent there. `screener_score` (float64): calibrated probability.
    """

    partitions: list[Partition]
    partition_index: Int64
    offsets: Int64
    batch: ColumnBatch
    start_ms: Float64
    queue_ms: Float64
    screener_score: Float64
    features_ms: float
    screener_ms: float

    def __len__(self) -> int:
        return len(self.offsets)

    def of(self, partitions: Collection[Partition]) -> Bool:
        """Which rows are of these partitions, bool [rows]."""
        return np.array([partition in partitions for partition in self.partitions], bool)[self.partition_index]

    def take(self, index: Array) -> Rows:
        """Returns some of the rows, by index or mask."""
        names = ("partition_index", "offsets", "start_ms", "queue_ms", "screener_score")
        columns: dict[str, Any] = {name: getattr(self, name)[index] for name in names}
        return replace(self, batch=self.batch.take(index), **columns)


class DeepCall:
    """A call to the deep model; `open` (bool, [rows]) marks the rows that have no decision yet."""

    def __init__(self, rows: Rows, deadline_ms: Float64, future: Future[Float64], sent_s: float) -> None:
        self.rows = rows
        self.deadline_ms = deadline_ms
        self.future = future
        self.sent_s = sent_s
        self.open: Bool = np.ones(len(rows), bool)
        self.next_deadline_ms = float(deadline_ms.min())

    @property
    def rows_open(self) -> int:
        """The number of rows that have no decision yet."""
        return int(np.count_nonzero(self.open))

    def expire(self, now_ms: float) -> Array:
        """Closes the rows whose deadline has passed, and returns their indexes."""
        if now_ms < self.next_deadline_ms:
            return np.zeros(0, np.int64)
        expired = np.flatnonzero(self.open & (self.deadline_ms <= now_ms))
        self.open[expired] = False
        left = self.deadline_ms[self.open]
        self.next_deadline_ms = float(left.min()) if len(left) else float("inf")
        return expired

    def drop(self, partitions: Collection[Partition]) -> None:
        """Closes the rows of these partitions, which this worker lost."""
        self.open &= ~self.rows.of(partitions)

    def close(self) -> Array:
        """Closes all open rows, and returns their indexes."""
        rows = np.flatnonzero(self.open)
        self.open[rows] = False
        return rows
