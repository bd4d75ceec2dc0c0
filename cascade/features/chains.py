"""What the kernels of the feature engine are built from: the hash index, the order of last use, and chains of blocks.

A chain is a list of blocks with the events of a key in order of time. Arguments of all kernels in this folder:

state, or table, slots, counters, events, frauds, remotes, step_times, step_values: `KeyState`, borrowed (`borrowed`)
slot: row of `slots`, which is a key
chain: EVENTS, FRAUDS or REMOTES, a chain of the slot
pool: the array of the chain's blocks (`events`, `frauds` or `remotes`)
pool_counters: where that pool's counters start in `counters` (EVENT_POOL, FRAUD_POOL or REMOTE_POOL)
partitions: `pool` viewed as uint16, for the partition ids (from column PARTITIONS on)
block, place: an event's row of `pool` and its position in the block, 0 ≤ place < BLOCK
"""

from __future__ import annotations

import numpy as np

from cascade.columns import Array, Int64
from cascade.compilation import kernel
from cascade.features.layout import (
    BLOCK,
    BLOCKS_USED,
    COUNT,
    EVENT_POOL,
    EVENTS,
    EVICTIONS,
    FRAUD_POOL,
    FRAUDS,
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
    REMOTE_POOL,
    REMOTES,
    SLOTS_USED,
    STEP_PARTITION,
    STEPS,
    TIMES,
    VALUES,
    KeyState,
)


@kernel(inline="always")
def home(key: int, mask: int) -> int:
    """Return the home position of a key in the index: the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    mixed = np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((mixed ^ (mixed >> np.uint64(31))) & np.uint64(mask))


# --- order of last use ------------------------------------------------------------------------------------------


@kernel
def unlink(slots: Int64, counters: Int64, slot: int) -> None:
    """Take a slot out of the order of last use."""
    less, more = slots[slot, LESS_RECENT], slots[slot, MORE_RECENT]
    if more:
        slots[more, LESS_RECENT] = less
    else:
        counters[MOST_RECENT] = less
    if less:
        slots[less, MORE_RECENT] = more
    else:
        counters[LEAST_RECENT] = more


@kernel
def link_as_latest(slots: Int64, counters: Int64, slot: int) -> None:
    """Put a slot at the head of the order of last use, as the latest used."""
    head = counters[MOST_RECENT]
    slots[slot, LESS_RECENT], slots[slot, MORE_RECENT] = head, 0
    if head:
        slots[head, MORE_RECENT] = slot
    else:
        counters[LEAST_RECENT] = slot
    counters[MOST_RECENT] = slot


# --- the index --------------------------------------------------------------------------------------------------


@kernel
def remove_key(table: Array, slots: Int64, key: int) -> None:
    """Remove a key from the index, and move later ones back, so that no gap ends a probe early."""
    mask = len(table) - 1
    gap = home(key, mask)
    while slots[table[gap], KEY] != key:
        gap = (gap + 1) & mask
    place = gap
    while True:
        place = (place + 1) & mask
        slot = table[place]
        if slot == 0:
            break
        preferred = home(slots[slot, KEY], mask)
        if (place - preferred) & mask >= (place - gap) & mask:
            table[gap] = slot
            gap = place
    table[gap] = 0


@kernel
def release(
    table: Array, slots: Int64, counters: Int64, events: Int64, frauds: Int64, remotes: Int64, slot: int
) -> None:
    """Forget the key of a slot with its chains and steps, and free the slot."""
    remove_key(table, slots, slots[slot, KEY])
    unlink(slots, counters, slot)
    free_chain(slots, counters, events, slot, EVENTS, EVENT_POOL)
    free_chain(slots, counters, frauds, slot, FRAUDS, FRAUD_POOL)
    free_chain(slots, counters, remotes, slot, REMOTES, REMOTE_POOL)
    slots[slot, STEPS] = slots[slot, STEP_PARTITION] = 0
    slots[slot, LESS_RECENT] = counters[FREE_SLOT]
    counters[FREE_SLOT] = slot
    counters[KEYS] -= 1


@kernel
def evict_longest_idle(
    table: Array, slots: Int64, counters: Int64, events: Int64, frauds: Int64, remotes: Int64
) -> None:
    """Forget the least recently used key."""
    release(table, slots, counters, events, frauds, remotes, counters[LEAST_RECENT])
    counters[EVICTIONS] += 1


@kernel
def find(table: Array, slots: Int64, key: int) -> int:
    """Return the key's slot, 0 where the key is not in the index."""
    mask = len(table) - 1
    place = home(key, mask)
    while table[place]:
        slot = np.int64(table[place])
        if slots[slot, KEY] == key:
            return slot
        place = (place + 1) & mask
    return 0


@kernel
def touch(table: Array, slots: Int64, counters: Int64, events: Int64, frauds: Int64, remotes: Int64, key: int) -> int:
    """Return the key's slot, a new one for a new key; the key becomes the latest used."""
    mask = len(table) - 1
    place = home(key, mask)
    while table[place]:
        slot = np.int64(table[place])
        if slots[slot, KEY] == key:
            if counters[MOST_RECENT] != slot:
                unlink(slots, counters, slot)
                link_as_latest(slots, counters, slot)
            return slot
        place = (place + 1) & mask
    if counters[FREE_SLOT] == 0 and counters[SLOTS_USED] == len(slots) - 1:
        evict_longest_idle(table, slots, counters, events, frauds, remotes)
        place = home(key, mask)
        while table[place]:
            place = (place + 1) & mask
    slot = counters[FREE_SLOT]
    if slot:
        counters[FREE_SLOT] = slots[slot, LESS_RECENT]
    else:
        counters[SLOTS_USED] += 1
        slot = counters[SLOTS_USED]
    slots[slot, KEY] = key
    table[place] = slot
    link_as_latest(slots, counters, slot)
    counters[KEYS] += 1
    return slot


# --- chains of blocks -------------------------------------------------------------------------------------------


@kernel
def free_block(counters: Int64, pool: Int64, block: int, pool_counters: int) -> None:
    """Return a block to its pool."""
    pool[block, OLDER] = counters[pool_counters + FREE_BLOCK]
    counters[pool_counters + FREE_BLOCK] = block


@kernel
def free_chain(slots: Int64, counters: Int64, pool: Int64, slot: int, chain: int, pool_counters: int) -> None:
    """Drop all events of a chain."""
    block = slots[slot, chain + NEWEST]
    while block:
        older = pool[block, OLDER]
        free_block(counters, pool, block, pool_counters)
        block = older
    slots[slot, chain + NEWEST] = slots[slot, chain + OLDEST] = slots[slot, chain + COUNT] = 0


@kernel
def drop_oldest(slots: Int64, counters: Int64, pool: Int64, slot: int, chain: int, pool_counters: int) -> None:
    """Drop the oldest event of a chain that is not empty."""
    block = slots[slot, chain + OLDEST]
    pool[block, LOW] += 1
    slots[slot, chain + COUNT] -= 1
    if pool[block, LOW] == pool[block, HIGH]:
        newer = pool[block, NEWER]
        slots[slot, chain + OLDEST] = newer
        if newer:
            pool[newer, OLDER] = 0
        else:
            slots[slot, chain + NEWEST] = 0
        free_block(counters, pool, block, pool_counters)


@kernel
def drop_newest(slots: Int64, counters: Int64, pool: Int64, slot: int, chain: int, pool_counters: int) -> None:
    """Drop the newest event of a chain that is not empty."""
    block = slots[slot, chain + NEWEST]
    pool[block, HIGH] -= 1
    slots[slot, chain + COUNT] -= 1
    if pool[block, LOW] == pool[block, HIGH]:
        older = pool[block, OLDER]
        slots[slot, chain + NEWEST] = older
        if older:
            pool[older, NEWER] = 0
        else:
            slots[slot, chain + OLDEST] = 0
        free_block(counters, pool, block, pool_counters)


@kernel
def trim(slots: Int64, counters: Int64, pool: Int64, slot: int, chain: int, pool_counters: int, time_ms: int) -> None:
    """Drop the events with time ≤ `time_ms`."""
    while slots[slot, chain + COUNT]:
        block = slots[slot, chain + OLDEST]
        if pool[block, TIMES + pool[block, LOW]] > time_ms:
            break
        drop_oldest(slots, counters, pool, slot, chain, pool_counters)


@kernel
def make_room(
    table: Array,
    slots: Int64,
    counters: Int64,
    events: Int64,
    frauds: Int64,
    remotes: Int64,
    pool: Int64,
    slot: int,
    chain: int,
    pool_counters: int,
) -> None:
    """Make a free place in the newest block of the chain; evict the least recently used keys where the pool is full."""
    block = slots[slot, chain + NEWEST]
    if block and pool[block, HIGH] < BLOCK:
        return
    while counters[pool_counters + FREE_BLOCK] == 0 and counters[pool_counters + BLOCKS_USED] == len(pool) - 1:
        if counters[LEAST_RECENT] != slot:
            evict_longest_idle(table, slots, counters, events, frauds, remotes)
        else:
            drop_oldest(slots, counters, pool, slot, chain, pool_counters)
    fresh = counters[pool_counters + FREE_BLOCK]
    if fresh:
        counters[pool_counters + FREE_BLOCK] = pool[fresh, OLDER]
    else:
        counters[pool_counters + BLOCKS_USED] += 1
        fresh = counters[pool_counters + BLOCKS_USED]
    block = slots[slot, chain + NEWEST]
    pool[fresh, LOW] = pool[fresh, HIGH] = 0
    pool[fresh, OLDER], pool[fresh, NEWER] = block, 0
    if block:
        pool[block, NEWER] = fresh
    else:
        slots[slot, chain + OLDEST] = fresh
    slots[slot, chain + NEWEST] = fresh


@kernel
def insert(
    slots: Int64, pool: Int64, partitions: Array, slot: int, chain: int, time_ms: int, partition_id: int, event: Int64
) -> None:
    """Insert an event by its time, after all that are not later. There must be room (`make_room`).

    `event` int64 [columns]: the numbers of the event besides its time.
    """
    block = slots[slot, chain + NEWEST]
    place = pool[block, HIGH]
    pool[block, HIGH] += 1
    slots[slot, chain + COUNT] += 1
    while True:
        before_block, before = block, place - 1
        if place == pool[block, LOW]:
            before_block = pool[block, OLDER]
            if before_block == 0:
                break
            before = pool[before_block, HIGH] - 1
        if pool[before_block, TIMES + before] <= time_ms:
            break
        for column in range(TIMES, pool.shape[1], BLOCK):
            pool[block, column + place] = pool[before_block, column + before]
        partitions[block, PARTITIONS + place] = partitions[before_block, PARTITIONS + before]
        block, place = before_block, before
    pool[block, TIMES + place] = time_ms
    partitions[block, PARTITIONS + place] = partition_id
    for column in range(len(event)):
        pool[block, VALUES + BLOCK * column + place] = event[column]


@kernel
def put(
    state: KeyState,
    pool: Int64,
    partitions: Array,
    slot: int,
    chain: int,
    pool_counters: int,
    entries_max: int,
    time_ms: int,
    partition_id: int,
    event: Int64,
) -> bool:
    """Insert an event as `insert` does, and make room for it.

    A chain of `entries_max` events drops its oldest first. Returns False, without inserting, where the event is older.
    """
    table, slots, counters, events, frauds, remotes, _, _ = state
    if slots[slot, chain + COUNT] == entries_max:
        oldest = slots[slot, chain + OLDEST]
        if pool[oldest, TIMES + pool[oldest, LOW]] > time_ms:
            return False
        drop_oldest(slots, counters, pool, slot, chain, pool_counters)
    make_room(table, slots, counters, events, frauds, remotes, pool, slot, chain, pool_counters)
    insert(slots, pool, partitions, slot, chain, time_ms, partition_id, event)
    return True


@kernel
def remove(
    slots: Int64,
    counters: Int64,
    pool: Int64,
    partitions: Array,
    slot: int,
    chain: int,
    pool_counters: int,
    block: int,
    place: int,
) -> None:
    """Remove the event at a place; those after it move back by one."""
    while True:
        after_block, after = block, place + 1
        if after == pool[block, HIGH]:
            after_block = pool[block, NEWER]
            if after_block == 0:
                break
            after = pool[after_block, LOW]
        for column in range(TIMES, pool.shape[1], BLOCK):
            pool[block, column + place] = pool[after_block, column + after]
        partitions[block, PARTITIONS + place] = partitions[after_block, PARTITIONS + after]
        block, place = after_block, after
    drop_newest(slots, counters, pool, slot, chain, pool_counters)


@kernel
def newest_ms(slots: Int64, pool: Int64, slot: int, chain: int, otherwise_ms: int) -> int:
    """Return the time of the newest event of a chain, `otherwise_ms` where the chain is empty."""
    block = slots[slot, chain + NEWEST]
    if block == 0:
        return otherwise_ms
    return pool[block, TIMES + pool[block, HIGH] - 1]
