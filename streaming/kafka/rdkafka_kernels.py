"""Kernels over librdkafka's messages: no Python object and no Python step for a record.

They read and write memory by address, and call functions of librdkafka by address (`Library.address`). An address is
an argument, so the compiled code can be cached.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from cascade.columns import Array, Bool, Int64
from cascade.compilation import c_callback, intrinsic, kernel
from streaming.kafka.rdkafka_library import CMessage

_ERROR, _TOPIC, _PARTITION = CMessage.error.offset, CMessage.topic.offset, CMessage.partition.offset
_VALUE, _VALUE_BYTES = CMessage.value.offset, CMessage.value_bytes.offset
_KEY, _KEY_BYTES = CMessage.key.offset, CMessage.key_bytes.offset
_OFFSET, _PRIVATE = CMessage.offset.offset, CMessage.private.offset

# Columns of the `parts` of `survey`.
TOPIC, PARTITION, END_ROW = 0, 1, 2
PART_COLUMNS = 3
# Positions in the `sizes` of `survey`.
COUNT, PARTS, ROWS, KEY_OCTETS, VALUE_OCTETS, KEYS_ABSENT, VALUES_ABSENT, HEADERS, HEADER_OCTETS = range(9)
SIZES = 9
# Rows of the `numbers` of `fill`, and of its `absent`.
OFFSETS, TIMESTAMPS_MS, KEY_ENDS, VALUE_ENDS, HEADER_ENDS = range(5)
NUMBERS = 5
KEYS, VALUES = 0, 1

# rd_kafka_vu_t, an argument of rd_kafka_produceva: its type, and a union of eight words.
ARGUMENT_WORDS = 9
_FIRST, _SECOND = 1, 2
ARGUMENT_TOPIC, ARGUMENT_VALUE, ARGUMENT_KEY, ARGUMENT_PRIVATE, ARGUMENT_FLAGS, ARGUMENT_TIME = range(6)
ARGUMENTS = 6

# Words of a delivery's cell, and of the state of all deliveries of a producer.
LEFT, FAILED, DONE_US = 0, 1, 2
CELL_WORDS = 3
FAILURE, FAILURE_TOPIC, ABORTING = 0, 1, 2
STATE_WORDS = 3
_WORD_BYTES = 8

_BYTE, _INT32, _INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_CLOCK_REALTIME = 0


@intrinsic
def _call(typing: Any, function: Any, arguments: Any) -> Any:
    """Call a C function by its address, with integers and addresses; returns int64."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        passed = cgutils.unpack_tuple(builder, values[1])
        kind = ir.FunctionType(_INT64, [_INT64] * len(passed))
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), passed)

    return types.int64(types.int64, types.UniTuple(types.int64, len(arguments))), generate


def _loads(word: ir.IntType) -> Any:
    def load(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            found = builder.load(builder.inttoptr(values[0], word.as_pointer()))
            return found if word is _INT64 else builder.sext(found, _INT64)

        return types.int64(types.int64), generate

    return load


_load64, _load32, _load8 = intrinsic(_loads(_INT64)), intrinsic(_loads(_INT32)), intrinsic(_loads(_BYTE))


@intrinsic
def _store64(typing: Any, address: Any, number: Any) -> Any:
    """Store eight bytes at an address."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[1], builder.inttoptr(values[0], _INT64.as_pointer()))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate


@intrinsic
def _add64(typing: Any, address: Any, number: Any) -> Any:
    """Add to the eight bytes at an address, as one step for all threads; returns the sum."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], _INT64.as_pointer())
        return builder.add(builder.atomic_rmw("add", place, values[1], "seq_cst"), values[1])

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _copy(typing: Any, target: Any, source: Any, octets: Any) -> Any:
    """Copy bytes from address to address."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        target, source = (builder.inttoptr(value, _BYTE.as_pointer()) for value in values[:2])
        cgutils.raw_memcpy(builder, target, source, values[2], 1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), generate


@intrinsic
def _now_us(typing: Any) -> Any:
    """The time in µs since the epoch."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = cgutils.alloca_once(builder, _INT64, size=2)
        kind = ir.FunctionType(_INT32, [_INT32, _INT64.as_pointer()])
        clock = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(clock, [_INT32(_CLOCK_REALTIME), place])
        seconds, nanoseconds = (builder.load(builder.gep(place, [_INT32(index)])) for index in range(2))
        return builder.add(builder.mul(seconds, _INT64(1_000_000)), builder.sdiv(nanoseconds, _INT64(1_000)))

    return types.int64(), generate


@kernel
def _text_octets(text: int) -> int:
    """The length of the text at an address, which a zero byte ends."""
    end = text
    while _load8(end):
        end += 1
    return end - text


@kernel
def survey(
    consume_batch_queue: int,
    message_headers: int,
    header_get_all: int,
    queue: int,
    taken: int,
    messages: Int64,
    order: Int64,
    parts: Int64,
    found: Int64,
    sizes: Int64,
) -> None:
    """Take the messages that wait in a queue; find out their partitions, and how much memory their columns take.

    - `consume_batch_queue`, `message_headers`, `header_get_all`: addresses of functions.
    - `queue`: address of the rd_kafka_queue_t. `taken`: how many messages were taken before.
    - `messages` int64 [rows_max]: addresses of rd_kafka_message_t, written from `taken` on.
    - `order` int64 [rows_max], written: indexes of the records, partition by partition; behind them those of events.
    - `parts` int64 [rows_max, PART_COLUMNS], written: the partitions, in the order of their first record.
    - `found` int64 [rows_max]: memory for the part of each message.
    - `sizes` int64 [SIZES], written.
    """
    count, rows_max = taken, len(messages)
    if taken < rows_max:
        place = messages.ctypes.data + taken * _WORD_BYTES
        count += max(_call(consume_batch_queue, (queue, 0, place, rows_max - taken)), 0)
    parts_found, part = 0, 0
    sizes[:] = 0
    last = count
    header = np.empty(4, np.int64)
    place = header.ctypes.data
    for index in range(count):
        message = messages[index]
        if _load32(message + _ERROR):
            found[index] = -1
            last -= 1
            order[last] = index
            continue
        topic, partition = _load64(message + _TOPIC), _load32(message + _PARTITION)
        # most messages belong to the partition of the message before
        if not parts_found or parts[part, TOPIC] != topic or parts[part, PARTITION] != partition:
            part = 0
            while part < parts_found and (parts[part, TOPIC] != topic or parts[part, PARTITION] != partition):
                part += 1
            if part == parts_found:
                parts[part, TOPIC], parts[part, PARTITION], parts[part, END_ROW] = topic, partition, 0
                parts_found += 1
        found[index] = part
        parts[part, END_ROW] += 1
        sizes[KEY_OCTETS] += _load64(message + _KEY_BYTES)
        sizes[VALUE_OCTETS] += _load64(message + _VALUE_BYTES)
        sizes[KEYS_ABSENT] += _load64(message + _KEY) == 0
        sizes[VALUES_ABSENT] += _load64(message + _VALUE) == 0
        if _call(message_headers, (message, place)) & 0xFFFFFFFF:
            continue
        headers, number = header[0], 0
        while not _call(header_get_all, (headers, number, place + 8, place + 16, place + 24)) & 0xFFFFFFFF:
            sizes[HEADER_OCTETS] += _text_octets(header[1]) + (header[3] if header[2] else 0)
            number += 1
        sizes[HEADERS] += number
    row = 0
    for part in range(parts_found):
        row += parts[part, END_ROW]
        parts[part, END_ROW] = row - parts[part, END_ROW]
    for index in range(count):
        part = found[index]
        if part >= 0:
            order[parts[part, END_ROW]] = index
            parts[part, END_ROW] += 1
    sizes[COUNT], sizes[PARTS], sizes[ROWS] = count, parts_found, row


@kernel
def fill(
    message_timestamp: int,
    message_headers: int,
    header_get_all: int,
    messages: Int64,
    order: Int64,
    numbers: Int64,
    absent: Bool,
    keys: Array,
    values: Array,
    header_octets: Array,
    piece_ends: Int64,
    piece_absent: Bool,
) -> None:
    """Copy records into columns.

    - `message_timestamp`, `message_headers`, `header_get_all`: addresses of functions.
    - `messages`: as for `survey`; `order` int64 [rows]: the indexes of the records, as `survey` has written them.
    - `numbers` int64 [NUMBERS, rows], written; HEADER_ENDS only if there are headers.
    - `absent` bool [2, rows], written: the keys and the values that are NULL.
    - `keys`, `values` uint8, written: the bytes, record after record.
    - `header_octets` uint8, written: name, value, name, value ...; `piece_ends` int64 [2 · headers], written: where
      each ends. `piece_absent` bool [2 · headers], written: those that are NULL.
    """
    key_end, value_end, piece, piece_end = 0, 0, 0, 0
    key_place, value_place, header_place = keys.ctypes.data, values.ctypes.data, header_octets.ctypes.data
    header = np.empty(4, np.int64)
    place = header.ctypes.data
    for row in range(len(order)):
        message = messages[order[row]]
        octets = _load64(message + _KEY_BYTES)
        _copy(key_place + key_end, _load64(message + _KEY), octets)
        key_end += octets
        octets = _load64(message + _VALUE_BYTES)
        _copy(value_place + value_end, _load64(message + _VALUE), octets)
        value_end += octets
        numbers[OFFSETS, row] = _load64(message + _OFFSET)
        numbers[TIMESTAMPS_MS, row] = _call(message_timestamp, (message, 0))
        numbers[KEY_ENDS, row], numbers[VALUE_ENDS, row] = key_end, value_end
        absent[KEYS, row] = _load64(message + _KEY) == 0
        absent[VALUES, row] = _load64(message + _VALUE) == 0
        if len(piece_ends) == 0:
            continue
        if not _call(message_headers, (message, place)) & 0xFFFFFFFF:
            headers, number = header[0], 0
            while not _call(header_get_all, (headers, number, place + 8, place + 16, place + 24)) & 0xFFFFFFFF:
                octets = _text_octets(header[1])
                _copy(header_place + piece_end, header[1], octets)
                piece_end += octets
                piece_ends[piece], piece_absent[piece] = piece_end, False
                octets = header[3] if header[2] else 0
                _copy(header_place + piece_end, header[2], octets)
                piece_end += octets
                piece_ends[piece + 1], piece_absent[piece + 1] = piece_end, header[2] == 0
                piece += 2
                number += 1
        numbers[HEADER_ENDS, row] = piece // 2


@kernel
def release(message_destroy: int, messages: Int64) -> None:
    """Destroy messages; `message_destroy`: address of the function, `messages` int64 [count]: addresses."""
    for index in range(len(messages)):
        _call(message_destroy, (messages[index],))


@kernel
def produce(
    produceva: int,
    client: int,
    arguments: Int64,
    keys: Array,
    key_ends: Int64,
    key_absent: Bool,
    values: Array,
    value_ends: Int64,
    value_absent: Bool,
    times_ms: Int64,
    first: int,
    count: int,
) -> tuple[int, int]:
    """Queue records, until one is refused.

    - `produceva`: address of the function; `client`: of the rd_kafka_t.
    - `arguments` int64 [ARGUMENTS + headers, ARGUMENT_WORDS]: the function's arguments, but for key, value and time.
    - `keys`, `values` uint8, `key_ends`, `value_ends` int64 [rows], `key_absent`, `value_absent` bool [rows] or [0]:
      the columns, as in ByteColumn.
    - `times_ms` int64 [rows] or [0]: timestamps; 0 is the present time.
    - `first`, `count`: of the records to queue.

    Returns how many were queued, and the address of the error (rd_kafka_error_t) of the next one, or 0.
    """
    place, size = arguments.ctypes.data, len(arguments)
    key_place, value_place = keys.ctypes.data, values.ctypes.data
    for row in range(first, first + count):
        start = key_ends[row - 1] if row else 0
        # an address that is not NULL, for the bytes of an empty column
        arguments[ARGUMENT_KEY, _FIRST] = 0 if len(key_absent) and key_absent[row] else (key_place or place) + start
        arguments[ARGUMENT_KEY, _SECOND] = key_ends[row] - start
        start = value_ends[row - 1] if row else 0
        absent = len(value_absent) and value_absent[row]
        arguments[ARGUMENT_VALUE, _FIRST] = 0 if absent else (value_place or place) + start
        arguments[ARGUMENT_VALUE, _SECOND] = value_ends[row] - start
        arguments[ARGUMENT_TIME, _FIRST] = times_ms[row] if len(times_ms) else 0
        error = _call(produceva, (client, place, size))
        if error:
            return row - first, error
    return count, 0


@cache
def acknowledgement_counter() -> Any:
    """An on_acknowledgement interceptor (its `address`), which counts deliveries in their cells.

    librdkafka calls it in its own threads, for each record. The record's private word is the address of its delivery's
    cell, int64 [CELL_WORDS]; the interceptor's opaque is the address of the state, int64 [STATE_WORDS], which gets the
    first failure. Cells and state must exist as long as the client.
    """
    return c_callback(types.int32(types.int64, types.int64, types.int64), _count_acknowledged)


def _count_acknowledged(client: int, message: int, state: int) -> int:
    cell, error = _load64(message + _PRIVATE), _load32(message + _ERROR)
    if error:
        _add64(cell + FAILED * _WORD_BYTES, 1)
        if not _load64(state + ABORTING * _WORD_BYTES) and not _load64(state + FAILURE * _WORD_BYTES):
            _store64(state + FAILURE_TOPIC * _WORD_BYTES, _load64(message + _TOPIC))
            _store64(state + FAILURE * _WORD_BYTES, error)
    if not _add64(cell + LEFT * _WORD_BYTES, -1):
        _store64(cell + DONE_US * _WORD_BYTES, _now_us())
    return 0
