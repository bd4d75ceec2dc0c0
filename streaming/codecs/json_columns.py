"""Reads plain JSON messages straight into columns; see `json_kernels` for what is plain."""

from __future__ import annotations

import re
from operator import itemgetter

import numpy as np

from cascade.columns import Bool, ByteColumn, ColumnBatch
from cascade.schema import TIME_UNITS_PER_SECOND, Field
from streaming.codecs.json_kernels import CATEGORY, FIELD, FIELDS_MAX, NUMBER, TEXT, TIME, WHOLE, read_objects

_KINDS = {"int64": WHOLE, "timestamp": TIME, "float64": NUMBER, "string": TEXT, "category": CATEGORY}
# Texts that JSON writes without an escape, whoever writes it.
_UNESCAPED = re.compile(r"[ !#-\[\]-~]*")


def can_be_plain(fields: dict[str, Field]) -> bool:
    """Whether messages with these fields can be plain: not with too many fields, or with names that need an escape."""
    return 0 < len(fields) <= FIELDS_MAX and all(_UNESCAPED.fullmatch(name) for name in fields)


class PlainReader:
    """Reads messages with fields that `can_be_plain`, at most `bytes_max` octets each. One thread uses it."""

    def __init__(self, fields: dict[str, Field], bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._wholes = [name for name, field in fields.items() if _KINDS[field.type] in (WHOLE, TIME, CATEGORY)]
        self._numbers = [name for name, field in fields.items() if field.type == "float64"]
        self._texts = {name: field.dtype for name, field in fields.items() if field.type == "string"}
        self._text_bounds = np.cumsum([0, *(dtype.itemsize for dtype in self._texts.values())]).tolist()
        words = [b'"%s":' % name.encode() for name in fields]
        self._fields = np.zeros(len(fields), FIELD)
        for row, (name, field) in zip(self._fields, fields.items(), strict=True):
            values = _words(field.values)
            row["kind"], row["column"] = _KINDS[field.type], self._column(name)
            row["word"], row["word_end"] = len(words), len(words) + len(values)
            row["width"] = field.max_length
            row["minimum"], row["maximum"] = field.limits()
            if field.type == "timestamp":
                per_second = TIME_UNITS_PER_SECOND[field.unit]
                row["times"], row["divisor"] = max(1_000 // per_second, 1), max(per_second // 1_000, 1)
            words += values
        self._letters = np.frombuffer(b"".join(words), np.uint8)
        self._bounds = np.cumsum([0, *map(len, words)])
        self._order = np.arange(len(fields))
        self._names = list(fields)
        by_kind = [*self._wholes, *self._numbers, *self._texts]
        # the columns in the order of the fields; with a first one that is not used, so that the result is a tuple
        self._in_order = itemgetter(0, *map(by_kind.index, fields))

    def read(self, messages: ByteColumn) -> tuple[ColumnBatch, Bool, int]:
        """Returns columns of all messages, which of them are doubtful (bool [messages]), and their number.

        The rows of doubtful messages have no meaning.
        """
        rows = len(messages.ends)
        wholes, numbers = np.empty((len(self._wholes), rows), np.int64), np.empty((len(self._numbers), rows))
        texts = np.empty(rows * self._text_bounds[-1], np.uint8)
        doubtful = np.empty(rows, np.bool_)
        doubts = read_objects(
            messages.octets, messages.ends, self._bytes_max, self._fields, self._letters, self._bounds, self._order,
            wholes, numbers, texts, doubtful,
        )  # fmt: skip
        columns = [*wholes, *numbers]
        for dtype, at in zip(self._texts.values(), self._text_bounds, strict=False):
            columns.append(texts[rows * at : rows * (at + dtype.itemsize)].view(dtype))
        return ColumnBatch(dict(zip(self._names, self._in_order(columns)[1:], strict=True)), rows), doubtful, doubts

    def _column(self, name: str) -> int:
        """The field's `column` for the kernel, see FIELD."""
        if name in self._texts:
            return int(self._text_bounds[list(self._texts).index(name)])
        return (self._numbers if name in self._numbers else self._wholes).index(name)


def _words(values: tuple[str, ...]) -> list[bytes]:
    """Category values as they are in messages; empty for one that needs an escape, or that the schema has again."""
    return [
        b'"%s"' % value.encode() if _UNESCAPED.fullmatch(value) and value not in values[number + 1 :] else b""
        for number, value in enumerate(values)
    ]


def compile_json_kernel() -> None:
    """Compiles the kernel ahead of the first message, for octets that are read-only and for others."""
    reader, no_ends = PlainReader({"amount": Field(type="float64")}, 1), np.zeros(0, np.int64)
    for octets in (np.frombuffer(b"-", np.uint8), np.zeros(1, np.uint8)):
        reader.read(ByteColumn(octets, no_ends))
