"""Messages to columns and back; `codec` is the way in."""

from __future__ import annotations

from cascade.config import CodecName
from cascade.schema import Field
from streaming.codecs.binary import BinaryCodec
from streaming.codecs.json import JsonCodec
from streaming.codecs.msgpack import MsgpackCodec
from streaming.codecs.protocol import Codec, Decoded, Reject, RejectReason
from streaming.codecs.validate import too_far_ahead

__all__ = ["Codec", "Decoded", "Reject", "RejectReason", "codec", "too_far_ahead"]


def codec(name: CodecName, fields: dict[str, Field], message_bytes_max: int) -> Codec:
    """The codec `name` for messages with these fields (`schema.fields`, or `schema.label_fields()` for labels)."""
    makers: dict[CodecName, type[JsonCodec] | type[MsgpackCodec] | type[BinaryCodec]] = {
        "json": JsonCodec, "msgpack": MsgpackCodec, "binary": BinaryCodec
    }  # fmt: skip
    return makers[name](fields, message_bytes_max)
