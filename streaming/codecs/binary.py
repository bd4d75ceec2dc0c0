"""Messages that are rows of fixed size: a whole fetch becomes an array, without a Python object for each row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np

from cascade.columns import Array, Bool, ByteColumn, ColumnBatch, Int64
from cascade.errors import SettingError
from cascade.schema import Field
from streaming.codecs.faults import Fault, Faults, reject, sift, size_fault
from streaming.codecs.protocol import Decoded, Reject, RejectReason
from streaming.codecs.rows import empty_batch, time_from_ms
from streaming.codecs.validate import check_columns, times_in_ms

# JSON objects, MessagePack maps and Avro's frame never begin with this octet.
MAGIC, VERSION = 0xCA, 1
LAYOUT_HASH_BYTES = 6
HEAD_BYTES = 2 + LAYOUT_HASH_BYTES
_HEAD = "head"
_FIRST_PLAIN, _PLAIN = 0x20, 0x7F - 0x20
_OTHER_LAYOUT: Fault = (RejectReason.OTHER_SCHEMA, "a row with another version or layout of fields")


class BinaryCodec:
    """Codec for fixed rows, little-endian, without gaps: the head, then the fields in their order.

    The head: the octets `MAGIC` and `VERSION`, then the first LAYOUT_HASH_BYTES of the SHA-256 of `layout_text`, so
    that a row of another layout is rejected and never misread. A number or time is 8 octets, a string
    `max_length` octets of UTF-8 padded with zeros, a category its index in the schema's `values` (1 octet, or 2 for
    more than 256 values).

    >>> codec = BinaryCodec({"card_id": Field(type="string", max_length=8), "amount": Field(type="float64")}, 1024)
    >>> batch = ColumnBatch({"card_id": np.array([b"K-1"], "S8"), "amount": np.array([12.5])}, 1)
    >>> [len(message) for message in codec.encode(batch)]
    [24]
    >>> codec.decode([*codec.encode(batch), b"K-1"]).batch["card_id"].tolist()
    [b'K-1']

    Raises SettingError if a row is larger than `message_bytes_max`, since none could be read.
    """

    name = "binary"

    def __init__(self, fields: dict[str, Field], message_bytes_max: int) -> None:
        self._fields = fields
        self._bytes_max = message_bytes_max
        digest = hashlib.sha256(layout_text(fields)).digest()
        self.head = bytes([MAGIC, VERSION]) + digest[:LAYOUT_HASH_BYTES]
        self._head = np.frombuffer(self.head, "<u8")[0]
        self._row = np.dtype(
            [(_HEAD, "<u8"), *((f"f{index}", _wire(field)) for index, field in enumerate(fields.values()))]
        )
        self._bytes = self._row.itemsize
        if self._bytes > message_bytes_max:
            raise SettingError(
                "configuration",
                "worker.message_bytes_max",
                message_bytes_max,
                f"a binary row of this schema has {self._bytes} bytes",
                f"set it to {self._bytes} or more",
            )

    def decode(self, values: Sequence[bytes | None]) -> Decoded:
        """See Codec."""
        messages, rejects = ByteColumn.of(values), list[Reject]()
        octets, lengths, rows = messages.octets, np.diff(messages.ends, prepend=0), np.arange(len(messages))
        fits = lengths == self._bytes
        if not fits.all():
            rejects = [reject(index, self._explain(values[index])) for index in np.flatnonzero(~fits).tolist()]
            octets, rows = octets[np.repeat(fits, lengths)], rows[fits]
        if not len(rows):
            return Decoded(empty_batch(self._fields), rows, rejects)
        table, rows = self._of_this_layout(octets.view(self._row), rows, values, rejects)
        batch, faults = self._to_columns(table)
        return sift(batch, rows, faults, rejects)

    def encode(self, batch: ColumnBatch) -> list[bytes]:
        """See Codec."""
        table = np.zeros(batch.rows, self._row)
        table[_HEAD] = self._head
        for index, (name, field) in enumerate(self._fields.items()):
            column = batch[name]
            table[f"f{index}"] = time_from_ms(column, field.unit) if field.type == "timestamp" else column
        octets, size = table.tobytes(), self._bytes
        return [octets[start : start + size] for start in range(0, len(octets), size)]

    def _of_this_layout(
        self, table: Array, rows: Int64, values: Sequence[bytes | None], rejects: list[Reject]
    ) -> tuple[Array, Int64]:
        same: Bool = table[_HEAD] == self._head
        if same.all():
            return table, rows
        rejects += [reject(index, self._explain(values[index])) for index in rows[~same].tolist()]
        return table[same], rows[same]

    def _explain(self, value: bytes | None) -> Fault:
        """Returns the fault of a message with another length or head."""
        if not value or len(value) > self._bytes_max:
            return size_fault(value, self._bytes_max)
        if value[0] != MAGIC or len(value) < HEAD_BYTES:
            return RejectReason.SYNTAX, "not a binary row: another first octet"
        if value[:HEAD_BYTES] != self.head:
            return _OTHER_LAYOUT
        return RejectReason.SYNTAX, f"{len(value)} bytes, a row has {self._bytes}"

    def _to_columns(self, table: Array) -> tuple[ColumnBatch, Faults]:
        faults: Faults = {}
        # a copy of each column, so that it does not keep the whole fetch in memory
        columns = {name: np.ascontiguousarray(table[f"f{index}"]) for index, name in enumerate(self._fields)}
        odd_texts = {name: _odd_texts(columns[name]) for name, field in self._fields.items() if field.type == "string"}
        for name, field in self._fields.items():
            if field.type == "category":
                columns[name] = columns[name].astype(np.int64)

        def to_ms(name: str, times: Int64) -> Array:
            return times_in_ms(name, times, self._fields[name].unit, faults)

        return check_columns(self._fields, columns, odd_texts, to_ms, faults), faults


def layout_text(fields: dict[str, Field]) -> bytes:
    """The text of the head's hash: compact JSON in UTF-8, an array for each field with its name, type and layout.

    >>> layout_text({"paid_at": Field(type="timestamp", unit="ms"), "way": Field(type="category", values=("a",))})
    b'[["paid_at","timestamp","ms"],["way","category",["a"]]]'
    """
    return msgspec.json.encode([[name, field.type, *_details(field)] for name, field in fields.items()])


def _details(field: Field) -> list[object]:
    """The rest of a field's layout; limits are not a part of it, and may differ between producer and reader."""
    details: dict[str, list[object]] = {
        "timestamp": [field.unit],
        "string": [field.max_length],
        "category": [field.values],
    }
    return details.get(field.type, [])


def _wire(field: Field) -> str:
    """The numpy type of a field in a row."""
    if field.type == "string":
        return f"S{field.max_length}"
    if field.type == "category":
        return "u1" if len(field.values) <= 256 else "<u2"
    return "<f8" if field.type == "float64" else "<i8"


def _odd_texts(column: Array) -> dict[int, bytes]:
    """The texts of a column that are not printable ASCII, by row."""
    octets = column.view(np.uint8).reshape(len(column), column.itemsize)
    return {row: octets[row].tobytes().rstrip(b"\0") for row in np.flatnonzero(_not_plain(octets)).tolist()}


def _not_plain(octets: Array) -> Bool:
    """Which texts are not printable ASCII, bool [rows]; `octets`: uint8 [rows, width], padded with zeros.

    A zero before another octet is a part of the text.
    """
    zero = octets == 0
    # a single comparison for both bounds: smaller values wrap around
    plain = (octets - np.uint8(_FIRST_PLAIN) < _PLAIN) | zero
    inner = zero[:, :-1] > zero[:, 1:]
    if plain.all() and not inner.any():
        return np.zeros(len(octets), np.bool_)
    found: Bool = ~plain.all(axis=1) | inner.any(axis=1)
    return found
