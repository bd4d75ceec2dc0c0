"""JSON decisions from the table: the text of a whole micro-batch in a pass, without a Python object for each row.

A row's text consists of constant pieces and, between them, words from tables, numbers with a fixed count of decimals,
and tokens: texts that a library wrote, such as the shortest exact text of a double.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numba.core import cgutils

from cascade.columns import Array, ByteColumn, Int64
from cascade.compilation import intrinsic, kernel

# The longest number with sign and point, and the longest shortest text of a double.
NUMBER_BYTES_MAX = 26
# What follows a constant piece. JSON gives latencies to the microsecond.
TRANSACTION, PARTITION, OFFSET, FIRST_OFFSET, EVENT_TIME, DECIDED, TOKEN = range(7)
ACTION, STAGE, CAUSE, BUNDLE = range(7, 11)
QUEUE, FEATURES, SCREENER, DEEP, TOTAL = range(11, 16)
LATENCY_DECIMALS = 3
LATENCY_MS_MAX = 1e12
_ZERO, _MINUS, _POINT, _COMMA, _END = ord("0"), ord("-"), ord("."), ord(","), ord("]")
_DIGITS_MAX = 20
_POWERS = np.array([10**power for power in range(_DIGITS_MAX)], np.uint64)
_HUNDRED = np.uint64(100)
_TENS = np.array([_ZERO + pair // 10 for pair in range(100)], np.uint8)
_ONES = np.array([_ZERO + pair % 10 for pair in range(100)], np.uint8)


class Words:
    """Texts as arrays for the kernel: `octets` uint8 [words, longest], `lengths` int64 [words]; `total`: their sum."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self.lengths = np.array([len(text) for text in texts], np.int64)
        self.longest, self.total = max(map(len, texts), default=1), sum(map(len, texts))
        self.octets = np.zeros((len(texts), self.longest), np.uint8)
        for row, text in enumerate(texts):
            self.octets[row, : len(text)] = np.frombuffer(text, np.uint8)


class Template:
    """What the texts of some rows have in common.

    pieces: the constant pieces. order (int64, [pieces - 1]): what follows each piece but the last. words: the table of
    words; firsts (int64, [4]): the position of the first action, stage, cause and bundle in it.
    """

    def __init__(self, pieces: Words, order: Int64, words: Words, firsts: Int64) -> None:
        self.length_max = pieces.total + len(order) * (max(NUMBER_BYTES_MAX, words.longest) + 2)
        self.arrays = (pieces.octets, pieces.lengths, words.octets, words.lengths, firsts, order)


def write_decisions(
    template: Template, rows: Array, chosen: Int64, transaction_ids: Int64, tokens: bytes, repeated: bool
) -> ByteColumn | None:
    """Returns the text of each chosen row; None if a score or a latency is out of range, or not all are `repeated`.

    rows: of the table. chosen (int64): positions of the rows. transaction_ids (int64, [rows]). tokens: a JSON array
    without spaces, with score and screener score of each chosen row.
    """
    text, ends = np.empty(len(chosen) * template.length_max, np.uint8), np.empty(len(chosen), np.int64)
    octets = np.frombuffer(tokens, np.uint8)
    length = _write(text, ends, *template.arrays, rows, chosen, transaction_ids, octets, repeated)
    return None if length < 0 else ByteColumn(text[:length], ends)


def write_numbers(numbers: Int64, chosen: Int64) -> ByteColumn:
    """Returns the decimal texts of the numbers (int64) at these positions (int64)."""
    text, ends = np.empty(len(chosen) * NUMBER_BYTES_MAX, np.uint8), np.empty(len(chosen), np.int64)
    return ByteColumn(text[: _write_numbers(text, ends, numbers, chosen)], ends)


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
def _write_numbers(text: Array, ends: Int64, numbers: Int64, chosen: Int64) -> int:
    end = 0
    for row in range(len(chosen)):
        end = _put_number(text, end, numbers[chosen[row]], 0)
        ends[row] = end
    return end


@kernel(nogil=True)
def _put_ms(text: Array, end: int, value_ms: float) -> int:
    return _put_number(text, end, np.int64(np.rint(value_ms * 10.0**LATENCY_DECIMALS)), LATENCY_DECIMALS)


@kernel(nogil=True)
def _in_range(row: Any) -> Any:
    """Whether scores and latencies have a text; NaN has none."""
    total_ms = row.decided_ms - row.start_ms
    return (
        0.0 <= row.score <= 1.0
        and 0.0 <= row.screener_score <= 1.0
        and abs(row.queue_ms) <= LATENCY_MS_MAX
        and abs(row.features_ms) <= LATENCY_MS_MAX
        and abs(row.screener_ms) <= LATENCY_MS_MAX
        and abs(row.deep_ms) <= LATENCY_MS_MAX
        and abs(total_ms) <= LATENCY_MS_MAX
    )


@kernel(nogil=True)
def _write(  # noqa: PLR0912  # a branch for each field of a decision
    text: Array, ends: Int64, pieces: Array, piece_lengths: Int64, words: Array, word_lengths: Int64, firsts: Int64,
    order: Int64, rows: Array, chosen: Int64, transaction_ids: Int64, tokens: Array, repeated: bool,
) -> int:  # fmt: skip
    end, token = 0, 1
    for number in range(len(chosen)):
        row = rows[chosen[number]]
        if not _in_range(row) or (row.first_offset >= 0) != repeated:
            return -1
        end = _put(text, end, pieces, 0, piece_lengths[0])
        for step in range(len(order)):
            field, word = order[step], -1
            if field == TOKEN:
                while tokens[token] != _COMMA and tokens[token] != _END:
                    text[end] = tokens[token]
                    end += 1
                    token += 1
                token += 1
            elif field == TRANSACTION:
                end = _put_number(text, end, transaction_ids[chosen[number]], 0)
            elif field == PARTITION:
                end = _put_number(text, end, row.partition_id, 0)
            elif field == OFFSET:
                end = _put_number(text, end, row.offset, 0)
            elif field == FIRST_OFFSET:
                end = _put_number(text, end, row.first_offset, 0)
            elif field == EVENT_TIME:
                end = _put_number(text, end, row.event_time_ms, 0)
            elif field == DECIDED:
                end = _put_number(text, end, np.int64(row.decided_ms), 0)
            elif field == QUEUE:
                end = _put_ms(text, end, row.queue_ms)
            elif field == FEATURES:
                end = _put_ms(text, end, row.features_ms)
            elif field == SCREENER:
                end = _put_ms(text, end, row.screener_ms)
            elif field == DEEP:
                end = _put_ms(text, end, row.deep_ms)
            elif field == TOTAL:
                end = _put_ms(text, end, row.decided_ms - row.start_ms)
            elif field == ACTION:
                word = firsts[0] + row.action
            elif field == STAGE:
                word = firsts[1] + row.stage
            elif field == CAUSE:
                word = firsts[2] + row.cause
            elif field == BUNDLE:
                word = firsts[3] + row.bundle
            if word >= 0:
                end = _put(text, end, words, word, word_lengths[word])
            end = _put(text, end, pieces, step + 1, piece_lengths[step + 1])
        ends[number] = end
    return end
