"""The inner loops of the feature engine, compiled by numba.

A row is handled whole before the next: find its key, forget what is too old, read the windows, read and extend the
sequence, put the event in its place. So results do not depend on where a batch ends.

`chain` arguments say which chain of a slot is meant (EVENTS or FRAUDS); `pool` is the array of its blocks.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from cascade.columns import Array, Float32, Float64, Int64
from cascade.features.state import (
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
    GENERATION,
    HIGH,
    KEY,
    KEYS,
    LATE,
    LEAST_RECENT,
    LESS_RECENT,
    LOW,
    MORE_RECENT,
    MOST_RECENT,
    NEWER,
    NEWEST,
    OLDER,
    OLDEST,
    SLOTS_USED,
    STEPS,
    TIMES,
    TOO_LATE,
    VALUES,
)

NO_PRECEDING_SECONDS = -1.0
# Columns of the scratch aggregates
ROWS, FRAUD_ROWS, SUMS = range(3)


@njit(cache=True, inline="always")
def _home(key: int, mask: int) -> int:
    """Preferred place of a key: the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    mixed = np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((mixed ^ (mixed >> np.uint64(31))) & np.uint64(mask))


# --- order of last use ------------------------------------------------------------------------------------------


@njit(cache=True)
def _unlink(slots: Int64, counters: Int64, slot: int) -> None:
    less, more = slots[slot, LESS_RECENT], slots[slot, MORE_RECENT]
    if more:
        slots[more, LESS_RECENT] = less
    else:
        counters[MOST_RECENT] = less
    if less:
        slots[less, MORE_RECENT] = more
    else:
        counters[LEAST_RECENT] = more


@njit(cache=True)
def _link_as_latest(slots: Int64, counters: Int64, slot: int) -> None:
    head = counters[MOST_RECENT]
    slots[slot, LESS_RECENT], slots[slot, MORE_RECENT] = head, 0
    if head:
        slots[head, MORE_RECENT] = slot
    else:
        counters[LEAST_RECENT] = slot
    counters[MOST_RECENT] = slot


# --- the index --------------------------------------------------------------------------------------------------


@njit(cache=True)
def _remove_key(table: Array, slots: Int64, key: int) -> None:
    """Take a key out of the table, moving later ones back so that no gap breaks a probe."""
    mask = len(table) - 1
    gap = _home(key, mask)
    while slots[table[gap], KEY] != key:
        gap = (gap + 1) & mask
    place = gap
    while True:
        place = (place + 1) & mask
        slot = table[place]
        if slot == 0:
            break
        home = _home(slots[slot, KEY], mask)
        if (place - home) & mask >= (place - gap) & mask:
            table[gap] = slot
            gap = place
    table[gap] = 0


@njit(cache=True)
def _evict_longest_idle(table: Array, slots: Int64, counters: Int64, events: Int64, frauds: Int64) -> None:
    slot = counters[LEAST_RECENT]
    _remove_key(table, slots, slots[slot, KEY])
    _unlink(slots, counters, slot)
    _free_chain(slots, counters, events, slot, EVENTS, EVENT_POOL)
    _free_chain(slots, counters, frauds, slot, FRAUDS, FRAUD_POOL)
    slots[slot, STEPS] = 0
    slots[slot, LESS_RECENT] = counters[FREE_SLOT]
    counters[FREE_SLOT] = slot
    counters[EVICTIONS] += 1
    counters[KEYS] -= 1


@njit(cache=True)
def _touch(table: Array, slots: Int64, counters: Int64, events: Int64, frauds: Int64, key: int) -> int:
    """The key's slot, made where it is new; the key becomes the latest used."""
    mask = len(table) - 1
    place = _home(key, mask)
    while table[place]:
        slot = np.int64(table[place])
        if slots[slot, KEY] == key:
            if counters[MOST_RECENT] != slot:
                _unlink(slots, counters, slot)
                _link_as_latest(slots, counters, slot)
            return slot
        place = (place + 1) & mask
    if counters[FREE_SLOT] == 0 and counters[SLOTS_USED] == len(slots) - 1:
        _evict_longest_idle(table, slots, counters, events, frauds)
        place = _home(key, mask)
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
    _link_as_latest(slots, counters, slot)
    counters[KEYS] += 1
    return slot


# --- chains of blocks -------------------------------------------------------------------------------------------


@njit(cache=True)
def _free_block(counters: Int64, pool: Int64, block: int, pool_counters: int) -> None:
    pool[block, OLDER] = counters[pool_counters + FREE_BLOCK]
    counters[pool_counters + FREE_BLOCK] = block


@njit(cache=True)
def _free_chain(slots: Int64, counters: Int64, pool: Int64, slot: int, chain: int, pool_counters: int) -> None:
    block = slots[slot, chain + NEWEST]
    while block:
        older = pool[block, OLDER]
        _free_block(counters, pool, block, pool_counters)
        block = older
    slots[slot, chain + NEWEST] = slots[slot, chain + OLDEST] = slots[slot, chain + COUNT] = 0


@njit(cache=True)
def _drop_oldest(slots: Int64, counters: Int64, pool: Int64, slot: int, chain: int, pool_counters: int) -> None:
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
        _free_block(counters, pool, block, pool_counters)


@njit(cache=True)
def _drop_newest(slots: Int64, counters: Int64, pool: Int64, slot: int, chain: int, pool_counters: int) -> None:
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
        _free_block(counters, pool, block, pool_counters)


@njit(cache=True)
def _trim(slots: Int64, counters: Int64, pool: Int64, slot: int, chain: int, pool_counters: int, time_ms: int) -> None:
    """Drop what is as old as `time_ms` or older."""
    while slots[slot, chain + COUNT]:
        block = slots[slot, chain + OLDEST]
        if pool[block, TIMES + pool[block, LOW]] > time_ms:
            break
        _drop_oldest(slots, counters, pool, slot, chain, pool_counters)


@njit(cache=True)
def _make_room(
    table: Array, slots: Int64, counters: Int64, events: Int64, frauds: Int64, slot: int, chain: int, pool_counters: int
) -> None:
    """See that the newest block of the chain has a free place, at the price of the longest idle keys."""
    pool = events if chain == EVENTS else frauds
    block = slots[slot, chain + NEWEST]
    if block and pool[block, HIGH] < BLOCK:
        return
    while counters[pool_counters + FREE_BLOCK] == 0 and counters[pool_counters + BLOCKS_USED] == len(pool) - 1:
        if counters[LEAST_RECENT] != slot:
            _evict_longest_idle(table, slots, counters, events, frauds)
        else:
            _drop_oldest(slots, counters, pool, slot, chain, pool_counters)
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


@njit(cache=True)
def _insert(slots: Int64, pool: Int64, slot: int, chain: int, time_ms: int, event: Int64) -> None:
    """Put an event after all that are as old or older; later ones move up by one. There must be room.

    `event` int64 [values + tags]: what follows the time.
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
        block, place = before_block, before
    pool[block, TIMES + place] = time_ms
    for column in range(len(event)):
        pool[block, VALUES + BLOCK * column + place] = event[column]


# --- reading the windows ----------------------------------------------------------------------------------------


@njit(cache=True)
def _is_new_tag(seen: Int64, code: int, generation: int) -> bool:
    """Whether the row's scan meets the tag for the first time; remembers it."""
    mask = len(seen) - 1
    place = _home(code, mask)
    while seen[place, 1] == generation:
        if seen[place, 0] == code:
            return False
        place = (place + 1) & mask
    seen[place, 0], seen[place, 1] = code, generation
    return True


@njit(cache=True)
def _keep(aggregates: Float64, edge: int) -> None:
    """Keep the running aggregates as those at `edge`; a loop: numba's slice assignment is slower."""
    running = len(aggregates) - 1
    for column in range(aggregates.shape[1]):
        aggregates[edge, column] = aggregates[running, column]


@njit(cache=True)
def _scan(
    events: Int64,
    event_values: Float64,
    edges: Int64,
    aggregates: Float64,
    seen: Int64,
    newest: int,
    time_ms: int,
    values: Float64,
    tags: Int64,
    generation: int,
) -> float:
    """Read the aggregates at each edge, from the row itself back to the oldest event.

    Sums are of the earlier rows alone. The variance is taken from differences to the row's own value, which keeps it
    exact where values are alike.
    `event_values` is `events` as float64. Returns the age in seconds of the event before this one.
    """
    value_count, tag_count, running = len(values), len(tags), len(edges)
    differences, squares = SUMS + value_count, SUMS + 2 * value_count
    maxima, distinct = SUMS + 3 * value_count, SUMS + 4 * value_count
    now = aggregates[running]
    for column in range(len(now)):
        now[column] = 0.0
    now[ROWS] = 1.0
    for value in range(value_count):
        now[maxima + value] = values[value]
    for tag in range(tag_count):
        _is_new_tag(seen[tag], tags[tag], generation)
        now[distinct + tag] = 1.0
    seconds_since_last = NO_PRECEDING_SECONDS
    edge = 0
    block = newest
    while block:
        for place in range(events[block, HIGH] - 1, events[block, LOW] - 1, -1):
            age_ms = time_ms - events[block, TIMES + place]
            if age_ms < 0:
                continue
            while edge < running and age_ms >= edges[edge]:
                _keep(aggregates, edge)
                edge += 1
            if seconds_since_last < 0.0:
                seconds_since_last = age_ms / 1000.0
            if edge == running:
                return seconds_since_last
            now[ROWS] += 1.0
            for value in range(value_count):
                stored = event_values[block, VALUES + BLOCK * value + place]
                difference = stored - values[value]
                now[SUMS + value] += stored
                now[differences + value] += difference
                now[squares + value] += difference * difference
                now[maxima + value] = max(now[maxima + value], stored)
            for tag in range(tag_count):
                if _is_new_tag(seen[tag], events[block, VALUES + BLOCK * (value_count + tag) + place], generation):
                    now[distinct + tag] += 1.0
        block = events[block, OLDER]
    while edge < running:
        _keep(aggregates, edge)
        edge += 1
    return seconds_since_last


@njit(cache=True)
def _scan_frauds(
    frauds: Int64, edges: Int64, aggregates: Float64, newest: int, time_ms: int, oldest_event_ms: int
) -> None:
    """Count the frauds up to each edge; one older than the oldest event kept has no transaction to stand by."""
    count, edge = 0.0, 0
    block = newest
    while block and edge < len(edges):
        for place in range(frauds[block, HIGH] - 1, frauds[block, LOW] - 1, -1):
            fraud_ms = frauds[block, TIMES + place]
            if fraud_ms > time_ms or fraud_ms < oldest_event_ms:
                continue
            while edge < len(edges) and time_ms - fraud_ms >= edges[edge]:
                aggregates[edge, FRAUD_ROWS] = count
                edge += 1
            count += 1.0
        block = frauds[block, OLDER]
    while edge < len(edges):
        aggregates[edge, FRAUD_ROWS] = count
        edge += 1


@njit(cache=True)
def _write_columns(ops: Int64, aggregates: Float64, values: Float64, seconds_since_last: float, out: Float32) -> None:
    """Turn the aggregates at the edges into the key's columns of the feature vector."""
    value_count = len(values)
    differences, squares = SUMS + value_count, SUMS + 2 * value_count
    maxima, distinct = SUMS + 3 * value_count, SUMS + 4 * value_count
    for column in range(len(ops)):
        function, near, far = ops[column, 0], ops[column, 1], ops[column, 2]
        value, tag = ops[column, 3], ops[column, 4]
        result = 0.0
        if function == 7:  # seconds_since_last
            result = seconds_since_last
        else:
            rows = aggregates[far, ROWS]
            if function == 0:  # count
                result = rows
            elif function == 1:  # sum
                result = values[value] + aggregates[far, SUMS + value]
            elif function == 2:  # mean
                result = (values[value] + aggregates[far, SUMS + value]) / rows
            elif function == 3:  # max
                result = aggregates[far, maxima + value]
            elif function == 4:  # std, of the population
                mean = aggregates[far, differences + value] / rows
                result = np.sqrt(max(0.0, aggregates[far, squares + value] / rows - mean * mean))
            elif function == 5:  # ratio_to_mean, of the earlier ones
                result = 1.0
                if aggregates[far, SUMS + value] > 0.0:
                    result = values[value] * (rows - 1.0) / aggregates[far, SUMS + value]
            elif function == 6:  # distinct
                result = aggregates[far, distinct + tag]
            else:
                labelled = rows - aggregates[near, ROWS]
                fraud_rows = aggregates[far, FRAUD_ROWS] - aggregates[near, FRAUD_ROWS]
                if function == 8:  # labelled_count
                    result = labelled
                elif function == 9:  # fraud_count
                    result = fraud_rows
                elif labelled > 0.0:  # fraud_rate
                    result = fraud_rows / labelled
        out[column] = result


# --- sequences --------------------------------------------------------------------------------------------------


@njit(cache=True)
def _step(
    slots: Int64,
    step_times: Int64,
    step_values: Float32,
    columns: Int64,
    slot: int,
    time_ms: int,
    features: Float32,
    out: Float32,
) -> None:
    """Write the row's sequence (oldest first, the row last) and put the row among the key's last transactions.

    `out` float32 [length, 2 + fields] is zero where there is nothing.
    """
    length = step_times.shape[1]
    count = slots[slot, STEPS]
    place = count
    while place > 0 and step_times[slot, place - 1] > time_ms:
        place -= 1
    first = max(0, place - (length - 1))
    target = length - 1 - (place - first)
    for step in range(first, place):
        out[target, 0] = 1.0
        out[target, 1] = (time_ms - step_times[slot, step]) / 1000.0
        for field in range(len(columns)):
            out[target, 2 + field] = step_values[slot, step, field]
        target += 1
    out[target, 0] = 1.0
    for field in range(len(columns)):
        out[target, 2 + field] = features[columns[field]]

    if count == length:
        if place == 0:
            return
        for step in range(1, place):
            step_times[slot, step - 1] = step_times[slot, step]
            for field in range(len(columns)):
                step_values[slot, step - 1, field] = step_values[slot, step, field]
        place -= 1
    else:
        for step in range(count, place, -1):
            step_times[slot, step] = step_times[slot, step - 1]
            for field in range(len(columns)):
                step_values[slot, step, field] = step_values[slot, step - 1, field]
        slots[slot, STEPS] = count + 1
    step_times[slot, place] = time_ms
    for field in range(len(columns)):
        step_values[slot, place, field] = features[columns[field]]


# --- entry points -----------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def update(
    table: Array,
    slots: Int64,
    counters: Int64,
    events: Int64,
    frauds: Int64,
    step_times: Int64,
    step_values: Float32,
    edges: Int64,
    ops: Int64,
    sequence_columns: Int64,
    first_column: int,
    horizon_ms: int,
    events_per_key_max: int,
    has_labels: bool,
    has_sequence: bool,
    aggregates: Float64,
    seen: Int64,
    keys: Int64,
    times: Int64,
    values: Float64,
    tags: Int64,
    features: Float32,
    sequence: Float32,
) -> None:
    """Fold rows into the state of one key field and write its columns.

    State, program and scratch come first, in the order of their tuples. `keys` int64 [rows], `times` int64 [rows] in
    ms, `values` float64 [rows, values], `tags` int64 [rows, tags]; written: `features` float32 [rows, columns] from
    `first_column` on, and `sequence` float32 [rows, length, width] where the key has the sequence.
    """
    event_values = events.view(np.float64)
    value_count, tag_count = values.shape[1], tags.shape[1]
    event = np.zeros(value_count + tag_count, np.int64)
    event_as_float = event.view(np.float64)
    for row in range(len(keys)):
        time_ms = times[row]
        slot = _touch(table, slots, counters, events, frauds, keys[row])
        newest_ms, oldest_ms = time_ms, time_ms
        newest = slots[slot, EVENTS + NEWEST]
        if newest:
            newest_ms = max(newest_ms, events[newest, TIMES + events[newest, HIGH] - 1])
        counters[LATE] += newest_ms > time_ms
        kept_after_ms = newest_ms - horizon_ms
        _trim(slots, counters, events, slot, EVENTS, EVENT_POOL, kept_after_ms)
        newest, oldest = slots[slot, EVENTS + NEWEST], slots[slot, EVENTS + OLDEST]
        if oldest:
            oldest_ms = events[oldest, TIMES + events[oldest, LOW]]
        counters[GENERATION] += 1
        seconds_since_last = _scan(
            events, event_values, edges, aggregates, seen, newest, time_ms, values[row], tags[row], counters[GENERATION]
        )
        if has_labels:
            _trim(slots, counters, frauds, slot, FRAUDS, FRAUD_POOL, kept_after_ms)
            _scan_frauds(frauds, edges, aggregates, slots[slot, FRAUDS + NEWEST], time_ms, oldest_ms)
        _write_columns(ops, aggregates, values[row], seconds_since_last, features[row, first_column:])
        if has_sequence:
            _step(slots, step_times, step_values, sequence_columns, slot, time_ms, features[row], sequence[row])

        keep = time_ms > kept_after_ms
        if keep and slots[slot, EVENTS + COUNT] == events_per_key_max:
            keep = oldest_ms <= time_ms
            if keep:
                _drop_oldest(slots, counters, events, slot, EVENTS, EVENT_POOL)
        if keep:
            for value in range(value_count):
                event_as_float[value] = values[row, value]
            for tag in range(tag_count):
                event[value_count + tag] = tags[row, tag]
            _make_room(table, slots, counters, events, frauds, slot, EVENTS, EVENT_POOL)
            _insert(slots, events, slot, EVENTS, time_ms, event)
        else:
            counters[TOO_LATE] += 1


@njit(cache=True, nogil=True)
def update_labels(
    table: Array,
    slots: Int64,
    counters: Int64,
    events: Int64,
    frauds: Int64,
    events_per_key_max: int,
    keys: Int64,
    times: Int64,
    identities: Int64,
    labels: Int64,
) -> None:
    """Record which transactions of the keys were frauds.

    `times` int64 [rows]: when the transactions took place, in ms. `identities` int64 [rows]: their ids. `labels`
    int64 [rows]: 1 fraud, 0 not (takes back an earlier 1). Telling the same thing twice changes nothing.
    """
    event = np.zeros(1, np.int64)
    for row in range(len(keys)):
        slot = _touch(table, slots, counters, events, frauds, keys[row])
        known = _has_fraud(slots, frauds, slot, identities[row])
        if labels[row] and not known:
            if slots[slot, FRAUDS + COUNT] == events_per_key_max:
                oldest = slots[slot, FRAUDS + OLDEST]
                if frauds[oldest, TIMES + frauds[oldest, LOW]] > times[row]:
                    continue
                _drop_oldest(slots, counters, frauds, slot, FRAUDS, FRAUD_POOL)
            event[0] = identities[row]
            _make_room(table, slots, counters, events, frauds, slot, FRAUDS, FRAUD_POOL)
            _insert(slots, frauds, slot, FRAUDS, times[row], event)
        elif known and not labels[row]:
            _forget_fraud(slots, counters, frauds, slot, identities[row])


@njit(cache=True)
def _has_fraud(slots: Int64, frauds: Int64, slot: int, identity: int) -> bool:
    block = slots[slot, FRAUDS + NEWEST]
    while block:
        for place in range(frauds[block, LOW], frauds[block, HIGH]):
            if frauds[block, VALUES + place] == identity:
                return True
        block = frauds[block, OLDER]
    return False


@njit(cache=True)
def _forget_fraud(slots: Int64, counters: Int64, frauds: Int64, slot: int, identity: int) -> None:
    """Take one fraud out: carry the newer ones back by one place each, then drop the newest place."""
    block = slots[slot, FRAUDS + NEWEST]
    place = frauds[block, HIGH] - 1
    time_ms, found = frauds[block, TIMES + place], frauds[block, VALUES + place]
    while found != identity:
        if place > frauds[block, LOW]:
            place -= 1
        else:
            block = frauds[block, OLDER]
            place = frauds[block, HIGH] - 1
        time_ms, frauds[block, TIMES + place] = frauds[block, TIMES + place], time_ms
        found, frauds[block, VALUES + place] = frauds[block, VALUES + place], found
    _drop_newest(slots, counters, frauds, slot, FRAUDS, FRAUD_POOL)
