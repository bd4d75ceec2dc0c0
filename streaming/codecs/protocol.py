"""What a codec promises: every message of a fetch becomes a row of the batch, or a reject with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cascade.columns import ColumnBatch, Int64


class RejectReason(StrEnum):
    """Why a message could not become a row; a closed set, for counters and for the dead-letter header.

    FUTURE_EVENT is found where the time of append is known, by `too_far_ahead`; the others are a codec's. OTHER_SCHEMA:
    the message says that it was written by a schema which cannot be read as ours, or is not known.
    """

    OVERSIZED = "oversized"
    EMPTY = "empty"
    OTHER_SCHEMA = "other-schema"
    ENCODING = "encoding"
    SYNTAX = "syntax"
    TYPE = "type"
    MISSING_FIELD = "missing-field"
    REPEATED_KEY = "repeated-key"
    NOT_FINITE = "not-finite"
    OUT_OF_LIMITS = "out-of-limits"
    UNKNOWN_CATEGORY = "unknown-category"
    TOO_LONG = "too-long"
    FUTURE_EVENT = "future-event"


@dataclass(frozen=True, slots=True)
class Reject:
    """One message that could not be read.

    `index`: its position in the input of `decode`. `detail`: the field and the limit, never the field's value (a
    card number must not reach a header or a log).
    """

    index: int
    reason: RejectReason
    detail: str


@dataclass(frozen=True, slots=True)
class Decoded:
    """The outcome of one `decode`: each position of the input is in `rows` or among the rejects, never in both.

    `rows` int64 [batch.rows]: for each row of `batch` its position in the input, ascending. `rejects`: by ascending
    position.
    """

    batch: ColumnBatch
    rows: Int64
    rejects: list[Reject]


class Codec(Protocol):
    """Messages to columns and back, for the fields it was made for."""

    name: str

    def decode(self, values: Sequence[bytes | None]) -> Decoded:
        """Read a fetch; never raises for what is in a message.

        Raises BrokerError where what is needed to read it cannot be had now (Avro's registry of schemas).
        """
        ...

    def encode(self, batch: ColumnBatch) -> list[bytes]:
        """One message a row; the batch has the dtypes that ColumnBatch documents, and values within the limits."""
        ...
