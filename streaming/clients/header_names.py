"""Reads records whose header names are not UTF-8: brokers accept them, kafka-python 3.0 cannot decode them.

Such a record makes kafka-python's `poll` raise, and the next `poll` never returns, so a single hostile record stops
every consumer of its partition. Here each byte of the name beyond ASCII becomes `?`. Key, value and header values do
not change.
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


class LenientHeaderRecords(Fetcher.PartitionRecords):  # type: ignore[misc]  # the vendor has no types
    """Replaces `Fetcher.PartitionRecords` in a consumer."""

    def _unpack_records(self, tp: Any, records: Any, key_deserializer: Any, value_deserializer: Any) -> Any:
        return super()._unpack_records(tp, _LenientRecords(records), key_deserializer, value_deserializer)
