"""JSON messages: an object for each transaction, fields by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec
import numpy as np

from cascade.columns import ByteColumn
from cascade.schema import Field
from streaming.codecs.faults import Fault
from streaming.codecs.json_columns import PlainReader, can_be_plain, compile_json_kernel
from streaming.codecs.messages import NESTING_MAX, MessageCodec
from streaming.codecs.protocol import Decoded, RejectReason

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
# the change of the nesting depth at each octet outside of texts
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"{[")] = 1
_STEPS[list(b"}]")] = -1
_COLON = ord(":")


class JsonCodec(MessageCodec):
    """Codec for JSON (RFC 8259, UTF-8).

    A kernel reads the messages that are plain, msgspec the others, with the same result; see `json_kernels`. One thread
    decodes.

    >>> fields = {"card_id": Field(type="int64"), "amount": Field(type="float64", minimum=0)}
    >>> decoded = JsonCodec(fields, 1024).decode([b'{"card_id": 7, "amount": 12.5}', b'{"card_id": 7}'])
    >>> decoded.batch["amount"].tolist(), str(decoded.rejects[0].reason)
    ([12.5], 'missing-field')
    """

    name = "json"
    warm_up = staticmethod(compile_json_kernel)

    def __init__(self, fields: dict[str, Field], message_bytes_max: int) -> None:
        super().__init__(msgspec.json, fields, message_bytes_max)
        # a field name with a colon sends its messages the slow way, with the same result
        self._colons = len(fields)
        self._plain = PlainReader(fields, message_bytes_max) if can_be_plain(fields) else None

    def decode(self, values: Sequence[bytes | None]) -> Decoded:
        """See Codec."""
        if self._plain is None:
            return super().decode(values)
        batch, doubtful, doubts = self._plain.read(ByteColumn.of(values))
        if not doubts:
            return Decoded(batch, np.arange(batch.rows), [])
        indexes = np.flatnonzero(doubtful).tolist()
        others = self._read_each([values[index] for index in indexes], indexes)
        good = ~doubtful
        good[others.rows] = True
        for name, column in batch.columns.items():
            column[others.rows] = others.batch[name]
        return Decoded(batch.take(good) if others.rejects else batch, np.flatnonzero(good), others.rejects)

    def _have_more(self, values: Sequence[bytes]) -> bool:
        # a message with every field has at least a colon for each, so messages cannot compensate for each other
        return b"".join(values).count(b":") != self._colons * len(values)

    def _shape(self, value: bytes, entries: dict[str, msgspec.Raw]) -> tuple[int, int]:
        value.decode()  # msgspec skips unknown fields without decoding them
        brackets = value.count(b"{") + value.count(b"[")
        if brackets <= NESTING_MAX and b"\\" not in value:
            # each key has a colon after it; the other colons are in keys and values
            inside = "".join(entries).count(":") + b"".join(entries.values()).count(b":")
            return value.count(b":") - inside, brackets - 1
        octets = np.frombuffer(_STRING.sub(b"", value), np.uint8)
        depth = np.cumsum(_STEPS[octets], dtype=np.int32)
        return int(np.count_nonzero((octets == _COLON) & (depth == 1))), int(depth.max()) - 1

    def _explain(self, value: bytes, error: Exception) -> Fault:
        reason, detail = super()._explain(value, error)
        if reason is RejectReason.SYNTAX:
            try:
                value.decode()
            except UnicodeDecodeError:
                return RejectReason.ENCODING, "the message is not UTF-8"
        return reason, detail
