"""How events lie in the arrays of the state: the columns of slots and blocks, and the places in `counters`.

The kernels contain these numbers as constants. They are in a file of their own so that only a change of theirs, and no
other change of the state, compiles the kernels again.
"""

from __future__ import annotations

from typing import NamedTuple

from cascade.columns import Array, Float32, Int64

# Of exported arrays: part of what a snapshot must agree on, raised whenever their meaning or shape changes.
STATE_LAYOUT = 2

# Sources (numbers of the partitions that rows come from) are stored as 16 bits an event.
SOURCES_MAX = 65_536

# Events in a block. Eight times are one cache line; a key with one event wastes seven places (112 bytes).
BLOCK = 8

# Columns of `slots`: the key, its neighbours by last use, its steps and their source, and three of each chain. What
# every row reads comes first, within one cache line.
KEY, LESS_RECENT, MORE_RECENT, STEPS = range(4)
EVENTS, FRAUDS, REMOTES = 4, 8, 11  # where the columns of a chain start
STEP_SOURCE = 7
NEWEST, OLDEST, COUNT = range(3)  # within a chain
SLOT_WIDTH = 14

# Places in `counters`
SLOTS_USED, FREE_SLOT, MOST_RECENT, LEAST_RECENT, EVICTIONS, LATE, TOO_LATE, GENERATION, KEYS = range(9)
# Where the counters of a chain's pool start, and what they count
EVENT_POOL, FRAUD_POOL, REMOTE_POOL = 9, 11, 13
FREE_BLOCK, BLOCKS_USED = range(2)
COUNTERS = 15

# Columns of a block: its neighbours in time, the places in use (LOW ≤ place < HIGH), BLOCK sources of 16 bits, then
# BLOCK times, then BLOCK values a field (bits of float64), then BLOCK tags a field.
OLDER, NEWER, LOW, HIGH = range(4)
TIMES = 6
VALUES = TIMES + BLOCK
# Where the sources of a block start in a row of its pool seen as uint16
SOURCES = 16

# What a remote holds after its time, which is that of its newest event: events, start of the stretch of event time in
# ms, then by value field (bits of float64) sums, squared differences to the mean, maxima.
REMOTE_COUNT, REMOTE_START, REMOTE_VALUES = range(3)


class KeyState(NamedTuple):
    """State of one key field.

    `table` int32 [2^k]: hash index (open addressing, linear probing), at most half full, holding slots. `slots` int64
    [keys_max + 1, SLOT_WIDTH]. `counters` int64 [COUNTERS]. `events`, `frauds`, `remotes` int64 [blocks, block width]:
    the pools of blocks; frauds have one tag, the transaction's id, and no source. `step_times` int64 [slots, length] in
    ms and `step_values` float32 [slots, length, fields]: the last transactions of each slot, in order of time.
    """

    table: Array
    slots: Int64
    counters: Int64
    events: Int64
    frauds: Int64
    remotes: Int64
    step_times: Int64
    step_values: Float32
