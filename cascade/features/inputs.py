"""The columns that the features read, as one table: the kernels get it whole, in place of a list of columns."""

from __future__ import annotations

import numpy as np

from cascade.columns import ColumnBatch, Int64
from cascade.features.layout import INPUT_FIELDS, INPUT_PARTITIONS, INPUT_TIMES
from cascade.features.plan import Plan
from cascade.schema import Schema, key_codes


class InputTable:
    """Partition ids, event times, codes and numbers of the rows of a micro-batch; a row of the table for each of them.

    It grows to the largest batch, and does not shrink.

    `codes`: fields whose codes are read (`key_codes`). `numbers`: fields that are read as float64.
    `cells` int64 [2 + codes + numbers, ≥ rows]: partition ids, times in ms, codes, then numbers (bits of float64).
    """

    def __init__(self, plan: Plan, schema: Schema) -> None:
        columns = [column for key in plan.keys for column in plan.keyed[key]]
        stateless = [column for column in plan.stateless if column.reads_field]
        codes = [*plan.keys, *(column.tag for column in columns if column.tag)]
        codes += [column.field for column in stateless if column.function != "value"]
        numbers = [column.value for column in columns if column.value]
        numbers += [column.field for column in stateless if column.function == "value"]
        self.codes, self.numbers = tuple(dict.fromkeys(codes)), tuple(dict.fromkeys(numbers))
        self.cells: Int64 = np.zeros((INPUT_FIELDS + len(self.codes) + len(self.numbers), 0), np.int64)
        self._event_time = schema.roles.event_time
        self._strings = frozenset(name for name in self.codes if schema.fields[name].type == "string")
        self._rows_max = 0
        self.make_room(1)

    def code(self, field: str) -> int:
        """Return the row of a field's codes."""
        return INPUT_FIELDS + self.codes.index(field)

    def number(self, field: str) -> int:
        """Return the row of a field's numbers."""
        return INPUT_FIELDS + len(self.codes) + self.numbers.index(field)

    def make_room(self, rows: int) -> None:
        """Allocate memory for batches of up to `rows` rows."""
        if rows <= self._rows_max:
            return
        self._rows_max = rows
        self.cells = np.zeros((len(self.cells), rows), np.int64)
        floats = self.cells.view(np.float64)
        self._partition_ids, self._times = self.cells[INPUT_PARTITIONS], self.cells[INPUT_TIMES]
        self._columns = [(name, self.cells[self.code(name)]) for name in self.codes if name not in self._strings]
        self._columns += [(name, floats[self.number(name)]) for name in self.numbers]
        self._hashed = [(name, self.cells[self.code(name)]) for name in self._strings]

    def fill(self, batch: ColumnBatch, partition_ids: Int64 | None) -> None:
        """Copy the columns of a batch into the table; `partition_ids` int64 [rows], None: all are of partition 0."""
        rows, columns = batch.rows, batch.columns
        self.make_room(rows)
        self._partition_ids[:rows] = 0 if partition_ids is None else partition_ids
        self._times[:rows] = columns[self._event_time]
        for name, cells in self._columns:
            cells[:rows] = columns[name]
        for name, cells in self._hashed:
            cells[:rows] = key_codes(columns[name])
