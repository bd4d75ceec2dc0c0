"""Codecs: messages to columns and back; `codec` makes them."""

from __future__ import annotations

from collections.abc import Callable

from cascade.config import CodecName, KafkaSettings
from cascade.errors import SettingError
from cascade.plugins import CODECS
from cascade.schema import Field
from streaming.codecs.ahead import too_far_ahead
from streaming.codecs.avro_writers import Schemas
from streaming.codecs.protocol import Codec, Decoded, Reject, RejectReason
from streaming.codecs.schema_sources import make_schemas

__all__ = ["Codec", "Decoded", "Reject", "RejectReason", "Schemas", "codec", "too_far_ahead", "topic_codec"]


def codec(name: CodecName, fields: dict[str, Field], message_bytes_max: int, schemas: Schemas | None = None) -> Codec:
    """Makes a codec.

    name: of the codec. fields: of the messages: `schema.fields`, or `schema.label_fields()` for labels.
    message_bytes_max: the largest message that is read. schemas: of a codec with `uses_schemas`. Raises SettingError.
    """
    maker: Callable[..., Codec] = CODECS.load(name)
    if not getattr(maker, "uses_schemas", False):
        return maker(fields, message_bytes_max)
    if schemas is None:
        remedy = "set url or directory of kafka.schema_registry"
        raise SettingError("configuration", CODECS.key, name, "has no source of schemas", remedy)
    return maker(fields, message_bytes_max, schemas)


def topic_codec(kafka: KafkaSettings, topic: str, fields: dict[str, Field], message_bytes_max: int) -> Codec:
    """Makes the configured codec of a topic."""
    schemas = None
    if kafka.uses_schemas:
        schemas = make_schemas(kafka.schema_registry, topic)
    return codec(kafka.codec, fields, message_bytes_max, schemas)
