"""Messages to columns and back; `codec` is the way in."""

from __future__ import annotations

from cascade.config import CodecName, KafkaSettings
from cascade.errors import SettingError
from cascade.schema import Field
from streaming.codecs.avro import AvroCodec
from streaming.codecs.avro_writers import Schemas
from streaming.codecs.binary import BinaryCodec
from streaming.codecs.json import JsonCodec
from streaming.codecs.msgpack import MsgpackCodec
from streaming.codecs.protocol import Codec, Decoded, Reject, RejectReason
from streaming.codecs.schema_sources import make_schemas
from streaming.codecs.validate import too_far_ahead

__all__ = ["Codec", "Decoded", "Reject", "RejectReason", "Schemas", "codec", "too_far_ahead", "topic_codec"]


def codec(name: CodecName, fields: dict[str, Field], message_bytes_max: int, schemas: Schemas | None = None) -> Codec:
    """The codec `name` for messages with these fields (`schema.fields`, or `schema.label_fields()` for labels).

    `schemas`: where `avro` finds the schemas that messages name. Raises SettingError where these settings cannot be.
    """
    if name == "avro":
        if schemas is None:
            raise SettingError(
                "configuration", "kafka.codec", name, "has no source of schemas here",
                "set url or directory of kafka.schema_registry",
            )  # fmt: skip
        return AvroCodec(fields, message_bytes_max, schemas)
    makers: dict[CodecName, type[JsonCodec] | type[MsgpackCodec] | type[BinaryCodec]] = {
        "json": JsonCodec, "msgpack": MsgpackCodec, "binary": BinaryCodec
    }  # fmt: skip
    return makers[name](fields, message_bytes_max)


def topic_codec(kafka: KafkaSettings, topic: str, fields: dict[str, Field], message_bytes_max: int) -> Codec:
    """The codec of a topic as the settings say."""
    schemas = None
    if kafka.codec == "avro":
        schemas = make_schemas(kafka.schema_registry, topic)
    return codec(kafka.codec, fields, message_bytes_max, schemas)
