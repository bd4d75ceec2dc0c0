"""The arrays of the state, and the columns of their slots, blocks and counters.

These numbers are constants in the compiled kernels. They have a file of their own, so that only a change of the layout
compiles the kernels again.
"""

from __future__ import annotations

from typing import NamedTuple

from cascade.columns import Array, Float32, Int64

# Version of the exported arrays, raised whenever their meaning or shape changes; other versions are refused.
STATE_LAYOUT = 2

# Each event stores the id of its partition in 16 bits.
PARTITIONS_MAX = 65_536

# Events in a block. Eight times fill one cache line; a key with one event wastes seven places (112 bytes).
BLOCK = 8

# Columns of `slots`: the key, its neighbours by last use, the number of its steps, the partition of its last step, and
# three columns for each chain. What every row reads comes first, within one cache line.
KEY, LESS_RECENT, MORE_RECENT, STEPS = range(4)
EVENTS, FRAUDS, REMOTES = 4, 8, 11  # where the columns of a chain start
STEP_PARTITION = 7
NEWEST, OLDEST, COUNT = range(3)  # within a chain
SLOT_WIDTH = 14

# Positions in `counters`
SLOTS_USED, FREE_SLOT, MOST_RECENT, LEAST_RECENT, EVICTIONS, LATE, TOO_LATE, GENERATION, KEYS = range(9)
# Positions in `counters` where the counters of a pool start, and the two counters
EVENT_POOL, FRAUD_POOL, REMOTE_POOL = 9, 11, 13
FREE_BLOCK, BLOCKS_USED = range(2)
COUNTERS = 15

# Columns of a block: its neighbours in time, the places in use (LOW ≤ place < HIGH), BLOCK partition ids of 16 bits,
# BLOCK times, then BLOCK values for each value field (bits of float64), then BLOCK tags for each tag field.
OLDER, NEWER, LOW, HIGH = range(4)
TIMES = 6
VALUES = TIMES + BLOCK
# Column of the first partition id in a block viewed as uint16
PARTITIONS = 16

# A remote is a summary of another worker's events, with the time of the newest. Its columns are the number of events,
# the start of the stretch of event time in ms, then sums, squared differences to the mean, and maxima, each for all
# value fields (bits of float64).
REMOTE_COUNT, REMOTE_START, REMOTE_VALUES = range(3)


class KeyState(NamedTuple):
    """State of one key field. Slots and blocks are counted from 1; 0 means none.

    `table` int32 [2^k]: hash index of slots (open addressing, linear probing), at most half full.
    `slots` int64 [keys_max + 1, SLOT_WIDTH]: one row for each key.
    `counters` int64 [COUNTERS].
    `events`, `frauds`, `remotes` int64 [blocks, block width]: the pools of blocks. A fraud has one tag, the
    transaction's id, and no partition.
    `step_times` int64 [slots, length] in ms, `step_values` float32 [slots, length, fields]: the last transactions of
    each slot, in order of time.
    """

    table: Array
    slots: Int64
    counters: Int64
    events: Int64
    frauds: Int64
    remotes: Int64
    step_times: Int64
    step_values: Float32
