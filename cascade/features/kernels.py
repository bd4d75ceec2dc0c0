"""The kernels that fold rows and labels: features, sequences, and the state after them.

The kernel completes a row before it starts the next, so results do not depend on where a batch ends. For each row it
finds the key's slot, drops events that are too old, aggregates the windows, reads and extends the sequence, and inserts
the event.

A row sees the events of its own partition and of all partitions that are not hidden. Of hidden partitions it sees the
remotes, which are summaries of other workers' events. So events and remotes of a partition never count together.

Arguments are explained in `chains` (the state), in `Program` and `Scratch`, and in `update`. Besides:

event_values: `events` viewed as float64 (bits of value fields); `remote_values` likewise
event_partitions: `events` viewed as uint16 (partition ids); `remote_partitions` likewise
own_partition_id: the partition of the row
newest, oldest: first and last block of a chain
row: position in the batch; the kernels take arrays and a position, since a slice costs two atomic reference counts
"""

from __future__ import annotations

import numpy as np

from cascade.columns import Array, Bool, Float32, Float64, Int64
from cascade.compilation import kernel
from cascade.features.borrowing import borrowed
from cascade.features.chains import drop_oldest, home, insert, make_room, put, remove, touch, trim
from cascade.features.layout import (
    BLOCK,
    COUNT,
    EVENT_POOL,
    EVENTS,
    FRAUD_POOL,
    FRAUDS,
    GENERATION,
    HIGH,
    LATE,
    LOW,
    NEWER,
    NEWEST,
    OLDER,
    OLDEST,
    PARTITIONS,
    REMOTE_COUNT,
    REMOTE_POOL,
    REMOTE_START,
    REMOTE_VALUES,
    REMOTES,
    STEP_PARTITION,
    STEPS,
    TIMES,
    TOO_LATE,
    VALUES,
    KeyState,
)
from cascade.features.prefetch import CURSORS, prefetch_next_rows

NO_PRECEDING_SECONDS = -1.0
FLOAT32_MAX = float(np.finfo(np.float32).max)
# Columns of `Scratch.aggregates`
ROWS, FRAUD_ROWS, SUMS = range(3)


@kernel
def _is_new_tag(seen: Int64, tag: int, code: int, generation: int) -> bool:
    """Add a tag to the row's set of tags; whether it is new there."""
    mask = seen.shape[1] - 1
    place = home(code, mask)
    while seen[tag, place, 1] == generation:
        if seen[tag, place, 0] == code:
            return False
        place = (place + 1) & mask
    seen[tag, place, 0], seen[tag, place, 1] = code, generation
    return True


@kernel
def _copy_block(
    events: Int64,
    event_values: Float64,
    block: int,
    low: int,
    high: int,
    time_ms: int,
    count: int,
    ages: Int64,
    stored: Float64,
    stored_tags: Int64,
) -> None:
    """Copy the events of a block to `ages`, `stored` and `stored_tags`, from position `count` on.

    Indices are unsigned, so that the compiled code does not check their sign.
    """
    row, first, newest = np.uint64(block), np.uint64(count), np.uint64(high - 1)
    length = np.uint64(high - low)
    column = np.uint64(TIMES) + newest
    for place in range(length):
        ages[first + place] = time_ms - events[row, column - place]
    column = np.uint64(VALUES) + newest
    for value in range(np.uint64(len(stored))):
        for place in range(length):
            stored[value, first + place] = event_values[row, column - place]
        column += np.uint64(BLOCK)
    for tag in range(np.uint64(len(stored_tags))):
        for place in range(length):
            stored_tags[tag, first + place] = events[row, column - place]
        column += np.uint64(BLOCK)


@kernel
def _gather(
    events: Int64,
    event_values: Float64,
    event_partitions: Array,
    hidden: Bool | None,
    own_partition_id: int,
    age_ms_max: int,
    newest: int,
    time_ms: int,
    ages: Int64,
    stored: Float64,
    stored_tags: Int64,
) -> tuple[int, float]:
    """Copy the events that the row sees and that are younger than `age_ms_max` to arrays, the newest first.

    Returns how many there are, and the age in seconds of the event before the row, of whatever age.
    """
    value_count, tag_count = len(stored), len(stored_tags)
    seconds_since_last = NO_PRECEDING_SECONDS
    count = 0
    block = newest
    while block:
        low, high = events[block, LOW], events[block, HIGH]
        if hidden is None:
            youngest_ms = time_ms - events[block, TIMES + high - 1]
            if youngest_ms >= 0 and time_ms - events[block, TIMES + low] < age_ms_max:
                if seconds_since_last < 0.0:
                    seconds_since_last = youngest_ms / 1000.0
                _copy_block(events, event_values, block, low, high, time_ms, count, ages, stored, stored_tags)
                count += high - low
                block = events[block, OLDER]
                continue
        for place in range(high - 1, low - 1, -1):
            age_ms = time_ms - events[block, TIMES + place]
            if age_ms < 0:
                continue
            if hidden is not None:
                partition_id = event_partitions[block, PARTITIONS + place]
                if partition_id != own_partition_id and hidden[partition_id]:
                    continue
            if seconds_since_last < 0.0:
                seconds_since_last = age_ms / 1000.0
            if age_ms >= age_ms_max:
                return count, seconds_since_last
            ages[count] = age_ms
            for value in range(value_count):
                stored[value, count] = event_values[block, VALUES + BLOCK * value + place]
            for tag in range(tag_count):
                stored_tags[tag, count] = events[block, VALUES + BLOCK * (value_count + tag) + place]
            count += 1
        block = events[block, OLDER]
    return count, seconds_since_last


@kernel
def _aggregate(
    edges: Int64,
    aggregates: Float64,
    seen: Int64,
    count: int,
    ages: Int64,
    stored: Float64,
    stored_tags: Int64,
    row: int,
    values: Float64,
    tags: Int64,
    generation: int,
) -> None:
    """Aggregate the row itself and the `count` events before it, from the row back to the oldest, up to each edge.

    Sums do not include the row. The variance comes from differences to the row's own value, so that it is exact where
    values are equal. Running totals are local variables, which stay in registers. They add event after event, so that
    results do not depend on the blocks.
    """
    value_count, tag_count = values.shape[1], tags.shape[1]
    differences, squares = SUMS + value_count, SUMS + 2 * value_count
    maxima, distinct = SUMS + 3 * value_count, SUMS + 4 * value_count
    until = 0
    for edge in range(len(edges)):
        while until < count and ages[until] < edges[edge]:
            until += 1
        aggregates[edge, ROWS] = until + 1.0
    for value in range(value_count):
        own = values[row, value]
        total, difference_total, square_total, largest = 0.0, 0.0, 0.0, own
        place = 0
        for edge in range(len(edges)):
            until = int(aggregates[edge, ROWS]) - 1
            while place < until:
                earlier = stored[value, place]
                difference = earlier - own
                total += earlier
                difference_total += difference
                square_total += difference * difference
                largest = max(largest, earlier)
                place += 1
            aggregates[edge, SUMS + value] = total
            aggregates[edge, differences + value] = difference_total
            aggregates[edge, squares + value] = square_total
            aggregates[edge, maxima + value] = largest
    for tag in range(tag_count):
        _is_new_tag(seen, tag, tags[row, tag], generation)
        different, place = 1.0, 0
        for edge in range(len(edges)):
            until = int(aggregates[edge, ROWS]) - 1
            while place < until:
                if _is_new_tag(seen, tag, stored_tags[tag, place], generation):
                    different += 1.0
                place += 1
            aggregates[edge, distinct + tag] = different


@kernel
def _scan_remotes(
    remotes: Int64,
    remote_values: Float64,
    remote_partitions: Array,
    hidden: Bool,
    own_partition_id: int,
    edges: Int64,
    aggregates: Float64,
    newest: int,
    time_ms: int,
    row: int,
    values: Float64,
    seconds_since_last: float,
) -> tuple[float, int]:
    """Add the remotes of hidden partitions to the aggregates: each as its number of rows, at the time of its newest.

    Returns the age in seconds of the last event before the row, and the earliest start of a remote that counts
    (`time_ms` where none does).
    """
    value_count = values.shape[1]
    differences, squares, maxima = SUMS + value_count, SUMS + 2 * value_count, SUMS + 3 * value_count
    earliest_ms = time_ms
    block = newest
    while block:
        for place in range(remotes[block, HIGH] - 1, remotes[block, LOW] - 1, -1):
            partition_id = remote_partitions[block, PARTITIONS + place]
            age_ms = time_ms - remotes[block, TIMES + place]
            if age_ms < 0 or partition_id == own_partition_id or not hidden[partition_id]:
                continue
            earliest_ms = min(earliest_ms, remotes[block, VALUES + BLOCK * REMOTE_START + place])
            if seconds_since_last < 0.0 or age_ms / 1000.0 < seconds_since_last:
                seconds_since_last = age_ms / 1000.0
            count = np.float64(remotes[block, VALUES + BLOCK * REMOTE_COUNT + place])
            for edge in range(len(edges) - 1, -1, -1):
                if age_ms >= edges[edge]:
                    break
                at_edge = aggregates[edge]
                at_edge[ROWS] += count
                for value in range(value_count):
                    first = VALUES + BLOCK * (REMOTE_VALUES + value) + place
                    total = remote_values[block, first]
                    offset = total / count - values[row, value]
                    at_edge[SUMS + value] += total
                    at_edge[differences + value] += total - count * values[row, value]
                    at_edge[squares + value] += (
                        remote_values[block, first + BLOCK * value_count] + count * offset * offset
                    )
                    at_edge[maxima + value] = max(
                        at_edge[maxima + value], remote_values[block, first + 2 * BLOCK * value_count]
                    )
        block = remotes[block, OLDER]
    return seconds_since_last, earliest_ms


@kernel
def _oldest_seen_ms(
    events: Int64, event_partitions: Array, hidden: Bool, own_partition_id: int, oldest: int, time_ms: int
) -> int:
    """Return the time of the oldest event that the row sees, `time_ms` where there is none."""
    block = oldest
    while block:
        for place in range(events[block, LOW], events[block, HIGH]):
            partition_id = event_partitions[block, PARTITIONS + place]
            if partition_id == own_partition_id or not hidden[partition_id]:
                return events[block, TIMES + place]
        block = events[block, NEWER]
    return time_ms


@kernel
def _scan_frauds(
    frauds: Int64, edges: Int64, aggregates: Float64, newest: int, time_ms: int, oldest_event_ms: int
) -> None:
    """Count the frauds up to each edge, without those older than the oldest event: their transactions are gone."""
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


@kernel
def _write_columns(
    ops: Int64,
    aggregates: Float64,
    row: int,
    values: Float64,
    seconds_since_last: float,
    first_column: int,
    features: Float32,
) -> None:
    """Compute the key's columns of the feature vector from the aggregates at the edges."""
    value_count = values.shape[1]
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
                result = values[row, value] + aggregates[far, SUMS + value]
            elif function == 2:  # mean
                result = (values[row, value] + aggregates[far, SUMS + value]) / rows
            elif function == 3:  # max
                result = aggregates[far, maxima + value]
            elif function == 4:  # std, of the population
                mean = aggregates[far, differences + value] / rows
                result = np.sqrt(max(0.0, aggregates[far, squares + value] / rows - mean * mean))
            elif function == 5:  # ratio_to_mean, of the earlier ones
                result = 1.0
                if aggregates[far, SUMS + value] > 0.0:
                    result = values[row, value] * (rows - 1.0) / aggregates[far, SUMS + value]
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
        # a ratio to amounts near zero may exceed float32; an infinity would remain in the card's sequence
        features[row, first_column + column] = min(max(result, -FLOAT32_MAX), FLOAT32_MAX)


# --- sequences --------------------------------------------------------------------------------------------------


@kernel
def step(
    slots: Int64,
    step_times: Int64,
    step_values: Float32,
    columns: Int64,
    slot: int,
    time_ms: int,
    partition_id: int,
    row: int,
    features: Float32,
    out: Float32,
) -> None:
    """Write the row's sequence (oldest first, the row last), and insert the row into the key's last transactions.

    columns: int64 [fields], the features stored with each step
    features: float32 [rows, width], where this row's features are
    out: float32 [rows, length, 2 + fields], zero in front where there are fewer steps
    """
    length = step_times.shape[1]
    count = slots[slot, STEPS]
    place = count
    while place > 0 and step_times[slot, place - 1] > time_ms:
        place -= 1
    first = max(0, place - (length - 1))
    target = length - 1 - (place - first)
    for empty in range(target):
        for field in range(2 + len(columns)):
            out[row, empty, field] = 0.0
    for step in range(first, place):
        out[row, target, 0] = 1.0
        out[row, target, 1] = (time_ms - step_times[slot, step]) / 1000.0
        for field in range(len(columns)):
            out[row, target, 2 + field] = step_values[slot, step, field]
        target += 1
    out[row, target, 0] = 1.0
    out[row, target, 1] = 0.0
    for field in range(len(columns)):
        out[row, target, 2 + field] = features[row, columns[field]]

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
    slots[slot, STEP_PARTITION] = partition_id
    step_times[slot, place] = time_ms
    for field in range(len(columns)):
        step_values[slot, place, field] = features[row, columns[field]]


# --- entry points -----------------------------------------------------------------------------------------------


@kernel(nogil=True)
def update(
    table: Array,
    slots: Int64,
    counters: Int64,
    events: Int64,
    frauds: Int64,
    remotes: Int64,
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
    ages: Int64,
    stored: Float64,
    stored_tags: Int64,
    hidden: Bool | None,
    keys: Int64,
    times: Int64,
    partition_ids: Int64,
    values: Float64,
    tags: Int64,
    features: Float32,
    sequence: Float32,
) -> None:
    """Fold rows into the state of one key field and write its columns.

    The fields of `KeyState`, `Program` and `Scratch` come first, in their order. Then:

    hidden: bool [PARTITIONS_MAX], or None where no partition is; numba compiles a kernel for each, and the one for None
        does not read partition ids
    keys: int64 [rows], codes of the keys
    times: int64 [rows], ms
    partition_ids: int64 [rows], below PARTITIONS_MAX
    values: float64 [rows, value fields]
    tags: int64 [rows, tag fields]
    features: float32 [rows, width], written from `first_column` on
    sequence: float32 [rows, length, 2 + fields], written where `has_sequence`
    """
    table, slots, counters, events = borrowed(table), borrowed(slots), borrowed(counters), borrowed(events)
    frauds, remotes, step_times = borrowed(frauds), borrowed(remotes), borrowed(step_times)
    step_values, edges, ops = borrowed(step_values), borrowed(edges), borrowed(ops)
    sequence_columns, aggregates, seen = borrowed(sequence_columns), borrowed(aggregates), borrowed(seen)
    ages, stored, stored_tags, keys = borrowed(ages), borrowed(stored), borrowed(stored_tags), borrowed(keys)
    values, tags, features, sequence = borrowed(values), borrowed(tags), borrowed(features), borrowed(sequence)
    event_values = events.view(np.float64)
    event_partitions = events.view(np.uint16)
    remote_values = remotes.view(np.float64)
    remote_partitions = remotes.view(np.uint16)
    value_count, tag_count = values.shape[1], tags.shape[1]
    event = np.zeros(value_count + tag_count, np.int64)
    event_as_float = event.view(np.float64)
    cursors = np.zeros(CURSORS, np.int64)
    age_ms_max = edges[-1] if len(edges) else 0
    for row in range(len(keys)):
        prefetch_next_rows(
            row, table, slots, events, frauds, step_times, step_values, has_labels, has_sequence, keys, cursors
        )
        time_ms, partition_id = times[row], partition_ids[row]
        slot = touch(table, slots, counters, events, frauds, remotes, keys[row])
        latest_ms, oldest_ms = time_ms, time_ms
        newest = slots[slot, EVENTS + NEWEST]
        if newest:
            latest_ms = max(latest_ms, events[newest, TIMES + events[newest, HIGH] - 1])
        counters[LATE] += latest_ms > time_ms
        dropped_until_ms = latest_ms - horizon_ms
        trim(slots, counters, events, slot, EVENTS, EVENT_POOL, dropped_until_ms)
        newest, oldest = slots[slot, EVENTS + NEWEST], slots[slot, EVENTS + OLDEST]
        if oldest:
            oldest_ms = events[oldest, TIMES + events[oldest, LOW]]
        counters[GENERATION] += 1
        count, seconds_since_last = _gather(
            events,
            event_values,
            event_partitions,
            hidden,
            partition_id,
            age_ms_max,
            newest,
            time_ms,
            ages,
            stored,
            stored_tags,
        )
        _aggregate(edges, aggregates, seen, count, ages, stored, stored_tags, row, values, tags, counters[GENERATION])
        oldest_seen_ms = oldest_ms
        if hidden is not None:
            if has_labels:
                oldest_seen_ms = _oldest_seen_ms(events, event_partitions, hidden, partition_id, oldest, time_ms)
            if slots[slot, REMOTES + COUNT]:
                trim(slots, counters, remotes, slot, REMOTES, REMOTE_POOL, dropped_until_ms)
                seconds_since_last, earliest_ms = _scan_remotes(
                    remotes,
                    remote_values,
                    remote_partitions,
                    hidden,
                    partition_id,
                    edges,
                    aggregates,
                    slots[slot, REMOTES + NEWEST],
                    time_ms,
                    row,
                    values,
                    seconds_since_last,
                )
                oldest_seen_ms = min(oldest_seen_ms, earliest_ms)
        if has_labels:
            trim(slots, counters, frauds, slot, FRAUDS, FRAUD_POOL, dropped_until_ms)
            _scan_frauds(frauds, edges, aggregates, slots[slot, FRAUDS + NEWEST], time_ms, oldest_seen_ms)
        _write_columns(ops, aggregates, row, values, seconds_since_last, first_column, features)
        if has_sequence:
            step(slots, step_times, step_values, sequence_columns, slot, time_ms, partition_id, row, features, sequence)

        store = time_ms > dropped_until_ms
        if store and slots[slot, EVENTS + COUNT] == events_per_key_max:
            store = oldest_ms <= time_ms
            if store:
                drop_oldest(slots, counters, events, slot, EVENTS, EVENT_POOL)
        if store:
            for value in range(value_count):
                event_as_float[value] = values[row, value]
            for tag in range(tag_count):
                event[value_count + tag] = tags[row, tag]
            make_room(table, slots, counters, events, frauds, remotes, events, slot, EVENTS, EVENT_POOL)
            insert(slots, events, event_partitions, slot, EVENTS, time_ms, partition_id, event)
        else:
            counters[TOO_LATE] += 1


@kernel(nogil=True)
def update_labels(
    state: KeyState, events_per_key_max: int, keys: Int64, times: Int64, identities: Int64, labels: Int64
) -> None:
    """Store which transactions of the keys were frauds. A label that comes again changes nothing.

    keys: int64 [rows], codes of the keys
    times: int64 [rows], when the transactions took place, in ms
    identities: int64 [rows], ids of the transactions
    labels: int64 [rows], 1 fraud, 0 not (removes an earlier 1)
    """
    state = borrowed(state)
    slots, counters, frauds = state.slots, state.counters, state.frauds
    fraud_partitions = frauds.view(np.uint16)
    event = np.zeros(1, np.int64)
    for row in range(len(keys)):
        slot = touch(state.table, slots, counters, state.events, frauds, state.remotes, keys[row])
        block, place = find_fraud(slots, frauds, slot, identities[row])
        if labels[row] and not block:
            event[0] = identities[row]
            put(state, frauds, fraud_partitions, slot, FRAUDS, FRAUD_POOL, events_per_key_max, times[row], 0, event)
        elif block and not labels[row]:
            remove(slots, counters, frauds, fraud_partitions, slot, FRAUDS, FRAUD_POOL, block, place)


@kernel
def find_fraud(slots: Int64, frauds: Int64, slot: int, identity: int) -> tuple[int, int]:
    """Return block and place of a fraud, block 0 where it is not in the chain."""
    block = slots[slot, FRAUDS + NEWEST]
    while block:
        for place in range(frauds[block, LOW], frauds[block, HIGH]):
            if frauds[block, VALUES + place] == identity:
                return block, place
        block = frauds[block, OLDER]
    return 0, 0
