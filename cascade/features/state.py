"""The bounded state behind the features: a hash index and flat arrays, for each key field.

A key has a slot (a row of `slots`), a chain of blocks of events, one of frauds, and one of remotes (summaries of other
workers' events). `numpy.zeros` reserves address space for the large arrays; the system
assigns pages when keys and events arrive, so a high limit costs nothing until it is reached.
"""

from __future__ import annotations

import numpy as np

from cascade.columns import Bool, Int64
from cascade.features.codes import WindowCode
from cascade.features.layout import (
    BLOCK,
    COUNTERS,
    EDGE_VALUES,
    LARGEST,
    NO_REACH,
    REMOTE_VALUES,
    SLOT_WIDTH,
    SQUARES_LOW,
    SUM,
    TOTALS_EDGES,
    VALUES,
    WAITING_ROWS,
    KeyState,
    Program,
    Waiting,
)
from cascade.features.plan import KeyColumn, Plan
from cascade.schema import Field, Schema

# Sums have at most this many bits, so that no sum leaves int64.
SUM_BITS = 60
# The ticks of a value have at most this many bits, so that a float64 has each whole number of them, and half a tick.
TICK_BITS_MAX = 51
# The limit that sums apply to a float64 where the schema has none. It leaves ticks of 10^-6.
FLOAT64_MAX = 1e9
# Sums apply at least this limit, so that the ticks of a field that is always 0 have a size.
LIMIT_MIN = 1e-6


def is_shared(plan: Plan, key: str) -> bool:
    """Whether workers share summaries of the key field, since its windows need rows of other partitions."""
    return key != plan.partition_key and bool(plan.keyed[key])


def step_columns(plan: Plan, key: str) -> int:
    """Columns of the key's events for the fields of its sequence's steps, two fields each."""
    sequence = plan.sequence_of(key)
    return 0 if sequence is None else (len(sequence.columns) + 1) // 2


def make_key_state(plan: Plan, key: str, values: int, tags: int) -> KeyState:
    """Return an empty state for the key field `key`, with `values` value fields and `tags` tag fields."""
    keys_max = plan.limits.keys_max
    events_max = keys_max * plan.limits.events_per_key_mean

    def pool(is_used: bool, entries_max: int, columns: int) -> Int64:
        """Blocks for all entries and one more for each key, since each key may have a partly filled block."""
        blocks = entries_max // BLOCK + keys_max if is_used else 0
        return np.zeros((blocks + 2, VALUES + BLOCK * columns), np.int64)

    return KeyState(
        table=np.zeros(1 << max(4, (2 * keys_max - 1).bit_length()), np.int32),
        slots=np.zeros((keys_max + 1, SLOT_WIDTH), np.int64),
        counters=np.zeros(COUNTERS, np.int64),
        events=pool(True, events_max, values + tags + step_columns(plan, key)),
        # frauds are rare: there is room for one in eight events
        frauds=pool(key in plan.label_keys, events_max // 8, 1),
        # a remote replaces an event or more, so the pool needs no more of them than of events
        remotes=pool(is_shared(plan, key), events_max, REMOTE_VALUES + 3 * values),
        totals=np.zeros((keys_max + 1, _totals_places(plan.keyed[key], values)[1]), np.int64),
    )


def make_program(plan: Plan, schema: Schema, key: str, values: list[str], tags: list[str], inputs: Int64) -> Program:
    """Return the kernel's program for the key field `key`.

    values, tags: the fields that its events have
    inputs: int64 [1 + values + tags], rows of the input table with key, value fields and tag fields
    """
    columns, limits, sequence = plan.keyed[key], plan.limits, plan.sequence_of(key)
    edges = _edges(columns)
    places, _ = _totals_places(columns, len(values))
    totals_width = max((_totals_width(columns, edge) for edge in edges), default=0)

    def position(edge_ms: int) -> int:
        return edges.index(edge_ms) if edge_ms > 0 else -1

    def column_of(column: KeyColumn) -> list[int]:
        return [
            WindowCode[column.function.upper()],
            position(column.near_ms),
            position(column.far_ms),
            values.index(column.value) if column.value else -1,
            tags.index(column.tag) if column.tag else -1,
        ]

    reach = [_reach(columns, field, edges) for field in (*values, *tags)]
    bits = min(TICK_BITS_MAX, SUM_BITS - limits.events_per_key_max.bit_length())
    return Program(
        edges=np.column_stack([edges, places, [_totals_width(columns, edge) for edge in edges]]).astype(np.int64),
        columns=np.array([column_of(column) for column in columns], np.int64).reshape(-1, 5),
        sequence_columns=np.array(sequence.columns if sequence else (), np.int64),
        inputs=inputs,
        ticks_per_unit=np.array([ticks_per_unit(schema.fields[name], 1 << bits) for name in values], np.float64),
        first_column=plan.names.index(columns[0].name) if columns else 0,
        horizon_ms=(edges[-1] if edges else 0) + plan.lateness_ms,
        kept=sequence.length - 1 if sequence else 0,
        events_per_key_max=limits.events_per_key_max,
        has_labels=key in plan.label_keys,
        has_sequence=sequence is not None,
        totals_width=totals_width,
        ticks_max=1 << bits,
        visibility=1,
        event=np.zeros(len(values) + len(tags) + step_columns(plan, key), np.int64),
        stored=np.zeros(2, np.int64),
        ticks=np.zeros(len(values), np.int64),
        sums=np.zeros((1, len(values) * totals_width), np.int64),
        fraud_rows=np.zeros(len(edges), np.int64),
        distinct=np.zeros((len(edges), len(tags)), np.int64),
        tag_uses=np.array([_tag_uses(columns, tag) for tag in tags], np.int64).reshape(-1, 2),
        matches=np.zeros((len(tags), 2), np.int64),
        seen=np.zeros((len(tags), 1 << (2 * limits.events_per_key_max + 1).bit_length(), 2), np.int64),
        reach=np.array(reach, np.int64),
        reach_max=max(reach, default=NO_REACH),
        order=np.zeros((len(edges) + 1, len(reach)), np.int64),
        first_age_ms=np.zeros((len(edges) + 1, len(tags)), np.int64),
        neighbours=np.zeros((2, len(reach)), np.int64),
        remote=np.zeros((len(edges), 1 + 4 * len(values))),
    )


def _tag_uses(columns: tuple[KeyColumn, ...], tag: str) -> tuple[bool, bool]:
    """Whether a column counts the different tags, and whether one looks for the row's tag (`Program.tag_uses`)."""
    functions = {column.function for column in columns if column.tag == tag}
    return "distinct" in functions, not functions.isdisjoint({"seen", "same_as_last"})


def _reach(columns: tuple[KeyColumn, ...], field: str, edges: list[int]) -> int:
    """Up to how many edges columns ask for the order of a field's values (`Program.reach`)."""
    fields = {"ratio_to_last": "value", "rises": "value", "changes": "tag", "seconds_since_first": "tag"}
    asking = [column for column in columns if getattr(column, fields.get(column.function, ""), "") == field]
    return max((edges.index(column.far_ms) + 1 if column.far_ms else 0 for column in asking), default=NO_REACH)


def make_waiting(plan: Plan, key: str, hidden: Bool, rows: int) -> Waiting:
    """Return the memory for the sequences of a micro-batch of up to `rows` rows; `hidden` as in `Waiting`.

    It is written to, so that the system assigns its pages.
    """
    sequence = plan.sequence_of(key)
    shape = (0, 0, 0) if sequence is None else (rows, *sequence.shape)
    written = np.empty(shape, np.float32)
    written.fill(0.0)
    # at least one row, which the mark of a key without rows means
    return Waiting(hidden, np.zeros(WAITING_ROWS + max(rows, 1), np.int64), written)


def ticks_per_unit(field: Field, ticks_max: int) -> float:
    """Return how many ticks a unit of a field has in sums: the largest power of ten that leaves it `ticks_max` ticks.

    An int64 has at most one.
    """
    size = max(abs(limit) for limit in field.limits())
    if not np.isfinite(size):
        size = FLOAT64_MAX if field.type == "float64" else ticks_max
    decimals = int(np.floor(np.log10(ticks_max / max(size, LIMIT_MIN))))
    return 10.0 ** (min(decimals, 0) if field.type == "int64" else decimals)


def _edges(columns: tuple[KeyColumn, ...]) -> list[int]:
    """Ages in ms up to which a key's columns count events, ascending."""
    return sorted({edge for column in columns for edge in (column.near_ms, column.far_ms) if edge > 0})


def _codes(columns: tuple[KeyColumn, ...], edge: int) -> set[int]:
    """The functions up to an edge, without those from it on."""
    return {WindowCode[column.function.upper()] for column in columns if column.far_ms == edge}


def _totals_width(columns: tuple[KeyColumn, ...], edge: int) -> int:
    """Numbers in the totals of a value field up to an edge; 0: no column needs them."""
    functions = _codes(columns, edge)
    if WindowCode.STD in functions:
        return SQUARES_LOW + 1
    if WindowCode.MAX in functions:
        return LARGEST + 1
    return SUM + 1 if max(functions, default=-1) >= WindowCode.SUM else 0


def _totals_places(columns: tuple[KeyColumn, ...], values: int) -> tuple[list[int], int]:
    """Where the columns of each edge start in `totals` (0: it has none), and how many columns there are."""
    places, width = [], TOTALS_EDGES
    for edge in _edges(columns):
        has_totals = max(_codes(columns, edge), default=-1) >= WindowCode.COUNT
        places.append(width if has_totals else 0)
        width += EDGE_VALUES + values * _totals_width(columns, edge) if has_totals else 0
    return places, width
