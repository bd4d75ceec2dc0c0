"""Columns of a micro-batch, a row per transaction, and short names for the types of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ColumnBatch:
    """Columns of equal length, by field name, a row per transaction.

    The type of a field in the schema determines the dtype of its column:

    - `int64` and `float64`: the same.
    - `timestamp`: int64, ms since the epoch (UTC).
    - `category`: int64, the position of the value in the schema's list.
    - `string`: `S{max_length}`, bytes of UTF-8.
    """

    columns: Mapping[str, Array]
    rows: int

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    def take(self, index: Array) -> ColumnBatch:
        """The rows that `index` (positions, or a mask bool [rows]) selects, in the order of `index`."""
        columns = {name: column[index] for name, column in self.columns.items()}
        rows = len(next(iter(columns.values()))) if columns else 0
        return ColumnBatch(columns, rows)
