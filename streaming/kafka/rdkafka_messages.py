"""Reads librdkafka's messages into columns: a batch for each partition, and no Python object for a record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, overload

import numpy as np
from confluent_kafka import KafkaError

from cascade.columns import ByteColumn, Int64
from streaming.kafka import rdkafka_kernels as kernels
from streaming.kafka.protocol import FetchedBatch, Headers, Partition
from streaming.kafka.rdkafka_library import CMessage, decoded, milliseconds, rdkafka

_CONSUME, _DESTROY = rdkafka.address("consume_batch_queue"), rdkafka.address("message_destroy")
_TIMESTAMP = rdkafka.address("message_timestamp")
_HEADERS, _HEADER = rdkafka.address("message_headers"), rdkafka.address("header_get_all")


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
        self._queue = queue
        self._sizes = np.zeros(kernels.SIZES, np.int64)
        self._reserve(1)
        # the first call of a kernel loads it, which takes milliseconds
        self.read(0.0, 1)

    def read(self, timeout_s: float, rows_max: int) -> tuple[list[FetchedBatch], list[Event]]:
        """Waits for a message, takes those that are there, at most `rows_max`, and returns records and events.

        librdkafka calls back for rebalances and errors meanwhile.
        """
        count = self._take(timeout_s, rows_max)
        if not count:
            return [], []
        try:
            return self._batches(), self._events(count)
        finally:
            kernels.release(_DESTROY, self._messages[:count])

    def drop(self, timeout_s: float, rows_max: int) -> None:
        """Takes messages as `read` does, and destroys them."""
        count = self._take(timeout_s, rows_max)
        kernels.release(_DESTROY, self._messages[:count])

    def _take(self, timeout_s: float, rows_max: int) -> int:
        if rows_max > len(self._messages):
            self._reserve(rows_max)
        messages = self._messages[:rows_max]
        # for more than a message librdkafka waits until all are there, or for the whole time
        taken = rdkafka.consume_batch_queue(self._queue, milliseconds(timeout_s), self._place, 1)
        if taken <= 0:
            return 0
        kernels.survey(
            _CONSUME,
            _HEADERS,
            _HEADER,
            self._queue,
            taken,
            messages,
            self._order,
            self._parts,
            self._found,
            self._sizes,
        )
        return int(self._sizes[kernels.COUNT])

    def _reserve(self, rows_max: int) -> None:
        self._messages, self._order, self._found = (np.zeros(rows_max, np.int64) for _ in range(3))
        self._parts = np.zeros((rows_max, kernels.PART_COLUMNS), np.int64)
        self._place = self._messages.ctypes.data

    def _batches(self) -> list[FetchedBatch]:
        _, parts, rows, key_octets, value_octets, keys_absent, values_absent, headers, octets = self._sizes.tolist()
        if not rows:
            return []
        numbers = np.empty((kernels.NUMBERS, rows), np.int64)
        absent = np.empty((2, rows), np.bool_)
        keys, values, header_octets = (np.empty(size, np.uint8) for size in (key_octets, value_octets, octets))
        piece_ends, piece_absent = np.empty(2 * headers, np.int64), np.empty(2 * headers, np.bool_)
        kernels.fill(
            _TIMESTAMP, _HEADERS, _HEADER, self._messages, self._order[:rows], numbers, absent, keys, values,
            header_octets, piece_ends, piece_absent,
        )  # fmt: skip
        offsets, times_ms, key_ends, value_ends, header_ends = numbers
        pieces = ByteColumn(header_octets, piece_ends, piece_absent)
        whole = FetchedBatch(
            *self._partition(0),
            offsets,
            times_ms,
            ByteColumn(keys, key_ends, absent[kernels.KEYS] if keys_absent else None),
            ByteColumn(values, value_ends, absent[kernels.VALUES] if values_absent else None),
            RecordHeaders(header_ends, pieces) if headers else [()] * rows,
        )
        if parts == 1:
            return [whole]
        batches, start = [], 0
        for part, end in enumerate(self._parts[:parts, kernels.END_ROW].tolist()):
            topic, partition_id = self._partition(part)
            batches.append(replace(whole.part(start, end), topic=topic, partition=partition_id))
            start = end
        return batches

    def _partition(self, part: int) -> Partition:
        topic, partition_id, _ = self._parts[part].tolist()
        return decoded(rdkafka.topic_name(topic)), partition_id

    def _events(self, count: int) -> list[Event]:
        rows = int(self._sizes[kernels.ROWS])
        if rows == count:
            return []
        found = []
        for index in self._order[rows:count].tolist()[::-1]:
            message = CMessage.from_address(int(self._messages[index]))
            partition = (decoded(rdkafka.topic_name(message.topic)), message.partition) if message.topic else None
            error = KafkaError(
                message.error, decoded(rdkafka.message_errstr(message)), fatal=message.error == KafkaError._FATAL
            )
            found.append(Event(partition, message.offset, error))
        return found
