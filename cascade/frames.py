"""Reads data files (Parquet, CSV) into columns: the offline counterpart of the codecs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from cascade.columns import Array, ColumnBatch, Int64
from cascade.errors import DataError
from cascade.schema import Field, Schema, out_of_limits

_READERS: dict[str, Callable[[Path], pl.DataFrame]] = {".parquet": pl.read_parquet, ".csv": pl.read_csv}


@dataclass(frozen=True, slots=True)
class LabelledData:
    """Transactions in order of event time, and their labels: `fraud` int64 [rows], 1 for a fraud, else 0."""

    batch: ColumnBatch
    fraud: Int64

    def take(self, rows: Array) -> LabelledData:
        """The rows that `rows` (positions, or a mask bool [rows]) selects."""
        return LabelledData(self.batch.take(rows), self.fraud[rows])


def read_frame(path: Path) -> pl.DataFrame:
    """Read a Parquet or CSV file. Raises DataError if it cannot be read."""
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: unknown file type; use {' or '.join(_READERS)}")
    try:
        return reader(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be read ({reason}); check the path and the file") from error


def read_labelled(path: Path, schema: Schema) -> LabelledData:
    """Read labelled transactions, in order of event time (rows of equal time in the order of the file).

    Raises DataError if the file cannot be read, has no labels, or does not fit the schema.
    """
    frame = read_frame(path)
    label = schema.label.field
    if label not in frame.columns:
        raise DataError(
            f"{path}: has no column {label} (label.field of schema {schema.name}); it has {', '.join(frame.columns)}"
        )
    fraud = _zeros_and_ones(frame[label])
    if fraud is None:
        raise DataError(f"{path}: column {label} has values other than 0 and 1; use 1 for a fraud and 0 for the others")
    batch = frame_to_batch(frame, schema, str(path))
    order = np.argsort(batch[schema.roles.event_time], kind="stable")
    return LabelledData(batch.take(order), fraud[order])


def _zeros_and_ones(series: pl.Series) -> Int64 | None:
    if not (series.dtype.is_numeric() or series.dtype == pl.Boolean) or series.null_count():
        return None
    numbers = series.cast(pl.Float64).to_numpy()
    return numbers.astype(np.int64) if np.isin(numbers, (0, 1)).all() else None


def frame_to_batch(frame: pl.DataFrame, schema: Schema, origin: str) -> ColumnBatch:
    """The columns of the schema's fields. `origin`: the file name in messages.

    Raises DataError for a missing column, a wrong type, a null, or a value out of limits.
    """
    columns = {name: _column(frame, name, field, origin) for name, field in schema.fields.items()}
    batch = ColumnBatch(columns, frame.height)
    for name, rows in out_of_limits(schema.fields, batch).items():
        low, high = schema.fields[name].limits()
        raise DataError(
            f"{origin}: {int(rows.sum())} values of {name} are not numbers within {low:g} and {high:g}"
            f" (first in row {int(np.argmax(rows))}); clean the data or widen the schema's limits"
        )
    return batch


def _column(frame: pl.DataFrame, name: str, field: Field, origin: str) -> Array:
    if name not in frame.columns:
        raise DataError(f"{origin}: has no column {name}; it has {', '.join(frame.columns)}")
    series = frame[name]
    if series.null_count():
        raise DataError(f"{origin}: column {name} has {series.null_count()} nulls; fill or drop them")
    try:
        if field.type == "timestamp":
            return _milliseconds(series, field)
        if field.type == "float64":
            return series.cast(pl.Float64).to_numpy()
        if field.type == "int64":
            return series.cast(pl.Int64).to_numpy()
        if field.type == "category":
            positions = {value: position for position, value in enumerate(field.values)}
            return series.cast(pl.String).replace_strict(positions, return_dtype=pl.Int64).to_numpy()
        octets = np.array([text.encode() for text in series.cast(pl.String)], dtype=np.bytes_)
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"{origin}: column {name} ({series.dtype}) does not fit type {field.type} of the schema"
            f" ({str(error).splitlines()[0]})"
        ) from error
    if octets.dtype.itemsize > field.max_length:
        raise DataError(
            f"{origin}: column {name} has texts of {octets.dtype.itemsize} bytes, more than max_length ="
            f" {field.max_length}; raise max_length in the schema"
        )
    return octets.astype(field.dtype)


def _milliseconds(series: pl.Series, field: Field) -> Int64:
    if series.dtype.is_temporal():
        zone = getattr(series.dtype, "time_zone", None) and "UTC"
        return series.cast(pl.Datetime("us", zone)).dt.epoch("ms").to_numpy()
    units = series.cast(pl.Int64)
    if field.unit == "s":
        return (units * 1_000).to_numpy()
    return (units // 1_000 if field.unit == "us" else units).to_numpy()
