"""JSON messages: one object a transaction, fields by name."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cascade.columns import ColumnBatch
from cascade.schema import Field
from streaming.codecs.messages import Fault, decode_messages, explain_error
from streaming.codecs.protocol import Decoded, RejectReason
from streaming.codecs.rows import row_type, to_rows


class JsonCodec:
    """Codec for JSON (RFC 8259, UTF-8); `message_bytes_max` is the largest message that is read.

    >>> fields = {"card_id": Field(type="int64"), "amount": Field(type="float64", minimum=0)}
    >>> decoded = JsonCodec(fields, 1024).decode([b'{"card_id": 7, "amount": 12.5}', b'{"card_id": 7}'])
    >>> decoded.batch["amount"].tolist(), str(decoded.rejects[0].reason)
    ([12.5], 'missing-field')
    """

    name = "json"

    def __init__(self, fields: dict[str, Field], message_bytes_max: int) -> None:
        self._fields = fields
        self._message_bytes_max = message_bytes_max
        self._row = row_type(fields)
        self._decoder = msgspec.json.Decoder(self._row)
        self._encoder = msgspec.json.Encoder()

    def decode(self, values: Sequence[bytes | None]) -> Decoded:
        """Read a fetch; never raises for what is in a message."""
        return decode_messages(self._fields, values, self._message_bytes_max, self._decoder.decode, _explain)

    def encode(self, batch: ColumnBatch) -> list[bytes]:
        """One JSON object a row."""
        encode = self._encoder.encode
        return [encode(row) for row in to_rows(self._fields, batch, self._row)]


def _explain(value: bytes, error: Exception) -> Fault:
    reason, detail = explain_error(error)
    if reason is RejectReason.SYNTAX:
        try:
            value.decode()
        except UnicodeDecodeError:
            return RejectReason.ENCODING, "the message is not UTF-8"
    return reason, detail
