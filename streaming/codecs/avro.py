"""Avro messages in a schema registry's frame: an octet 0, the number of the writer's schema, the body."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cascade.columns import Array, Bool, ColumnBatch, Int64
from cascade.errors import SettingError
from cascade.schema import Field
from streaming.codecs.avro_kernels import (
    BAD_BOOLEAN,
    BAD_LENGTH,
    BAD_NUMBER,
    CATEGORY,
    CUT_SHORT,
    IS_NULL,
    NO_SUCH_BRANCH,
    NO_SUCH_SYMBOL,
    NUMBER,
    TEXT,
    TOO_MUCH,
    WHOLE,
    read_messages,
)
from streaming.codecs.avro_schemas import NAME, TARGETS, WriterSchema, parse_writer, schema_text
from streaming.codecs.avro_writers import Schemas, Writers
from streaming.codecs.faults import Fault, Faults, note, reject, sift, size_fault
from streaming.codecs.protocol import Decoded, RejectReason
from streaming.codecs.rows import empty_batch, time_from_ms
from streaming.codecs.validate import NOT_UTF8, check_columns, times_in_ms

MAGIC, HEAD_BYTES = 0, 5
_NO_FRAME: Fault = (RejectReason.SYNTAX, "no schema registry frame: an octet 0 and the schema's number")
_FAULTS: dict[int, Fault] = {
    CUT_SHORT: (RejectReason.SYNTAX, "the message ends within this field"),
    BAD_NUMBER: (RejectReason.SYNTAX, "an integer with more bits than its type"),
    BAD_LENGTH: (RejectReason.SYNTAX, "a length that is negative, or beyond the end of the message"),
    NO_SUCH_BRANCH: (RejectReason.SYNTAX, "an unknown branch of a union"),
    NO_SUCH_SYMBOL: (RejectReason.SYNTAX, "an unknown symbol of an enum"),
    BAD_BOOLEAN: (RejectReason.SYNTAX, "a boolean other than 0 and 1"),
    TOO_MUCH: (RejectReason.SYNTAX, "more octets after the last field of the schema"),
    IS_NULL: (RejectReason.TYPE, "null"),
}


class AvroCodec:
    """Codec for Avro (specification 1.12) as Confluent's serializers frame it.

    fields: of the reader's schema. message_bytes_max: the largest message that is read. schemas: the source of the
    writers' schemas, and the registry of the reader's schema at the first `encode`.

    A writer's schema may have more fields, in any order. Its types are promoted as the specification says, and an enum
    is read as its symbol's text. Null is rejected. Raises SettingError if a field name is not a name in Avro. `decode`
    raises BrokerError if a new schema cannot be read now: the message may be good, so it is neither row nor reject.
    """

    name = "avro"
    uses_schemas = True

    def __init__(self, fields: dict[str, Field], message_bytes_max: int, schemas: Schemas) -> None:
        for name in fields:
            if not NAME.fullmatch(name):
                raise SettingError(
                    "schema", f"fields.{name}", None, "is not a name in Avro", "use letters, digits and _"
                )
        self._fields = fields
        self._bytes_max = message_bytes_max
        self._schemas = schemas
        self._writers = Writers(schemas, fields)
        self._columns = _Columns(fields)
        self._head: bytes | None = None

    @staticmethod
    def warm_up() -> None:
        """See Codec."""
        fields = {"amount": Field(type="float64")}
        rows = np.zeros(0, np.int64)
        # read-only octets, as those of messages
        octets = np.frombuffer(b"-", np.uint8)
        _Columns(fields).read(octets, rows, rows, [(parse_writer(schema_text(fields), fields), rows)], {})

    def decode(self, values: Sequence[bytes | None]) -> Decoded:
        """See Codec."""
        values, most, rejects = list(values), self._bytes_max, []
        fitting = [value for value in values if value and len(value) <= most]
        rows = np.arange(len(values))
        if len(fitting) < len(values):
            fits = np.fromiter((bool(value) and len(value or b"") <= most for value in values), np.bool_, len(values))
            rejects = [reject(index, size_fault(values[index], most)) for index in np.flatnonzero(~fits).tolist()]
            rows = rows[fits]
        if not fitting:
            return Decoded(empty_batch(self._fields), rows, rejects)
        octets = np.frombuffer(b"".join(fitting), np.uint8)
        lengths = np.fromiter(map(len, fitting), np.int64, len(fitting))
        ends = np.cumsum(lengths)
        starts = ends - lengths
        faults: Faults = {}
        framed = (octets[starts] == MAGIC) & (lengths >= HEAD_BYTES)
        if not framed.all():
            note(faults, ~framed, *_NO_FRAME)
        by_writer = self._by_writer(octets, starts, framed, faults)
        batch = self._columns.read(octets, starts + HEAD_BYTES, ends, by_writer, faults)
        return sift(batch, rows, faults, rejects)

    def encode(self, batch: ColumnBatch) -> list[bytes]:
        """See Codec; raises BrokerError if the schema cannot be registered."""
        if self._head is None:
            number = self._schemas.register(schema_text(self._fields))
            self._head = bytes([MAGIC]) + number.to_bytes(4, "big")
        head = self._head
        columns = [_encoded(field, batch[name]) for name, field in self._fields.items()]
        return [head + b"".join(parts) for parts in zip(*columns, strict=True)]

    def _by_writer(
        self, octets: Array, starts: Int64, framed: Bool, faults: Faults
    ) -> list[tuple[WriterSchema, Int64]]:
        """The rows of each writer's schema; notes rows whose schema cannot be resolved."""
        rows = np.flatnonzero(framed)
        begins = starts[rows]
        numbers = np.zeros(len(rows), np.int64)
        for octet in range(1, HEAD_BYTES):
            numbers = numbers << 8 | octets[begins + octet]
        found = []
        for number in np.unique(numbers).tolist():
            of_writer = rows[numbers == number]
            writer = self._writers.find(number)
            if isinstance(writer, WriterSchema):
                found.append((writer, of_writer))
            else:
                for row in of_writer.tolist():
                    faults.setdefault(row, writer)
        return found


class _Columns:
    """The fields by kind of column, and their widths and words, for the kernel."""

    def __init__(self, fields: dict[str, Field]) -> None:
        self.fields = fields
        self.of: dict[int, list[str]] = {kind: [] for kind in (WHOLE, NUMBER, TEXT, CATEGORY)}
        for name, field in fields.items():
            self.of[TARGETS[field.type]].append(name)
        self.widths = np.array([fields[name].max_length for name in self.of[TEXT]], np.int64)
        values = [[value.encode() for value in fields[name].values] for name in self.of[CATEGORY]]
        flat = [word for words in values for word in words]
        self.word_bounds = np.cumsum([0, *map(len, values)])
        self.word_lengths = np.array([len(word) for word in flat], np.int64)
        self.words = np.zeros((len(flat), max([1, *map(len, flat)])), np.uint8)
        for row, word in enumerate(flat):
            self.words[row, : len(word)] = np.frombuffer(word, np.uint8)

    def read(
        self, octets: Array, starts: Int64, ends: Int64, by_writer: list[tuple[WriterSchema, Int64]], faults: Faults
    ) -> ColumnBatch:
        """Returns columns of all rows; notes the faults of each writer's rows."""
        rows, texts = len(starts), len(self.widths)
        wholes = np.zeros((len(self.of[WHOLE]), rows), np.int64)
        numbers = np.zeros((len(self.of[NUMBER]), rows))
        categories = np.zeros((len(self.of[CATEGORY]), rows), np.int64)
        flat = np.zeros(rows * int(self.widths.sum()), np.uint8)
        begins, lengths = np.zeros((texts, rows), np.int64), np.zeros((texts, rows), np.int64)
        doubtful, broken = np.zeros((texts, rows), np.bool_), np.zeros(rows, np.bool_)
        wrong, wrong_step = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        for writer, of_writer in by_writer:
            read_messages(
                octets, starts, ends, of_writer, writer.steps, writer.branches, writer.symbols, self.words,
                self.word_lengths, self.word_bounds, self.widths, wholes, numbers, flat, begins, lengths, doubtful,
                categories, broken, wrong, wrong_step,
            )  # fmt: skip
            _note_wrong(writer, of_writer, wrong, wrong_step, faults)
        if broken.any():
            note(faults, broken, *NOT_UTF8)
        columns = dict(zip(self.of[WHOLE], wholes, strict=True)) | dict(zip(self.of[NUMBER], numbers, strict=True))
        columns |= dict(zip(self.of[CATEGORY], categories, strict=True))
        columns |= self._texts(flat, rows)
        odd_texts = {
            name: {row: octets[begin[row] : begin[row] + length[row]].tobytes() for row in np.flatnonzero(odd).tolist()}
            for name, odd, begin, length in zip(self.of[TEXT], doubtful, begins, lengths, strict=True)
        }

        def to_ms(name: str, times: Int64) -> Array:
            return _times_in_ms(name, times, by_writer, faults)

        return check_columns(self.fields, columns, odd_texts, to_ms, faults)

    def _texts(self, flat: Array, rows: int) -> dict[str, Array]:
        ends = np.cumsum(self.widths * rows)
        pieces = [flat[end - width * rows : end] for end, width in zip(ends, self.widths, strict=True)]
        return {name: piece.view(self.fields[name].dtype) for name, piece in zip(self.of[TEXT], pieces, strict=True)}


def _note_wrong(writer: WriterSchema, rows: Int64, wrong: Int64, wrong_step: Int64, faults: Faults) -> None:
    for row in rows[wrong[rows] != 0].tolist():
        reason, detail = _FAULTS[int(wrong[row])]
        faults.setdefault(row, (reason, f"{writer.names[wrong_step[row]]}: {detail}"))


def _times_in_ms(name: str, column: Int64, by_writer: list[tuple[WriterSchema, Int64]], faults: Faults) -> Int64:
    """Converts times to ms; each writer may use another unit."""
    for writer, rows in by_writer:
        of_writer: Faults = {}
        column[rows] = times_in_ms(name, column[rows], writer.units[name], of_writer)
        for row, fault in of_writer.items():
            faults.setdefault(int(rows[row]), fault)
    return column


# --- writing ----------------------------------------------------------------------------------------------------------


def _encoded(field: Field, column: Array) -> list[bytes]:
    """The encoded values of a column."""
    if field.type == "float64":
        octets = column.astype("<f8").tobytes()
        return [octets[begin : begin + 8] for begin in range(0, len(octets), 8)]
    if field.type == "string":
        return [_number(len(text)) + text for text in column.tolist()]
    if field.type == "category":
        words = [_number(len(value.encode())) + value.encode() for value in field.values]
        return [words[position] for position in column.tolist()]
    if field.type == "timestamp":
        column = time_from_ms(column, field.unit)
    return [_number(value) for value in column.tolist()]


def _number(value: int) -> bytes:
    """An integer in zigzag, seven bits in each octet, the lowest first."""
    left = value << 1 ^ value >> 63
    octets = bytearray()
    while left > 0x7F:
        octets.append(left & 0x7F | 0x80)
        left >>= 7
    octets.append(left)
    return bytes(octets)
