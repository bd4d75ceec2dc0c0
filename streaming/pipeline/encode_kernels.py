"""JSON decisions from columns: the text of a whole micro-batch in a pass, without a Python object for each row.

A row's text consists of constant pieces and, between them, words from tables, numbers with a fixed count of decimals,
and tokens: texts that a library wrote, such as the shortest exact text of a double.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numba.core import cgutils

from cascade.columns import Array, Int64
from cascade.compilation import intrinsic, kernel

# The longest number with sign and point, and the longest shortest text of a double.
NUMBER_BYTES_MAX = 26
# In `order`: the next token.
TOKEN = 1 << 20
_ZERO, _MINUS, _POINT, _COMMA, _END = ord("0"), ord("-"), ord("."), ord(","), ord("]")
_DIGITS_MAX = 20
_POWERS = np.array([10**power for power in range(_DIGITS_MAX)], np.uint64)
_HUNDRED = np.uint64(100)
_TENS = np.array([_ZERO + pair // 10 for pair in range(100)], np.uint8)
_ONES = np.array([_ZERO + pair % 10 for pair in range(100)], np.uint8)


class Words:
    """Texts as arrays for the kernel: `octets` uint8 [words, longest], `lengths` int64 [words]."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self.lengths = np.array([len(text) for text in texts], np.int64)
        self.longest = int(self.lengths.max(initial=1))
        self.octets = np.zeros((len(texts), self.longest), np.uint8)
        for row, text in enumerate(texts):
            self.octets[row, : len(text)] = np.frombuffer(text, np.uint8)


def write_rows(
    pieces: Words, words: Words, word_rows: Int64, numbers: Int64, decimals: Int64, tokens: bytes, order: Int64
) -> list[bytes]:
    """Returns a text for each row.

    pieces: the constant pieces. words: the table of words. word_rows (int64, [rows, columns]): indexes into `words`.
    numbers (int64, [rows, columns]). decimals (int64, [columns]): of `numbers`, which are integers times 10^-decimals.
    tokens: a JSON array without spaces. order (int64, [pieces - 1]): what follows each piece but the last: k ≥ 0 is
    column k of `numbers`, -1 - k is column k of `word_rows`, TOKEN is the next token.
    """
    length_max = int(pieces.lengths.sum()) + len(order) * (max(NUMBER_BYTES_MAX, words.longest) + 2)
    rows = len(numbers)
    text = np.empty(rows * length_max, np.uint8)
    ends = np.empty(rows, np.int64)
    length = _write(
        text, ends, pieces.octets, pieces.lengths, words.octets, words.lengths, word_rows, numbers, decimals,
        np.frombuffer(tokens, np.uint8), order,
    )  # fmt: skip
    joined = text[:length].tobytes()
    starts = [0, *ends[:-1].tolist()] if rows else []
    return [joined[start:end] for start, end in zip(starts, ends.tolist(), strict=True)]


@intrinsic
def _copy(typing: Any, text: Any, end: Any, octets: Any, first: Any, length: Any) -> Any:
    """Copies `length` octets from index `first` on; a loop instead would double the time of `_write`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        text_value, end, octets_value, first, length = arguments
        target = context.make_array(text)(context, builder, text_value).data
        source = context.make_array(octets)(context, builder, octets_value).data
        cgutils.raw_memcpy(builder, builder.gep(target, [end]), builder.gep(source, [first]), length, 1)
        return context.get_dummy_value()

    return numba.types.void(text, end, octets, first, length), generate


@kernel(nogil=True)
def _put(text: Array, end: int, octets: Array, row: int, length: int) -> int:
    _copy(text, end, octets, row * octets.shape[1], length)
    return end + length


@kernel(nogil=True)
def _put_digits(text: Array, start: int, value: Any, digits: int) -> None:
    """Writes the last `digits` digits of `value` (uint64), two at a time, since divisions take most of the time."""
    left, position = value, start + digits - 2
    while position >= start:
        rest = left // _HUNDRED
        pair = np.int64(left - rest * _HUNDRED)
        text[position], text[position + 1] = _TENS[pair], _ONES[pair]
        left = rest
        position -= 2
    if position == start - 1:
        text[start] = _ONES[np.int64(left % _HUNDRED)]


@kernel(nogil=True)
def _put_number(text: Array, end: int, value: int, decimals: int) -> int:
    """Writes `value` / 10^`decimals` with `decimals` decimals; returns the end."""
    # the least int64 has no positive counterpart
    left = np.uint64(value) if value >= 0 else np.uint64(-(value + 1)) + np.uint64(1)
    if value < 0:
        text[end] = _MINUS
        end += 1
    whole = left // _POWERS[decimals]
    digits = 1
    while digits < _DIGITS_MAX and whole >= _POWERS[digits]:
        digits += 1
    _put_digits(text, end, whole, digits)
    end += digits
    if decimals:
        text[end] = _POINT
        _put_digits(text, end + 1, left - whole * _POWERS[decimals], decimals)
        end += 1 + decimals
    return end


@kernel(nogil=True)
def _write(
    text: Array, ends: Int64, pieces: Array, piece_lengths: Int64, words: Array, word_lengths: Int64,
    word_rows: Int64, numbers: Int64, decimals: Int64, tokens: Array, order: Int64,
) -> int:  # fmt: skip
    end, token = 0, 1
    for row in range(len(ends)):
        end = _put(text, end, pieces, 0, piece_lengths[0])
        for step in range(len(order)):
            column = order[step]
            if column == TOKEN:
                while tokens[token] != _COMMA and tokens[token] != _END:
                    text[end] = tokens[token]
                    end += 1
                    token += 1
                token += 1
            elif column >= 0:
                end = _put_number(text, end, numbers[row, column], decimals[column])
            else:
                word = word_rows[row, -1 - column]
                end = _put(text, end, words, word, word_lengths[word])
            end = _put(text, end, pieces, step + 1, piece_lengths[step + 1])
        ends[row] = end
    return end
