"""The bounded state behind the features: a hash index and flat arrays, for each key field.

A key has a slot (a row of `slots`), a chain of blocks of events, one of frauds, one of remotes (summaries of other
workers' events), and a short sequence of steps. `numpy.zeros` reserves address space for the large arrays; the system
assigns pages when keys and events arrive, so a high limit costs nothing until it is reached.

The kernel of rows takes plain arrays, not tuples of them: numba takes some microseconds to look at a tuple's type at
each call, and counts references at each access through it unless its arrays are borrowed (`borrowing`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cascade.columns import Float64, Int64
from cascade.features.layout import BLOCK, COUNTERS, REMOTE_VALUES, SLOT_WIDTH, VALUES, KeyState
from cascade.features.spec import KeyColumn, Plan

# Positions are the functions' codes in `Program.ops`.
FUNCTIONS = (
    "count",
    "sum",
    "mean",
    "max",
    "std",
    "ratio_to_mean",
    "distinct",
    "seconds_since_last",
    "labelled_count",
    "fraud_count",
    "fraud_rate",
)


class Program(NamedTuple):
    """What the kernel computes for one key field.

    `edges` int64 [edges]: ages in ms at which the kernel reads the running aggregates, ascending.
    `ops` int64 [columns, 5]: function (position in FUNCTIONS), near edge and far edge (positions in `edges`, −1 for age
    0), value field, tag field (−1: none).
    `sequence_columns` int64 [fields]: the features stored with each step.
    `first_column`: position of the key's first column in the feature vector.
    `horizon_ms`: age at which the kernel drops events.
    """

    edges: Int64
    ops: Int64
    sequence_columns: Int64
    first_column: int
    horizon_ms: int
    events_per_key_max: int
    has_labels: bool
    has_sequence: bool


class Scratch(NamedTuple):
    """Working memory of a row.

    `aggregates` float64 [edges, 2 + 4 · values + tags]: for each edge the count, the frauds, then for each value field
    sums, differences, squared differences and maxima, then for each tag field the number of distinct tags.
    `seen` int64 [tags, 2^k, 2]: a small hash set (tag, generation) for each tag field, for `distinct`.
    `ages` int64 [events] in ms, `stored` float64 [values, events], `stored_tags` int64 [tags, events]: the events of
    its key that the row sees, newest first.
    """

    aggregates: Float64
    seen: Int64
    ages: Int64
    stored: Float64
    stored_tags: Int64


def is_shared(plan: Plan, key: str) -> bool:
    """Whether workers share summaries of the key field, since its windows need rows of other partitions."""
    return key != plan.sequence_key and bool(plan.keyed[key])


def make_key_state(plan: Plan, key: str, values: int, tags: int) -> KeyState:
    """Return an empty state for the key field `key`, with `values` value fields and `tags` tag fields."""
    keys_max = plan.limits.keys_max
    events_max = keys_max * plan.limits.events_per_key_mean

    def pool(is_used: bool, entries_max: int, columns: int) -> Int64:
        """Blocks for all entries and one more for each key, since each key may have a partly filled block."""
        blocks = entries_max // BLOCK + keys_max if is_used else 0
        return np.zeros((blocks + 2, VALUES + BLOCK * columns), np.int64)

    step_slots = keys_max + 1 if key == plan.sequence_key else 1
    return KeyState(
        table=np.zeros(1 << max(4, (2 * keys_max - 1).bit_length()), np.int32),
        slots=np.zeros((keys_max + 1, SLOT_WIDTH), np.int64),
        counters=np.zeros(COUNTERS, np.int64),
        events=pool(True, events_max, values + tags),
        # frauds are rare: there is room for one in eight events
        frauds=pool(key in plan.label_keys, events_max // 8, 1),
        # a remote replaces an event or more, so the pool needs no more of them than of events
        remotes=pool(is_shared(plan, key), events_max, REMOTE_VALUES + 3 * values),
        step_times=np.zeros((step_slots, plan.sequence.length), np.int64),
        step_values=np.zeros((step_slots, plan.sequence.length, len(plan.sequence.fields)), np.float32),
    )


def make_program(plan: Plan, key: str, values: list[str], tags: list[str]) -> Program:
    """Return the kernel's program for the key field `key`; `values` and `tags` are the fields that its events have."""
    columns = plan.keyed[key]
    edges = sorted({edge for column in columns for edge in (column.near_ms, column.far_ms) if edge > 0})

    def position(edge_ms: int) -> int:
        return edges.index(edge_ms) if edge_ms > 0 else -1

    def op(column: KeyColumn) -> list[int]:
        return [
            FUNCTIONS.index(column.function),
            position(column.near_ms),
            position(column.far_ms),
            values.index(column.value) if column.value else -1,
            tags.index(column.tag) if column.tag else -1,
        ]

    has_sequence = key == plan.sequence_key
    return Program(
        edges=np.array(edges, np.int64),
        ops=np.array([op(column) for column in columns], np.int64).reshape(-1, 5),
        sequence_columns=np.array([plan.names.index(name) for name in plan.sequence.fields], np.int64),
        first_column=plan.names.index(columns[0].name) if columns else 0,
        horizon_ms=(edges[-1] if edges else 0) + plan.lateness_ms,
        events_per_key_max=plan.limits.events_per_key_max,
        has_labels=key in plan.label_keys,
        has_sequence=has_sequence,
    )


def make_scratch(program: Program, values: int, tags: int) -> Scratch:
    """Return working memory for `program`, with `values` value fields and `tags` tag fields."""
    events = program.events_per_key_max
    return Scratch(
        aggregates=np.zeros((len(program.edges), 2 + 4 * values + tags)),
        seen=np.zeros((tags, 1 << (2 * events + 1).bit_length(), 2), np.int64),
        ages=np.zeros(events, np.int64),
        stored=np.zeros((values, events)),
        stored_tags=np.zeros((tags, events), np.int64),
    )
