"""Decoding a fetch message by message: the part that JSON and MessagePack share.

Each message is decoded on its own. Joining a fetch into one JSON array would save a tenth of a microsecond a
message, but lets a message such as `{…},{…}` pass for two and make up for a broken neighbour. Messages are looked at
some together, though, which takes two thirds of the time; one by one only where any of those is not plainly good.
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
from streaming.codecs.rows import empty_batch, row_type, to_rows
from streaming.codecs.validate import to_columns

# Only unknown fields can nest. The bound is ours, so that whether a message is read never depends on how deep in the
# interpreter's stack the decoder was called: a replay must take and leave the same messages.
NESTING_MAX = 32

# So many are looked at together: what one that is not good costs the others is bounded by it.
_TOGETHER = 64
# RecursionError: nesting deeper than the interpreter allows, far beyond NESTING_MAX
MESSAGE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_TOO_DEEP: Fault = (RejectReason.SYNTAX, f"nested deeper than {NESTING_MAX}")


class RefusedMessageError(Exception):
    """A message that the library read, and that we refuse: its reason and detail."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault[1])
        self.fault = fault


class _Library(Protocol):
    """What the modules `msgspec.json` and `msgspec.msgpack` have in common."""

    Decoder: Any
    Encoder: Any


class MessageCodec(ABC):
    """A codec for messages that are one object each, fields by name.

    `fields`: what a message must have; it may have more. `message_bytes_max`: the largest message that is read.
    Refused: an object that has a key twice, since readers differ in which of the two counts, so what is decided here
    need not be what is booked elsewhere; and unknown fields nested deeper than `NESTING_MAX`.
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
        """Read a fetch; never raises for what is in a message."""
        rows: list[msgspec.Struct] = []
        positions: list[int] = []
        rejects: list[Reject] = []
        for start in range(0, len(values), _TOGETHER):
            some = values[start : start + _TOGETHER]
            together = self._read_together(some)
            if together is not None:
                rows += together
                positions += range(start, start + len(some))
                continue
            for index, value in enumerate(some, start):
                try:
                    rows.append(self._read(value))
                    positions.append(index)
                except RefusedMessageError as refused:
                    rejects.append(reject(index, refused.fault))
                except MESSAGE_ERRORS as error:
                    rejects.append(reject(index, self._explain(value or b"", error)))
        return _checked(self._fields, rows, positions, rejects)

    def encode(self, batch: ColumnBatch) -> list[bytes]:
        """One object a row."""
        encode = self._encode_row
        return [encode(row) for row in to_rows(self._fields, batch, self._row)]

    def _read_together(self, values: Sequence[bytes | None]) -> list[msgspec.Struct] | None:
        """The rows of messages that all are plainly good; None where one may not be, which `_read` finds out."""
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
        """Whether any of some messages that have every field may have more; quick, and never wrongly False."""

    @abstractmethod
    def _shape(self, value: bytes, entries: dict[str, msgspec.Raw]) -> tuple[int, int]:
        """The number of keys of a message that was read, repeated ones counted, and how deep its values nest.

        `entries`: its distinct keys, each with one of its values. The nesting, 0 for numbers and texts, may be an upper
        bound where it is within NESTING_MAX. Raises UnicodeDecodeError where the format wants UTF-8 throughout.
        """

    def _explain(self, value: bytes, error: Exception) -> Fault:
        """The reason and detail behind an error; msgspec's messages name fields and types but no values."""
        del value
        if isinstance(error, UnicodeDecodeError):
            return RejectReason.ENCODING, "a text is not UTF-8"
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


def _checked(
    fields: dict[str, Field], structs: list[msgspec.Struct], positions: list[int], rejects: list[Reject]
) -> Decoded:
    rows = np.array(positions, np.int64)
    if not structs:
        return Decoded(empty_batch(fields), rows, rejects)
    batch, faults = to_columns(fields, structs)
    return sift(batch, rows, faults, rejects)
