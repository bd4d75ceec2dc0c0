"""MessagePack messages: one map a transaction, fields by name."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cascade.columns import ColumnBatch
from cascade.schema import Field
from streaming.codecs.messages import Fault, decode_messages, explain_error
from streaming.codecs.protocol import Decoded
from streaming.codecs.rows import row_type, to_rows


class MsgpackCodec:
    """Codec for MessagePack (github.com/msgpack/msgpack, spec of 2017); see JsonCodec for the arguments.

    >>> codec = MsgpackCodec({"card_id": Field(type="string", max_length=8)}, 1024)
    >>> codec.decode([msgspec.msgpack.encode({"card_id": "K-1"})]).batch["card_id"].tolist()
    [b'K-1']
    """

    name = "msgpack"

    def __init__(self, fields: dict[str, Field], message_bytes_max: int) -> None:
        self._fields = fields
        self._message_bytes_max = message_bytes_max
        self._row = row_type(fields)
        self._decoder = msgspec.msgpack.Decoder(self._row)
        self._encoder = msgspec.msgpack.Encoder()

    def decode(self, values: Sequence[bytes | None]) -> Decoded:
        """Read a fetch; never raises for what is in a message."""
        return decode_messages(self._fields, values, self._message_bytes_max, self._decoder.decode, _explain)

    def encode(self, batch: ColumnBatch) -> list[bytes]:
        """One map a row."""
        encode = self._encoder.encode
        return [encode(row) for row in to_rows(self._fields, batch, self._row)]


def _explain(value: bytes, error: Exception) -> Fault:
    del value
    return explain_error(error)
