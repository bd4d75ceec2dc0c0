"""What the kernels of the feature engine are built from: the hash index, the order of last use, and chains of blocks.

A chain is a list of blocks with the events of a key in order of time. Arguments of all kernels in this folder:

state: the key field's `State`
slot: row of `state.slots`, which is a key
pool: `state.events`, `state.frauds` or `state.remotes`; a slot has a chain in each
block, place: an event's row of `pool.blocks` and its position in the block, 0 ≤ place < BLOCK
"""

from __future__ import annotations

import numpy as np

from cascade.columns import Int64
from cascade.compilation import kernel
from cascade.features.layout import (
    BLOCK,
    BLOCKS_USED,
    COUNT,
    EVICTIONS,
    FREE_BLOCK,
    FREE_SLOT,
    HIGH,
    KEY,
    KEYS,
    LEAST_RECENT,
    LESS_RECENT,
    LOW,
    MORE_RECENT,
    MOST_RECENT,
    NEWER,
    NEWEST,
    OLDER,
    OLDEST,
    PARTITIONS,
    SLOTS_USED,
    TIMES,
    TOTALS_VISIBILITY,
    VALUES,
    Pool,
    State,
)
from cascade.features.sequences import write_waiting


@kernel(inline="always")
def mix(key: int) -> int:
    """Return a hash of a number as uint64: the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    mixed = np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@kernel(inline="always")
def home(key: int, mask: int) -> int:
    """Return the home position of a key in the index."""
    return np.int64(mix(key) & np.uint64(mask))


# --- order of last use ------------------------------------------------------------------------------------------


@kernel(forceinline=True)
def unlink(state: State, slot: int) -> None:
    """Take a slot out of the order of last use."""
    less, more = state.slots[slot, LESS_RECENT], state.slots[slot, MORE_RECENT]
    if more:
        state.slots[more, LESS_RECENT] = less
    else:
        state.counters[MOST_RECENT] = less
    if less:
        state.slots[less, MORE_RECENT] = more
    else:
        state.counters[LEAST_RECENT] = more


@kernel(forceinline=True)
def link_as_latest(state: State, slot: int) -> None:
    """Put a slot at the head of the order of last use, as the latest used."""
    head = state.counters[MOST_RECENT]
    state.slots[slot, LESS_RECENT], state.slots[slot, MORE_RECENT] = head, 0
    if head:
        state.slots[head, MORE_RECENT] = slot
    else:
        state.counters[LEAST_RECENT] = slot
    state.counters[MOST_RECENT] = slot


# --- the index --------------------------------------------------------------------------------------------------


@kernel
def remove_key(state: State, key: int) -> None:
    """Remove a key from the index, and move later ones back, so that no gap ends a probe early."""
    mask = len(state.table) - 1
    gap = home(key, mask)
    while state.slots[state.table[gap], KEY] != key:
        gap = (gap + 1) & mask
    place = gap
    while True:
        place = (place + 1) & mask
        slot = state.table[place]
        if slot == 0:
            break
        preferred = home(state.slots[slot, KEY], mask)
        if (place - preferred) & mask >= (place - gap) & mask:
            state.table[gap] = slot
            gap = place
    state.table[gap] = 0


@kernel
def release(state: State, slot: int) -> None:
    """Forget the key of a slot with its chains, and free the slot."""
    write_waiting(state, slot)
    remove_key(state, state.slots[slot, KEY])
    unlink(state, slot)
    free_chain(state, state.events, slot)
    free_chain(state, state.frauds, slot)
    free_chain(state, state.remotes, slot)
    state.totals[slot, TOTALS_VISIBILITY] = 0
    state.slots[slot, LESS_RECENT] = state.counters[FREE_SLOT]
    state.counters[FREE_SLOT] = slot
    state.counters[KEYS] -= 1


@kernel
def evict_longest_idle(state: State) -> None:
    """Forget the least recently used key."""
    release(state, state.counters[LEAST_RECENT])
    state.counters[EVICTIONS] += 1


@kernel
def find(state: State, key: int) -> int:
    """Return the key's slot, 0 where the key is not in the index."""
    mask = len(state.table) - 1
    place = home(key, mask)
    while state.table[place]:
        slot = np.int64(state.table[place])
        if state.slots[slot, KEY] == key:
            return slot
        place = (place + 1) & mask
    return 0


@kernel(forceinline=True)
def touch(state: State, key: int) -> int:
    """Return the key's slot, a new one for a new key; the key becomes the latest used."""
    mask = len(state.table) - 1
    place = home(key, mask)
    while state.table[place]:
        slot = np.int64(state.table[place])
        if state.slots[slot, KEY] == key:
            if state.counters[MOST_RECENT] != slot:
                unlink(state, slot)
                link_as_latest(state, slot)
            return slot
        place = (place + 1) & mask
    if state.counters[FREE_SLOT] == 0 and state.counters[SLOTS_USED] == len(state.slots) - 1:
        evict_longest_idle(state)
        place = home(key, mask)
        while state.table[place]:
            place = (place + 1) & mask
    slot = state.counters[FREE_SLOT]
    if slot:
        state.counters[FREE_SLOT] = state.slots[slot, LESS_RECENT]
    else:
        state.counters[SLOTS_USED] += 1
        slot = state.counters[SLOTS_USED]
    state.slots[slot, KEY] = key
    state.table[place] = slot
    link_as_latest(state, slot)
    state.counters[KEYS] += 1
    return slot


# --- chains of blocks -------------------------------------------------------------------------------------------


@kernel(forceinline=True)
def free_block(state: State, pool: Pool, block: int) -> None:
    """Return a block to its pool."""
    pool.blocks[block, OLDER] = state.counters[pool.counters + FREE_BLOCK]
    state.counters[pool.counters + FREE_BLOCK] = block


@kernel
def free_chain(state: State, pool: Pool, slot: int) -> None:
    """Drop all events of a chain."""
    block = state.slots[slot, pool.chain + NEWEST]
    while block:
        older = pool.blocks[block, OLDER]
        free_block(state, pool, block)
        block = older
    for column in (NEWEST, OLDEST, COUNT):
        state.slots[slot, pool.chain + column] = 0


@kernel(forceinline=True)
def drop_oldest(state: State, pool: Pool, slot: int) -> None:
    """Drop the oldest event of a chain that is not empty."""
    block = state.slots[slot, pool.chain + OLDEST]
    pool.blocks[block, LOW] += 1
    state.slots[slot, pool.chain + COUNT] -= 1
    if pool.blocks[block, LOW] == pool.blocks[block, HIGH]:
        newer = pool.blocks[block, NEWER]
        state.slots[slot, pool.chain + OLDEST] = newer
        if newer:
            pool.blocks[newer, OLDER] = 0
        else:
            state.slots[slot, pool.chain + NEWEST] = 0
        free_block(state, pool, block)


@kernel
def drop_newest(state: State, pool: Pool, slot: int) -> None:
    """Drop the newest event of a chain that is not empty."""
    block = state.slots[slot, pool.chain + NEWEST]
    pool.blocks[block, HIGH] -= 1
    state.slots[slot, pool.chain + COUNT] -= 1
    if pool.blocks[block, LOW] == pool.blocks[block, HIGH]:
        older = pool.blocks[block, OLDER]
        state.slots[slot, pool.chain + NEWEST] = older
        if older:
            pool.blocks[older, NEWER] = 0
        else:
            state.slots[slot, pool.chain + OLDEST] = 0
        free_block(state, pool, block)


@kernel(forceinline=True)
def trim(state: State, pool: Pool, slot: int, time_ms: int, kept: int) -> None:
    """Drop the events with time ≤ `time_ms`, as long as the chain has more than `kept` events."""
    while state.slots[slot, pool.chain + COUNT] > kept:
        block = state.slots[slot, pool.chain + OLDEST]
        if pool.blocks[block, TIMES + pool.blocks[block, LOW]] > time_ms:
            break
        drop_oldest(state, pool, slot)


@kernel(forceinline=True)
def make_room(state: State, pool: Pool, slot: int) -> None:
    """Make a free place in the newest block of the chain; evict the least recently used keys where the pool is full."""
    block = state.slots[slot, pool.chain + NEWEST]
    if block and pool.blocks[block, HIGH] < BLOCK:
        return
    while (
        state.counters[pool.counters + FREE_BLOCK] == 0
        and state.counters[pool.counters + BLOCKS_USED] == len(pool.blocks) - 1
    ):
        if state.counters[LEAST_RECENT] != slot:
            evict_longest_idle(state)
        else:
            drop_oldest(state, pool, slot)
            state.totals[slot, TOTALS_VISIBILITY] = 0
    fresh = state.counters[pool.counters + FREE_BLOCK]
    if fresh:
        state.counters[pool.counters + FREE_BLOCK] = pool.blocks[fresh, OLDER]
    else:
        state.counters[pool.counters + BLOCKS_USED] += 1
        fresh = state.counters[pool.counters + BLOCKS_USED]
    block = state.slots[slot, pool.chain + NEWEST]
    pool.blocks[fresh, LOW] = pool.blocks[fresh, HIGH] = 0
    pool.blocks[fresh, OLDER], pool.blocks[fresh, NEWER] = block, 0
    if block:
        pool.blocks[block, NEWER] = fresh
    else:
        state.slots[slot, pool.chain + OLDEST] = fresh
    state.slots[slot, pool.chain + NEWEST] = fresh


@kernel(forceinline=True)
def insert(state: State, pool: Pool, slot: int, time_ms: int, partition_id: int, event: Int64) -> int:
    """Insert an event by its time, after all that are not later. There must be room (`make_room`).

    `event` int64 [columns]: the numbers of the event besides its time.

    Returns the event's place, as BLOCK × block + place.
    """
    block = state.slots[slot, pool.chain + NEWEST]
    place = pool.blocks[block, HIGH]
    pool.blocks[block, HIGH] += 1
    state.slots[slot, pool.chain + COUNT] += 1
    while True:
        before_block, before = block, place - 1
        if place == pool.blocks[block, LOW]:
            before_block = pool.blocks[block, OLDER]
            if before_block == 0:
                break
            before = pool.blocks[before_block, HIGH] - 1
        if pool.blocks[before_block, TIMES + before] <= time_ms:
            break
        for column in range(TIMES, pool.blocks.shape[1], BLOCK):
            pool.blocks[block, column + place] = pool.blocks[before_block, column + before]
        pool.partitions[block, PARTITIONS + place] = pool.partitions[before_block, PARTITIONS + before]
        block, place = before_block, before
    pool.blocks[block, TIMES + place] = time_ms
    pool.partitions[block, PARTITIONS + place] = partition_id
    for column in range(len(event)):
        pool.blocks[block, VALUES + BLOCK * column + place] = event[column]
    return block * BLOCK + place


@kernel
def put(state: State, pool: Pool, slot: int, entries_max: int, time_ms: int, partition_id: int, event: Int64) -> bool:
    """Insert an event as `insert` does, and make room for it.

    A chain of `entries_max` events drops its oldest first. Returns False, without inserting, where the event is older.
    """
    if state.slots[slot, pool.chain + COUNT] == entries_max:
        oldest = state.slots[slot, pool.chain + OLDEST]
        if pool.blocks[oldest, TIMES + pool.blocks[oldest, LOW]] > time_ms:
            return False
        drop_oldest(state, pool, slot)
    make_room(state, pool, slot)
    insert(state, pool, slot, time_ms, partition_id, event)
    return True


@kernel
def remove(state: State, pool: Pool, slot: int, block: int, place: int) -> None:
    """Remove the event at a place; those after it move back by one."""
    while True:
        after_block, after = block, place + 1
        if after == pool.blocks[block, HIGH]:
            after_block = pool.blocks[block, NEWER]
            if after_block == 0:
                break
            after = pool.blocks[after_block, LOW]
        for column in range(TIMES, pool.blocks.shape[1], BLOCK):
            pool.blocks[block, column + place] = pool.blocks[after_block, column + after]
        pool.partitions[block, PARTITIONS + place] = pool.partitions[after_block, PARTITIONS + after]
        block, place = after_block, after
    drop_newest(state, pool, slot)


@kernel(forceinline=True)
def newest_ms(state: State, pool: Pool, slot: int, otherwise_ms: int) -> int:
    """Return the time of the newest event of a chain, `otherwise_ms` where the chain is empty."""
    block = state.slots[slot, pool.chain + NEWEST]
    if block == 0:
        return otherwise_ms
    return pool.blocks[block, TIMES + pool.blocks[block, HIGH] - 1]
