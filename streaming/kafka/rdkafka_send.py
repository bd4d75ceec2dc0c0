"""Queues records and counts their acknowledgements, in compiled code."""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import types

from cascade.columns import Array, Bool, Int64
from cascade.compilation import c_callback, kernel
from streaming.kafka.rdkafka_library import CMessage
from streaming.kafka.rdkafka_memory import (
    INT_BITS,
    INT_BYTES,
    WORD_BYTES,
    add_word,
    call,
    load_int,
    load_word,
    now_us,
    store_word,
)

# Words of a delivery's cell.
LEFT, FAILED, DONE_US = 0, 1, 2
CELL_WORDS = 3
# Words of a producer's state: the first failure, and whether failures are expected.
FAILURE, FAILURE_TOPIC, DROPPING = 0, 1, 2
STATE_WORDS = 3

# rd_kafka_vu_t, an argument of rd_kafka_produceva: its type, and a union of eight words.
ARGUMENT_WORDS = 9
_FIRST, _SECOND = 1, 2
TOPIC, VALUE, KEY, PRIVATE, FLAGS, TIME = range(6)
ARGUMENTS = 6

# Words of what `produce` works with, by address: functions of librdkafka, the rd_kafka_t, and the producer's state.
POLL, OUTQ_LEN, PRODUCEVA, CLIENT, STATE = range(5)
# Of a rd_kafka_message_t; the error is an int.
_ERROR = CMessage.error.offset // INT_BYTES
_TOPIC, _PRIVATE = CMessage.topic.offset // WORD_BYTES, CMessage.private.offset // WORD_BYTES


@kernel
def produce(
    session: Int64,
    undelivered_max: int,
    arguments: Int64,
    cell: int,
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
    """Queue the records of a delivery, until one is refused.

    - `session` int64 [5]: POLL to STATE, by address.
    - `undelivered_max`: the limit of records in flight; it does not apply if no record is in flight.
    - `arguments` int64 [ARGUMENTS + headers, ARGUMENT_WORDS]: for rd_kafka_produceva, but for key, value and time.
    - `cell`: address of the delivery's cell.
    - `keys`, `values` uint8, `key_ends`, `value_ends` int64 [rows], `key_absent`, `value_absent` bool [rows] or [0]:
      the columns, as in ByteColumn.
    - `times_ms` int64 [rows] or [0]: timestamps; 0 is the present time.
    - `first`, `count`: of the records to queue.

    Returns how many were queued, 0 after a failure and where there is no room; and the address of the error
    (rd_kafka_error_t) of the record that was refused, or 0.
    """
    client = session[CLIENT]
    # calls back for errors of connections
    call(session[POLL], (client, 0))
    waiting = call(session[OUTQ_LEN], (client,)) & INT_BITS
    if load_word(session[STATE], FAILURE) or (waiting and waiting + count > undelivered_max):
        return 0, 0
    if first == 0:
        store_word(cell, LEFT, len(value_ends))
    if len(value_ends) == 0:
        store_word(cell, DONE_US, now_us())
    place, size = arguments.ctypes.data, len(arguments)
    key_place, value_place = keys.ctypes.data, values.ctypes.data
    arguments[PRIVATE, _FIRST] = cell
    for row in range(first, first + count):
        start = key_ends[row - 1] if row else 0
        # an address that is not NULL, for the bytes of an empty column
        arguments[KEY, _FIRST] = 0 if len(key_absent) and key_absent[row] else (key_place or place) + start
        arguments[KEY, _SECOND] = key_ends[row] - start
        start = value_ends[row - 1] if row else 0
        arguments[VALUE, _FIRST] = 0 if len(value_absent) and value_absent[row] else (value_place or place) + start
        arguments[VALUE, _SECOND] = value_ends[row] - start
        arguments[TIME, _FIRST] = times_ms[row] if len(times_ms) else 0
        error = call(session[PRODUCEVA], (client, place, size))
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
    cell, error = load_word(message, _PRIVATE), load_int(message, _ERROR)
    if error:
        add_word(cell + FAILED * WORD_BYTES, 1)
        if not load_word(state, DROPPING) and not load_word(state, FAILURE):
            store_word(state, FAILURE_TOPIC, load_word(message, _TOPIC))
            store_word(state, FAILURE, error)
    if not add_word(cell + LEFT * WORD_BYTES, -1):
        store_word(cell, DONE_US, now_us())
    return 0
