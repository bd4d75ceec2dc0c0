"""Screened transactions on their way to a decision, and the calls to the deep model that some of them wait for."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from cascade.columns import Array, Bool, ColumnBatch, Float64, Int64
from streaming.clients import Partition


@dataclass(frozen=True, slots=True)
class Rows:
    """Screened transactions on their way to a decision, a row each.

    `source` int64: position in `partitions`. `start_ms` float64: from when the deadline counts, ms since the epoch.
    `queue_ms`, `features_ms`, `screener_ms` float64: what the transaction spent there. `screener_score` float64:
    calibrated probability. `batch`: the transactions themselves.
    """

    partitions: list[Partition]
    source: Int64
    offsets: Int64
    batch: ColumnBatch
    start_ms: Float64
    queue_ms: Float64
    screener_score: Float64
    features_ms: float
    screener_ms: float

    def __len__(self) -> int:
        return len(self.offsets)

    def take(self, index: Array) -> Rows:
        """Some of the rows, by positions or mask."""
        return Rows(
            self.partitions, self.source[index], self.offsets[index], self.batch.take(index), self.start_ms[index],
            self.queue_ms[index], self.screener_score[index], self.features_ms, self.screener_ms,
        )  # fmt: skip


class DeepCall:
    """One call to the deep model; `open` marks the rows that have no decision yet."""

    def __init__(self, rows: Rows, deadline_ms: Float64, future: Future[Float64], sent_s: float) -> None:
        self.rows = rows
        self.deadline_ms = deadline_ms
        self.future = future
        self.sent_s = sent_s
        self.open: Bool = np.ones(len(rows), bool)
        self.next_deadline_ms = float(deadline_ms.min())

    def expire(self, now_ms: float) -> Array:
        """Close the rows whose deadline has passed; returns their positions."""
        if now_ms < self.next_deadline_ms:
            return np.zeros(0, np.int64)
        expired = np.flatnonzero(self.open & (self.deadline_ms <= now_ms))
        self.open[expired] = False
        left = self.deadline_ms[self.open]
        self.next_deadline_ms = float(left.min()) if len(left) else float("inf")
        return expired

    def drop(self, partitions: frozenset[Partition]) -> None:
        """Close the rows of these partitions: they are another's to decide."""
        gone = np.array([one in partitions for one in self.rows.partitions], bool)
        self.open &= ~gone[self.rows.source]

    def close(self) -> Array:
        """Close all rows that are open; returns their positions."""
        rows = np.flatnonzero(self.open)
        self.open[rows] = False
        return rows
