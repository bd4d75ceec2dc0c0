"""Decodes Avro's binary encoding to columns, compiled by numba: a pass over a fetch, no Python object for each row.

Every length and number in a message is compared with the end of the message before it is used, and each step of a
writer's schema reads at most the octets of the message. So the lengths of message and schema limit the cost.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cascade.columns import Array, Int64
from cascade.compilation import kernel

# The types of a writer's schema.
NULL, BOOLEAN, INT, LONG, FLOAT, DOUBLE, BYTES, FIXED, ENUM = range(9)
# The kinds of columns.
SKIP, WHOLE, NUMBER, TEXT, CATEGORY = range(5)
# Faults of a message; 0: none.
CUT_SHORT, BAD_NUMBER, BAD_LENGTH, NO_SUCH_BRANCH, NO_SUCH_SYMBOL, BAD_BOOLEAN, TOO_MUCH, IS_NULL = range(1, 9)
_INT_MAX = 2**31 - 1
_VARINT_BITS = 63


@kernel(nogil=True)
def _number(octets: Array, cursor: int, end: int) -> Any:
    """Returns a zigzag number and the next position; the position is -CUT_SHORT or -BAD_NUMBER for a fault."""
    value, shift = np.uint64(0), 0
    while cursor < end:
        octet = octets[cursor]
        cursor += 1
        if shift == _VARINT_BITS and octet > 1:
            return 0, -BAD_NUMBER
        value |= np.uint64(octet & 0x7F) << np.uint64(shift)
        if octet < 0x80:
            return np.int64(value >> np.uint64(1)) ^ -np.int64(value & np.uint64(1)), cursor
        shift += 7
    return 0, -CUT_SHORT


@kernel(nogil=True)
def _category(octets: Array, cursor: int, length: int, words: Array, lengths: Int64, first: int, after: int) -> int:
    """The index of these octets among the words from `first` to `after` - 1, counted from `first`; -1 for none."""
    for word in range(first, after):
        if lengths[word] == length:
            same = True
            for position in range(length):
                if words[word, position] != octets[cursor + position]:
                    same = False
                    break
            if same:
                return word - first
    return -1


@kernel(nogil=True)
def _is_utf8(octets: Array, cursor: int, end: int) -> bool:
    """Whether octets are UTF-8 (RFC 3629, section 4): no overlong form, no surrogate, at most U+10FFFF."""
    while cursor < end:
        lead = octets[cursor]
        cursor += 1
        if lead < 0x80:
            continue
        more = 1 if 0xC2 <= lead <= 0xDF else 2 if 0xE0 <= lead <= 0xEF else 3 if 0xF0 <= lead <= 0xF4 else 0
        if more == 0 or cursor + more > end:
            return False
        low = 0xA0 if lead == 0xE0 else 0x90 if lead == 0xF0 else 0x80
        high = 0x9F if lead == 0xED else 0x8F if lead == 0xF4 else 0xBF
        if octets[cursor] < low or octets[cursor] > high:
            return False
        for later in range(cursor + 1, cursor + more):
            if octets[later] < 0x80 or octets[later] > 0xBF:
                return False
        cursor += more
    return True


@kernel(nogil=True)
def read_messages(  # noqa: PLR0912, PLR0915  # numba inlines nothing across Python calls as well as one body
    octets: Array, starts: Int64, ends: Int64, rows: Int64, steps: Int64, branches: Int64, symbols: Int64,
    words: Array, word_lengths: Int64, word_bounds: Int64, widths: Int64, wholes: Array, numbers: Array,
    texts: Array, text_begins: Int64, text_lengths: Int64, doubtful: Array, categories: Array, broken: Array,
    wrong: Int64, wrong_step: Int64,
) -> None:  # fmt: skip
    """Decodes the message bodies of `rows`, which were written with the same schema.

    octets (uint8): all messages. starts, ends (int64, [all rows]): of each body. rows (int64): to decode. steps,
    branches, symbols: see WriterSchema. words (uint8, [words, longest]), word_lengths (int64): all category values;
    those of category c are from word_bounds[c] to word_bounds[c + 1] - 1. widths (int64, [texts]): of the text columns.

    Written, by column and row: wholes (int64), numbers (float64), categories (int64, -1 for an unknown value), texts
    (uint8, flat; text t of row r has widths[t] octets from all rows × (sum of the widths before t) + r × widths[t] on),
    text_begins and text_lengths (int64; of the whole text in `octets`), doubtful (bool; the text is too long or not
    printable ASCII). By row: broken (bool; a text is not UTF-8), wrong (int64; the fault) and wrong_step (its step).
    """
    bits = numbers.view(np.int64)
    single = np.empty(1, np.uint32)
    single_value = single.view(np.float32)
    all_rows = len(starts)
    for row in rows:
        cursor, end = starts[row], ends[row]
        fault, at = 0, 0
        for step in range(len(steps)):
            branch, target, column = steps[step, 1], steps[step, 3], steps[step, 4]
            if steps[step, 0]:
                choice, cursor = _number(octets, cursor, end)
                if cursor < 0:
                    fault, at = -cursor, step
                    break
                if choice < 0 or choice >= steps[step, 2] - branch:
                    fault, at = NO_SUCH_BRANCH, step
                    break
                branch += choice
            kind, size = branches[branch, 0], branches[branch, 1]
            if kind == NULL:
                if target != SKIP and fault == 0:
                    # noted, but what is malformed after it counts more
                    fault, at = IS_NULL, step
            elif kind in (INT, LONG, ENUM):
                value, cursor = _number(octets, cursor, end)
                if cursor < 0:
                    fault, at = -cursor, step
                    break
                if kind == INT and (value > _INT_MAX or value < -_INT_MAX - 1):
                    fault, at = BAD_NUMBER, step
                    break
                if kind == ENUM and (value < 0 or value >= size):
                    fault, at = NO_SUCH_SYMBOL, step
                    break
                if target == WHOLE:
                    wholes[column, row] = value
                elif target == NUMBER:
                    numbers[column, row] = float(value)
                elif target == CATEGORY:
                    categories[column, row] = symbols[branches[branch, 2] + value]
            elif kind == BYTES:
                length, cursor = _number(octets, cursor, end)
                if cursor < 0:
                    fault, at = -cursor, step
                    break
                if length < 0 or length > end - cursor:
                    fault, at = BAD_LENGTH, step
                    break
                if target == TEXT:
                    width = widths[column]
                    before = 0
                    for other in range(column):
                        before += widths[other]
                    into = all_rows * before + row * width
                    odd = length > width
                    for position in range(min(length, width)):
                        octet = octets[cursor + position]
                        odd |= octet < 0x20 or octet > 0x7E
                        texts[into + position] = octet
                    text_begins[column, row] = cursor
                    text_lengths[column, row] = length
                    doubtful[column, row] = odd
                elif target == CATEGORY:
                    found = _category(
                        octets, cursor, length, words, word_lengths, word_bounds[column], word_bounds[column + 1]
                    )
                    categories[column, row] = found
                    if found < 0 and not _is_utf8(octets, cursor, cursor + length):
                        broken[row] = True
                cursor += length
            else:
                octets_needed = size if kind == FIXED else 8 if kind == DOUBLE else 4 if kind == FLOAT else 1
                if octets_needed > end - cursor:
                    fault, at = CUT_SHORT, step
                    break
                if kind == BOOLEAN and octets[cursor] > 1:
                    fault, at = BAD_BOOLEAN, step
                    break
                if target == NUMBER and kind == DOUBLE:
                    raw = np.uint64(0)
                    for position in range(8):
                        raw |= np.uint64(octets[cursor + position]) << np.uint64(8 * position)
                    bits[column, row] = np.int64(raw)
                elif target == NUMBER:
                    short = np.uint32(0)
                    for position in range(4):
                        short |= np.uint32(octets[cursor + position]) << np.uint32(8 * position)
                    single[0] = short
                    numbers[column, row] = single_value[0]
                cursor += octets_needed
        if fault in (0, IS_NULL) and cursor != end:
            fault, at = TOO_MUCH, len(steps) - 1
        wrong[row], wrong_step[row] = fault, at
