"""The kernels that fold rows and labels: features, and the state after them.

The kernel completes a row before it starts the next, so results do not depend on where a batch ends. For each row and
key field it finds the key's slot, moves the running totals of its windows on (`totals`), drops events that are too old,
writes the features, and inserts the event. Then all features of the row are known, and the events get the fields of the
steps of the sequences (`sequences`).

A row sees the events of its own partition and of all partitions that are not hidden. Of hidden partitions it sees the
remotes, which are summaries of other workers' events. So events and remotes of a partition never count together.

Running totals are for rows that are not late and see all events of their key. For others the kernel adds up the windows
from the events, and its results are the same to the last bit.

Arguments are explained in `chains` and `totals` (the state), in `Program`, and in `update`. Besides:

program: the key field's `Program`
own_partition_id: the partition of the row
row: position in the batch
"""

from __future__ import annotations

import numpy as np

from cascade.columns import Bool, Float32, Int64
from cascade.compilation import kernel
from cascade.features.chains import drop_oldest, home, insert, make_room, mix, newest_ms, put, remove, touch, trim
from cascade.features.codes import TransactionCode, WindowCode
from cascade.features.handles import open_program, open_state
from cascade.features.layout import (
    BLOCK,
    COLUMN_FAR,
    COLUMN_FUNCTION,
    COLUMN_NEAR,
    COLUMN_TAG,
    COLUMN_VALUE,
    COUNT,
    DAY_MS,
    EDGE_AGE_MS,
    EDGE_PLACE,
    EDGE_ROWS,
    EDGE_VALUES,
    EDGE_WIDTH,
    EPOCH_WEEKDAY,
    EVENTS,
    EVERYONE,
    FRAUDS,
    GENERATION,
    HIGH,
    HOUR_MS,
    INPUT_PARTITIONS,
    INPUT_TIMES,
    LARGEST,
    LAST,
    LATE,
    LATER,
    LOW,
    MATCH_AGE_MS,
    MATCH_LAST,
    NEWER,
    NEWEST,
    NIGHT_ENDS_HOUR,
    OLDER,
    OLDEST,
    PARTITIONS,
    PARTITIONS_MAX,
    REMOTE_COUNT,
    REMOTE_START,
    REMOTE_VALUES,
    REMOTES,
    STATELESS_ARGUMENT,
    STATELESS_FUNCTION,
    STATELESS_INPUT,
    STORED_PLACE,
    STORED_SLOT,
    SUM,
    TIMES,
    TOO_LATE,
    TOTALS_AUDIENCE,
    TOTALS_VISIBILITY,
    USED_BY_DISTINCT,
    USED_BY_MATCHES,
    VALUES,
    Program,
    State,
)
from cascade.features.prefetch import prefetch_next_rows
from cascade.features.sequences import add_step, begin_batch, write_waiting
from cascade.features.totals import (
    NO_PRECEDING_SECONDS,
    advance,
    drop_oldest_event,
    enter,
    in_ticks,
    is_seen,
    keep,
    plus,
    rows_between,
    scan,
    spread,
    square,
    squares_of,
)

FLOAT32_MAX = float(np.finfo(np.float32).max)
# Columns of `Program.remote`: the rows, then for each value field
REMOTE_ROWS, REMOTE_FIELDS = range(2)
REMOTE_SUM, REMOTE_DIFFERENCES, REMOTE_SQUARES, REMOTE_LARGEST, REMOTE_WIDTH = range(5)
NO_PRECEDING_AGE_MS = -1
# An age beyond every window, for a tag that no event has
NO_MATCH_AGE_MS = 2**62


@kernel(forceinline=True)
def _as_float32(number: float) -> float:
    """Return a number within float32's range: an infinity would remain in the key's sequence."""
    return min(max(number, -FLOAT32_MAX), FLOAT32_MAX)


# --- the transaction alone --------------------------------------------------------------------------------------


@kernel(forceinline=True)
def _write_stateless(stateless: Int64, inputs: Int64, rows: int, features: Float32) -> None:
    """Compute the columns that need no state."""
    numbers = inputs.view(np.float64)
    for column in range(len(stateless)):
        function, field = stateless[column, STATELESS_FUNCTION], stateless[column, STATELESS_INPUT]
        argument = stateless[column, STATELESS_ARGUMENT]
        for row in range(rows):
            time_ms = inputs[INPUT_TIMES, row]
            result = 0.0
            if function == TransactionCode.VALUE:
                result = numbers[field, row]
            elif function == TransactionCode.ONE_HOT:
                result = np.float64(inputs[field, row] == argument)
            elif function == TransactionCode.CATEGORY:
                result = np.float64(inputs[field, row])
            elif function == TransactionCode.BUCKET:
                result = np.float64(mix(inputs[field, row]) % np.uint64(argument))
            elif function == TransactionCode.HOUR:
                result = time_ms % DAY_MS / HOUR_MS
            elif function == TransactionCode.NIGHT:
                result = np.float64(time_ms % DAY_MS < NIGHT_ENDS_HOUR * HOUR_MS)
            else:
                weekday = (time_ms // DAY_MS + EPOCH_WEEKDAY) % 7
                if function == TransactionCode.WEEKDAY:
                    result = np.float64(weekday)
                elif function == TransactionCode.WEEKEND:
                    result = np.float64(weekday >= 5)
            features[row, column] = _as_float32(result)


# --- what windows have besides their totals ---------------------------------------------------------------------


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
def _count_tags(
    state: State, program: Program, slot: int, time_ms: int, hidden: Bool, any_hidden: bool, own_partition_id: int
) -> None:
    """Count the different tags up to each edge, the row's own included, from the row back to the oldest event."""
    values, generation = len(program.ticks), state.counters[GENERATION]
    for tag in range(program.distinct.shape[1]):
        if not program.tag_uses[tag, USED_BY_DISTINCT]:
            continue
        _is_new_tag(program.seen, tag, program.event[values + tag], generation)
        different, edge = 1, 0
        block = state.slots[slot, EVENTS + NEWEST]
        while block and edge < len(program.edges):
            for place in range(state.events.blocks[block, HIGH] - 1, state.events.blocks[block, LOW] - 1, -1):
                age_ms = time_ms - state.events.blocks[block, TIMES + place]
                if age_ms < 0 or (any_hidden and not is_seen(state, block, place, hidden, own_partition_id)):
                    continue
                while edge < len(program.edges) and age_ms >= program.edges[edge, EDGE_AGE_MS]:
                    program.distinct[edge, tag] = different
                    edge += 1
                if edge == len(program.edges):
                    break
                code = state.events.blocks[block, VALUES + BLOCK * (values + tag) + place]
                different += _is_new_tag(program.seen, tag, code, generation)
            block = state.events.blocks[block, OLDER]
        while edge < len(program.edges):
            program.distinct[edge, tag] = different
            edge += 1


@kernel
def _match_tags(
    state: State,
    program: Program,
    slot: int,
    time_ms: int,
    floor_ms: int,
    hidden: Bool,
    any_hidden: bool,
    own_partition_id: int,
) -> None:
    """Look for the row's tags among the events before it that are later than `floor_ms`, from the newest back."""
    values = len(program.ticks)
    for tag in range(program.distinct.shape[1]):
        if not program.tag_uses[tag, USED_BY_MATCHES]:
            continue
        column = VALUES + BLOCK * (values + tag)
        program.matches[tag, MATCH_LAST], program.matches[tag, MATCH_AGE_MS] = -1, NO_MATCH_AGE_MS
        block, is_done = state.slots[slot, EVENTS + NEWEST], False
        while block and not is_done:
            for place in range(state.events.blocks[block, HIGH] - 1, state.events.blocks[block, LOW] - 1, -1):
                event_ms = state.events.blocks[block, TIMES + place]
                if event_ms > time_ms or (any_hidden and not is_seen(state, block, place, hidden, own_partition_id)):
                    continue
                if event_ms <= floor_ms:
                    is_done = True
                    break
                is_same = state.events.blocks[block, column + place] == program.event[values + tag]
                if program.matches[tag, MATCH_LAST] < 0:
                    program.matches[tag, MATCH_LAST] = is_same
                if is_same:
                    program.matches[tag, MATCH_AGE_MS] = time_ms - event_ms
                    is_done = True
                    break
            block = state.events.blocks[block, OLDER]


@kernel
def _follow_order(
    state: State,
    program: Program,
    slot: int,
    time_ms: int,
    floor_ms: int,
    hidden: Bool,
    any_hidden: bool,
    own_partition_id: int,
) -> None:
    """Compare each event that is later than `floor_ms` with the next one up to each edge, from the row back.

    Writes `Program.order`, `first_age_ms`, and the last event's values in `neighbours`: 0 where there is none.
    """
    values, so_far = len(program.ticks), len(program.edges)
    neighbours, values_of_neighbours = program.neighbours, program.neighbours.view(np.float64)
    for field in range(len(program.reach)):
        neighbours[LATER, field], neighbours[LAST, field] = program.event[field], 0
    program.order[so_far] = 0
    program.first_age_ms[so_far] = NO_PRECEDING_AGE_MS
    block, edge, is_first, is_done = state.slots[slot, EVENTS + NEWEST], 0, True, False
    while block and not is_done:
        for place in range(state.events.blocks[block, HIGH] - 1, state.events.blocks[block, LOW] - 1, -1):
            event_ms = state.events.blocks[block, TIMES + place]
            if event_ms > time_ms or (any_hidden and not is_seen(state, block, place, hidden, own_partition_id)):
                continue
            if event_ms <= floor_ms:
                is_done = True
                break
            age_ms = time_ms - event_ms
            while edge < program.reach_max and age_ms >= program.edges[edge, EDGE_AGE_MS]:
                program.order[edge], program.first_age_ms[edge] = program.order[so_far], program.first_age_ms[so_far]
                edge += 1
            for field in range(len(program.reach)):
                at = VALUES + BLOCK * field + place
                stored = state.events.blocks[block, at]
                if is_first:
                    neighbours[LAST, field] = stored
                if edge >= program.reach[field]:
                    continue
                if field < values:
                    rises = values_of_neighbours[LATER, field] > state.events.values[block, at]
                    program.order[so_far, field] += rises
                else:
                    program.order[so_far, field] += stored != neighbours[LATER, field]
                    if stored == program.event[field]:
                        program.first_age_ms[so_far, field - values] = age_ms
                neighbours[LATER, field] = stored
            is_first = False
            if edge >= program.reach_max:
                is_done = True
                break
        block = state.events.blocks[block, OLDER]
    while edge < program.reach_max:
        program.order[edge], program.first_age_ms[edge] = program.order[so_far], program.first_age_ms[so_far]
        edge += 1


@kernel
def _scan_remotes(
    state: State,
    program: Program,
    slot: int,
    time_ms: int,
    hidden: Bool,
    own_partition_id: int,
    seconds_since_last: float,
) -> tuple[float, int]:
    """Add the remotes of hidden partitions up to each edge: each as its number of rows, at the time of its newest.

    Returns the age in seconds of the last event before the row, and the earliest start of a remote that counts
    (`time_ms` where none does).
    """
    remotes, values = state.remotes.blocks, program.event.view(np.float64)
    value_count = len(program.ticks)
    for edge in range(len(program.edges)):
        program.remote[edge] = 0.0
        for field in range(value_count):
            program.remote[edge, REMOTE_FIELDS + REMOTE_WIDTH * field + REMOTE_LARGEST] = -np.inf
    earliest_ms = time_ms
    block = state.slots[slot, REMOTES + NEWEST]
    while block:
        for place in range(remotes[block, HIGH] - 1, remotes[block, LOW] - 1, -1):
            partition_id = state.remotes.partitions[block, PARTITIONS + place]
            age_ms = time_ms - remotes[block, TIMES + place]
            if age_ms < 0 or partition_id == own_partition_id or not hidden[partition_id]:
                continue
            earliest_ms = min(earliest_ms, remotes[block, VALUES + BLOCK * REMOTE_START + place])
            if seconds_since_last < 0.0 or age_ms / 1000.0 < seconds_since_last:
                seconds_since_last = age_ms / 1000.0
            count = np.float64(remotes[block, VALUES + BLOCK * REMOTE_COUNT + place])
            for edge in range(len(program.edges) - 1, -1, -1):
                if age_ms >= program.edges[edge, EDGE_AGE_MS]:
                    break
                at_edge = program.remote[edge]
                at_edge[REMOTE_ROWS] += count
                for field in range(value_count):
                    first = VALUES + BLOCK * (REMOTE_VALUES + field) + place
                    total = state.remotes.values[block, first]
                    squares = state.remotes.values[block, first + BLOCK * value_count]
                    largest = state.remotes.values[block, first + 2 * BLOCK * value_count]
                    offset = total / count - values[field]
                    column = REMOTE_FIELDS + REMOTE_WIDTH * field
                    at_edge[column + REMOTE_SUM] += total
                    at_edge[column + REMOTE_DIFFERENCES] += total - count * values[field]
                    at_edge[column + REMOTE_SQUARES] += squares + count * offset * offset
                    at_edge[column + REMOTE_LARGEST] = max(at_edge[column + REMOTE_LARGEST], largest)
        block = remotes[block, OLDER]
    return seconds_since_last, earliest_ms


@kernel(forceinline=True)
def _oldest_seen_ms(
    state: State, slot: int, floor_ms: int, hidden: Bool, any_hidden: bool, own_partition_id: int, time_ms: int
) -> int:
    """Return the time of the oldest event later than `floor_ms` that the row sees, `time_ms` where there is none."""
    block = state.slots[slot, EVENTS + OLDEST]
    while block:
        for place in range(state.events.blocks[block, LOW], state.events.blocks[block, HIGH]):
            event_ms = state.events.blocks[block, TIMES + place]
            if event_ms <= floor_ms:
                continue
            if not any_hidden or is_seen(state, block, place, hidden, own_partition_id):
                return event_ms
        block = state.events.blocks[block, NEWER]
    return time_ms


@kernel(forceinline=True)
def _scan_frauds(state: State, program: Program, slot: int, time_ms: int, oldest_event_ms: int) -> None:
    """Count the frauds up to each edge, without those older than the oldest event: their transactions are gone."""
    frauds = state.frauds.blocks
    count, edge = 0, 0
    block = state.slots[slot, FRAUDS + NEWEST]
    while block and edge < len(program.edges):
        for place in range(frauds[block, HIGH] - 1, frauds[block, LOW] - 1, -1):
            fraud_ms = frauds[block, TIMES + place]
            if fraud_ms > time_ms or fraud_ms < oldest_event_ms:
                continue
            while edge < len(program.edges) and time_ms - fraud_ms >= program.edges[edge, EDGE_AGE_MS]:
                program.fraud_rows[edge] = count
                edge += 1
            count += 1
        block = frauds[block, OLDER]
    while edge < len(program.edges):
        program.fraud_rows[edge] = count
        edge += 1


# --- columns ----------------------------------------------------------------------------------------------------


@kernel(forceinline=True)
def _population_std(state: State, program: Program, at: int, edge: int, field: int, other_rows: float) -> float:
    """Compute the standard deviation of the population of a window; `other_rows`: rows of remotes in it."""
    place, ticks, per_unit = program.edges[edge, EDGE_PLACE], program.ticks[field], program.ticks_per_unit[field]
    column = place + EDGE_VALUES + program.edges[edge, EDGE_WIDTH] * field
    rows, earlier = state.totals[at, place + EDGE_ROWS] + 1, state.totals[at, column + SUM]
    high, low = plus(*squares_of(state.totals, at, column), *square(ticks))
    scaled = spread(rows, earlier + ticks, high, low)
    if not other_rows:
        return np.sqrt(scaled) / (rows * per_unit)
    # around the row's own value, as the remotes are
    others, first = program.remote[edge], REMOTE_FIELDS + REMOTE_WIDTH * field
    difference = (earlier - (rows - 1) * ticks) / per_unit
    squares = scaled / rows / per_unit / per_unit + difference * difference / rows + others[first + REMOTE_SQUARES]
    mean = (difference + others[first + REMOTE_DIFFERENCES]) / (rows + other_rows)
    return np.sqrt(max(0.0, squares / (rows + other_rows) - mean * mean))


@kernel(forceinline=True)
def _value_result(state: State, program: Program, function: int, at: int, edge: int, field: int, remote: bool) -> float:
    """Compute a function of the values of a window."""
    place, value = program.edges[edge, EDGE_PLACE], program.event.view(np.float64)[field]
    column = place + EDGE_VALUES + program.edges[edge, EDGE_WIDTH] * field
    earlier, ticks, per_unit = state.totals[at, column + SUM], program.ticks[field], program.ticks_per_unit[field]
    rows = state.totals[at, place + EDGE_ROWS] + 1
    others, first = program.remote[edge], REMOTE_FIELDS + REMOTE_WIDTH * field
    other_rows = program.remote[edge, REMOTE_ROWS] if remote else 0.0
    if function == WindowCode.MAX:
        largest = max(value, state.largest[at, column + LARGEST])
        return max(largest, others[first + REMOTE_LARGEST]) if other_rows else largest
    if function == WindowCode.STD:
        return _population_std(state, program, at, edge, field, other_rows)
    if function == WindowCode.RATIO_TO_MEAN:  # of the earlier ones
        total = earlier / per_unit
        if other_rows:
            total += others[first + REMOTE_SUM]
        return ticks / per_unit * (rows - 1 + other_rows) / total if total > 0.0 else 1.0
    total = (earlier + ticks) / per_unit
    if other_rows:
        total += others[first + REMOTE_SUM]
    return total if function == WindowCode.SUM else total / (rows + other_rows)


@kernel(forceinline=True)
def _order_result(program: Program, function: int, edge: int, column: int) -> float:
    """Compute a function of the order of a window's values or tags."""
    value, tag = program.columns[column, COLUMN_VALUE], program.columns[column, COLUMN_TAG]
    if function == WindowCode.RATIO_TO_LAST:
        last = program.neighbours.view(np.float64)[LAST, value]
        return program.event.view(np.float64)[value] / last if last > 0.0 else 1.0
    if function == WindowCode.RISES:
        return np.float64(program.order[edge, value])
    if function == WindowCode.CHANGES:
        return np.float64(program.order[edge, len(program.ticks) + tag])
    age_ms = program.first_age_ms[edge, tag]
    return age_ms / 1000.0 if age_ms >= 0 else NO_PRECEDING_SECONDS


@kernel(forceinline=True)
def _write_columns(
    state: State,
    program: Program,
    slot: int,
    at: int,
    row: int,
    time_ms: int,
    hidden: Bool,
    any_hidden: bool,
    own_partition_id: int,
    seconds_since_last: float,
    remote: bool,
    features: Float32,
) -> None:
    """Compute the key's columns of the feature vector.

    at: row of the totals
    remote: whether `program.remote` counts too
    """
    for column in range(len(program.columns)):
        function = program.columns[column, COLUMN_FUNCTION]
        near, far = program.columns[column, COLUMN_NEAR], program.columns[column, COLUMN_FAR]
        result = 0.0
        if function >= WindowCode.SUM:
            result = _value_result(state, program, function, at, far, program.columns[column, COLUMN_VALUE], remote)
        elif function == WindowCode.SECONDS_SINCE_LAST:
            result = seconds_since_last
        elif function == WindowCode.COUNT:
            result = state.totals[at, program.edges[far, EDGE_PLACE] + EDGE_ROWS] + 1.0
            if remote:
                result += program.remote[far, REMOTE_ROWS]
        elif function == WindowCode.DISTINCT:
            result = np.float64(program.distinct[far, program.columns[column, COLUMN_TAG]])
        elif function == WindowCode.SAME_AS_LAST:
            result = np.float64(program.matches[program.columns[column, COLUMN_TAG], MATCH_LAST])
        elif function == WindowCode.SEEN:
            age_ms = program.matches[program.columns[column, COLUMN_TAG], MATCH_AGE_MS]
            result = np.float64(age_ms < program.edges[far, EDGE_AGE_MS])
        elif function >= WindowCode.RATIO_TO_LAST and function < WindowCode.COUNT:
            result = _order_result(program, function, far, column)
        else:
            fraud_rows = program.fraud_rows[far] - program.fraud_rows[near]
            if function == WindowCode.FRAUD_COUNT:
                result = np.float64(fraud_rows)
            elif fraud_rows > 0 or function == WindowCode.LABELLED_COUNT:
                # most keys have no fraud, so that their rows need not be counted
                rows = 1.0 * rows_between(
                    state, program, slot, time_ms, hidden, any_hidden, own_partition_id, near, far
                )
                if remote:
                    rows += program.remote[far, REMOTE_ROWS] - program.remote[near, REMOTE_ROWS]
                if function == WindowCode.LABELLED_COUNT:
                    result = rows
                elif rows > 0.0:  # fraud_rate
                    result = fraud_rows / rows
        features[row, program.first_column + column] = _as_float32(result)


# --- entry points -----------------------------------------------------------------------------------------------


@kernel(forceinline=True)
def _store(state: State, program: Program, slot: int, time_ms: int, latest_ms: int, partition_id: int) -> int:
    """Insert the row's event within the limits; return its place (BLOCK × block + place), 0 if it was not stored."""
    if time_ms <= latest_ms - program.horizon_ms:
        return 0
    valid = state.totals[slot, TOTALS_VISIBILITY] == program.visibility
    if state.slots[slot, EVENTS + COUNT] == program.events_per_key_max:
        oldest = state.slots[slot, EVENTS + OLDEST]
        if state.events.blocks[oldest, TIMES + state.events.blocks[oldest, LOW]] > time_ms:
            return 0
        if valid:
            drop_oldest_event(state, program, slot)
        drop_oldest(state, state.events, slot)
    make_room(state, state.events, slot)
    event_place = insert(state, state.events, slot, time_ms, partition_id, program.event)
    # to make room may have taken events of the same key
    if state.totals[slot, TOTALS_VISIBILITY] == program.visibility:
        enter(state, program, slot, time_ms, latest_ms)
    return event_place


@kernel(forceinline=True)
def _restrict(state: State, slot: int, partition_id: int) -> None:
    """Note that a slot has an event of a hidden partition, which only rows of the same partition see."""
    if state.totals[slot, TOTALS_AUDIENCE] == EVERYONE:
        state.totals[slot, TOTALS_AUDIENCE] = partition_id
    elif state.totals[slot, TOTALS_AUDIENCE] != partition_id:
        state.totals[slot, TOTALS_VISIBILITY] = 0


@kernel(forceinline=True)
def _fold_row(
    state: State,
    program: Program,
    inputs: Int64,
    row: int,
    hidden: Bool,
    any_hidden: bool,
    features: Float32,
) -> None:
    """Fold one row into the state of a key field, and write its columns; arguments as for `update`."""
    time_ms, partition_id = inputs[INPUT_TIMES, row], inputs[INPUT_PARTITIONS, row]
    slot = touch(state, inputs[program.inputs[0], row])
    if program.has_sequence:
        write_waiting(state, slot)
    for field in range(len(program.inputs) - 1):
        program.event[field] = inputs[program.inputs[1 + field], row]
    for field in range(len(program.ticks)):
        value = program.event.view(np.float64)[field]
        program.ticks[field] = in_ticks(value, program.ticks_per_unit[field], program.ticks_max)
    last_ms = newest_ms(state, state.events, slot, time_ms)
    latest_ms = max(last_ms, time_ms)
    floor_ms = latest_ms - program.horizon_ms
    is_late = latest_ms > time_ms
    state.counters[LATE] += is_late
    state.counters[GENERATION] += 1
    at = slot
    if is_late or state.totals[slot, TOTALS_VISIBILITY] != program.visibility:
        at = 0
    else:
        advance(state, program, slot, time_ms)
        if state.totals[slot, TOTALS_AUDIENCE] != EVERYONE and state.totals[slot, TOTALS_AUDIENCE] != partition_id:
            at = 0
    trim(state, state.events, slot, floor_ms, program.kept)
    seconds_since_last = NO_PRECEDING_SECONDS
    if at == 0:
        seconds_since_last, sees_all = scan(state, program, slot, time_ms, floor_ms, hidden, any_hidden, partition_id)
        if sees_all and not is_late:
            keep(state, program, slot, partition_id if any_hidden and hidden[partition_id] else EVERYONE)
    elif state.slots[slot, EVENTS + COUNT] and last_ms > floor_ms:
        seconds_since_last = (time_ms - last_ms) / 1000.0
    if program.distinct.shape[1]:
        _count_tags(state, program, slot, time_ms, hidden, any_hidden, partition_id)
        _match_tags(state, program, slot, time_ms, floor_ms, hidden, any_hidden, partition_id)
    if program.reach_max >= 0:
        _follow_order(state, program, slot, time_ms, floor_ms, hidden, any_hidden, partition_id)
    oldest_seen_ms = time_ms
    if program.has_labels and state.slots[slot, FRAUDS + COUNT]:
        oldest_seen_ms = _oldest_seen_ms(state, slot, floor_ms, hidden, any_hidden, partition_id, time_ms)
    has_remotes = any_hidden and state.slots[slot, REMOTES + COUNT] > 0
    if has_remotes:
        trim(state, state.remotes, slot, floor_ms, 0)
        seconds_since_last, earliest_ms = _scan_remotes(
            state, program, slot, time_ms, hidden, partition_id, seconds_since_last
        )
        oldest_seen_ms = min(oldest_seen_ms, earliest_ms)
    if program.has_labels:
        trim(state, state.frauds, slot, floor_ms, 0)
        _scan_frauds(state, program, slot, time_ms, oldest_seen_ms)
    _write_columns(
        state,
        program,
        slot,
        at,
        row,
        time_ms,
        hidden,
        any_hidden,
        partition_id,
        seconds_since_last,
        has_remotes,
        features,
    )
    if any_hidden and hidden[partition_id]:
        _restrict(state, slot, partition_id)
    event_place = _store(state, program, slot, time_ms, latest_ms, partition_id)
    state.counters[TOO_LATE] += event_place == 0
    program.stored[STORED_SLOT], program.stored[STORED_PLACE] = slot, event_place


@kernel(nogil=True)
def update(
    handles: Int64,
    stateless: Int64,
    inputs: Int64,
    rows: int,
    wanted: Bool,
    any_hidden: bool,
    features: Float32,
) -> int:
    """Fold rows into the state of all key fields, and write their features.

    handles: int64 [key fields, fields, 4]
    stateless: int64 [columns, 3], the columns computed from the transaction alone
    inputs: int64 [fields, ≥ rows], the input table
    rows: how many rows there are
    wanted: bool [≥ rows], the rows whose sequences may be asked for
    any_hidden: whether any partition is hidden
    features: float32 [≥ rows, width], written

    Returns −1, or the first row whose partition id is out of range; then nothing is folded.
    """
    for row in range(rows):
        if not 0 <= inputs[INPUT_PARTITIONS, row] < PARTITIONS_MAX:
            return row
    _write_stateless(stateless, inputs, rows, features)
    for key_field in range(len(handles)):
        begin_batch(handles[key_field])
    for row in range(rows):
        for key_field in range(len(handles)):
            state, program = open_state(handles[key_field]), open_program(handles[key_field])
            prefetch_next_rows(state, program, inputs, row, rows)
            _fold_row(state, program, inputs, row, state.waiting.hidden, any_hidden, features)
        time_ms, partition_id = inputs[INPUT_TIMES, row], inputs[INPUT_PARTITIONS, row]
        for key_field in range(len(handles)):
            state, program = open_state(handles[key_field]), open_program(handles[key_field])
            if program.has_sequence:
                add_step(state, program, row, time_ms, partition_id, wanted[row], features)
    return -1


@kernel(nogil=True)
def update_labels(handle: Int64, keys: Int64, times: Int64, identities: Int64, labels: Int64) -> None:
    """Store which transactions of the keys were frauds. A label that comes again changes nothing.

    handle: of the key field
    keys: int64 [rows], codes of the keys
    times: int64 [rows], when the transactions took place, in ms
    identities: int64 [rows], ids of the transactions
    labels: int64 [rows], 1 fraud, 0 not (removes an earlier 1)
    """
    state, events_per_key_max = open_state(handle), open_program(handle).events_per_key_max
    event = np.zeros(1, np.int64)
    for row in range(len(keys)):
        slot = touch(state, keys[row])
        block, place = find_fraud(state, slot, identities[row])
        if labels[row] and not block:
            event[0] = identities[row]
            put(state, state.frauds, slot, events_per_key_max, times[row], 0, event)
        elif block and not labels[row]:
            remove(state, state.frauds, slot, block, place)


@kernel
def find_fraud(state: State, slot: int, identity: int) -> tuple[int, int]:
    """Return block and place of a fraud, block 0 where it is not in the chain."""
    frauds = state.frauds.blocks
    block = state.slots[slot, FRAUDS + NEWEST]
    while block:
        for place in range(frauds[block, LOW], frauds[block, HIGH]):
            if frauds[block, VALUES + place] == identity:
                return block, place
        block = frauds[block, OLDER]
    return 0, 0
