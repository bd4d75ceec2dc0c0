"""A feature file resolved against a schema: the columns of the feature vector, and the sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cascade.durations import parse_ms
from cascade.errors import SettingError
from cascade.features.layout import DAY_MS
from cascade.features.spec import FeatureSpec, Limits, TransactionFunction, WindowFeatures, WindowFunction
from cascade.schema import Schema

FieldLookup = Callable[[str, str, tuple[str, ...]], str]
# Ten years: sums of durations stay far from the end of int64.
DURATION_MS_MAX = 3_650 * DAY_MS
# float32 has each whole number up to here.
BUCKETS_MAX = 1 << 24
# Types of fields that are keys or tags.
_KEY_TYPES = ("int64", "string", "category")
# Functions of `[[window]]` that have no window, and those that read `distinct_field`
_WITHOUT_WINDOW = frozenset(("ratio_to_last", "same_as_last", "seconds_since_last"))
_OF_TAGS = frozenset(("changes", "distinct", "seen", "same_as_last", "seconds_since_first"))


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

    stateless = tuple(_stateless(spec, schema, field, origin))
    keyed: dict[str, list[KeyColumn]] = {}
    for position, group in enumerate(spec.window):
        place = f"window[{position}]"
        key_field = field(group.key, f"{place}.key", _KEY_TYPES)
        value = field(group.field, f"{place}.field", ("float64", "int64"))
        reads_tag = bool(_OF_TAGS & set(group.functions))
        tag = field(group.distinct_field, f"{place}.distinct_field", _KEY_TYPES) if reads_tag else ""
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

    sequence_keys = _sequence_keys(spec, field, origin)
    for key_field in sequence_keys:
        keyed.setdefault(key_field, [])
    keys = tuple(sorted(keyed, key=lambda name: name == schema.roles.card))
    names = tuple(column.name for column in stateless) + tuple(column.name for name in keys for column in keyed[name])
    for name in names:
        if names.count(name) > 1:
            raise SettingError(origin, "features", name, "is declared twice", "remove one")
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
        tuple(_sequences(spec, sequence_keys, names, origin)),
    )


def _sequence_keys(spec: FeatureSpec, field: FieldLookup, origin: str) -> list[str]:
    """The key field of each sequence."""
    keys = [field(group.key, f"sequence[{position}].key", _KEY_TYPES) for position, group in enumerate(spec.sequence)]
    for key in keys:
        if keys.count(key) > 1:
            raise SettingError(origin, "sequence", key, "has two sequences", "declare one for each key")
    return keys


def _sequences(spec: FeatureSpec, keys: list[str], names: tuple[str, ...], origin: str) -> Iterator[SequencePlan]:
    for position, (sequence, key) in enumerate(zip(spec.sequence, keys, strict=True)):
        for name in sequence.fields:
            if name not in names:
                remedy = f"use some of {', '.join(names)}"
                raise SettingError(origin, f"sequence[{position}].fields", name, "is no feature of this file", remedy)
        yield SequencePlan(f"{sequence.key}_sequence", key, sequence.length, tuple(map(names.index, sequence.fields)))


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
