"""Avro's binary encoding to columns, compiled by numba: one pass over a fetch, no Python object a transaction.

Every length and number that a message tells is held against the end of the message before it is followed, and each
step of a writer's schema takes at most as many octets as the message has, so a message costs no more than its length
and its schema's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cascade.columns import Array, Int64
from cascade.compilation import kernel

# What a writer's type is.
NULL, BOOLEAN, INT, LONG, FLOAT, DOUBLE, BYTES, FIXED, ENUM = range(9)
# What it is read into.
SKIP, WHOLE, NUMBER, TEXT, CATEGORY = range(5)
# What is wrong with a message; 0 nothing.
CUT_SHORT, BAD_NUMBER, BAD_LENGTH, NO_SUCH_BRANCH, NO_SUCH_SYMBOL, BAD_BOOLEAN, TOO_MUCH, IS_NULL = range(1, 9)
_INT_MAX = 2**31 - 1
_VARINT_BITS = 63


@kernel(nogil=True)
def _number(octets: Array, place: int, end: int) -> Any:
    """A number in zigzag and its next place; instead of that -CUT_SHORT, or -BAD_NUMBER beyond 64 bits."""
    value, shift = np.uint64(0), 0
    while place < end:
        octet = octets[place]
        place += 1
        if shift == _VARINT_BITS and octet > 1:
            return 0, -BAD_NUMBER
        value |= np.uint64(octet & 0x7F) << np.uint64(shift)
        if octet < 0x80:
            return np.int64(value >> np.uint64(1)) ^ -np.int64(value & np.uint64(1)), place
        shift += 7
    return 0, -CUT_SHORT


@kernel(nogil=True)
def _category(octets: Array, place: int, length: int, words: Array, lengths: Int64, first: int, after: int) -> int:
    """Which of the words from `first` up to `after` these octets are, counted from `first`; -1 for none."""
    for word in range(first, after):
        if lengths[word] == length:
            same = True
            for position in range(length):
                if words[word, position] != octets[place + position]:
                    same = False
                    break
            if same:
                return word - first
    return -1


@kernel(nogil=True)
def _is_utf8(octets: Array, place: int, end: int) -> bool:
    """Whether octets are UTF-8 (RFC 3629, section 4): no overlong form, no surrogate, none beyond U+10FFFF."""
    while place < end:
        one = octets[place]
        place += 1
        if one < 0x80:
            continue
        more = 1 if 0xC2 <= one <= 0xDF else 2 if 0xE0 <= one <= 0xEF else 3 if 0xF0 <= one <= 0xF4 else 0
        if more == 0 or place + more > end:
            return False
        low = 0xA0 if one == 0xE0 else 0x90 if one == 0xF0 else 0x80
        high = 0x9F if one == 0xED else 0x8F if one == 0xF4 else 0xBF
        if octets[place] < low or octets[place] > high:
            return False
        for later in range(place + 1, place + more):
            if octets[later] < 0x80 or octets[later] > 0xBF:
                return False
        place += more
    return True


@kernel(nogil=True)
def read_messages(  # noqa: PLR0912, PLR0915  # numba inlines nothing across Python calls as well as one body
    octets: Array, starts: Int64, ends: Int64, rows: Int64, steps: Int64, branches: Int64, symbols: Int64,
    words: Array, word_lengths: Int64, word_bounds: Int64, widths: Int64, wholes: Array, numbers: Array,
    texts: Array, text_places: Int64, text_lengths: Int64, doubtful: Array, categories: Array, broken: Array,
    wrong: Int64, wrong_step: Int64,
) -> None:  # fmt: skip
    """Read the bodies of `rows`, which lie in `octets` from `starts` to `ends` (by row), written by one schema.

    The schema: see WriterSchema. Categories: the words of category c are those from `word_bounds[c]` up to
    `word_bounds[c + 1]`. Filled, by place and row: `wholes` int64; `numbers` float64; `texts` uint8, flat, text t of
    row r in `widths[t]` octets from rows × (sum of the widths before) + r × `widths[t]`, with where the whole of it
    lies, its length, and whether it is more than printable ASCII that fits; `categories` int64, -1 for none. By row:
    `broken`, a text is not UTF-8; `wrong`, 0 or what is wrong with the message, and at which step.
    """
    bits = numbers.view(np.int64)
    single = np.empty(1, np.uint32)
    single_value = single.view(np.float32)
    all_rows = len(starts)
    for row in rows:
        place, end = starts[row], ends[row]
        fault, at = 0, 0
        for step in range(len(steps)):
            branch, target, column = steps[step, 1], steps[step, 3], steps[step, 4]
            if steps[step, 0]:
                choice, place = _number(octets, place, end)
                if place < 0:
                    fault, at = -place, step
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
                value, place = _number(octets, place, end)
                if place < 0:
                    fault, at = -place, step
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
                length, place = _number(octets, place, end)
                if place < 0:
                    fault, at = -place, step
                    break
                if length < 0 or length > end - place:
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
                        octet = octets[place + position]
                        odd |= octet < 0x20 or octet > 0x7E
                        texts[into + position] = octet
                    text_places[column, row] = place
                    text_lengths[column, row] = length
                    doubtful[column, row] = odd
                elif target == CATEGORY:
                    found = _category(
                        octets, place, length, words, word_lengths, word_bounds[column], word_bounds[column + 1]
                    )
                    categories[column, row] = found
                    if found < 0 and not _is_utf8(octets, place, place + length):
                        broken[row] = True
                place += length
            else:
                octets_needed = size if kind == FIXED else 8 if kind == DOUBLE else 4 if kind == FLOAT else 1
                if octets_needed > end - place:
                    fault, at = CUT_SHORT, step
                    break
                if kind == BOOLEAN and octets[place] > 1:
                    fault, at = BAD_BOOLEAN, step
                    break
                if target == NUMBER and kind == DOUBLE:
                    raw = np.uint64(0)
                    for position in range(8):
                        raw |= np.uint64(octets[place + position]) << np.uint64(8 * position)
                    bits[column, row] = np.int64(raw)
                elif target == NUMBER:
                    short = np.uint32(0)
                    for position in range(4):
                        short |= np.uint32(octets[place + position]) << np.uint32(8 * position)
                    single[0] = short
                    numbers[column, row] = single_value[0]
                place += octets_needed
        if fault in (0, IS_NULL) and place != end:
            fault, at = TOO_MUCH, len(steps) - 1
        wrong[row], wrong_step[row] = fault, at
