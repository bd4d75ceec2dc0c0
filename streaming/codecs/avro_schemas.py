"""Avro schemas (specification 1.12): the reader's from the fields, and a writer's as steps for the kernel.

A writer's schema is a record of numbers, texts, enums, fixed octets and unions of these. Other fields than the reader's
are skipped. Arrays, maps and nested records are refused: an array of nulls may have any number of elements without an
octet, so the length of a message would not limit its cost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from cascade.columns import Int64
from cascade.schema import Field, FieldType
from streaming.codecs.avro_kernels import (
    BOOLEAN,
    BYTES,
    CATEGORY,
    DOUBLE,
    ENUM,
    FIXED,
    FLOAT,
    INT,
    LONG,
    NULL,
    NUMBER,
    SKIP,
    TEXT,
    WHOLE,
)
from streaming.codecs.faults import Fault
from streaming.codecs.protocol import RejectReason

# Far more than a transaction has; parsing a larger schema would delay the loop.
SCHEMA_BYTES_MAX = 256 * 1024
FIELDS_MAX = 1_000
BRANCHES_MAX = 32
_WRAPPINGS_MAX = 4
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_PRIMITIVES = {
    "null": NULL, "boolean": BOOLEAN, "int": INT, "long": LONG, "float": FLOAT, "double": DOUBLE, "bytes": BYTES,
    "string": BYTES,
}  # fmt: skip
# The column kind of each field type, and the writer's types that it reads (the specification's promotions; an enum's
# symbols are read as texts).
TARGETS: dict[FieldType, int] = {
    "int64": WHOLE, "timestamp": WHOLE, "float64": NUMBER, "string": TEXT, "category": CATEGORY
}  # fmt: skip
_READ_FROM = {WHOLE: {INT, LONG}, NUMBER: {INT, LONG, FLOAT, DOUBLE}, TEXT: {BYTES}, CATEGORY: {BYTES, ENUM}}
_UNITS = {"timestamp-millis": "ms", "timestamp-micros": "us"}


class SchemaRefusedError(Exception):
    """A writer's schema that cannot be resolved to the reader's, and the fault of its messages."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(detail)
        self.fault: Fault = (reason, detail)


@dataclass(frozen=True, slots=True)
class WriterSchema:
    """A writer's schema as steps of the kernel.

    `names`: of the writer's fields. `steps` (int64, [fields, 5]): 1 for a union, else 0; the first index in `branches`;
    the index after the last; SKIP or the kind of column; the index of the reader's field among the fields of this kind.
    `branches` (int64, [branches, 3]): the type; the size of FIXED or the number of symbols of ENUM; its first index in
    `symbols`. `symbols` (int64): the category of each symbol, -1 for none. `units`: of the reader's times, by name.
    """

    names: tuple[str, ...]
    steps: Int64
    branches: Int64
    symbols: Int64
    units: Mapping[str, str]


def schema_text(fields: Mapping[str, Field]) -> str:
    """The reader's schema as JSON, for encoding: categories are strings, times have their logical type."""
    return msgspec.json.encode(
        {
            "type": "record",
            "name": "row",
            "namespace": "cascade",
            "fields": [{"name": name, "type": _type(field)} for name, field in fields.items()],
        }
    ).decode()


def _type(field: Field) -> object:
    if field.type == "timestamp":
        logical = {unit: name for name, unit in _UNITS.items()}.get(field.unit)
        return {"type": "long", "logicalType": logical} if logical else "long"
    return {"int64": "long", "float64": "double", "string": "string", "category": "string"}[field.type]


def parse_writer(text: str, fields: Mapping[str, Field]) -> WriterSchema:
    """Converts a writer's schema to steps; raises SchemaRefusedError."""
    if len(text) > SCHEMA_BYTES_MAX:
        raise _refused(f"its schema has more than {SCHEMA_BYTES_MAX} bytes")
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise _refused("its schema is not JSON") from error
    if not isinstance(schema, dict) or schema.get("type") != "record" or not isinstance(schema.get("fields"), list):
        raise _refused("its schema is not a record")
    written = schema["fields"]
    names = [_text_of(entry, "name") if isinstance(entry, dict) else "" for entry in written]
    if len(names) > FIELDS_MAX or not all(map(NAME.fullmatch, names)):
        raise _refused(f"its schema has more than {FIELDS_MAX} fields, or one without a proper name")
    if len(set(names)) < len(names):
        raise _refused("its schema has two fields with the same name")
    for name in fields:
        if name not in names:
            raise SchemaRefusedError(RejectReason.MISSING_FIELD, f"{name}: not in its writer's schema")
    column_indexes = _column_indexes(fields)
    steps = _Steps(tuple(names), _Names(_text_of(schema, "namespace")))
    for name, entry in zip(names, written, strict=True):
        steps.add(name, entry.get("type"), fields.get(name), column_indexes.get(name, -1))
    return steps.finished()


def _column_indexes(fields: Mapping[str, Field]) -> dict[str, int]:
    """The index of each field among those that are read into the same kind of column."""
    counts = dict.fromkeys(_READ_FROM, 0)
    indexes = {}
    for name, reader_field in fields.items():
        indexes[name] = counts[TARGETS[reader_field.type]]
        counts[TARGETS[reader_field.type]] += 1
    return indexes


@dataclass(frozen=True, slots=True)
class _Branch:
    """A type of a union, or the type of a field."""

    kind: int
    size: int = 0
    symbols: tuple[str, ...] = ()
    logical: str = ""


@dataclass(slots=True)
class _Names:
    """The named types so far, to which a later field may refer."""

    namespace: str
    known: dict[str, _Branch] = field(default_factory=dict)

    def add(self, schema: dict[str, Any], branch: _Branch) -> None:
        name, namespace = _text_of(schema, "name"), _text_of(schema, "namespace") or self.namespace
        full = name if "." in name or not namespace else f"{namespace}.{name}"
        if not name or full in self.known:
            raise _refused("its schema has a type without a name, or two with the same name")
        self.known[full] = branch

    def find(self, name: str) -> _Branch | None:
        full = name if "." in name or not self.namespace else f"{self.namespace}.{name}"
        return self.known.get(full) or self.known.get(name)


class _Steps:
    """Builds the steps of a writer's schema, field by field."""

    def __init__(self, fields: tuple[str, ...], names: _Names) -> None:
        self._fields = fields
        self._names = names
        self._steps: list[tuple[int, int, int, int, int]] = []
        self._branches: list[tuple[int, int, int]] = []
        self._symbols: list[int] = []
        self._units: dict[str, str] = {}

    def add(self, name: str, schema: object, reader_field: Field | None, place: int) -> None:
        union = isinstance(schema, list)
        types = schema if isinstance(schema, list) else [schema]
        if not 1 <= len(types) <= BRANCHES_MAX:
            raise _refused(f"{name}: its union has no branch, or more than {BRANCHES_MAX}")
        branches = [self._branch(name, branch) for branch in types]
        if reader_field is not None:
            self._check(name, reader_field, [branch for branch in branches if branch.kind != NULL])
        first = len(self._branches)
        self._branches += [self._coded(branch, reader_field) for branch in branches]
        target = SKIP if reader_field is None else TARGETS[reader_field.type]
        self._steps.append((int(union), first, len(self._branches), target, place))

    def finished(self) -> WriterSchema:
        return WriterSchema(
            self._fields, np.array(self._steps, np.int64).reshape(-1, 5),
            np.array(self._branches, np.int64).reshape(-1, 3), np.array(self._symbols, np.int64), self._units,
        )  # fmt: skip

    def _branch(self, name: str, schema: object) -> _Branch:
        for _ in range(_WRAPPINGS_MAX):
            if isinstance(schema, str):
                found = _Branch(_PRIMITIVES[schema]) if schema in _PRIMITIVES else self._names.find(schema)
                if found is not None:
                    return found
            if not isinstance(schema, dict):
                break
            kind = schema.get("type")
            if isinstance(kind, str) and kind in _PRIMITIVES:
                return _Branch(_PRIMITIVES[kind], logical=_text_of(schema, "logicalType"))
            if kind in ("enum", "fixed"):
                return self._named(name, schema)
            schema = kind
        raise _refused(f"{name}: not a number, a text, an enum, fixed octets, or a union of these")

    def _named(self, name: str, schema: dict[str, Any]) -> _Branch:
        symbols, size = schema.get("symbols", []), schema.get("size", 0)
        if schema["type"] == "enum":
            if not isinstance(symbols, list) or not symbols or not all(isinstance(symbol, str) for symbol in symbols):
                raise _refused(f"{name}: an enum without symbols")
            branch = _Branch(ENUM, len(symbols), tuple(symbols))
        else:
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= 2**31:
                raise _refused(f"{name}: fixed octets without a size")
            branch = _Branch(FIXED, size, logical=_text_of(schema, "logicalType"))
        self._names.add(schema, branch)
        return branch

    def _check(self, name: str, reader_field: Field, branches: list[_Branch]) -> None:
        logical = {branch.logical for branch in branches}
        fits = {branch.kind for branch in branches} <= _READ_FROM[TARGETS[reader_field.type]] and bool(branches)
        if reader_field.type == "timestamp":
            # the writer's logical type gives the unit; an unknown logical type cannot be read
            fits = fits and len(logical) == 1 and logical <= {"", *_UNITS}
            self._units[name] = _UNITS.get(next(iter(logical), ""), reader_field.unit)
        elif TARGETS[reader_field.type] == TEXT:
            # the octets of a decimal, for instance, are not a text
            fits = fits and logical <= {"", "uuid"}
        if not fits:
            raise SchemaRefusedError(
                RejectReason.TYPE, f"{name}: its writer's type cannot be read as {reader_field.type}"
            )

    def _coded(self, branch: _Branch, reader_field: Field | None) -> tuple[int, int, int]:
        first = len(self._symbols)
        if branch.kind == ENUM and reader_field is not None:
            values = {value: position for position, value in enumerate(reader_field.values)}
            self._symbols += [values.get(symbol, -1) for symbol in branch.symbols]
        return branch.kind, branch.size, first


def _text_of(schema: dict[str, Any], key: str) -> str:
    value = schema.get(key, "")
    return value if isinstance(value, str) else ""


def _refused(detail: str) -> SchemaRefusedError:
    return SchemaRefusedError(RejectReason.OTHER_SCHEMA, detail)
