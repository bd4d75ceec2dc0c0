"""Corrects three faults of kafka-python 3.0's fetcher.

- Header names that are not UTF-8: brokers accept them, kafka-python cannot decode them. Such a record makes its `poll`
  raise, and the next `poll` never returns, so a single hostile record stops every consumer of its partition. Here each
  byte of the name beyond ASCII becomes `?`. Key, value and header values do not change.
- Paused partitions: kafka-python sets their fetched records aside and does not fetch them. After `resume` it takes the
  records back only if its slot for the current records is None. But a slot whose records were all returned stays, empty
  and not None: the partition is then never returned or fetched again. Here an empty slot is set to None first.
- Backoff: kafka-python returns buffered records, else sends fetch requests, else waits for those in flight. If a
  response arrives between the first step and the second, there is nothing to request and nothing in flight, so that it
  sleeps for 100 ms. Here the buffer is read again before the sleep.
"""

from __future__ import annotations

from typing import Any

from kafka.consumer.fetcher import Fetcher
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.util import decode_varint

_ASCII_END = 0x80
_REPLACEMENT = ord("?")


class _LenientBatch(DefaultRecordBatch):  # type: ignore[misc]  # the vendor has no types
    # no attributes: the class of an existing kafka-python batch is set to this one
    __slots__ = ()

    def _read_msg(self) -> Any:
        start = self._pos
        try:
            return super()._read_msg()
        except UnicodeDecodeError:
            _repair_header_names(self._buffer, start)
            return super()._read_msg()


def _repair_header_names(buffer: bytearray, start: int) -> None:
    """Overwrites, in `buffer`, the bytes beyond ASCII in the header names of the record at `start`.

    The layout is that of a record of message format v2: https://kafka.apache.org/documentation/#record
    """
    _, position = decode_varint(buffer, start)
    for _ in ("attributes", "timestamp", "offset"):
        _, position = decode_varint(buffer, position)
    for _ in ("key", "value"):
        length, position = decode_varint(buffer, position)
        position += max(length, 0)
    headers, position = decode_varint(buffer, position)
    for _ in range(headers):
        length, position = decode_varint(buffer, position)
        for index in range(position, position + length):
            if buffer[index] >= _ASCII_END:
                buffer[index] = _REPLACEMENT
        length, position = decode_varint(buffer, position + length)
        position += max(length, 0)


class _LenientRecords:
    """kafka-python's records of one fetch; their batches replace invalid header names."""

    def __init__(self, records: Any) -> None:
        self._records = records

    def next_batch(self) -> Any:
        batch = self._records.next_batch()
        if type(batch) is DefaultRecordBatch:
            batch.__class__ = _LenientBatch
        return batch


class _LenientPartitionRecords(Fetcher.PartitionRecords):  # type: ignore[misc]  # the vendor has no types
    def _unpack_records(self, tp: Any, records: Any, key_deserializer: Any, value_deserializer: Any) -> Any:
        return super()._unpack_records(tp, _LenientRecords(records), key_deserializer, value_deserializer)


class CorrectedFetcher(Fetcher):  # type: ignore[misc]  # the vendor has no types
    """A fetcher without these faults; the class of a consumer's fetcher is set to it."""

    _next_partition_records: Any
    PartitionRecords = _LenientPartitionRecords

    def fetched_records(self, max_records: int | None = None, update_offsets: bool = True) -> Any:
        """Returns the buffered records, and whether there are more; those of resumed partitions too."""
        if not self._next_partition_records:
            self._next_partition_records = None
        return super().fetched_records(max_records, update_offsets)

    def fetch_records(
        self, max_records: int | None = None, update_offsets: bool = True, timeout_ms: float | None = None
    ) -> Any:
        """Returns records, fetched if none are buffered, and whether the consumer is idle."""
        records, idle = super().fetch_records(max_records, update_offsets=update_offsets, timeout_ms=timeout_ms)
        if idle and not records:
            records, _ = self.fetched_records(max_records, update_offsets=update_offsets)
        return records, idle
