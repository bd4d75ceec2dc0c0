"""The rules of the schema: converts structs to columns, and finds the rows that break a rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat

import msgspec
import numpy as np

from cascade.columns import Array, ColumnBatch, Float64, Int64
from cascade.schema import Field, out_of_limits
from streaming.codecs.faults import Fault, Faults, note
from streaming.codecs.protocol import RejectReason
from streaming.codecs.rows import SECONDS_MAX, time_to_ms, wire_values

# Controls (Unicode's Cc): a NUL would be lost in a fixed-width column, others break logs and terminals. And invisible
# characters (Cf, Zl, Zp, and the rest of Default_Ignorable_Code_Point, Unicode 15): zero-width characters make two ids
# look equal, bidirectional controls display digits in another order.
_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)

NOT_UTF8: Fault = (RejectReason.ENCODING, "a text is not UTF-8")


def to_columns(fields: dict[str, Field], rows: Sequence[msgspec.Struct]) -> tuple[ColumnBatch, Faults]:
    """Returns columns of all rows, and the first fault of each faulty row."""
    faults: Faults = {}
    columns = {
        name: _column(name, field, rows, position, faults) for position, (name, field) in enumerate(fields.items())
    }
    batch = ColumnBatch(columns, len(rows))
    check_limits(fields, batch, faults)
    return batch, faults


def _column(name: str, field: Field, rows: Sequence[msgspec.Struct], position: int, faults: Faults) -> Array:
    if field.type == "string":
        return _strings(name, field, list(wire_values(rows, position)), faults)
    if field.type == "category":
        return _categories(name, field, list(wire_values(rows, position)), faults)
    if field.type == "float64":
        numbers = np.fromiter(wire_values(rows, position), np.float64, len(rows))
        check_finite(name, numbers, faults)
        return numbers
    whole = np.fromiter(wire_values(rows, position), np.int64, len(rows))
    return times_in_ms(name, whole, field.unit, faults) if field.type == "timestamp" else whole


def _strings(name: str, field: Field, texts: list[str], faults: Faults) -> Array:
    octets = [text.encode() for text in texts]
    lengths = np.fromiter(map(len, octets), np.int64, len(octets))
    note(faults, lengths > field.max_length, *_too_long(name, field))
    if _INVISIBLE.search("".join(texts)):
        invisible = np.fromiter((_INVISIBLE.search(text) is not None for text in texts), np.bool_, len(texts))
        note(faults, invisible, *_invisible(name))
    return np.array(octets, field.dtype)


def _categories(name: str, field: Field, texts: list[str], faults: Faults) -> Array:
    positions = {value: position for position, value in enumerate(field.values)}
    column = np.fromiter(map(positions.get, texts, repeat(-1)), np.int64, len(texts))
    check_categories(name, field, column, faults)
    return column


# --- the rules, for columns of any codec ------------------------------------------------------------------------------


def check_columns(
    fields: dict[str, Field],
    columns: dict[str, Array],
    odd_texts: Mapping[str, Mapping[int, bytes]],
    to_ms: Callable[[str, Int64], Array],
    faults: Faults,
) -> ColumnBatch:
    """Returns columns as a batch; notes faults in the order of `to_columns`, so that they are the same in every codec.

    fields: by name. columns: of all fields, as ColumnBatch has them but for times. odd_texts: by string field and row,
    the octets of each text that is too long or not printable ASCII. to_ms: converts the times of the named field, and
    notes its faults. faults: the first of each row.
    """
    decoded = {name: _decoded(odd_texts[name], faults) for name, field in fields.items() if field.type == "string"}
    for name, field in fields.items():
        if field.type == "string":
            for row, text in decoded[name].items():
                if len(text.encode()) > field.max_length:
                    faults.setdefault(row, _too_long(name, field))
                elif _INVISIBLE.search(text):
                    faults.setdefault(row, _invisible(name))
        elif field.type == "float64":
            check_finite(name, columns[name], faults)
        elif field.type == "timestamp":
            columns[name] = to_ms(name, columns[name])
        elif field.type == "category":
            check_categories(name, field, columns[name], faults)
    batch = ColumnBatch({name: columns[name] for name in fields}, len(next(iter(columns.values()))))
    check_limits(fields, batch, faults)
    return batch


def _decoded(texts: Mapping[int, bytes], faults: Faults) -> dict[int, str]:
    """Notes texts that are not UTF-8: a fault of the message, which comes before those of fields."""
    decoded = {}
    for row, octets in texts.items():
        try:
            decoded[row] = octets.decode()
        except UnicodeDecodeError:
            faults.setdefault(row, NOT_UTF8)
    return decoded


def check_limits(fields: dict[str, Field], batch: ColumnBatch, faults: Faults) -> None:
    """Notes numbers and times outside their limits: the last rule."""
    for name, mask in out_of_limits(fields, batch).items():
        note(faults, mask, RejectReason.OUT_OF_LIMITS, f"{name}: outside {_limits_text(fields[name])}")


def check_finite(name: str, numbers: Float64, faults: Faults) -> None:
    """Notes NaN and infinities."""
    finite = np.isfinite(numbers)
    if not finite.all():
        note(faults, ~finite, RejectReason.NOT_FINITE, f"{name}: NaN or infinite")


def times_in_ms(name: str, times: Int64, unit: str, faults: Faults) -> Array:
    """Converts times to ms; notes seconds beyond the range of int64 ms."""
    if unit == "s":
        beyond = (times > SECONDS_MAX) | (times < -SECONDS_MAX)
        note(faults, beyond, RejectReason.OUT_OF_LIMITS, f"{name}: beyond the range of int64 milliseconds")
        times = np.where(beyond, 0, times)
    return time_to_ms(times, unit)


def check_categories(name: str, field: Field, column: Int64, faults: Faults) -> None:
    """Notes values that are not an index into the field's values."""
    unknown = (column < 0) | (column >= len(field.values))
    if unknown.any():
        note(faults, unknown, RejectReason.UNKNOWN_CATEGORY, f"{name}: not one of the {len(field.values)} known values")


def _too_long(name: str, field: Field) -> Fault:
    return RejectReason.TOO_LONG, f"{name}: more than {field.max_length} bytes"


def _invisible(name: str) -> Fault:
    return RejectReason.OUT_OF_LIMITS, f"{name}: contains a control or invisible character"


def _limits_text(field: Field) -> str:
    low = "-∞" if field.minimum is None else str(field.minimum)
    high = "∞" if field.maximum is None else str(field.maximum)
    return f"{low} to {high}"
