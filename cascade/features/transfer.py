"""Kernels that remove a partition from a state, take partitions from exported arrays, and check such arrays.

Compiled code does not check indices. So the kernels follow indices of exported arrays only after they have checked that
each is in range. A walk along a chain ends after as many blocks as the slot counts events, since each block has one.
"""

from __future__ import annotations

import numpy as np

from cascade.columns import Array, Bool, Int64
from cascade.compilation import kernel
from cascade.features.borrowing import borrowed
from cascade.features.chains import find, free_block, free_chain, newest_ms, put, release, touch, trim
from cascade.features.kernels import find_fraud, step
from cascade.features.layout import (
    BLOCK,
    BLOCKS_USED,
    COUNT,
    EVENT_POOL,
    EVENTS,
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

# --- removing ---------------------------------------------------------------------------------------------------


@kernel(nogil=True)
def forget(state: KeyState, partition_id: int) -> None:
    """Drop the events and steps of a partition, and forget the keys that have lost their last event or step by it."""
    state = borrowed(state)
    table, slots, counters, events, frauds, remotes, _, _ = state
    event_partitions = events.view(np.uint16)
    for slot in range(1, counters[SLOTS_USED] + 1):
        dropped = _drop_partition(slots, counters, events, event_partitions, slot, partition_id)
        if slots[slot, STEPS] and slots[slot, STEP_PARTITION] == partition_id:
            slots[slot, STEPS] = slots[slot, STEP_PARTITION] = 0
            dropped = True
        left = slots[slot, STEPS] + slots[slot, EVENTS + COUNT] + slots[slot, FRAUDS + COUNT]
        if dropped and left + slots[slot, REMOTES + COUNT] == 0:
            release(table, slots, counters, events, frauds, remotes, slot)


@kernel
def _drop_partition(
    slots: Int64, counters: Int64, events: Int64, event_partitions: Array, slot: int, partition_id: int
) -> bool:
    """Drop a key's events of a partition, and move the others together towards the oldest; whether there were any."""
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
    if left == 0:
        free_chain(slots, counters, events, slot, EVENTS, EVENT_POOL)
        return True
    surplus = events[target, NEWER]
    while surplus:
        newer = events[surplus, NEWER]
        free_block(counters, events, surplus, EVENT_POOL)
        surplus = newer
    events[target, NEWER], events[target, HIGH] = 0, free
    slots[slot, EVENTS + NEWEST], slots[slot, EVENTS + COUNT] = target, left
    return True


# --- checks -----------------------------------------------------------------------------------------------------


@kernel
def _chain_fits(slots: Int64, pool: Int64, slot: int, chain: int) -> bool:
    """Whether a chain stays in its pool, ends, has as many events as its slot counts, and is in order of time."""
    count, newest, block = slots[slot, chain + COUNT], slots[slot, chain + NEWEST], slots[slot, chain + OLDEST]
    if count == 0:
        return newest == 0 and block == 0
    previous, found, last_ms = np.int64(0), np.int64(0), np.int64(-(2**63))
    while found < count:
        if not 0 < block < len(pool) or pool[block, OLDER] != previous:
            return False
        low, high, newer = pool[block, LOW], pool[block, HIGH], pool[block, NEWER]
        if not 0 <= low < high <= BLOCK or (previous and low) or (newer and high < BLOCK):
            return False
        for place in range(low, high):
            if pool[block, TIMES + place] < last_ms:
                return False
            last_ms = pool[block, TIMES + place]
        found += high - low
        previous, block = block, newer
    return found == count and block == 0 and previous == newest


@kernel
def _mark_chain(slots: Int64, pool: Int64, marks: Bool, slot: int, chain: int) -> bool:
    """Mark the blocks of a chain that `_chain_fits` has checked; whether none was marked before."""
    block = slots[slot, chain + NEWEST]
    while block:
        if marks[block]:
            return False
        marks[block] = True
        block = pool[block, OLDER]
    return True


@kernel
def _free_blocks_fit(counters: Int64, pool: Int64, marks: Bool, pool_counters: int) -> bool:
    """Whether the list of free blocks contains exactly the blocks that are in no chain."""
    if counters[pool_counters + BLOCKS_USED] != len(pool) - 1:
        return False
    free = len(pool) - 1 - marks.sum()
    block = counters[pool_counters + FREE_BLOCK]
    for _ in range(free):
        if not 0 < block < len(pool) or marks[block]:
            return False
        marks[block] = True
        block = pool[block, OLDER]
    return block == 0


@kernel
def _keys_fit(table: Array, slots: Int64, counters: Int64, in_use: Bool) -> bool:  # noqa: PLR0911
    """Whether index, order of last use and free slots agree with each other; marks the slots in `in_use`."""
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
        if find(table, slots, slots[slot, KEY]) != slot:
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
def state_fits(state: KeyState, has_sequence: bool) -> bool:  # noqa: PLR0911
    """Whether all indices in the used parts of a state are in range and agree, so that kernels may follow them."""
    table, slots, counters, events, frauds, remotes, step_times, _ = borrowed(state)
    in_use = np.zeros(len(slots), np.bool_)
    # a negative generation would reach 0, which is that of unused scratch memory
    if counters.min() < 0 or counters.max() >= 1 << 62:
        return False
    if not _keys_fit(table, slots, counters, in_use):
        return False
    event_marks = np.zeros(len(events), np.bool_)
    fraud_marks = np.zeros(len(frauds), np.bool_)
    remote_marks = np.zeros(len(remotes), np.bool_)
    chains = ((EVENTS, events, event_marks), (FRAUDS, frauds, fraud_marks), (REMOTES, remotes, remote_marks))
    if has_sequence and len(step_times) < len(slots):
        return False
    for slot in range(1, len(slots)):
        steps = slots[slot, STEPS]
        if not 0 <= steps <= (step_times.shape[1] if has_sequence and in_use[slot] else 0):
            return False
        for chain, pool, marks in chains:
            if slots[slot, chain + COUNT] and not in_use[slot]:
                return False
            if not _chain_fits(slots, pool, slot, chain) or not _mark_chain(slots, pool, marks, slot, chain):
                return False
    return (
        _free_blocks_fit(counters, events, event_marks, EVENT_POOL)
        and _free_blocks_fit(counters, frauds, fraud_marks, FRAUD_POOL)
        and _free_blocks_fit(counters, remotes, remote_marks, REMOTE_POOL)
    )


# --- absorbing --------------------------------------------------------------------------------------------------


@kernel(nogil=True)
def absorb(  # noqa: PLR0912
    state: KeyState,
    exported: KeyState,
    horizon_ms: int,
    entries_max: int,
    has_sequence: bool,
    wanted: Bool,
    labels: bool,
    first: int,
    end: int,
) -> int:
    """Take events and steps of the wanted partitions from other arrays, each as if its row came now.

    exported: the other arrays
    horizon_ms, entries_max, has_sequence: `horizon_ms`, `events_per_key_max` and `has_sequence` of `Program`
    wanted: bool [PARTITIONS_MAX]
    labels: whether the frauds are taken too
    first, end: the slots first ≤ slot < end of `exported` are taken

    Returns 0, or a slot that is not in order; the slots before it are then in the state.
    """
    state, exported, wanted = borrowed(state), borrowed(exported), borrowed(wanted)
    table, slots, counters, events, frauds, remotes, step_times, step_values = state
    _, from_slots, _, from_events, from_frauds, _, from_step_times, from_step_values = exported
    from_partitions = from_events.view(np.uint16)
    event_partitions, fraud_partitions = events.view(np.uint16), frauds.view(np.uint16)
    event = np.zeros((from_events.shape[1] - VALUES) // BLOCK, np.int64)
    fraud = np.zeros(1, np.int64)
    step_columns = np.arange(step_values.shape[2])
    length = step_times.shape[1]
    unread = np.zeros((length, length, 2 + step_values.shape[2]), np.float32)
    for slot in range(first, end):
        steps = from_slots[slot, STEPS] if has_sequence else 0
        fits = _chain_fits(from_slots, from_events, slot, EVENTS) and 0 <= steps <= from_step_times.shape[1]
        if not fits or (labels and not _chain_fits(from_slots, from_frauds, slot, FRAUDS)):
            return slot
        if not 0 <= from_slots[slot, STEP_PARTITION] < len(wanted):
            return slot
        if steps and not wanted[from_slots[slot, STEP_PARTITION]]:
            steps = 0
        found, latest_ms = _newest_of(from_slots, from_events, from_partitions, slot, wanted)
        fraud_count = from_slots[slot, FRAUDS + COUNT] if labels else 0
        if not found and not fraud_count and not steps:
            continue
        target = touch(table, slots, counters, events, frauds, remotes, from_slots[slot, KEY])
        if found:
            latest_ms = max(latest_ms, newest_ms(slots, events, target, EVENTS, latest_ms))
            trim(slots, counters, events, target, EVENTS, EVENT_POOL, latest_ms - horizon_ms)
            block = from_slots[slot, EVENTS + OLDEST]
            while block:
                for place in range(from_events[block, LOW], from_events[block, HIGH]):
                    partition_id = np.int64(from_partitions[block, PARTITIONS + place])
                    time_ms = from_events[block, TIMES + place]
                    if not wanted[partition_id] or time_ms <= latest_ms - horizon_ms:
                        continue
                    for column in range(len(event)):
                        event[column] = from_events[block, VALUES + BLOCK * column + place]
                    put(
                        state,
                        events,
                        event_partitions,
                        target,
                        EVENTS,
                        EVENT_POOL,
                        entries_max,
                        time_ms,
                        partition_id,
                        event,
                    )
                block = from_events[block, NEWER]
        for number in range(steps):
            time_ms, partition_id = from_step_times[slot, number], from_slots[slot, STEP_PARTITION]
            values = from_step_values[slot]
            step(slots, step_times, step_values, step_columns, target, time_ms, partition_id, number, values, unread)
        if fraud_count:
            block = from_slots[slot, FRAUDS + OLDEST]
            while block:
                for place in range(from_frauds[block, LOW], from_frauds[block, HIGH]):
                    fraud[0], time_ms = from_frauds[block, VALUES + place], from_frauds[block, TIMES + place]
                    if find_fraud(slots, frauds, target, fraud[0])[0]:
                        continue
                    put(state, frauds, fraud_partitions, target, FRAUDS, FRAUD_POOL, entries_max, time_ms, 0, fraud)
                block = from_frauds[block, NEWER]
    return 0


@kernel
def _newest_of(slots: Int64, events: Int64, event_partitions: Array, slot: int, wanted: Bool) -> tuple[bool, int]:
    """Return whether a slot has events of the wanted partitions, and the time of the newest of them."""
    block = slots[slot, EVENTS + NEWEST]
    while block:
        for place in range(events[block, HIGH] - 1, events[block, LOW] - 1, -1):
            if wanted[event_partitions[block, PARTITIONS + place]]:
                return True, events[block, TIMES + place]
        block = events[block, OLDER]
    return False, 0
