"""The messages of a load: endless transactions, encoded once for all turns."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.cluster import EndlessData
from cascade.config import CodecName
from cascade.schema import Schema
from streaming.codecs import codec
from streaming.pipeline.decisions import message_keys

FILL_ROWS = 20_000


@dataclass(slots=True)
class Traffic:
    """Endless transactions as messages; encoded messages are cached for later turns."""

    schema: Schema
    rows: EndlessData
    bytes_max: int = 65_536
    _encoded: dict[CodecName, tuple[list[bytes], list[bytes]]] = field(default_factory=dict)

    def messages(self, name: CodecName, start: int, stop: int) -> tuple[list[bytes], list[bytes]]:
        """Keys and values of the transactions from `start` to `stop`, in a codec."""
        keys, values = self._encoded.setdefault(name, ([], []))
        encoder = codec(name, self.schema.fields, self.bytes_max)
        while len(values) < stop:
            batch = self.rows.rows(len(values), len(values) + FILL_ROWS).batch
            keys += message_keys(batch[self.schema.roles.card])
            values += encoder.encode(batch)
        return keys[start:stop], values[start:stop]
