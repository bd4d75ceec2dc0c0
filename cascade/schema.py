"""The schema: names, types, units and limits of a transaction's fields.

Decoders, validation and features read them only from the schema, which is a TOML file:

    name = "simulator"
    version = 1

    [roles]
    transaction_id = "transaction_id"
    event_time = "event_time"
    amount = "amount"
    card = "card_id"
    terminal = "terminal_id"

    [fields.amount]
    type = "float64"
    unit = "EUR"
    minimum = 0.0
    maximum = 100000.0

    [label]
    field = "fraud"
    delay = "7d"
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from cascade.columns import Array, Bool, ColumnBatch, Int64
from cascade.durations import parse_ms
from cascade.errors import SettingError
from cascade.setting_files import read_setting_file

FieldType = Literal["int64", "float64", "timestamp", "string", "category"]
TIME_UNITS_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}


class Field(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One field of a transaction.

    - `unit`: unit of the values in messages and data files; of a `timestamp`, `s`, `ms` or `us` since the epoch.
    - `minimum`, `maximum`: inclusive limits; of a `timestamp`, dates with a time zone.
    - `max_length`: of a `string`, in bytes of UTF-8.
    - `values`: of a `category`, its values.
    """

    type: FieldType
    unit: str = ""
    minimum: float | datetime | None = None
    maximum: float | datetime | None = None
    max_length: int = 64
    values: tuple[str, ...] = ()

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The numpy dtype of the field's column."""
        if self.type == "float64":
            return np.dtype(np.float64)
        if self.type == "string":
            return np.dtype(f"S{self.max_length}")
        return np.dtype(np.int64)

    def limits(self) -> tuple[float, float]:
        """Inclusive (minimum, maximum) in the unit of the column: ms since the epoch for a timestamp."""

        def number(limit: float | datetime | None, default: float) -> float:
            if limit is None:
                return default
            return limit.timestamp() * 1_000 if isinstance(limit, datetime) else float(limit)

        return number(self.minimum, -np.inf), number(self.maximum, np.inf)


class Roles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The names of the fields that Cascade itself needs, by role."""

    transaction_id: str
    event_time: str
    amount: str
    card: str
    terminal: str


class Label(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fraud label: its column in data files and field in `labels` messages, and the delay until it arrives."""

    field: str
    delay: str

    @property
    def delay_ms(self) -> int:
        """Time in ms from a transaction to the earliest moment at which features may use its label."""
        return parse_ms(self.delay)


class Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of a transaction, their roles, and the label."""

    name: str
    version: int
    roles: Roles
    fields: dict[str, Field]
    label: Label

    def label_fields(self) -> dict[str, Field]:
        """Fields of a message on the labels topic: those that identify the transaction, and the label."""
        names = (self.roles.transaction_id, self.roles.event_time, self.roles.card, self.roles.terminal)
        return {name: self.fields[name] for name in names} | {
            self.label.field: Field(type="int64", minimum=0, maximum=1)
        }

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the schema's content. The layout of the file does not change it."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


def load_schema(path: Path) -> Schema:
    """Read and check a schema file. Raises SettingError if it cannot be read or used."""
    return parse_schema(read_setting_file(path), str(path))


def parse_schema(content: bytes, origin: str) -> Schema:
    """Read and check a schema's TOML. `origin`: the file name in messages. Raises SettingError if it cannot be used."""
    try:
        schema = msgspec.toml.decode(content, type=Schema)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SettingError(origin, "schema", None, str(error), "see docs/schema.md for the form") from error
    problem = next(_problems(schema), None)
    if problem is not None:
        raise SettingError(origin, *problem)
    return schema


_ROLE_TYPES: dict[str, tuple[FieldType, ...]] = {
    "transaction_id": ("int64", "string"),
    "event_time": ("timestamp",),
    "amount": ("float64",),
    "card": ("int64", "string"),
    "terminal": ("int64", "string"),
}


_Problem = tuple[str, object, str, str]  # key, value, problem and remedy of a SettingError


def _problems(schema: Schema) -> Iterator[_Problem]:
    """What is wrong with a schema. Each check relies on those before it, so only the first problem counts."""
    for role, types in _ROLE_TYPES.items():
        name = getattr(schema.roles, role)
        if name not in schema.fields:
            yield f"roles.{role}", name, "no such field", f"add [fields.{name}] or name another"
        actual = schema.fields[name].type
        if actual not in types:
            yield f"fields.{name}.type", actual, f"the role {role} cannot have this type", f"use {' or '.join(types)}"
    remedy = 'write for example "7d"'
    try:
        if schema.label.delay_ms <= 0:
            yield "label.delay", schema.label.delay, "must be positive", remedy
    except ValueError as error:
        yield "label.delay", schema.label.delay, str(error), remedy
    for name, field in schema.fields.items():
        yield from _field_problems(f"fields.{name}", field)
    if schema.label.field in schema.fields:
        problem = "the label may not be a field of the transaction"
        yield "label.field", schema.label.field, problem, "remove it from [fields]: the decision comes before the label"


def _field_problems(key: str, field: Field) -> Iterator[_Problem]:
    if field.type == "timestamp" and field.unit not in TIME_UNITS_PER_SECOND:
        yield f"{key}.unit", field.unit, "not a unit of time", "use s, ms or us"
    if (field.type == "category") != bool(field.values):
        yield f"{key}.values", field.values, "belongs to a category, and only there", 'list them for type = "category"'
    if field.type == "string" and not 1 <= field.max_length <= 256:
        yield f"{key}.max_length", field.max_length, "out of range", "use 1 to 256 bytes"
    for bound in ("minimum", "maximum"):
        limit = getattr(field, bound)
        if limit is None:
            continue
        if field.type in ("string", "category"):
            yield f"{key}.{bound}", limit, f"a {field.type} has no limits", "remove it"
        if isinstance(limit, datetime) != (field.type == "timestamp"):
            remedy = "write a date such as 2020-01-01T00:00:00Z for a timestamp, a number for other types"
            yield f"{key}.{bound}", limit, "does not fit the type", remedy
        if isinstance(limit, datetime) and limit.tzinfo is None:
            yield f"{key}.{bound}", limit, "has no time zone", "end it in Z"
    low, high = field.limits()
    if low > high:
        yield f"{key}.minimum", field.minimum, "is above the maximum", "swap them"


def out_of_limits(fields: dict[str, Field], batch: ColumnBatch) -> dict[str, Bool]:
    """Mask of the rows whose value is NaN, infinite or outside the limits, for each field that has such rows."""
    masks: dict[str, Bool] = {}
    for name, field in fields.items():
        if field.type in ("string", "category"):
            continue
        column = batch[name]
        low, high = field.limits()
        with np.errstate(invalid="ignore"):
            bad = ~((column >= low) & (column <= high))
        if field.type == "float64":
            bad |= ~np.isfinite(column)
        if bad.any():
            masks[name] = bad
    return masks


def key_codes(column: Array) -> Int64:
    """Codes int64 [rows] of a key column: integers as they are, strings hashed with FNV-1a.

    The codes are equal on every machine and in every process. Source of the constants: Fowler, Noll, Vo, RFC 9923.
    """
    if column.dtype.kind != "S":
        return column.astype(np.int64, copy=False)
    width = column.dtype.itemsize
    octets = np.ascontiguousarray(column).view(np.uint8).reshape(len(column), width)
    state = np.full(len(column), 0xCBF29CE484222325, np.uint64)
    prime = np.uint64(0x100000001B3)
    for position in range(width):
        octet = octets[:, position]
        # without the zero padding, so that a schema with a longer max_length gives the same codes
        state = np.where(octet != 0, (state ^ octet) * prime, state)
    return state.view(np.int64)
