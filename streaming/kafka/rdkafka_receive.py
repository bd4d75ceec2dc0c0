"""Takes messages from librdkafka's queue and copies them into columns, in compiled code.

`receive` is called for each poll. It returns records of one partition in memory that is there already; for others
the caller makes the arrays, and calls `fill` and `release`.
"""

from __future__ import annotations

from ctypes import CFUNCTYPE, Structure, c_char, c_int64
from functools import cache
from typing import Any

from numba import types

from cascade.compilation import c_callback, kernel
from streaming.kafka.rdkafka_library import CMessage
from streaming.kafka.rdkafka_memory import (
    INT_BITS,
    INT_BYTES,
    WORD_BYTES,
    call,
    copy,
    load_int,
    load_word,
    store_byte,
    store_word,
    text_octets,
)

# Words of a partition in `parts`: handle of the topic, partition id, and the row after its last one.
TOPIC, PARTITION, END_ROW = 0, 1, 2
PART_WORDS = 3
# Columns of `numbers`; HEADER_ENDS only where there are headers.
OFFSETS, TIMESTAMPS_MS, KEY_ENDS, VALUE_ENDS, HEADER_ENDS = range(5)
NUMBERS = 5
TOPIC_BYTES = 256
FUNCTIONS = (
    "consume_batch_queue", "message_timestamp", "message_headers", "header_get_all", "message_destroy", "topic_name",
)  # fmt: skip
_MEMORY = ("messages", "order", "parts", "found", "numbers", "absent", "keys", "values")
_LIMITS = ("queue", "rows_room", "octets_room")
RESULTS = (
    "rows", "key_octets", "value_octets", "keys_absent", "values_absent", "partition", "count", "partitions", "headers",
    "header_octets", "released",
)  # fmt: skip
_HEADER = ("header_list", "header_name", "header_value", "header_value_octets")


class Reading(Structure):
    """What the kernels work with, a word of eight bytes each; made by MessageReader.

    Functions of librdkafka, by address.

    Memory, by address:
    - `messages` [rows_max]: addresses of rd_kafka_message_t.
    - `order` [rows_max]: indexes of the records, partition by partition; behind them those of events, last first.
    - `parts` [rows_max, PART_WORDS]: the partitions, in the order of their first record.
    - `found` [rows_max]: the part of each message.
    - `numbers`, `absent`, `keys`, `values`: columns, as for `fill`, with `rows_room` rows and `octets_room` bytes.

    Results: how many messages were taken, and records, partitions and bytes in them. `released`: 1 if all are records
    of one partition, of `topic` and `partition`, and lie in the columns; 0 if the messages are still to be destroyed.
    """

    _fields_ = (
        *((name, c_int64) for name in (*FUNCTIONS, *_MEMORY, *_LIMITS, *RESULTS, *_HEADER)),
        ("topic", c_char * TOPIC_BYTES),
    )


def _words(*names: str) -> list[int]:
    """The positions of fields of a Reading, in words."""
    return [getattr(Reading, name).offset // WORD_BYTES for name in names]


_CONSUME, _TIMESTAMP, _MESSAGE_HEADERS, _HEADER_GET_ALL, _DESTROY, _TOPIC_NAME = _words(*FUNCTIONS)
_MESSAGES, _ORDER, _PARTS, _FOUND, _NUMBERS, _ABSENT, _KEYS, _VALUES = _words(*_MEMORY)
_QUEUE, _ROWS_ROOM, _OCTETS_ROOM = _words(*_LIMITS)
_ROWS, _KEY_OCTETS, _VALUE_OCTETS, _KEYS_ABSENT, _VALUES_ABSENT, _ONLY_PARTITION = _words(*RESULTS[:6])
_COUNT, _PARTITIONS, _HEADERS, _HEADER_OCTETS, _RELEASED = _words(*RESULTS[6:])
_LIST, _NAME, _TEXT, _TEXT_OCTETS = _words(*_HEADER)
_LIST_BYTE, _TOPIC_BYTE = Reading.header_list.offset, Reading.topic.offset

# Of a rd_kafka_message_t; error and partition are ints.
_ERROR, _PARTITION = CMessage.error.offset // INT_BYTES, CMessage.partition.offset // INT_BYTES
_TOPIC, _OFFSET = CMessage.topic.offset // WORD_BYTES, CMessage.offset.offset // WORD_BYTES
_VALUE, _VALUE_BYTES = CMessage.value.offset // WORD_BYTES, CMessage.value_bytes.offset // WORD_BYTES
_KEY, _KEY_BYTES = CMessage.key.offset // WORD_BYTES, CMessage.key_bytes.offset // WORD_BYTES


@kernel
def _survey(reading: int, count: int) -> None:
    """Finds out which partitions `count` messages belong to, and how much memory their columns take."""
    messages, order = load_word(reading, _MESSAGES), load_word(reading, _ORDER)
    parts, found = load_word(reading, _PARTS), load_word(reading, _FOUND)
    store_word(reading, _HEADERS, 0)
    store_word(reading, _HEADER_OCTETS, 0)
    partitions, part, last = 0, 0, count
    key_octets, value_octets, keys_absent, values_absent = 0, 0, 0, 0
    for index in range(count):
        message = load_word(messages, index)
        if load_int(message, _ERROR):
            store_word(found, index, -1)
            last -= 1
            store_word(order, last, index)
            continue
        # most messages belong to the partition of the message before
        if not partitions or not _belongs(message, parts, part):
            part = 0
            while part < partitions and not _belongs(message, parts, part):
                part += 1
            if part == partitions:
                store_word(parts, part * PART_WORDS + TOPIC, load_word(message, _TOPIC))
                store_word(parts, part * PART_WORDS + PARTITION, load_int(message, _PARTITION))
                store_word(parts, part * PART_WORDS + END_ROW, 0)
                partitions += 1
        store_word(found, index, part)
        store_word(parts, part * PART_WORDS + END_ROW, load_word(parts, part * PART_WORDS + END_ROW) + 1)
        key_octets += load_word(message, _KEY_BYTES)
        value_octets += load_word(message, _VALUE_BYTES)
        keys_absent += load_word(message, _KEY) == 0
        values_absent += load_word(message, _VALUE) == 0
        _survey_headers(reading, message)
    row = 0
    for part in range(partitions):
        rows = load_word(parts, part * PART_WORDS + END_ROW)
        store_word(parts, part * PART_WORDS + END_ROW, row)
        row += rows
    for index in range(count):
        part = load_word(found, index)
        if part >= 0:
            place = load_word(parts, part * PART_WORDS + END_ROW)
            store_word(order, place, index)
            store_word(parts, part * PART_WORDS + END_ROW, place + 1)
    store_word(reading, _COUNT, count)
    store_word(reading, _PARTITIONS, partitions)
    store_word(reading, _ROWS, row)
    store_word(reading, _KEY_OCTETS, key_octets)
    store_word(reading, _VALUE_OCTETS, value_octets)
    store_word(reading, _KEYS_ABSENT, keys_absent)
    store_word(reading, _VALUES_ABSENT, values_absent)
    store_word(reading, _RELEASED, 0)


@kernel
def _belongs(message: int, parts: int, part: int) -> bool:
    place = part * PART_WORDS
    return bool(
        load_word(message, _TOPIC) == load_word(parts, place + TOPIC)
        and load_int(message, _PARTITION) == load_word(parts, place + PARTITION)
    )


@kernel
def _survey_headers(reading: int, message: int) -> None:
    number = 0
    while _find_header(reading, message, number):
        octets = text_octets(load_word(reading, _NAME)) + load_word(reading, _TEXT_OCTETS)
        store_word(reading, _HEADER_OCTETS, load_word(reading, _HEADER_OCTETS) + octets)
        number += 1
    store_word(reading, _HEADERS, load_word(reading, _HEADERS) + number)


@kernel
def _find_header(reading: int, message: int, number: int) -> bool:
    """Whether a record has a header of this number; its name, value and size are then in the reading."""
    place = reading + _LIST_BYTE
    if number == 0 and call(load_word(reading, _MESSAGE_HEADERS), (message, place)) & INT_BITS:
        return False
    name, text, octets = place + WORD_BYTES, place + 2 * WORD_BYTES, place + 3 * WORD_BYTES
    headers = load_word(reading, _LIST)
    if call(load_word(reading, _HEADER_GET_ALL), (headers, number, name, text, octets)) & INT_BITS:
        return False
    if load_word(reading, _TEXT) == 0:
        store_word(reading, _TEXT_OCTETS, 0)
    return True


@kernel
def fill(
    reading: int, numbers: int, absent: int, keys: int, values: int, headers: int, piece_ends: int, piece_absent: int
) -> None:
    """Copies the records that were surveyed into columns, each of them memory at an address.

    - `numbers` int64 [NUMBERS, rows].
    - `absent` bool [2, rows]: the keys and the values that are NULL.
    - `keys`, `values`: the bytes, record after record.
    - `headers`: the bytes of name, value, name, value ...; `piece_ends` int64 [2 · headers]: where each ends;
      `piece_absent` bool [2 · headers]: those that are NULL. Not used if no record has headers.
    """
    messages, order, rows = load_word(reading, _MESSAGES), load_word(reading, _ORDER), load_word(reading, _ROWS)
    message_timestamp, has_headers = load_word(reading, _TIMESTAMP), load_word(reading, _HEADERS) > 0
    key_end, value_end, piece, piece_end = 0, 0, 0, 0
    for row in range(rows):
        message = load_word(messages, load_word(order, row))
        key, key_octets = load_word(message, _KEY), load_word(message, _KEY_BYTES)
        value, value_octets = load_word(message, _VALUE), load_word(message, _VALUE_BYTES)
        copy(keys + key_end, key, key_octets)
        copy(values + value_end, value, value_octets)
        key_end += key_octets
        value_end += value_octets
        store_word(numbers, OFFSETS * rows + row, load_word(message, _OFFSET))
        store_word(numbers, TIMESTAMPS_MS * rows + row, call(message_timestamp, (message, 0)))
        store_word(numbers, KEY_ENDS * rows + row, key_end)
        store_word(numbers, VALUE_ENDS * rows + row, value_end)
        store_byte(absent, row, key == 0)
        store_byte(absent, rows + row, value == 0)
        if has_headers:
            number = 0
            while _find_header(reading, message, number):
                name, text = load_word(reading, _NAME), load_word(reading, _TEXT)
                name_octets, octets = text_octets(name), load_word(reading, _TEXT_OCTETS)
                copy(headers + piece_end, name, name_octets)
                copy(headers + piece_end + name_octets, text, octets)
                store_word(piece_ends, piece, piece_end + name_octets)
                piece_end += name_octets + octets
                store_word(piece_ends, piece + 1, piece_end)
                store_byte(piece_absent, piece, 0)
                store_byte(piece_absent, piece + 1, text == 0)
                piece += 2
                number += 1
            store_word(numbers, HEADER_ENDS * rows + row, piece >> 1)


@kernel
def release(reading: int) -> None:
    """Destroys the messages that were taken."""
    message_destroy, messages = load_word(reading, _DESTROY), load_word(reading, _MESSAGES)
    for index in range(load_word(reading, _COUNT)):
        call(message_destroy, (load_word(messages, index),))


def _receive(reading: int, timeout_ms: int, rows_max: int) -> int:
    consume, queue, messages = load_word(reading, _CONSUME), load_word(reading, _QUEUE), load_word(reading, _MESSAGES)
    # for more than a message librdkafka waits until all are there, or for the whole time
    count = call(consume, (queue, timeout_ms, messages, 1))
    if count <= 0:
        return 0
    if rows_max > 1:
        count += max(call(consume, (queue, 0, messages + WORD_BYTES, rows_max - 1)), 0)
    _survey(reading, count)
    if (
        load_word(reading, _ROWS) == count
        and load_word(reading, _PARTITIONS) == 1
        and load_word(reading, _HEADERS) == 0
        and count <= load_word(reading, _ROWS_ROOM)
        and load_word(reading, _KEY_OCTETS) <= load_word(reading, _OCTETS_ROOM)
        and load_word(reading, _VALUE_OCTETS) <= load_word(reading, _OCTETS_ROOM)
    ):
        numbers, absent = load_word(reading, _NUMBERS), load_word(reading, _ABSENT)
        fill(reading, numbers, absent, load_word(reading, _KEYS), load_word(reading, _VALUES), 0, 0, 0)
        parts = load_word(reading, _PARTS)
        store_word(reading, _ONLY_PARTITION, load_word(parts, PARTITION))
        name = call(load_word(reading, _TOPIC_NAME), (load_word(parts, TOPIC),))
        copy(reading + _TOPIC_BYTE, name, min(text_octets(name) + 1, TOPIC_BYTES))
        release(reading)
        store_word(reading, _RELEASED, 1)
    return int(count)


@cache
def receiver() -> tuple[Any, Any]:
    """A C function that waits for a message, takes those that are there, and returns how many it has taken.

    Its arguments: the address of a Reading, the time limit in ms, and the largest number of messages. The interpreter's
    lock is released meanwhile. Also returns what must exist as long as the function.
    """
    compiled = c_callback(types.int64(types.int64, types.int64, types.int64), _receive)
    return CFUNCTYPE(c_int64, c_int64, c_int64, c_int64)(compiled.address), compiled
