"""Feature declarations: which features a bundle computes, from which fields, keys and windows.

A feature file is TOML. Keys and fields are named by role (`card`, `terminal`, `amount`) or by field name:

    version = 2
    lateness = "1h"

    [limits]
    keys_max = 1_000_000
    events_per_key_max = 256

    [[transaction]]                      # from the transaction alone
    functions = ["value", "hour", "night", "weekend"]
    field = "amount"

    [[window]]                           # exact sliding windows over a key
    key = "card"
    field = "amount"
    windows = ["1d", "7d", "30d"]
    functions = ["count", "mean"]

    [[label_window]]                     # frauds of a key, which count label.delay later
    key = "terminal"
    windows = ["7d"]
    functions = ["fraud_rate"]

    [[sequence]]                         # the card's last transactions, for the deep model
    key = "card"
    length = 16
    fields = ["amount", "terminal_fraud_rate_7d"]
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from cascade.durations import parse_ms
from cascade.errors import SettingError
from cascade.features.layout import DAY_MS as DAY_MS  # noqa: PLC0414 (others import it from here)
from cascade.schema import Schema
from cascade.setting_files import read_setting_file

TransactionFunction = Literal["value", "hour", "weekday", "night", "weekend", "one_hot", "category", "bucket"]
WindowFunction = Literal[
    "count", "sum", "mean", "max", "std", "ratio_to_mean", "distinct", "seen", "same_as_last", "seconds_since_last"
]
LabelFunction = Literal["count", "fraud_count", "fraud_rate"]
FieldLookup = Callable[[str, str, tuple[str, ...]], str]
SPEC_VERSION = 2
# Functions of `[[window]]` that have no window, and those that read `distinct_field`
_WITHOUT_WINDOW = frozenset(("seconds_since_last", "same_as_last"))
_OF_TAGS = frozenset(("distinct", "seen", "same_as_last"))
# Ten years: sums of durations stay far from the end of int64.
DURATION_MS_MAX = 3_650 * DAY_MS
# A late row reads each event of its key, so this limit also bounds the time of a row.
EVENTS_PER_KEY_LIMIT = 65_536
SEQUENCE_LENGTH_MAX = 256
# float32 has each whole number up to here.
BUCKETS_MAX = 1 << 24


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of the state of each key field.

    `keys_max`: keys in the state; beyond it, the least recently used key is forgotten.
    `events_per_key_max`: events of a key; beyond it, the oldest is forgotten.
    `events_per_key_mean`: `keys_max` times this is the size of the pool of events.
    """

    keys_max: int = 1_000_000
    events_per_key_max: int = 256
    events_per_key_mean: int = 32


class TransactionFeatures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Features of the transaction alone: `hour`, `weekday`, `night` and `weekend` read the event time (UTC).

    The others read `field`. `bucket` is one of `buckets` numbers, by a hash of the field.
    """

    functions: tuple[TransactionFunction, ...]
    field: str = "amount"
    buckets: int = 0


class WindowFeatures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Aggregates of `field` over sliding windows (t − window, t] of a key, the current transaction included.

    `ratio_to_mean` divides the current value by the mean of the earlier ones in the window (1 where there are none).
    `distinct` counts the values of `distinct_field`; `seen` is whether an earlier row in the window has the row's own,
    `same_as_last` whether the row before has it. `same_as_last` and `seconds_since_last` have no window; they are −1
    for a first row.
    """

    key: str
    functions: tuple[WindowFunction, ...]
    windows: tuple[str, ...] = ()
    field: str = "amount"
    distinct_field: str = "terminal"


class LabelFeatures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Frauds and transactions of a key over (t − delay − window, t − delay]; delay is the schema's `label.delay`."""

    key: Literal["card", "terminal"]
    windows: tuple[str, ...]
    functions: tuple[LabelFunction, ...]


class Sequence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last `length` transactions of a key, the current one last, with the features named in `fields`.

    The deep model's input is named after the key as it is written here: `card_sequence`.
    """

    key: str
    length: int
    fields: tuple[str, ...]


class FeatureSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A feature file. Windows are exact for events that are up to `lateness` late. There is at least one sequence."""

    version: int
    sequence: tuple[Sequence, ...]
    lateness: str = "1h"
    limits: Limits = Limits()
    transaction: tuple[TransactionFeatures, ...] = ()
    window: tuple[WindowFeatures, ...] = ()
    label_window: tuple[LabelFeatures, ...] = ()

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the content; the layout of the file has no effect."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


@dataclass(frozen=True, slots=True)
class StatelessColumn:
    """A column computed from the transaction alone.

    `argument`: position of the category for `one_hot`, the number of buckets for `bucket`.
    """

    name: str
    function: TransactionFunction
    field: str
    argument: int = 0

    @property
    def reads_field(self) -> bool:
        """Whether it reads `field`, not the event time alone."""
        return self.function in ("value", "one_hot", "category", "bucket")


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """A sequence: the name of its tensor, its key field, the steps that it has, and the features of each step.

    `columns`: positions in the feature vector.
    """

    name: str
    key: str
    length: int
    columns: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Steps, and columns of a step: 1 for present, age in seconds, then the fields."""
        return self.length, 2 + len(self.columns)


@dataclass(frozen=True, slots=True)
class KeyColumn:
    """A column computed from a key's events.

    `near_ms`, `far_ms`: events with near_ms ≤ age < far_ms count. `value`, `tag`: the fields that the function reads.
    """

    name: str
    function: str
    near_ms: int
    far_ms: int
    value: str
    tag: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A feature file resolved against a schema: the columns of the feature vector, by key field.

    `names`: the columns in the order of the feature vector. `keys`: the key fields in that order, the card last.
    `partition_key`: the card's field, by which transactions are partitioned. `sequences`: in the order of the file.
    """

    names: tuple[str, ...]
    stateless: tuple[StatelessColumn, ...]
    keyed: dict[str, tuple[KeyColumn, ...]]
    keys: tuple[str, ...]
    label_keys: tuple[str, ...]
    label_delay_ms: int
    lateness_ms: int
    limits: Limits
    partition_key: str
    sequences: tuple[SequencePlan, ...]

    def sequence_of(self, key: str) -> SequencePlan | None:
        """The sequence of a key field; None where it has none."""
        return next((sequence for sequence in self.sequences if sequence.key == key), None)

    @property
    def categorical_names(self) -> tuple[str, ...]:
        """The columns that are codes of a category."""
        return tuple(column.name for column in self.stateless if column.function == "category")


def load_spec(path: Path) -> FeatureSpec:
    """Read and check a feature file; raises SettingError."""
    return parse_spec(read_setting_file(path), str(path))


def parse_spec(content: bytes, origin: str) -> FeatureSpec:
    """Read a feature file's TOML; `origin` is its name in messages. Raises SettingError."""
    try:
        _check_version(msgspec.toml.decode(content), origin)
        spec = msgspec.toml.decode(content, type=FeatureSpec)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SettingError(origin, "features", None, str(error), "see docs/features.md for the form") from error
    limits = spec.limits
    bounds = {
        "keys_max": (limits.keys_max, 1, 100_000_000),
        "events_per_key_max": (limits.events_per_key_max, 1, EVENTS_PER_KEY_LIMIT),
        "events_per_key_mean": (limits.events_per_key_mean, 1, limits.events_per_key_max),
    }
    for key, (value, low, high) in bounds.items():
        if not low <= value <= high:
            raise SettingError(origin, f"limits.{key}", value, "out of range", f"use {low} to {high}")
    if not spec.sequence:
        raise SettingError(origin, "sequence", None, "is empty", "declare at least one [[sequence]]")
    longest = min(SEQUENCE_LENGTH_MAX, limits.events_per_key_max)
    for position, sequence in enumerate(spec.sequence):
        if not 1 <= sequence.length <= longest:
            remedy = f"use 1 to {longest} (at most {SEQUENCE_LENGTH_MAX}, and limits.events_per_key_max)"
            raise SettingError(origin, f"sequence[{position}].length", sequence.length, "out of range", remedy)
    return spec


def _check_version(content: dict[str, object], origin: str) -> None:
    """Raise SettingError, with what to write, unless a feature file's TOML is of this release's version."""
    version = content.get("version")
    if version == 1:
        remedy = f"set version = {SPEC_VERSION}, and write [[sequence]] in place of [sequence]"
        raise SettingError(origin, "version", version, "is of an earlier release", remedy)
    if version != SPEC_VERSION:
        raise SettingError(origin, "version", version, "is not known to this release", f"use {SPEC_VERSION}")
    if isinstance(content.get("sequence"), dict):
        raise SettingError(origin, "sequence", None, "is a single table", "write [[sequence]] in place of [sequence]")


def resolve(spec: FeatureSpec, schema: Schema, origin: str = "features.toml") -> Plan:
    """Return the plan that computes `spec` over `schema`; raises SettingError where they do not fit."""
    roles = {name: getattr(schema.roles, name) for name in schema.roles.__struct_fields__}

    def field(name: str, key: str, types: tuple[str, ...]) -> str:
        found: str = roles.get(name, name)
        if found not in schema.fields:
            raise SettingError(
                origin,
                key,
                name,
                f"is no role or field of schema {schema.name}",
                f"use one of {', '.join(sorted({*roles, *schema.fields}))}",
            )
        if schema.fields[found].type not in types:
            raise SettingError(
                origin, key, name, f"has type {schema.fields[found].type}", f"it takes {' or '.join(types)}"
            )
        return found

    def duration(text: str, key: str, least_ms: int = 1) -> int:
        try:
            length_ms = parse_ms(text)
        except ValueError as error:
            raise SettingError(origin, key, text, str(error), 'write "7d", "90m" or the like') from error
        if not least_ms <= length_ms <= DURATION_MS_MAX:
            raise SettingError(origin, key, text, "out of range", f"use {least_ms} ms to {DURATION_MS_MAX // DAY_MS} d")
        return length_ms

    key_types = ("int64", "string", "category")
    stateless = tuple(_stateless(spec, schema, field, origin))
    keyed: dict[str, list[KeyColumn]] = {}
    for position, group in enumerate(spec.window):
        place = f"window[{position}]"
        key_field = field(group.key, f"{place}.key", key_types)
        value = field(group.field, f"{place}.field", ("float64", "int64"))
        reads_tag = bool(_OF_TAGS & set(group.functions))
        tag = field(group.distinct_field, f"{place}.distinct_field", key_types) if reads_tag else ""
        if not group.windows and not _WITHOUT_WINDOW.issuperset(group.functions):
            raise SettingError(origin, f"{place}.windows", None, "is empty", 'give windows such as ["1d", "7d"]')
        for function in group.functions:
            columns = keyed.setdefault(key_field, [])
            name = _stem_of(group, function)
            if function in _WITHOUT_WINDOW:
                columns.append(KeyColumn(name, function, 0, 0, value, tag))
                continue
            for window in group.windows:
                far_ms = duration(window, f"{place}.windows")
                columns.append(KeyColumn(f"{name}_{window}", function, 0, far_ms, value, tag))
    delay_ms = schema.label.delay_ms
    label_keys: list[str] = []
    for position, labels in enumerate(spec.label_window):
        key_field = roles[labels.key]
        if not labels.windows:
            raise SettingError(
                origin, f"label_window[{position}].windows", None, "is empty", 'give windows such as ["7d"]'
            )
        label_keys.append(key_field)
        for label_function in labels.functions:
            kernel_name = "labelled_count" if label_function == "count" else label_function
            for window in labels.windows:
                far_ms = delay_ms + duration(window, f"label_window[{position}].windows")
                name = f"{labels.key}_{kernel_name}_{window}"
                keyed.setdefault(key_field, []).append(KeyColumn(name, kernel_name, delay_ms, far_ms, "", ""))

    sequence_keys = [
        field(sequence.key, f"sequence[{position}].key", key_types) for position, sequence in enumerate(spec.sequence)
    ]
    for key_field in sequence_keys:
        if sequence_keys.count(key_field) > 1:
            raise SettingError(origin, "sequence", key_field, "has two sequences", "declare one for each key")
        keyed.setdefault(key_field, [])
    keys = tuple(sorted(keyed, key=lambda name: name == schema.roles.card))
    names = tuple(column.name for column in stateless) + tuple(column.name for name in keys for column in keyed[name])
    for name in names:
        if names.count(name) > 1:
            raise SettingError(origin, "features", name, "is declared twice", "remove one")
    for position, sequence in enumerate(spec.sequence):
        for name in sequence.fields:
            if name not in names:
                remedy = f"use some of {', '.join(names)}"
                raise SettingError(origin, f"sequence[{position}].fields", name, "is no feature of this file", remedy)
    sequences = tuple(
        SequencePlan(f"{sequence.key}_sequence", key_field, sequence.length, tuple(map(names.index, sequence.fields)))
        for sequence, key_field in zip(spec.sequence, sequence_keys, strict=True)
    )
    return Plan(
        names,
        stateless,
        {name: tuple(columns) for name, columns in keyed.items()},
        keys,
        tuple(dict.fromkeys(label_keys)),
        delay_ms,
        duration(spec.lateness, "lateness", 0),
        spec.limits,
        schema.roles.card,
        sequences,
    )


def _stem_of(group: WindowFeatures, function: WindowFunction) -> str:
    """The name of a feature of a key, without its window."""
    if function in ("count", "seconds_since_last"):
        return f"{group.key}_{function}"
    if function in _OF_TAGS:
        return f"{group.key}_{function}_{group.distinct_field}"
    return f"{group.key}_{group.field}_{function}"


def _stateless(spec: FeatureSpec, schema: Schema, field: FieldLookup, origin: str) -> Iterator[StatelessColumn]:
    for position, group in enumerate(spec.transaction):
        for function in group.functions:
            place = f"transaction[{position}].field"
            if function == "one_hot":
                name = field(group.field, place, ("category",))
                for code, value in enumerate(schema.fields[name].values):
                    yield StatelessColumn(f"{group.field}_{value}", function, name, code)
            elif function == "category":
                yield StatelessColumn(f"{group.field}_category", function, field(group.field, place, ("category",)))
            elif function == "bucket":
                if not 2 <= group.buckets <= BUCKETS_MAX:
                    key = f"transaction[{position}].buckets"
                    raise SettingError(origin, key, group.buckets, "out of range", f"use 2 to {BUCKETS_MAX}")
                name = field(group.field, place, ("int64", "string"))
                yield StatelessColumn(f"{group.field}_bucket", function, name, group.buckets)
            elif function == "value":
                yield StatelessColumn(group.field, function, field(group.field, place, ("float64", "int64")))
            else:
                yield StatelessColumn(function, function, schema.roles.event_time)
