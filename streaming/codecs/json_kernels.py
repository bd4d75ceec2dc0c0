"""Decodes plain JSON objects to columns, compiled by numba: a pass over a fetch, no Python object for each row.

A message is plain if it is an object with every field once and nothing else, written as Python's `json` or a compact
writer does, with numbers, texts and limits about which no two readers differ. What is doubtful, for whatever reason, is
left to msgspec, which accepts it or names the reason. So the rules here may be stricter than those of JSON, and never
laxer. Reading stops at the first doubt, and no octet is read twice except for field names and category values, so the
length of a message limits the cost.

All functions are inlined into one, which saves a third of the time: numba passes an array as seven arguments.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils

from cascade.columns import Array, Bool, Float64, Int64
from cascade.compilation import intrinsic, kernel

# The kinds of fields.
WHOLE, TIME, NUMBER, TEXT, CATEGORY = range(5)
# A field of the messages. `column`: its row in `wholes` (WHOLE, TIME, CATEGORY) or `numbers`, or of a TEXT the widths
# of the text columns before it. `word`, `word_end`: its category values among the words. `width`: of a text, octets.
# `times`, `divisor`: from its unit of time to ms. `minimum`, `maximum`: inclusive, in the unit of the column.
FIELD = np.dtype(
    [
        ("kind", np.int64),
        ("column", np.int64),
        ("word", np.int64),
        ("word_end", np.int64),
        ("width", np.int64),
        ("times", np.int64),
        ("divisor", np.int64),
        ("minimum", np.float64),
        ("maximum", np.float64),
    ]
)
# A bit for each field that a message has had.
FIELDS_MAX = 62
# With more digits an integer might not fit int64.
_DIGITS_MAX = 18
# With more digits the milliseconds of a time in seconds might not.
_SECONDS_DIGITS_MAX = 15
# A mantissa below 2^53 and a power of ten up to 10^22 are doubles exactly, so their quotient is rounded once, as the
# nearest double must be (Clinger, "How to read floating point numbers accurately", PLDI 1990).
_EXACT = 1 << 53
_POWERS = np.array([10.0**power for power in range(_DIGITS_MAX + 1)])
_OPEN, _CLOSE, _QUOTE, _COMMA, _SPACE, _BACKSLASH = (ord(character) for character in '{}", \\')
_MINUS, _POINT, _ZERO, _NINE = (ord(character) for character in "-.09")
_FIRST_PLAIN, _LAST_PLAIN = 0x20, 0x7E


@intrinsic
def _equal(typing: Any, octets: Any, cursor: Any, letters: Any, begin: Any, length: Any) -> Any:
    """Whether `length` octets are equal, by C's memcmp; a loop would take a third more time for a message."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        octets_value, cursor, letters_value, begin, length = arguments
        left = context.make_array(octets)(context, builder, octets_value).data
        right = context.make_array(letters)(context, builder, letters_value).data
        octet = ir.IntType(8).as_pointer()
        memcmp = ir.FunctionType(ir.IntType(32), [octet, octet, ir.IntType(64)])
        function = cgutils.get_or_insert_function(builder.module, memcmp, "memcmp")
        difference = builder.call(function, [builder.gep(left, [cursor]), builder.gep(right, [begin]), length])
        return builder.icmp_signed("==", difference, ir.IntType(32)(0))

    return numba.types.boolean(octets, cursor, letters, begin, length), generate


@kernel(inline="always")
def _word_at(octets: Array, cursor: int, end: int, letters: Array, bounds: Int64, word: int) -> int:
    """Returns the length of a word if it is at `cursor`, else 0."""
    begin, length = bounds[word], bounds[word + 1] - bounds[word]
    if length > end - cursor:
        return 0
    return length if _equal(octets, cursor, letters, begin, length) else 0


@kernel(inline="always")
def _digits(octets: Array, cursor: int, end: int, value: Any) -> Any:
    """Appends the digits from `cursor` on to `value`; returns it and the end of the digits.

    The caller compares their number with _DIGITS_MAX. Beyond it `value` overflows, and does not count.
    """
    while cursor < end and _ZERO <= octets[cursor] <= _NINE:
        value = value * 10 + (np.int64(octets[cursor]) - _ZERO)
        cursor += 1
    return value, cursor


@kernel(inline="always")
def _read_whole(octets: Array, cursor: int, end: int, field: Any, wholes: Int64, row: int) -> int:
    """Reads an integer or a time; returns its end, or -1 for a doubt. So do the other readers."""
    negative = cursor < end and octets[cursor] == _MINUS
    begin = cursor + negative
    value, cursor = _digits(octets, begin, end, 0)
    digits = cursor - begin
    if digits == 0 or digits > _DIGITS_MAX or (octets[begin] == _ZERO and (digits > 1 or negative)):
        return -1
    if negative:
        value = -value
    if field.kind == TIME:
        if field.times > 1 and digits > _SECONDS_DIGITS_MAX:
            return -1
        # rounds down, as `time_to_ms` does
        value = value * field.times // field.divisor
    if not field.minimum <= float(value) <= field.maximum:
        return -1
    wholes[field.column, row] = value
    return cursor


@kernel(inline="always")
def _read_number(octets: Array, cursor: int, end: int, field: Any, numbers: Float64, row: int) -> int:
    negative = cursor < end and octets[cursor] == _MINUS
    begin = cursor + negative
    mantissa, cursor = _digits(octets, begin, end, 0)
    digits, decimals = cursor - begin, 0
    if digits == 0 or (octets[begin] == _ZERO and digits > 1):
        return -1
    if cursor < end and octets[cursor] == _POINT:
        point = cursor + 1
        mantissa, cursor = _digits(octets, point, end, mantissa)
        decimals = cursor - point
        if decimals == 0:
            return -1
    if digits + decimals > _DIGITS_MAX or mantissa >= _EXACT or (negative and mantissa == 0):
        return -1
    value = float(mantissa) / _POWERS[decimals]
    if negative:
        value = -value
    if not field.minimum <= value <= field.maximum:
        return -1
    numbers[field.column, row] = value
    return cursor


@kernel(inline="always")
def _read_text(octets: Array, cursor: int, end: int, field: Any, texts: Array, into: int) -> int:
    """Reads a text of printable ASCII without escapes, and pads it with zeros."""
    if cursor >= end or octets[cursor] != _QUOTE:
        return -1
    cursor += 1
    last = into + field.width
    while cursor < end and octets[cursor] != _QUOTE:
        octet = octets[cursor]
        if into == last or octet < _FIRST_PLAIN or octet > _LAST_PLAIN or octet == _BACKSLASH:
            return -1
        texts[into] = octet
        into += 1
        cursor += 1
    while into < last:
        texts[into] = 0
        into += 1
    return cursor + 1 if cursor < end else -1


@kernel(inline="always")
def _read_category(
    octets: Array, cursor: int, end: int, field: Any, letters: Array, bounds: Int64, wholes: Int64, row: int
) -> int:
    for word in range(field.word, field.word_end):
        length = _word_at(octets, cursor, end, letters, bounds, word)
        if length:
            wholes[field.column, row] = word - field.word
            return cursor + length
    return -1


@kernel(inline="always")
def _field_at(octets: Array, cursor: int, end: int, letters: Array, bounds: Int64, order: Int64, step: int) -> Any:
    """The field whose name is at `cursor`, or -1. `order[step]` is tried first, and becomes the field."""
    if _word_at(octets, cursor, end, letters, bounds, order[step]):
        return order[step]
    for number in range(len(order)):
        if _word_at(octets, cursor, end, letters, bounds, number):
            order[step] = number
            return number
    return -1


@kernel(inline="always")
def _read_object(
    octets: Array, cursor: int, end: int, fields: Array, letters: Array, bounds: Int64, order: Int64, wholes: Int64,
    numbers: Float64, texts: Array, row: int,
) -> bool:  # fmt: skip
    """Reads a message into row `row` of the columns; returns whether it is plain."""
    rows, seen = wholes.shape[1], 0
    for step in range(len(fields)):
        # "{", or "," and perhaps a space
        if cursor >= end or octets[cursor] != (_COMMA if step else _OPEN):
            return False
        cursor += 1
        if step and cursor < end and octets[cursor] == _SPACE:
            cursor += 1
        number = _field_at(octets, cursor, end, letters, bounds, order, step)
        if number < 0 or seen >> number & 1:
            return False
        seen |= 1 << number
        field = fields[number]
        cursor += bounds[number + 1] - bounds[number]
        if cursor < end and octets[cursor] == _SPACE:
            cursor += 1
        if field.kind == NUMBER:
            cursor = _read_number(octets, cursor, end, field, numbers, row)
        elif field.kind == TEXT:
            into = field.column * rows + row * field.width
            cursor = _read_text(octets, cursor, end, field, texts, into)
        elif field.kind == CATEGORY:
            cursor = _read_category(octets, cursor, end, field, letters, bounds, wholes, row)
        else:
            cursor = _read_whole(octets, cursor, end, field, wholes, row)
        if cursor < 0:
            return False
    return cursor == end - 1 and octets[cursor] == _CLOSE


@kernel
def read_objects(
    octets: Array, ends: Int64, bytes_max: int, fields: Array, letters: Array, bounds: Int64, order: Int64,
    wholes: Int64, numbers: Float64, texts: Array, doubtful: Bool,
) -> int:  # fmt: skip
    """Decodes the messages of a fetch; returns the number of doubtful ones, whose values in the columns do not count.

    octets (uint8), ends (int64 [rows]): as in ByteColumn. bytes_max: a longer message is doubtful. fields (FIELD
    [fields], at most FIELDS_MAX): of each message. letters (uint8), bounds (int64): word w is letters[bounds[w]:
    bounds[w + 1]]. The first words are the names of the fields with quotes and colon, the others are category values
    with quotes; an empty one occurs in no plain message. order (int64 [fields]): the fields in the order of the last
    message, which is tried first in the next one.

    Written: wholes (int64 [columns, rows]), numbers (float64 [columns, rows]), texts (uint8, flat: the column of a
    text field has rows × width octets after rows × field.column), doubtful (bool [rows]).
    """
    begin, doubts = 0, 0
    for row in range(len(ends)):
        end = ends[row]
        plain = end - begin <= bytes_max and _read_object(
            octets, begin, end, fields, letters, bounds, order, wholes, numbers, texts, row
        )
        doubtful[row] = not plain
        doubts += not plain
        begin = end
    return doubts
