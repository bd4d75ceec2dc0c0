"""Codecs: messages to columns and back; `codec` makes them."""

from __future__ import annotations

from cascade.config import CodecName, KafkaSettings
from cascade.errors import SettingError
from cascade.schema import Field
from streaming.codecs.ahead import too_far_ahead
from streaming.codecs.avro import AvroCodec
from streaming.codecs.avro_writers import Schemas
from streaming.codecs.binary import BinaryCodec
from streaming.codecs.json import JsonCodec
from streaming.codecs.msgpack import MsgpackCodec
from streaming.codecs.protocol import Codec, Decoded, Reject, RejectReason
from streaming.codecs.schema_sources import make_schemas

__all__ = ["Codec", "Decoded", "Reject", "RejectReason", "Schemas", "codec", "too_far_ahead", "topic_codec"]


def codec(name: CodecName, fields: dict[str, Field], message_bytes_max: int, schemas: Schemas | None = None) -> Codec:
    """Makes a codec.

    name: of the codec. fields: of the messages: `schema.fields`, or `schema.label_fields()` for labels.
    message_bytes_max: the largest message that is read. schemas: of codec `avro`. Raises SettingError.
    """
    if name == "avro":
        if schemas is None:
            raise SettingError(
                "configuration",
                "kafka.codec",
                name,
                "has no source of schemas",
                "set url or directory of kafka.schema_registry",
            )
        return AvroCodec(fields, message_bytes_max, schemas)
    makers: dict[CodecName, type[JsonCodec] | type[MsgpackCodec] | type[BinaryCodec]] = {
        "json": JsonCodec,
        "msgpack": MsgpackCodec,
        "binary": BinaryCodec,
    }
    return makers[name](fields, message_bytes_max)


def topic_codec(kafka: KafkaSettings, topic: str, fields: dict[str, Field], message_bytes_max: int) -> Codec:
    """Makes the configured codec of a topic."""
    schemas = None
    if kafka.codec == "avro":
        schemas = make_schemas(kafka.schema_registry, topic)
    return codec(kafka.codec, fields, message_bytes_max, schemas)
