"""The rules of the schema: which rows break one, for structs that become columns here, and for columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import repeat

import msgspec
import numpy as np

from cascade.columns import Array, Bool, ColumnBatch, Float64, Int64
from cascade.schema import INT64_MAX, Field, out_of_limits
from streaming.codecs.faults import Fault, Faults, note
from streaming.codecs.protocol import RejectReason
from streaming.codecs.rows import seconds_limit, time_to_ms, wire_values

# Controls (Unicode's Cc): a NUL would be lost in a fixed-width column, the others break logs and terminals. And what
# cannot be seen (Cf, Zl, Zp, and the rest of Default_Ignorable_Code_Point, Unicode 15): zero-width characters make two
# ids look like one, bidirectional controls show an operator digits in another order than they are.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def to_columns(fields: dict[str, Field], rows: Sequence[msgspec.Struct]) -> tuple[ColumnBatch, Faults]:
    """Columns of all rows, and the first fault found in each row that may not be used, by row."""
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
    if _UNSEEN.search("".join(texts)):
        unseen = np.fromiter((_UNSEEN.search(text) is not None for text in texts), np.bool_, len(texts))
        note(faults, unseen, *_unseen(name))
    return np.array(octets, field.dtype)


def _categories(name: str, field: Field, texts: list[str], faults: Faults) -> Array:
    positions = {value: position for position, value in enumerate(field.values)}
    column = np.fromiter(map(positions.get, texts, repeat(-1)), np.int64, len(texts))
    check_categories(name, field, column, faults)
    return column


# --- the rules, for columns however they came about -------------------------------------------------------------------


def check_limits(fields: dict[str, Field], batch: ColumnBatch, faults: Faults) -> None:
    """Note numbers and times outside their limits: the last of the rules."""
    for name, mask in out_of_limits(fields, batch).items():
        note(faults, mask, RejectReason.OUT_OF_LIMITS, f"{name}: outside {_limits_text(fields[name])}")


def check_finite(name: str, numbers: Float64, faults: Faults) -> None:
    """Note NaN and infinities."""
    finite = np.isfinite(numbers)
    if not finite.all():
        note(faults, ~finite, RejectReason.NOT_FINITE, f"{name}: NaN or infinite")


def times_in_ms(name: str, times: Int64, unit: str, faults: Faults) -> Array:
    """Times in `unit` as ms; notes seconds that milliseconds cannot count."""
    if unit == "s":
        beyond = (times > seconds_limit()) | (times < -seconds_limit())
        note(faults, beyond, RejectReason.OUT_OF_LIMITS, f"{name}: beyond what milliseconds can count")
        times = np.where(beyond, 0, times)
    return time_to_ms(times, unit)


def check_categories(name: str, field: Field, column: Int64, faults: Faults) -> None:
    """Note what is no position in the field's values."""
    unknown = (column < 0) | (column >= len(field.values))
    if unknown.any():
        note(faults, unknown, RejectReason.UNKNOWN_CATEGORY, f"{name}: none of the {len(field.values)} known values")


def check_text(name: str, field: Field, text: str) -> Fault | None:
    """What is wrong with a text, if anything."""
    if len(text.encode()) > field.max_length:
        return _too_long(name, field)
    return _unseen(name) if _UNSEEN.search(text) else None


def _too_long(name: str, field: Field) -> Fault:
    return RejectReason.TOO_LONG, f"{name}: more than {field.max_length} bytes"


def _unseen(name: str) -> Fault:
    return RejectReason.OUT_OF_LIMITS, f"{name}: holds a control or invisible character"


def _limits_text(field: Field) -> str:
    low = "-∞" if field.minimum is None else str(field.minimum)
    high = "∞" if field.maximum is None else str(field.maximum)
    return f"{low} to {high}"


def too_far_ahead(event_times_ms: Int64, appended_ms: Int64, tolerance_ms: int) -> Bool:
    """Which rows say that they took place more than `tolerance_ms` after the broker kept them; bool [rows].

    `event_times_ms`, `appended_ms` int64 [rows], ms since the epoch; a record without a time of append (negative) is
    not judged. Such a row is refused (RejectReason.FUTURE_EVENT) since it would outlast itself: windows end at a key's
    newest event, so what is older than the longest window before it is dropped, and the card's and the terminal's true
    transactions are late, or not kept at all, until the clock has caught up. Up to the feature file's `lateness`
    ahead, no window of a later row loses anything.
    """
    latest_ms = np.minimum(appended_ms, INT64_MAX - tolerance_ms) + tolerance_ms
    return (event_times_ms > latest_ms) & (appended_ms >= 0)
