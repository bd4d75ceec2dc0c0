"""Kernels that remove a partition from a state, take partitions from exported arrays, and check such arrays.

Compiled code does not check indices. So the kernels follow indices of exported arrays only after they have checked that
each is in range. A walk along a chain ends after as many blocks as the slot counts events, since each block has one.
"""

from __future__ import annotations

import numpy as np

from cascade.columns import Bool, Int64
from cascade.compilation import kernel
from cascade.features.chains import find, free_block, free_chain, newest_ms, put, release, touch, trim
from cascade.features.handles import open_program, open_state
from cascade.features.kernels import find_fraud
from cascade.features.layout import (
    BLOCK,
    BLOCKS_USED,
    COUNT,
    EVENTS,
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
    REMOTES,
    SLOTS_USED,
    TIMES,
    TOTALS_VISIBILITY,
    VALUES,
    Pool,
    State,
)

# --- removing ---------------------------------------------------------------------------------------------------


@kernel(nogil=True)
def forget(handle: Int64, partition_id: int) -> None:
    """Drop the events of a partition, and forget the keys that have lost their last event by it."""
    state = open_state(handle)
    slots = state.slots
    for slot in range(1, state.counters[SLOTS_USED] + 1):
        dropped = _drop_partition(state, slot, partition_id)
        left = slots[slot, EVENTS + COUNT] + slots[slot, FRAUDS + COUNT] + slots[slot, REMOTES + COUNT]
        if dropped and left == 0:
            release(state, slot)


@kernel
def _drop_partition(state: State, slot: int, partition_id: int) -> bool:
    """Drop a key's events of a partition, and move the others together towards the oldest; whether there were any."""
    slots, events, event_partitions = state.slots, state.events.blocks, state.events.partitions
    block = target = slots[slot, EVENTS + OLDEST]
    if block == 0:
        return False
    free = events[target, LOW]
    left = 0
    while block:
        for place in range(events[block, LOW], events[block, HIGH]):
            if event_partitions[block, PARTITIONS + place] == partition_id:
                continue
            if free == BLOCK:
                target, free = events[target, NEWER], 0
            if target != block or free != place:
                for column in range(TIMES, events.shape[1], BLOCK):
                    events[target, column + free] = events[block, column + place]
                event_partitions[target, PARTITIONS + free] = event_partitions[block, PARTITIONS + place]
            free += 1
            left += 1
        block = events[block, NEWER]
    if left == slots[slot, EVENTS + COUNT]:
        return False
    state.totals[slot, TOTALS_VISIBILITY] = 0
    if left == 0:
        free_chain(state, state.events, slot)
        return True
    surplus = events[target, NEWER]
    while surplus:
        newer = events[surplus, NEWER]
        free_block(state, state.events, surplus)
        surplus = newer
    events[target, NEWER], events[target, HIGH] = 0, free
    slots[slot, EVENTS + NEWEST], slots[slot, EVENTS + COUNT] = target, left
    return True


# --- checks -----------------------------------------------------------------------------------------------------


@kernel
def _chain_fits(state: State, pool: Pool, slot: int) -> bool:
    """Whether a chain stays in its pool, ends, has as many events as its slot counts, and is in order of time."""
    blocks, (newest, block, count) = pool.blocks, state.slots[slot, pool.chain : pool.chain + 3]
    if count == 0:
        return newest == 0 and block == 0
    previous, found, last_ms = np.int64(0), np.int64(0), np.int64(-(2**63))
    while found < count:
        if not 0 < block < len(blocks) or blocks[block, OLDER] != previous:
            return False
        low, high, newer = blocks[block, LOW], blocks[block, HIGH], blocks[block, NEWER]
        if not 0 <= low < high <= BLOCK or (previous and low) or (newer and high < BLOCK):
            return False
        for place in range(low, high):
            if blocks[block, TIMES + place] < last_ms:
                return False
            last_ms = blocks[block, TIMES + place]
        found += high - low
        previous, block = block, newer
    return found == count and block == 0 and previous == newest


@kernel
def _mark_chain(state: State, pool: Pool, marks: Bool, slot: int) -> bool:
    """Mark the blocks of a chain that `_chain_fits` has checked; whether none was marked before."""
    block = state.slots[slot, pool.chain + NEWEST]
    while block:
        if marks[block]:
            return False
        marks[block] = True
        block = pool.blocks[block, OLDER]
    return True


@kernel
def _free_blocks_fit(state: State, pool: Pool, marks: Bool) -> bool:
    """Whether the list of free blocks contains exactly the blocks that are in no chain."""
    if state.counters[pool.counters + BLOCKS_USED] != len(pool.blocks) - 1:
        return False
    free = len(pool.blocks) - 1 - marks.sum()
    block = state.counters[pool.counters + FREE_BLOCK]
    for _ in range(free):
        if not 0 < block < len(pool.blocks) or marks[block]:
            return False
        marks[block] = True
        block = pool.blocks[block, OLDER]
    return block == 0


@kernel
def _keys_fit(state: State, in_use: Bool) -> bool:  # noqa: PLR0911
    """Whether index, order of last use and free slots agree with each other; marks the slots in `in_use`."""
    table, slots, counters = state.table, state.slots, state.counters
    keys = counters[KEYS]
    if counters[SLOTS_USED] != len(slots) - 1 or not 0 <= keys <= min(len(slots) - 1, len(table) // 2):
        return False
    found = 0
    for place in range(len(table)):
        slot = table[place]
        if slot == 0:
            continue
        if not 0 < slot < len(slots) or in_use[slot]:
            return False
        in_use[slot] = True
        found += 1
    if found != keys:
        return False
    more, slot = np.int64(0), counters[MOST_RECENT]
    for _ in range(keys):
        if not 0 < slot < len(slots) or not in_use[slot] or slots[slot, MORE_RECENT] != more:
            return False
        if find(state, slots[slot, KEY]) != slot:
            return False
        more, slot = slot, slots[slot, LESS_RECENT]
    if slot != 0 or counters[LEAST_RECENT] != more:
        return False
    seen = in_use.copy()
    slot = counters[FREE_SLOT]
    for _ in range(len(slots) - 1 - keys):
        if not 0 < slot < len(slots) or seen[slot]:
            return False
        seen[slot] = True
        slot = slots[slot, LESS_RECENT]
    return slot == 0


@kernel(nogil=True)
def state_fits(handle: Int64) -> bool:
    """Whether all indices in the used parts of a state are in range and agree, so that kernels may follow them."""
    state = open_state(handle)
    slots, counters = state.slots, state.counters
    in_use = np.zeros(len(slots), np.bool_)
    # a negative generation would reach 0, which is that of unused scratch memory
    if counters.min() < 0 or counters.max() >= 1 << 62:
        return False
    if not _keys_fit(state, in_use):
        return False
    event_marks = np.zeros(len(state.events.blocks), np.bool_)
    fraud_marks = np.zeros(len(state.frauds.blocks), np.bool_)
    remote_marks = np.zeros(len(state.remotes.blocks), np.bool_)
    chains = ((state.events, event_marks), (state.frauds, fraud_marks), (state.remotes, remote_marks))
    for slot in range(1, len(slots)):
        for pool, marks in chains:
            if slots[slot, pool.chain + COUNT] and not in_use[slot]:
                return False
            if not _chain_fits(state, pool, slot) or not _mark_chain(state, pool, marks, slot):
                return False
    return (
        _free_blocks_fit(state, state.events, event_marks)
        and _free_blocks_fit(state, state.frauds, fraud_marks)
        and _free_blocks_fit(state, state.remotes, remote_marks)
    )


# --- absorbing --------------------------------------------------------------------------------------------------


@kernel(nogil=True)
def absorb(  # noqa: PLR0912
    handle: Int64, exported_handle: Int64, wanted: Bool, labels: bool, first: int, end: int
) -> int:
    """Take events of the wanted partitions from other arrays, each as if its row came now.

    An event past the key's horizon is taken where the key has fewer events than its sequence has steps.

    handle, exported_handle: of the key field, and of the other arrays
    wanted: bool [PARTITIONS_MAX]
    labels: whether the frauds are taken too
    first, end: the slots first ≤ slot < end of the other arrays are taken

    Returns 0, or a slot that is not in order; the slots before it are then in the state.
    """
    state, exported, program = open_state(handle), open_state(exported_handle), open_program(handle)
    horizon_ms, entries_max = program.horizon_ms, program.events_per_key_max
    from_slots, from_events, from_partitions = exported.slots, exported.events.blocks, exported.events.partitions
    from_frauds = exported.frauds.blocks
    event = np.zeros((from_events.shape[1] - VALUES) // BLOCK, np.int64)
    fraud = np.zeros(1, np.int64)
    for slot in range(first, end):
        fits = _chain_fits(exported, exported.events, slot)
        if not fits or (labels and not _chain_fits(exported, exported.frauds, slot)):
            return slot
        found, latest_ms = _newest_of(exported, slot, wanted)
        fraud_count = from_slots[slot, FRAUDS + COUNT] if labels else 0
        if not found and not fraud_count:
            continue
        target = touch(state, from_slots[slot, KEY])
        if found:
            state.totals[target, TOTALS_VISIBILITY] = 0
            latest_ms = max(latest_ms, newest_ms(state, state.events, target, latest_ms))
            trim(state, state.events, target, latest_ms - horizon_ms, program.kept)
            block = from_slots[slot, EVENTS + OLDEST]
            while block:
                for place in range(from_events[block, LOW], from_events[block, HIGH]):
                    partition_id = np.int64(from_partitions[block, PARTITIONS + place])
                    time_ms = from_events[block, TIMES + place]
                    if not wanted[partition_id]:
                        continue
                    has_steps = state.slots[target, EVENTS + COUNT] > program.kept or not program.has_sequence
                    if time_ms <= latest_ms - horizon_ms and has_steps:
                        continue
                    for column in range(len(event)):
                        event[column] = from_events[block, VALUES + BLOCK * column + place]
                    put(state, state.events, target, entries_max, time_ms, partition_id, event)
                block = from_events[block, NEWER]
        if fraud_count:
            block = from_slots[slot, FRAUDS + OLDEST]
            while block:
                for place in range(from_frauds[block, LOW], from_frauds[block, HIGH]):
                    fraud[0], time_ms = from_frauds[block, VALUES + place], from_frauds[block, TIMES + place]
                    if find_fraud(state, target, fraud[0])[0]:
                        continue
                    put(state, state.frauds, target, entries_max, time_ms, 0, fraud)
                block = from_frauds[block, NEWER]
    return 0


@kernel
def _newest_of(state: State, slot: int, wanted: Bool) -> tuple[bool, int]:
    """Return whether a slot has events of the wanted partitions, and the time of the newest of them."""
    events, event_partitions = state.events.blocks, state.events.partitions
    block = state.slots[slot, EVENTS + NEWEST]
    while block:
        for place in range(events[block, HIGH] - 1, events[block, LOW] - 1, -1):
            if wanted[event_partitions[block, PARTITIONS + place]]:
                return True, events[block, TIMES + place]
        block = events[block, OLDER]
    return False, 0
