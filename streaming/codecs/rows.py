"""Struct types for messages, derived from the fields, and their conversion to columns and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Annotated, Any

import msgspec
import numpy as np

from cascade.columns import INT64_MAX, Array, ColumnBatch
from cascade.schema import TIME_UNITS_PER_SECOND, Field

# The largest number of seconds whose milliseconds fit int64.
SECONDS_MAX = INT64_MAX // 1_000

WireInt64 = Annotated[int, msgspec.Meta(ge=-INT64_MAX - 1, le=INT64_MAX)]
_WIRE_TYPES: dict[str, Any] = {
    "int64": WireInt64,
    "float64": float,
    "timestamp": WireInt64,
    "string": str,
    "category": str,
}


def row_type(fields: dict[str, Field]) -> type[msgspec.Struct]:
    """Returns a struct type with attributes f0, f1, … for the fields in order, under their names on the wire.

    Field names need not be Python identifiers. Unknown fields of a message are ignored: producers evolve first.
    """
    attributes = [
        (f"f{position}", _WIRE_TYPES[field.type], msgspec.field(name=name))
        for position, (name, field) in enumerate(fields.items())
    ]
    # gc=False: a row has no containers, so the garbage collector need not visit it
    return msgspec.defstruct("Row", attributes, gc=False)


def wire_values(rows: Sequence[msgspec.Struct], position: int) -> Iterable[Any]:
    """The values of the field at `position`, a value for each row."""
    return map(attrgetter(f"f{position}"), rows)


def time_to_ms(values: Array, unit: str) -> Array:
    """Converts epoch times int64 from `unit` to ms; rounds µs down; seconds must be within SECONDS_MAX."""
    if unit == "s":
        return values * 1_000
    return values // 1_000 if unit == "us" else values


def time_from_ms(column: Array, unit: str) -> Array:
    """Converts times int64 from ms to `unit`; the inverse of `time_to_ms`, except for its rounding."""
    per_second = TIME_UNITS_PER_SECOND[unit]
    return column // (1_000 // per_second) if per_second <= 1_000 else column * (per_second // 1_000)


def to_rows(fields: dict[str, Field], batch: ColumnBatch, row: type[msgspec.Struct]) -> list[msgspec.Struct]:
    """Converts a batch to structs; the inverse of decoding, except for the rounding of `time_to_ms`."""
    columns = [_wire_column(batch[name], field) for name, field in fields.items()]
    return [row(*values) for values in zip(*columns, strict=True)]


def _wire_column(column: Array, field: Field) -> list[Any]:
    if field.type == "timestamp":
        column = time_from_ms(column, field.unit)
    values: list[Any] = column.tolist()
    if field.type == "string":
        return [text.decode() for text in values]
    if field.type == "category":
        return [field.values[position] for position in values]
    return values


def empty_batch(fields: dict[str, Field]) -> ColumnBatch:
    """Returns a batch without rows, with the fields' dtypes."""
    return ColumnBatch({name: np.empty(0, field.dtype) for name, field in fields.items()}, 0)
