"""Decodes a fetch message by message: the common part of JSON and MessagePack.

Each message is decoded separately. A JSON array of all messages would save a tenth of a microsecond for each, but a
message such as `{…},{…}` would count as two and hide a broken neighbour. The checks run on groups of messages, which
takes two thirds of the time; only a group with a doubtful message is checked one by one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

from cascade.columns import ColumnBatch
from cascade.schema import Field
from streaming.codecs.faults import Fault, reject, sift, size_fault
from streaming.codecs.protocol import Decoded, Reject, RejectReason
from streaming.codecs.rows import row_type, to_rows
from streaming.codecs.validate import NOT_UTF8, to_columns

# Only unknown fields can nest. A fixed limit, so that the result never depends on the depth of the interpreter's stack:
# a replay must accept and reject the same messages.
NESTING_MAX = 32

# Size of a group: limits the cost of a bad message for the others.
_GROUP = 64
# RecursionError: nesting deeper than the interpreter allows, far beyond NESTING_MAX
MESSAGE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_TOO_DEEP: Fault = (RejectReason.SYNTAX, f"nested deeper than {NESTING_MAX}")


class RefusedMessageError(Exception):
    """A message that msgspec decodes and this codec rejects."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault[1])
        self.fault = fault


class _Library(Protocol):
    """The common part of the modules `msgspec.json` and `msgspec.msgpack`."""

    Decoder: Any
    Encoder: Any


class MessageCodec(ABC):
    """A codec for messages that are an object each, fields by name.

    `fields`: must be in a message, which may have more. `message_bytes_max`: the largest message that is read. Rejects
    an object with a repeated key, since readers differ in which value counts: the amount decided here could differ from
    the amount booked elsewhere. Rejects unknown fields nested deeper than `NESTING_MAX`.
    """

    name: str

    def __init__(self, library: _Library, fields: dict[str, Field], message_bytes_max: int) -> None:
        self._fields = fields
        self._message_bytes_max = message_bytes_max
        self._row = row_type(fields)
        self._decode_row = library.Decoder(self._row).decode
        self._decode_entries = library.Decoder(dict[str, msgspec.Raw]).decode
        self._encode_row = library.Encoder().encode

    def decode(self, values: Sequence[bytes | None]) -> Decoded:
        """See Codec."""
        return self._read_each(list(values), range(len(values)))

    def _read_each(self, values: Sequence[bytes | None], indexes: Sequence[int]) -> Decoded:
        """Decodes messages with these indexes in the input of `decode`, ascending."""
        rows: list[msgspec.Struct] = []
        positions: list[int] = []
        rejects: list[Reject] = []
        for start in range(0, len(values), _GROUP):
            some, places = values[start : start + _GROUP], indexes[start : start + _GROUP]
            together = self._read_together(some)
            if together is not None:
                rows += together
                positions += places
                continue
            for index, value in zip(places, some, strict=True):
                try:
                    rows.append(self._read(value))
                    positions.append(index)
                except RefusedMessageError as refused:
                    rejects.append(reject(index, refused.fault))
                except MESSAGE_ERRORS as error:
                    rejects.append(reject(index, self._explain(value or b"", error)))
        batch, faults = to_columns(self._fields, rows)
        return sift(batch, np.array(positions, np.int64), faults, rejects)

    def encode(self, batch: ColumnBatch) -> list[bytes]:
        """See Codec."""
        encode = self._encode_row
        return [encode(row) for row in to_rows(self._fields, batch, self._row)]

    def _read_together(self, values: Sequence[bytes | None]) -> list[msgspec.Struct] | None:
        """The rows of a group of messages; None if one may be bad, which `_read` decides."""
        present = [value for value in values if value]
        if len(present) < len(values) or max(map(len, present)) > self._message_bytes_max or self._have_more(present):
            return None
        try:
            return list(map(self._decode_row, present))
        except MESSAGE_ERRORS:
            return None

    def _read(self, value: bytes | None) -> msgspec.Struct:
        if not value or len(value) > self._message_bytes_max:
            raise RefusedMessageError(size_fault(value, self._message_bytes_max))
        row: msgspec.Struct = self._decode_row(value)
        if self._have_more([value]):
            # raises UnicodeDecodeError for a key that is not UTF-8
            entries = self._decode_entries(value)
            keys, nesting = self._shape(value, entries)
            if keys != len(entries):
                raise RefusedMessageError((RejectReason.REPEATED_KEY, "a key occurs twice"))
            if nesting > NESTING_MAX:
                raise RefusedMessageError(_TOO_DEEP)
        return row

    @abstractmethod
    def _have_more(self, values: Sequence[bytes]) -> bool:
        """Whether any of these messages with every field may have more fields; fast, and never wrongly False."""

    @abstractmethod
    def _shape(self, value: bytes, entries: dict[str, msgspec.Raw]) -> tuple[int, int]:
        """The number of keys of a decoded message, repeated ones included, and the nesting depth of its values.

        `entries`: its distinct keys, each with one of its values. The depth, 0 for numbers and texts, may be an upper
        bound if it is within NESTING_MAX. Raises UnicodeDecodeError if the format requires UTF-8 everywhere.
        """

    def _explain(self, value: bytes, error: Exception) -> Fault:
        """Reason and detail of an error; msgspec's messages name fields and types, but no values."""
        del value
        if isinstance(error, UnicodeDecodeError):
            return NOT_UTF8
        if isinstance(error, RecursionError):
            return _TOO_DEEP
        text = str(error)
        if not isinstance(error, msgspec.ValidationError):
            return RejectReason.SYNTAX, text
        if text.startswith("Object missing required field"):
            return RejectReason.MISSING_FIELD, text
        if text.startswith("Number out of range"):
            return RejectReason.NOT_FINITE, text
        return RejectReason.TYPE, text
