"""Header names that are not UTF-8, which brokers accept and kafka-python 3.0 cannot read.

Such a record makes the vendor's `poll` raise, and the next `poll` never return: one hostile record would stop every
consumer of its partition for good. Here the offending bytes of the name become `?`; key, value and header values
stay as they are.
"""

from __future__ import annotations

from typing import Any

from kafka.consumer.fetcher import Fetcher
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.util import decode_varint

_ASCII_END = 0x80
_REPLACEMENT = ord("?")


class _LenientBatch(DefaultRecordBatch):  # type: ignore[misc]  # the vendor has no types
    # no attributes of its own, so that a batch of the vendor can become one
    __slots__ = ()

    def _read_msg(self) -> Any:
        start = self._pos
        try:
            return super()._read_msg()
        except UnicodeDecodeError:
            _repair_header_names(self._buffer, start)
            return super()._read_msg()


def _repair_header_names(buffer: bytearray, start: int) -> None:
    """Overwrite the bytes beyond ASCII in the header names of the record at `start`, in place.

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
        for place in range(position, position + length):
            if buffer[place] >= _ASCII_END:
                buffer[place] = _REPLACEMENT
        length, position = decode_varint(buffer, position + length)
        position += max(length, 0)


class _LenientRecords:
    """The vendor's records of one fetch, whose batches read leniently."""

    def __init__(self, records: Any) -> None:
        self._records = records

    def next_batch(self) -> Any:
        batch = self._records.next_batch()
        if type(batch) is DefaultRecordBatch:
            batch.__class__ = _LenientBatch
        return batch


class LenientPartitionRecords(Fetcher.PartitionRecords):  # type: ignore[misc]  # the vendor has no types
    """Takes the place of `Fetcher.PartitionRecords` in a consumer."""

    def _unpack_records(self, tp: Any, records: Any, key_deserializer: Any, value_deserializer: Any) -> Any:
        return super()._unpack_records(tp, _LenientRecords(records), key_deserializer, value_deserializer)
