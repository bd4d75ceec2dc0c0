"""Decoding a fetch message by message: the part that JSON and MessagePack share.

Each message is decoded on its own. Joining a fetch into one JSON array would save a tenth of a microsecond a
message, but lets a message such as `{…},{…}` pass for two and make up for a broken neighbour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from cascade.schema import Field
from streaming.codecs.protocol import Decoded, Reject, RejectReason
from streaming.codecs.rows import empty_batch
from streaming.codecs.validate import to_columns

DETAIL_CHARACTERS_MAX = 200

DecodeOne = Callable[[bytes], msgspec.Struct]
# RecursionError: nesting deeper than the interpreter allows, which only hostile messages have
MESSAGE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
Fault = tuple[RejectReason, str]


def decode_messages(
    fields: dict[str, Field],
    values: Sequence[bytes | None],
    message_bytes_max: int,
    decode_one: DecodeOne,
    explain: Callable[[bytes, Exception], Fault],
) -> Decoded:
    """Decode each message with `decode_one`; what it cannot read is a reject that `explain` words."""
    structs: list[msgspec.Struct] = []
    positions: list[int] = []
    rejects: list[Reject] = []
    for index, value in enumerate(values):
        if not value:
            rejects.append(Reject(index, RejectReason.EMPTY, "no bytes" if value is not None else "a tombstone"))
        elif len(value) > message_bytes_max:
            rejects.append(Reject(index, RejectReason.OVERSIZED, f"{len(value)} bytes, at most {message_bytes_max}"))
        else:
            try:
                structs.append(decode_one(value))
                positions.append(index)
            except MESSAGE_ERRORS as error:
                rejects.append(_reject(index, explain(value, error)))
    return _checked(fields, structs, positions, rejects)


def _checked(
    fields: dict[str, Field], structs: list[msgspec.Struct], positions: list[int], rejects: list[Reject]
) -> Decoded:
    rows = np.array(positions, np.int64)
    if not structs:
        return Decoded(empty_batch(fields), rows, rejects)
    batch, faults = to_columns(fields, structs)
    if faults:
        rejects.extend(_reject(positions[row], fault) for row, fault in faults.items())
        good = np.ones(len(rows), np.bool_)
        good[list(faults)] = False
        batch, rows = batch.take(good), rows[good]
    rejects.sort(key=lambda reject: reject.index)
    return Decoded(batch, rows, rejects)


def _reject(index: int, fault: Fault) -> Reject:
    return Reject(index, fault[0], fault[1][:DETAIL_CHARACTERS_MAX])


def explain_error(error: Exception) -> Fault:
    """The reason and detail behind an error of msgspec, whose messages name fields and types but no values."""
    if isinstance(error, UnicodeDecodeError):
        return RejectReason.ENCODING, "a text is not UTF-8"
    if isinstance(error, RecursionError):
        return RejectReason.SYNTAX, "nested too deeply"
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return RejectReason.SYNTAX, text
    if text.startswith("Object missing required field"):
        return RejectReason.MISSING_FIELD, text
    if text.startswith("Number out of range"):
        return RejectReason.NOT_FINITE, text
    return RejectReason.TYPE, text
