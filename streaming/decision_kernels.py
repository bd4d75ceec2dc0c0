"""JSON decisions from columns: the text of a whole micro-batch in one pass, no Python object a transaction.

A row's text is constant pieces and, between them, words out of tables, integers, numbers of a fixed count of decimals
(integers too), and tokens: what a library wrote that knows the shortest exact text of a double.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numba.core import cgutils

from cascade.columns import Array, Int64
from cascade.compilation import intrinsic, kernel

# Of a number with its sign and point, and of the shortest text of a double.
NUMBER_BYTES_MAX = 26
# In an order: the next token.
TOKEN = 1 << 20
_ZERO, _MINUS, _POINT, _COMMA, _END = ord("0"), ord("-"), ord("."), ord(","), ord("]")
_DIGITS_MAX = 20
_POWERS = np.array([10**power for power in range(_DIGITS_MAX)], np.uint64)
_HUNDRED = np.uint64(100)
_TENS = np.array([_ZERO + pair // 10 for pair in range(100)], np.uint8)
_ONES = np.array([_ZERO + pair % 10 for pair in range(100)], np.uint8)


class Words:
    """Some texts as arrays that the kernel reads: `octets` uint8 [words, longest], `lengths` int64 [words]."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self.lengths = np.array([len(text) for text in texts], np.int64)
        self.longest = int(self.lengths.max(initial=1))
        self.octets = np.zeros((len(texts), self.longest), np.uint8)
        for row, text in enumerate(texts):
            self.octets[row, : len(text)] = np.frombuffer(text, np.uint8)


def write_rows(
    pieces: Words, words: Words, word_rows: Int64, numbers: Int64, decimals: Int64, tokens: bytes, order: Int64
) -> list[bytes]:
    """The texts of the rows of `word_rows` and `numbers`.

    After each constant piece but the last comes what `order` int64 [pieces - 1] says: k ≥ 0 is column k of `numbers`
    (int64 [rows, columns]) with `decimals[k]` decimals, -1 - k the word that column k of `word_rows` (int64
    [rows, columns], rows of `words`) names, TOKEN the next of `tokens`, a JSON array without spaces.
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
def _copy(typing: Any, text: Any, place: Any, octets: Any, first: Any, length: Any) -> Any:
    """`length` octets from the place `first` on; with a loop of ours all of `_write` takes twice as long."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        text_value, place, octets_value, first, length = arguments
        target = context.make_array(text)(context, builder, text_value).data
        source = context.make_array(octets)(context, builder, octets_value).data
        cgutils.raw_memcpy(builder, builder.gep(target, [place]), builder.gep(source, [first]), length, 1)
        return context.get_dummy_value()

    return numba.types.void(text, place, octets, first, length), generate


@kernel(nogil=True)
def _put(text: Array, place: int, octets: Array, row: int, length: int) -> int:
    _copy(text, place, octets, row * octets.shape[1], length)
    return place + length


@kernel(nogil=True)
def _put_digits(text: Array, place: int, value: Any, digits: int) -> None:
    """The last `digits` digits of `value`, uint64, two at a time: a division costs as much as all else."""
    left, position = value, place + digits - 2
    while position >= place:
        rest = left // _HUNDRED
        pair = np.int64(left - rest * _HUNDRED)
        text[position], text[position + 1] = _TENS[pair], _ONES[pair]
        left = rest
        position -= 2
    if position == place - 1:
        text[place] = _ONES[np.int64(left % _HUNDRED)]


@kernel(nogil=True)
def _put_number(text: Array, place: int, value: int, decimals: int) -> int:
    """`value` / 10^`decimals`, with exactly so many decimals."""
    # the least int64 has no positive counterpart
    left = np.uint64(value) if value >= 0 else np.uint64(-(value + 1)) + np.uint64(1)
    if value < 0:
        text[place] = _MINUS
        place += 1
    whole = left // _POWERS[decimals]
    digits = 1
    while digits < _DIGITS_MAX and whole >= _POWERS[digits]:
        digits += 1
    _put_digits(text, place, whole, digits)
    place += digits
    if decimals:
        text[place] = _POINT
        _put_digits(text, place + 1, left - whole * _POWERS[decimals], decimals)
        place += 1 + decimals
    return place


@kernel(nogil=True)
def _write(
    text: Array, ends: Int64, pieces: Array, piece_lengths: Int64, words: Array, word_lengths: Int64,
    word_rows: Int64, numbers: Int64, decimals: Int64, tokens: Array, order: Int64,
) -> int:  # fmt: skip
    place, token = 0, 1
    for row in range(len(ends)):
        place = _put(text, place, pieces, 0, piece_lengths[0])
        for step in range(len(order)):
            column = order[step]
            if column == TOKEN:
                while tokens[token] != _COMMA and tokens[token] != _END:
                    text[place] = tokens[token]
                    place += 1
                    token += 1
                token += 1
            elif column >= 0:
                place = _put_number(text, place, numbers[row, column], decimals[column])
            else:
                word = word_rows[row, -1 - column]
                place = _put(text, place, words, word, word_lengths[word])
            place = _put(text, place, pieces, step + 1, piece_lengths[step + 1])
        ends[row] = place
    return place
