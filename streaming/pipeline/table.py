"""The table of transactions in flight: the steps of the pipeline fill its columns, from left to right.

`streaming.pipeline.row` lists the columns by the step that fills them. A table has the rows of a micro-batch, or some
of them: escalated rows wait in a table of their own for the answer of the deep model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from cascade.columns import Array, Bool, ColumnBatch, Float64, Int64
from streaming.kafka import Partition
from streaming.pipeline import table_kernels as kernels
from streaming.pipeline.row import ROW


@dataclass(slots=True)
class Records:
    """Records of transactions: `partition_ids` and `offsets`, int64 [records]."""

    topic: str
    partition_ids: Int64
    offsets: Int64

    def part(self, chosen: Bool) -> Records:
        """Returns some of the records (bool [records])."""
        return Records(self.topic, self.partition_ids[chosen], self.offsets[chosen])


@dataclass(slots=True)
class Table:
    """Transactions in flight, a row each.

    topic: of their records. rows: structured array of ROW, [rows]. batch: the fields of the transactions. bundles: the
    versions that decided; the first is the worker's own.
    """

    topic: str
    rows: Array
    batch: ColumnBatch
    bundles: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, topic: str, batch: ColumnBatch, bundles: tuple[str, ...], **columns: object) -> Table:
        """Returns a table of these transactions; columns that are not given are 0, and -1 where that means none."""
        rows = np.zeros(batch.rows, ROW)
        for name in ("entry", "first", "first_offset"):
            rows[name] = -1
        for name, values in columns.items():
            rows[name] = values
        return cls(topic, rows, batch, bundles)

    def take(self, index: Array) -> Table:
        """Returns some of the rows (positions, or a mask), as copies."""
        return replace(self, rows=self.rows[index], batch=self.batch.take(index))

    def column(self, name: str) -> Array:
        """Returns a copy of a column, contiguous, for kernels that do not take the table."""
        return np.ascontiguousarray(self.rows[name])

    def belong_to(self, partitions: Collection[Partition]) -> Bool:
        """Which rows are of these partitions, bool [rows]."""
        wanted = [partition_id for topic, partition_id in partitions if topic == self.topic]
        found: Bool = np.isin(self.rows["partition_id"], wanted)
        return found

    def records(self, chosen: Int64) -> tuple[Records, dict[Partition, Int64], Float64]:
        """Returns the records of the rows with these positions, at least one; their offsets by partition; `start_ms`.

        All in the order of the rows.
        """
        count = len(chosen)
        partition_ids, offsets, start_ms = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count)
        only = kernels.copy_records(self.rows, chosen, partition_ids, offsets, start_ms)
        if only >= 0:
            by_partition = {(self.topic, only): offsets}
        else:
            numbers = np.unique(partition_ids).tolist()
            by_partition = {(self.topic, number): offsets[partition_ids == number] for number in numbers}
        return Records(self.topic, partition_ids, offsets), by_partition, start_ms
