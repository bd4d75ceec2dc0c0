"""Streams for the tests of the feature engine: schemas, feature files, generators, and a player."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from cascade.columns import ColumnBatch, Float32
from cascade.features import FeatureBatch, FeatureEngine, FeatureSpec, parse_spec
from cascade.schema import Field, Schema, parse_schema

from .reference import Reference, Row

QUICK = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
# Friday 2021-01-01, 05:59:50 UTC: streams run over the end of the night
START_MS = 1_609_480_790_000
KeyKind = Literal["int64", "string"]
KEY_KINDS: tuple[KeyKind, ...] = ("int64", "string")
KEY_VALUES: dict[str, list[Any]] = {
    "int64": [0, -1, 1, 2, 2**63 - 1, -(2**63), 16, 32, 48, -7, 1_000_003, 5],
    "string": ["", "a", "b", "é", "card-0001", "card-0002", "zwölfzwölf", "A", "aa", " ", "-", "10"],
}


def schema_of(kind: KeyKind) -> Schema:
    """A schema with keys and ids of the given type, whose labels count after five seconds."""
    fields = "".join(f'[fields.{name}]\ntype = "{kind}"\n' for name in ("id", "pan", "shop"))
    text = f"""
        name = "{kind}"
        version = 1
        {fields}
        [fields.at]
        type = "timestamp"
        unit = "ms"
        [fields.paid]
        type = "float64"
        [fields.mode]
        type = "category"
        values = ["chip", "contactless", "online"]
        [fields.items]
        type = "int64"
        [roles]
        transaction_id = "id"
        event_time = "at"
        amount = "paid"
        card = "pan"
        terminal = "shop"
        [label]
        field = "fraud"
        delay = "5s"
        """
    return parse_schema(text.encode(), "schema.toml")


EVERYTHING = """
[[transaction]]
functions = ["value", "hour", "weekday", "night", "weekend"]
[[transaction]]
functions = ["one_hot", "category"]
field = "mode"
[[transaction]]
functions = ["bucket"]
field = "shop"
buckets = 3
[[window]]
key = "terminal"
functions = ["seconds_since_last", "count", "mean"]
windows = ["10s"]
[[window]]
key = "terminal"
functions = ["seen", "same_as_last", "rises", "changes", "seconds_since_first"]
windows = ["1s", "10s"]
distinct_field = "card"
[[window]]
key = "card"
functions = ["seconds_since_last", "count", "sum", "mean", "max", "std", "ratio_to_mean", "distinct"]
windows = ["1s", "10s"]
[[window]]
key = "card"
field = "items"
functions = ["max", "sum", "distinct", "seen", "changes", "ratio_to_last"]
windows = ["10s"]
distinct_field = "mode"
[[window]]
key = "card"
functions = ["ratio_to_last", "rises", "seconds_since_first"]
windows = ["1s"]
distinct_field = "mode"
[[label_window]]
key = "terminal"
functions = ["count", "fraud_count", "fraud_rate"]
windows = ["1s", "10s"]
[[label_window]]
key = "card"
functions = ["fraud_rate"]
windows = ["10s"]
[[sequence]]
key = "card"
length = 3
fields = ["amount", "card_count_10s", "terminal_fraud_rate_10s"]
[[sequence]]
key = "terminal"
length = 4
fields = ["card_seconds_since_last", "amount", "terminal_count_10s", "mode_category"]
"""
CARD_COUNTS = """
[[window]]
key = "card"
functions = ["count", "sum"]
windows = ["10s"]
[[sequence]]
key = "card"
length = 2
fields = []
"""


def spec_of(
    body: str = EVERYTHING,
    keys_max: int = 100,
    events_per_key_max: int = 256,
    events_per_key_mean: int = 32,
    lateness: str = "2s",
) -> FeatureSpec:
    """A feature file with these limits; its sequences have at most `events_per_key_max` steps."""
    body = re.sub(r"length = (\d+)", lambda found: f"length = {min(int(found[1]), events_per_key_max)}", body)
    text = f"""
        version = 2
        lateness = "{lateness}"
        [limits]
        keys_max = {keys_max}
        events_per_key_max = {events_per_key_max}
        events_per_key_mean = {min(events_per_key_mean, events_per_key_max)}
        {body}"""
    return parse_spec(text.encode(), "features.toml")


class Item(NamedTuple):
    """One message of a stream: a transaction, or a label."""

    kind: Literal["row", "label"]
    fields: Row


@dataclass(frozen=True)
class Move:
    """A step of a generated stream.

    It is `repeat` rows, each `advance_ms` after the row before, and `late_ms` late. Where `label` is 0 or 1, it is a
    label of the row that came `back` rows before, or of an unknown row where `back` is beyond the start. A 0 mostly
    removes an earlier fraud.
    """

    advance_ms: int = 0
    late_ms: int = 0
    card: int = 0
    terminal: int = 0
    quarters: int = 40
    mode: int = 0
    repeat: int = 1
    label: int | None = None
    back: int = 0


# Steps and delays on both sides of the windows (1 s, 10 s), the label delay (5 s) and the lateness (2 s)
ADVANCES_MS = (0, 0, 1, 250, 999, 1_000, 1_001, 2_500, 5_000, 9_999, 10_000, 10_001, 30_000)
LATE_MS = (0, 0, 0, 0, 0, 0, 1, 1_000, 1_999, 2_000, 2_001, 5_000, 16_999, 17_000, 17_001, 60_000)


def moves(keys: int) -> st.SearchStrategy[list[Move]]:
    """Streams over few keys, for hypothesis to find and to shrink."""
    row = st.builds(
        Move,
        advance_ms=st.sampled_from(ADVANCES_MS),
        late_ms=st.sampled_from(LATE_MS),
        card=st.integers(0, keys - 1),
        terminal=st.integers(0, 1),
        quarters=st.integers(0, 8_000),
        mode=st.integers(0, 2),
        repeat=st.sampled_from((1, 1, 1, 2, 11)),
    )
    label = st.builds(Move, label=st.sampled_from((1, 1, 0)), back=st.integers(0, 12))
    return st.lists(st.one_of(row, row, label), min_size=1, max_size=30)


def random_moves(seed: int, count: int, keys: int) -> list[Move]:
    """A longer stream of the same kind; half of its rows belong to the first key."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        if rng.random() < 0.25:
            found.append(Move(label=int(rng.random() < 0.8), back=int(rng.integers(0, 40))))
            continue
        found.append(
            Move(
                advance_ms=int(rng.choice(ADVANCES_MS[:8])),
                late_ms=int(rng.choice(LATE_MS)),
                card=int(rng.integers(0, keys) * rng.integers(0, 2)),
                terminal=int(rng.integers(0, keys)),
                quarters=int(rng.integers(0, 8_000)),
                mode=int(rng.integers(0, 3)),
                repeat=int(rng.choice((1, 1, 1, 1, 12))),
            )
        )
    return found


def stream(kind: KeyKind, drawn: Iterable[Move]) -> list[Item]:
    """The messages of a generated stream."""
    keys = KEY_VALUES[kind]
    rows: list[Row] = []
    frauds: list[Row] = []
    items: list[Item] = []
    clock_ms = START_MS
    for move in drawn:
        if move.label is not None:
            labelled = rows[-1 - move.back] if move.back < len(rows) else row_of(kind, move.back, clock_ms - 6_000)
            if move.label == 0 and frauds and move.back % 4:
                labelled = frauds[-1 - move.back % len(frauds)]
            if move.label == 1:
                frauds.append(labelled)
            items.append(label_of(labelled, move.label))
            continue
        for _ in range(move.repeat):
            clock_ms += move.advance_ms
            rows.append(
                row_of(
                    kind,
                    len(rows) + 100,
                    clock_ms - move.late_ms,
                    keys[move.card],
                    keys[-1 - move.terminal],
                    move.quarters / 4,
                    move.mode,
                )
            )
            items.append(Item("row", rows[-1]))
    return items


def row_of(
    kind: KeyKind,
    number: int,
    time_ms: int,
    card: Any = None,
    terminal: Any = None,
    amount: float = 10.0,
    mode: int = 0,
) -> Row:
    """One transaction; `number` makes its id."""
    first = KEY_VALUES[kind][0]
    return {
        "id": number if kind == "int64" else f"tx{number}",
        "at": time_ms,
        "pan": first if card is None else card,
        "shop": first if terminal is None else terminal,
        "paid": amount,
        "mode": mode,
        "items": number % 5 - 2,
    }


def label_of(row: Row, fraud: int) -> Item:
    """The label of a transaction."""
    return Item("label", {name: row[name] for name in ("id", "at", "pan", "shop")} | {"fraud": fraud})


def rows_of(items: Iterable[Item]) -> list[Row]:
    """The transactions of a stream."""
    return [item.fields for item in items if item.kind == "row"]


def batch_of(fields: dict[str, Field], rows: Sequence[Row]) -> ColumnBatch:
    """Rows as columns."""

    def column(name: str, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        values = [row[name].encode() if dtype.kind == "S" else row[name] for row in rows]
        return np.array(values, dtype)

    return ColumnBatch({name: column(name, field.dtype) for name, field in fields.items()}, len(rows))


def pieces(items: Sequence[Item], cuts: Iterable[int]) -> Iterator[tuple[str, list[Row]]]:
    """Runs of messages of one kind, cut at each change of kind and at each position in `cuts`."""
    ends = set(cuts)
    run: list[Row] = []
    for position, item in enumerate(items):
        if run and (position in ends or items[position - 1].kind != item.kind):
            yield items[position - 1].kind, run
            run = []
        run.append(item.fields)
    if run:
        yield items[-1].kind, run


def partition_of(row: Row) -> int:
    """Partition 0, 1 or 2 by card: a card is in one partition, a terminal in several."""
    return sum(str(row["pan"]).encode()) % 3


def play(
    engine: FeatureEngine,
    items: Sequence[Item],
    cuts: Iterable[int] = (),
    partition: Callable[[Row], int] | None = None,
) -> tuple[Float32, Float32]:
    """Fold a stream, cut into batches; features float32 [rows, width], and sequences as `flat` returns them.

    `partition`: returns the partition of a row; None: the engine gets no partitions.
    """
    size = sum(length * width for length, width in engine.sequence_shapes.values())
    features, sequences = [np.zeros((0, engine.width), np.float32)], [np.zeros((0, size), np.float32)]
    for kind, rows in pieces(items, cuts):
        if kind == "label":
            engine.update_labels(batch_of(engine.schema.label_fields(), rows))
            continue
        partition_ids = None if partition is None else np.array([partition(row) for row in rows])
        found = engine.update(batch_of(engine.schema.fields, rows), partition_ids)
        features.append(found.features)
        sequences.append(flat(found))
    return np.concatenate(features), np.concatenate(sequences)


def flat(found: FeatureBatch) -> Float32:
    """All sequences of a batch, those of a row one after the other: float32 [rows, sum of length × width]."""
    return joined(found.sequences(np.arange(len(found.features))))


def joined(sequences: dict[str, Float32]) -> Float32:
    """Sequences of rows, those of a row one after the other."""
    return np.concatenate([part.reshape(len(part), math.prod(part.shape[1:])) for part in sequences.values()], axis=1)


def assert_same_results(
    engine: FeatureEngine,
    other: FeatureEngine,
    items: Sequence[Item],
    cuts: Iterable[int] = (),
    partition: Callable[[Row], int] | None = None,
) -> None:
    """Fold a stream with both, with the first as `play` does; features and sequences are equal to the last bit."""
    for found, expected in zip(play(engine, items, cuts, partition), play(other, items), strict=True):
        assert np.array_equal(found, expected)


def play_reference(reference: Reference, items: Iterable[Item]) -> tuple[Float32, Float32]:
    """Fold the stream by the reference; the results are those of `play`."""
    features, sequences = [], []
    for item in items:
        if item.kind == "label":
            reference.update_label(item.fields)
            continue
        row_features, row_sequence = reference.update(item.fields)
        features.append(row_features)
        sequences.append(row_sequence)
    shape = len(features), len(reference.names)
    return np.array(features, np.float32).reshape(shape), np.array(sequences, np.float32)
