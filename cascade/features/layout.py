"""The arrays of the state, and the columns of their slots, blocks and counters.

These numbers are constants in the compiled kernels. They have a file of their own, so that only a change of the layout
compiles the kernels again.
"""

from __future__ import annotations

from typing import NamedTuple

from cascade.columns import Array, Bool, Float32, Float64, Int64

# Version of the exported arrays, raised whenever their meaning or shape changes; other versions are refused.
STATE_LAYOUT = 3

# Each event stores the id of its partition in 16 bits.
PARTITIONS_MAX = 65_536

DAY_MS, HOUR_MS = 86_400_000, 3_600_000
NIGHT_ENDS_HOUR = 6
# Added to the number of a day, so that Monday is 0: 1970-01-01 was a Thursday.
EPOCH_WEEKDAY = 3

# Events in a block. Eight times fill one cache line; a key with one event wastes seven places (112 bytes).
BLOCK = 8

# Columns of `slots`: the key, its neighbours by last use, and three columns for each chain. What every row reads comes
# first.
KEY, LESS_RECENT, MORE_RECENT = range(3)
EVENTS, FRAUDS, REMOTES = 3, 6, 9  # where the columns of a chain start
NEWEST, OLDEST, COUNT = range(3)  # within a chain
SLOT_WIDTH = 12

# Positions in `counters`
SLOTS_USED, FREE_SLOT, MOST_RECENT, LEAST_RECENT, EVICTIONS, LATE, TOO_LATE, GENERATION, KEYS = range(9)
# Positions in `counters` where the counters of a pool start, and the two counters
EVENT_POOL, FRAUD_POOL, REMOTE_POOL = 9, 11, 13
FREE_BLOCK, BLOCKS_USED = range(2)
COUNTERS = 15

# Columns of a block: its neighbours in time, the places in use (LOW ≤ place < HIGH), BLOCK partition ids of 16 bits,
# BLOCK times, then BLOCK values for each value field (bits of float64), BLOCK tags for each tag field, and BLOCK pairs
# of float32 for each two fields of the steps of the key's sequence.
OLDER, NEWER, LOW, HIGH = range(4)
TIMES = 6
VALUES = TIMES + BLOCK
# Column of the first partition id in a block viewed as uint16
PARTITIONS = 16

# A remote is a summary of another worker's events, with the time of the newest. Its columns are the number of events,
# the start of the stretch of event time in ms, then sums, squared differences to the mean, and maxima, each for all
# value fields (bits of float64).
REMOTE_COUNT, REMOTE_START, REMOTE_VALUES = range(3)


# Columns of `totals`: the `Program.visibility` for which the slot's totals are valid (0: for none), the partition whose
# rows they are for (EVERYONE: for all rows), and the number (counter GENERATION) of the slot's last row whose sequence
# may be asked for. Then for each edge: the number of events with a smaller age, place (BLOCK × block + place) and time
# of the oldest of them, and the totals of each value field.
TOTALS_VISIBILITY, TOTALS_AUDIENCE, TOTALS_ROW, TOTALS_EDGES = range(4)
EVERYONE = -1
EDGE_ROWS, EDGE_OLDEST, EDGE_OLDEST_MS, EDGE_VALUES = range(4)
# The totals of a value field: the sum in ticks, the largest value (bits of float64), and the sum of squares of ticks in
# 128 bits. An edge without `std` has the first two, without `max` the first only.
SUM, LARGEST, SQUARES_HIGH, SQUARES_LOW = range(4)

# Columns of `Program.edges`: the age in ms, where the edge's columns of `totals` start (0: it has none), and how many
# numbers the totals of a value field have.
EDGE_AGE_MS, EDGE_PLACE, EDGE_WIDTH = range(3)
# Columns of `Program.columns`: function, near and far edge, value field, tag field
COLUMN_FUNCTION, COLUMN_NEAR, COLUMN_FAR, COLUMN_VALUE, COLUMN_TAG = range(5)
# Columns of the stateless columns: function, row of the input table, and the category or the number of buckets
STATELESS_FUNCTION, STATELESS_INPUT, STATELESS_ARGUMENT = range(3)
# Places of `Program.stored`: the slot of the last row, and the place of its event (0: it was not stored)
STORED_SLOT, STORED_PLACE = range(2)
# Columns of `Program.matches`: whether the tag of the last event equals the row's (−1: there is no event), and the age
# in ms of the last event with the row's tag
MATCH_LAST, MATCH_AGE_MS = range(2)
# Columns of `Program.tag_uses`: whether a column counts the different tags, and whether one looks for the row's tag
USED_BY_DISTINCT, USED_BY_MATCHES = range(2)
# Rows of `Program.neighbours`: the event that came after the one that is looked at, and the last event before the row
LATER, LAST = range(2)
# `Program.reach` of a field of which no column asks for the order of its values
NO_REACH = -1
# Places of `Waiting.places`: the number of the micro-batch's first row, then an entry for each row
FIRST_GENERATION, WAITING_ROWS = range(2)
# Rows of the input table before those of the fields
INPUT_PARTITIONS, INPUT_TIMES, INPUT_FIELDS = range(3)


class KeyState(NamedTuple):
    """State of one key field. Slots and blocks are counted from 1; 0 means none.

    `table` int32 [2^k]: hash index of slots (open addressing, linear probing), at most half full.
    `slots` int64 [keys_max + 1, SLOT_WIDTH]: one row for each key.
    `counters` int64 [COUNTERS].
    `events`, `frauds`, `remotes` int64 [blocks, block width]: the pools of blocks. A fraud has one tag, the
    transaction's id, and no partition.
    `totals` int64 [keys_max + 1, totals width]: running totals of each slot's windows, which end at its newest event.
    They follow from the events, so they are not exported. Row 0 is for rows that need totals of their own.
    """

    table: Array
    slots: Int64
    counters: Int64
    events: Int64
    frauds: Int64
    remotes: Int64
    totals: Int64


EXPORTED = tuple(name for name in KeyState._fields if name != "totals")


class Pool(NamedTuple):
    """The blocks of a chain, as kernels see them.

    `blocks` int64 [blocks, block width]. `values`, `steps`, `partitions`: the same memory as float64, float32 and
    uint16.
    `chain`: where the chain's columns of `slots` start. `counters`: where the pool's counters start.
    """

    blocks: Int64
    values: Float64
    steps: Float32
    partitions: Array
    chain: int
    counters: int


class Waiting(NamedTuple):
    """The rows of a micro-batch whose sequences may be asked for, as kernels see them.

    A row's sequence follows from the events of its key, as long as these are as the row left them. So it is written
    when it is asked for, or else right before the key changes.

    `hidden` bool [PARTITIONS_MAX]: the partitions that are hidden.
    `places` int64 [1 + rows]: the number (counter GENERATION) of the first row; then for each row the place of its
    event (BLOCK × block + place), 0: its sequence is in `written`, −1: nobody may ask for it.
    `written` float32 [rows, length, 2 + fields].
    """

    hidden: Bool
    places: Int64
    written: Float32


class State(NamedTuple):
    """The arrays of `KeyState`, as kernels see them; `largest`: `totals` as float64."""

    table: Array
    slots: Int64
    counters: Int64
    events: Pool
    frauds: Pool
    remotes: Pool
    totals: Int64
    largest: Float64
    waiting: Waiting


class Program(NamedTuple):
    """What the kernel computes for one key field, and its working memory.

    `edges` int64 [edges, 3]: the ages up to which events count, ascending.
    `columns` int64 [columns, 5]: the key's columns of the feature vector.
    `sequence_columns` int64 [fields]: the features that the steps of the key's sequence have.
    `inputs` int64 [1 + values + tags]: rows of the input table with key, value fields and tag fields.
    `ticks_per_unit` float64 [values]: how many ticks a unit of each value field has.
    `first_column`: position of the key's first column in the feature vector.
    `horizon_ms`: age at which events do not count for windows any more.
    `kept`: how many events of a key stay in the state beyond the horizon: those of a sequence before its last step.
    `totals_width`: numbers in the totals of a value field at the edge that has most.
    `ticks_max`: the largest number of ticks of a value.
    `visibility`: changes whenever a partition is hidden or shown; starts at 1.
    `event` int64 [values + tags + two step fields each]: the row's event. `ticks` int64 [values]: its values in ticks.
    `stored` int64 [2]: slot and place of the last row.
    `sums` int64 [1, values × totals width]. `fraud_rows` int64 [edges]. `distinct` int64 [edges, tags].
    `tag_uses` int64 [tags, 2], `matches` int64 [tags, 2]: for `seen` and `same_as_last`.
    `seen` int64 [tags, 2^k, 2]: a small hash set (tag, generation) for each tag field, for `distinct`.
    `reach` int64 [values + tags]: up to how many edges columns ask for the order of a field's values; 0: only for the
    last one, NO_REACH: for none. `reach_max`: the largest.
    `order` int64 [edges + 1, values + tags]: in how many rows up to each edge the value rose, or the tag changed.
    `first_age_ms` int64 [edges + 1, tags]: age of the first event up to each edge with the row's tag, −1: there is
    none. The last row of both is for the events so far. `neighbours` int64 [2, values + tags]: see LATER and LAST.
    `remote` float64 [edges, 1 + 4 × values]: rows of remotes, then for each value field their sums, differences and
    squared differences to the row's value, and maxima.
    """

    edges: Int64
    columns: Int64
    sequence_columns: Int64
    inputs: Int64
    ticks_per_unit: Float64
    first_column: int
    horizon_ms: int
    kept: int
    events_per_key_max: int
    has_labels: bool
    has_sequence: bool
    totals_width: int
    ticks_max: int
    visibility: int
    event: Int64
    stored: Int64
    ticks: Int64
    sums: Int64
    fraud_rows: Int64
    distinct: Int64
    tag_uses: Int64
    matches: Int64
    seen: Int64
    reach: Int64
    reach_max: int
    order: Int64
    first_age_ms: Int64
    neighbours: Int64
    remote: Float64
