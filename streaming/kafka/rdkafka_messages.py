"""Reads librdkafka's messages into columns: a batch for each partition, and no Python object for a record."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, overload

import numpy as np
from confluent_kafka import KafkaError

from cascade.columns import ByteColumn, Int64
from streaming.kafka import rdkafka_receive as kernels
from streaming.kafka.protocol import FetchedBatch, Headers, Partition
from streaming.kafka.rdkafka_library import CMessage, decoded, rdkafka

# Memory for the records of a poll; a larger batch gets its own.
ROWS_ROOM, OCTETS_ROOM = 256, 64 * 1024
_NONE_ABSENT = np.empty(0, np.bool_)


class Event(NamedTuple):
    """What librdkafka reports in place of a record: the end of a partition, or an error. `partition`: None if all."""

    partition: Partition | None
    offset: int
    error: KafkaError


class RecordHeaders(Sequence[Headers]):
    """The headers of records, which become Python objects when they are read.

    `ends` int64 [rows]: how many headers the records up to each have. `pieces` [2 · headers]: name, value, name ...
    """

    __slots__ = ("_ends", "_pieces")

    def __init__(self, ends: Int64, pieces: ByteColumn) -> None:
        self._ends, self._pieces = ends, pieces

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Headers: ...
    @overload
    def __getitem__(self, index: slice) -> RecordHeaders: ...
    def __getitem__(self, index: int | slice) -> Headers | RecordHeaders:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"a slice with step {step}: use 1")
            first, end = self._first(start), self._first(max(start, stop))
            return RecordHeaders(self._ends[start:stop] - first, self._pieces[2 * first : 2 * end])
        row = range(len(self))[index]
        pieces = list(self._pieces[2 * self._first(row) : 2 * int(self._ends[row])])
        return [(_name(name), value) for name, value in zip(pieces[::2], pieces[1::2], strict=True)]

    def __iter__(self) -> Iterator[Headers]:
        return (self[row] for row in range(len(self)))

    def _first(self, row: int) -> int:
        return int(self._ends[row - 1]) if row else 0


def _name(octets: bytes | None) -> str:
    """A header's name; one that is not UTF-8 becomes a question mark."""
    try:
        return (octets or b"").decode()
    except UnicodeDecodeError:
        return "?"


class MessageReader:
    """Takes messages from a queue (rd_kafka_queue_t), copies them, and destroys them."""

    def __init__(self, queue: int) -> None:
        self._receive, self._compiled = kernels.receiver()
        self._reading = kernels.Reading(queue=queue, rows_room=ROWS_ROOM, octets_room=OCTETS_ROOM)
        self._address = ctypes.addressof(self._reading)
        first = kernels.Reading.rows.offset
        self._results = np.frombuffer(memoryview(self._reading).cast("B"), np.int64, len(kernels.RESULTS), first)
        for name in kernels.FUNCTIONS:
            setattr(self._reading, name, rdkafka.address(name))
        self._numbers = np.empty(kernels.NUMBERS * ROWS_ROOM, np.int64)
        self._absent = np.empty(2 * ROWS_ROOM, np.bool_)
        self._keys, self._values = np.empty(OCTETS_ROOM, np.uint8), np.empty(OCTETS_ROOM, np.uint8)
        for name in ("numbers", "absent", "keys", "values"):
            setattr(self._reading, name, getattr(self, f"_{name}").ctypes.data)
        self._rows_max = 0
        self._reserve(1)
        # the first call of a kernel loads it, which takes milliseconds
        kernels.fill(self._address, 0, 0, 0, 0, 0, 0, 0)
        kernels.release(self._address)

    def read(self, timeout_s: float, rows_max: int) -> tuple[Sequence[FetchedBatch], Sequence[Event]]:
        """Waits for a message, takes those that are there, at most `rows_max`, and returns records and events.

        librdkafka calls back for rebalances and errors meanwhile.
        """
        count = self._take(timeout_s, rows_max)
        if not count:
            return (), ()
        if self._reading.released:
            return (self._only_partition(),), ()
        try:
            return self._partitions(), self._events()
        finally:
            kernels.release(self._address)

    def drop(self, timeout_s: float, rows_max: int) -> None:
        """Takes messages as `read` does, and destroys them."""
        if self._take(timeout_s, rows_max) and not self._reading.released:
            kernels.release(self._address)

    def _take(self, timeout_s: float, rows_max: int) -> int:
        if rows_max > self._rows_max:
            self._reserve(rows_max)
        # rounded up
        timeout_ms = int(timeout_s * 1_000 + 0.999)
        return self._receive(self._address, timeout_ms, rows_max)  # type: ignore[no-any-return]  # ctypes returns an int

    def _reserve(self, rows_max: int) -> None:
        """Makes memory for the addresses of so many messages, and their order."""
        self._rows_max = rows_max
        self._addresses = np.zeros((3 + kernels.PART_WORDS, rows_max), np.int64)
        places = [row.ctypes.data for row in self._addresses[:4]]
        self._reading.messages, self._reading.order, self._reading.found, self._reading.parts = places

    def _only_partition(self) -> FetchedBatch:
        """The records that lie in the memory that is there already."""
        rows, key_octets, value_octets, keys_absent, values_absent, partition_id = self._results[:6].tolist()
        numbers = self._numbers[: kernels.HEADER_ENDS * rows].copy()
        key_ends, value_ends = numbers[2 * rows : 3 * rows], numbers[3 * rows :]
        absent = self._absent[: 2 * rows].copy() if keys_absent or values_absent else _NONE_ABSENT
        return FetchedBatch(
            self._reading.topic.decode(),
            partition_id,
            numbers[:rows],
            numbers[rows : 2 * rows],
            ByteColumn(self._keys[:key_octets].copy(), key_ends, absent[:rows] if keys_absent else None),
            ByteColumn(self._values[:value_octets].copy(), value_ends, absent[rows:] if values_absent else None),
            [()] * rows,
        )

    def _partitions(self) -> list[FetchedBatch]:
        reading = self._reading
        rows, headers = reading.rows, reading.headers
        if not rows:
            return []
        numbers, absent = np.empty((kernels.NUMBERS, rows), np.int64), np.empty((2, rows), np.bool_)
        octets = (reading.key_octets, reading.value_octets, reading.header_octets)
        keys, values, header_octets = (np.empty(size, np.uint8) for size in octets)
        piece_ends, piece_absent = np.empty(2 * headers, np.int64), np.empty(2 * headers, np.bool_)
        filled = (numbers, absent, keys, values, header_octets, piece_ends, piece_absent)
        kernels.fill(self._address, *(array.ctypes.data for array in filled))
        offsets, times_ms, key_ends, value_ends, header_ends = numbers
        pieces = ByteColumn(header_octets, piece_ends, piece_absent)
        whole = FetchedBatch(
            "",
            0,
            offsets,
            times_ms,
            ByteColumn(keys, key_ends, absent[0] if reading.keys_absent else None),
            ByteColumn(values, value_ends, absent[1] if reading.values_absent else None),
            RecordHeaders(header_ends, pieces) if headers else [()] * rows,
        )
        batches, start = [], 0
        parts = self._addresses[3:].reshape(-1, kernels.PART_WORDS)[: reading.partitions]
        for topic, partition_id, end in parts.tolist():
            name = decoded(rdkafka.topic_name(topic))
            batches.append(replace(whole.part(start, end), topic=name, partition=partition_id))
            start = end
        return batches

    def _events(self) -> list[Event]:
        messages, order = self._addresses[:2]
        found = []
        for index in order[self._reading.rows : self._reading.count].tolist()[::-1]:
            message = CMessage.from_address(int(messages[index]))
            partition = (decoded(rdkafka.topic_name(message.topic)), message.partition) if message.topic else None
            error = KafkaError(
                message.error, decoded(rdkafka.message_errstr(message)), fatal=message.error == KafkaError._FATAL
            )
            found.append(Event(partition, message.offset, error))
        return found
