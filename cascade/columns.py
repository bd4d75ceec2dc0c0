"""Columns of a micro-batch, a row per transaction, and short names for the types of arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
INT64_MAX = 2**63 - 1


@dataclass(slots=True)
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


class ByteColumn(Sequence[bytes | None]):
    """A column of byte strings, which lie one after another in memory; also a sequence of Python's `bytes`.

    - `octets` uint8 [total]: the strings. `ends` int64 [rows]: where each ends; the first begins at 0.
    - `absent` bool [rows]: the rows that are None, whose length is 0; None if there is no such row.

    >>> column = ByteColumn.of([b"ab", None, b"c"])
    >>> column[0], column[1], list(column[1:])
    (b'ab', None, [None, b'c'])
    """

    __slots__ = ("absent", "ends", "octets")

    def __init__(self, octets: Array, ends: Int64, absent: Bool | None = None) -> None:
        self.octets, self.ends, self.absent = octets, ends, absent

    @classmethod
    def of(cls, values: Sequence[bytes | None]) -> ByteColumn:
        """The column of these strings; `values` itself if it is a column."""
        if isinstance(values, ByteColumn):
            return values
        absent = np.fromiter((value is None for value in values), np.bool_, len(values))
        octets = np.frombuffer(b"".join(value for value in values if value is not None), np.uint8)
        ends = np.cumsum(np.fromiter((len(value or b"") for value in values), np.int64, len(values)))
        return cls(octets, ends, absent if absent.any() else None)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> bytes | None: ...
    @overload
    def __getitem__(self, index: slice) -> ByteColumn: ...
    def __getitem__(self, index: int | slice) -> bytes | ByteColumn | None:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"a slice with step {step}: use 1")
            begin, end = self._start(start), self._start(max(start, stop))
            absent = None if self.absent is None else self.absent[start:stop]
            return ByteColumn(self.octets[begin:end], self.ends[start:stop] - begin, absent)
        row = range(len(self))[index]
        if self.absent is not None and self.absent[row]:
            return None
        return self.octets[self._start(row) : self.ends[row]].tobytes()

    def __iter__(self) -> Iterator[bytes | None]:
        joined, start = self.octets.tobytes(), 0
        for row, end in enumerate(self.ends.tolist()):
            yield None if self.absent is not None and self.absent[row] else joined[start:end]
            start = end

    def _start(self, row: int) -> int:
        return int(self.ends[row - 1]) if row else 0
