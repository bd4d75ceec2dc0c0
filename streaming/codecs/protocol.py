"""The protocol of codecs: every message becomes a row of the batch, or a reject with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cascade.columns import ColumnBatch, Int64


class RejectReason(StrEnum):
    """Why a message is rejected; a closed set, for counters and for the dead-letter header.

    `too_far_ahead` finds FUTURE_EVENT, since codecs do not have the append time. OTHER_SCHEMA: the message was written
    with a schema that is unknown, or cannot be resolved to this one.
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
    """A message that cannot be read.

    `index`: in the input of `decode`. `detail`: the field and the limit, never the field's value, since a card number
    must not reach a header or a log.
    """

    index: int
    reason: RejectReason
    detail: str


@dataclass(slots=True)
class Decoded:
    """The result of `decode`: each message of the input is either a row or a reject.

    `rows` (int64, [batch.rows]): the index in the input of each row of `batch`, ascending. `rejects`: by ascending
    index.
    """

    batch: ColumnBatch
    rows: Int64
    rejects: list[Reject]


class Codec(Protocol):
    """Decodes and encodes messages with certain fields.

    A codec's class is called with `fields` and `message_bytes_max`, see `streaming.codecs.codec`. It may have these
    attributes:

    - `decisions`: the format of the decisions, "json" (the default) or "msgpack".
    - `uses_schemas`: True for a third argument, the schemas of `kafka.schema_registry`.
    - `warm_up`: a static method that compiles ahead of the first message what the codec would compile then.
    """

    name: str

    def decode(self, values: Sequence[bytes | None]) -> Decoded:
        """Decodes messages; never raises for their content.

        Raises BrokerError if Avro's schema registry does not answer.
        """
        ...

    def encode(self, batch: ColumnBatch) -> list[bytes]:
        """Encodes a batch, a message for each row; the values must be within the limits, dtypes as in ColumnBatch."""
        ...
