"""Running totals of a key's windows: exact, so that the order in which events are added has no effect.

A window's sums are sums of integers. A value counts as the nearest whole number of ticks, and a tick is the smallest
power of ten with which no value and no sum can leave int64 (`state.ticks_per_unit`). So a window may lose its oldest
event, take in one that came late, or be added up anew from the events: its sums are the same to the last bit.

The totals of a slot are those of the windows that end at the slot's newest event. `advance` moves them on to a later
row. Each event enters a window once and leaves it once, so that a row's time does not grow with the events of its key.
`scan` adds up the windows of any other row from the events themselves.

edge: a row of `program.edges`; its window has the events with a smaller age, which are the newest events of the chain
at: row of `state.totals`, a slot or 0
"""

from __future__ import annotations

import numpy as np

from cascade.columns import Bool, Float64, Int64
from cascade.compilation import kernel
from cascade.features.layout import (
    BLOCK,
    EDGE_AGE_MS,
    EDGE_OLDEST,
    EDGE_OLDEST_MS,
    EDGE_PLACE,
    EDGE_ROWS,
    EDGE_VALUES,
    EDGE_WIDTH,
    EVENTS,
    HIGH,
    LARGEST,
    LOW,
    NEWER,
    NEWEST,
    OLDER,
    OLDEST,
    PARTITIONS,
    SQUARES_HIGH,
    SQUARES_LOW,
    SUM,
    TIMES,
    TOTALS_AUDIENCE,
    TOTALS_EDGES,
    TOTALS_VISIBILITY,
    VALUES,
    Program,
    State,
)

NO_PRECEDING_SECONDS = -1.0
_LOW_HALF, _HALF_BITS = np.uint64(0xFFFFFFFF), np.uint64(32)


# --- exact numbers ----------------------------------------------------------------------------------------------


@kernel(forceinline=True)
def in_ticks(value: float, ticks_per_unit: float, ticks_max: int) -> int:
    """Return a value as a whole number of ticks, at most `ticks_max`."""
    ticks = np.rint(value * ticks_per_unit)
    return np.int64(min(max(ticks, -np.float64(ticks_max)), np.float64(ticks_max)))


@kernel(forceinline=True)
def multiply(first: int, second: int) -> tuple[int, int]:
    """Return the product of two uint64 as the upper and the lower uint64 of 128 bits."""
    first_high, first_low = first >> _HALF_BITS, first & _LOW_HALF
    second_high, second_low = second >> _HALF_BITS, second & _LOW_HALF
    low = first_low * second_low
    middle = first_high * second_low + (low >> _HALF_BITS)
    other = first_low * second_high + (middle & _LOW_HALF)
    high = first_high * second_high + (middle >> _HALF_BITS) + (other >> _HALF_BITS)
    return high, (other << _HALF_BITS) | (low & _LOW_HALF)


@kernel(forceinline=True)
def square(ticks: int) -> tuple[int, int]:
    """Return the square of an int64 as two uint64."""
    size = np.uint64(abs(ticks))
    return multiply(size, size)


@kernel(forceinline=True)
def plus(high: int, low: int, other_high: int, other_low: int) -> tuple[int, int]:
    """Return the sum of two numbers of 128 bits, each as two uint64."""
    total = low + other_low
    return high + other_high + np.uint64(total < low), total


@kernel(forceinline=True)
def minus(high: int, low: int, other_high: int, other_low: int) -> tuple[int, int]:
    """Return the difference of two numbers of 128 bits, each as two uint64."""
    return high - other_high - np.uint64(low < other_low), low - other_low


@kernel(forceinline=True)
def spread(count: int, total: int, high: int, low: int) -> float:
    """Return count² × the population's variance of `count` integers: count × their squares' sum − their sum squared.

    total: the sum of the integers; high, low: the sum of their squares, as two uint64. The difference is exact.
    """
    scaled_high, scaled_low = multiply(np.uint64(count), low)
    upper, lower = minus(scaled_high + np.uint64(count) * high, scaled_low, *square(total))
    return np.float64(upper) * 2.0**64 + np.float64(lower)


# --- the totals of one value field ------------------------------------------------------------------------------


@kernel(forceinline=True)
def squares_of(totals: Int64, at: int, column: int) -> tuple[int, int]:
    """Return the sum of squares in the totals that start at `totals[at, column]`, as two uint64."""
    return np.uint64(totals[at, column + SQUARES_HIGH]), np.uint64(totals[at, column + SQUARES_LOW])


@kernel(forceinline=True)
def _add_value(totals: Int64, largest: Float64, at: int, column: int, width: int, ticks: int, value: float) -> None:
    """Add a value to the totals that start at `totals[at, column]`; largest: `totals` as float64."""
    totals[at, column + SUM] += ticks
    if width > LARGEST:
        largest[at, column + LARGEST] = max(largest[at, column + LARGEST], value)
    if width > SQUARES_HIGH:
        high, low = plus(*squares_of(totals, at, column), *square(ticks))
        totals[at, column + SQUARES_HIGH], totals[at, column + SQUARES_LOW] = np.int64(high), np.int64(low)


@kernel(forceinline=True)
def _take_value(totals: Int64, at: int, column: int, width: int, ticks: int) -> None:
    """Take a value out of the totals that start at `totals[at, column]`, except out of the largest."""
    totals[at, column + SUM] -= ticks
    if width > SQUARES_HIGH:
        high, low = minus(*squares_of(totals, at, column), *square(ticks))
        totals[at, column + SQUARES_HIGH], totals[at, column + SQUARES_LOW] = np.int64(high), np.int64(low)


@kernel
def _clear_value(totals: Int64, largest: Float64, at: int, column: int, width: int) -> None:
    """Set the totals that start at `totals[at, column]` to those of no values."""
    for number in range(width):
        totals[at, column + number] = 0
    if width > LARGEST:
        largest[at, column + LARGEST] = -np.inf


# --- running totals ---------------------------------------------------------------------------------------------


@kernel(forceinline=True)
def advance(state: State, program: Program, slot: int, time_ms: int) -> None:
    """Move the windows of a slot on to a time at or after its newest event. Call it before events are trimmed."""
    for edge in range(len(program.edges)):
        at = program.edges[edge, EDGE_PLACE]
        if not at:
            continue
        until_ms = time_ms - program.edges[edge, EDGE_AGE_MS]
        lost_largest = False
        while state.totals[slot, at + EDGE_ROWS] and state.totals[slot, at + EDGE_OLDEST_MS] <= until_ms:
            lost_largest |= _take_oldest(state, program, slot, edge)
        if lost_largest:
            _find_largest(state, program, slot, edge)


@kernel(forceinline=True)
def drop_oldest_event(state: State, program: Program, slot: int) -> None:
    """Take the oldest event of a slot with valid totals out of the windows that have it, since it is dropped next."""
    oldest = state.slots[slot, EVENTS + OLDEST]
    first = oldest * BLOCK + state.events.blocks[oldest, LOW]
    for edge in range(len(program.edges)):
        at = program.edges[edge, EDGE_PLACE]
        has_it = at > 0 and state.totals[slot, at + EDGE_ROWS] > 0 and state.totals[slot, at + EDGE_OLDEST] == first
        if has_it and _take_oldest(state, program, slot, edge):
            _find_largest(state, program, slot, edge)


@kernel(forceinline=True)
def enter(state: State, program: Program, slot: int, time_ms: int, latest_ms: int) -> None:
    """Add the row's event, which is now in the slot's chain, to the windows of a slot with valid totals.

    latest_ms: the time of the slot's newest event
    """
    totals, largest = state.totals, state.largest
    event_values = program.event.view(np.float64)
    for edge in range(len(program.edges)):
        at, width = program.edges[edge, EDGE_PLACE], program.edges[edge, EDGE_WIDTH]
        if not at:
            continue
        if time_ms <= latest_ms - program.edges[edge, EDGE_AGE_MS]:
            # it lies before the window, and has moved the window's events on by one place
            _move_to_next(state, slot, at)
            continue
        if totals[slot, at + EDGE_ROWS] == 0:
            newest = state.slots[slot, EVENTS + NEWEST]
            totals[slot, at + EDGE_OLDEST] = newest * BLOCK + state.events.blocks[newest, HIGH] - 1
            totals[slot, at + EDGE_OLDEST_MS] = time_ms
        # before the oldest event of the window it has taken that event's place
        totals[slot, at + EDGE_OLDEST_MS] = min(totals[slot, at + EDGE_OLDEST_MS], time_ms)
        totals[slot, at + EDGE_ROWS] += 1
        if width:
            column = at + EDGE_VALUES
            for field in range(len(program.ticks)):
                _add_value(totals, largest, slot, column, width, program.ticks[field], event_values[field])
                column += width


@kernel(forceinline=True)
def _take_oldest(state: State, program: Program, slot: int, edge: int) -> bool:
    """Take its oldest event out of a window; whether that was the largest of a value field."""
    totals, at, width = state.totals, program.edges[edge, EDGE_PLACE], program.edges[edge, EDGE_WIDTH]
    block, place = divmod(totals[slot, at + EDGE_OLDEST], BLOCK)
    lost_largest = False
    if width:
        column = at + EDGE_VALUES
        for field in range(len(program.ticks)):
            value = state.events.values[block, VALUES + BLOCK * field + place]
            ticks = in_ticks(value, program.ticks_per_unit[field], program.ticks_max)
            _take_value(totals, slot, column, width, ticks)
            if width > LARGEST:
                lost_largest |= value >= state.largest[slot, column + LARGEST]
            column += width
    totals[slot, at + EDGE_ROWS] -= 1
    if totals[slot, at + EDGE_ROWS]:
        _move_to_next(state, slot, at)
        block, place = divmod(totals[slot, at + EDGE_OLDEST], BLOCK)
        totals[slot, at + EDGE_OLDEST_MS] = state.events.blocks[block, TIMES + place]
    return lost_largest


@kernel(forceinline=True)
def _move_to_next(state: State, slot: int, at: int) -> None:
    """Move the place of the oldest event of a window to the next place of the chain."""
    block, place = divmod(state.totals[slot, at + EDGE_OLDEST] + 1, BLOCK)
    if place == 0:
        block = state.events.blocks[block - 1, NEWER]
    state.totals[slot, at + EDGE_OLDEST] = block * BLOCK + place


@kernel
def _find_largest(state: State, program: Program, slot: int, edge: int) -> None:
    """Find the largest value of each field among the events of a window."""
    at = program.edges[edge, EDGE_PLACE]
    column = at + EDGE_VALUES + LARGEST
    for field in range(len(program.ticks)):
        largest = -np.inf
        left = state.totals[slot, at + EDGE_ROWS]
        block = state.slots[slot, EVENTS + NEWEST]
        while left:
            low, high = state.events.blocks[block, LOW], state.events.blocks[block, HIGH]
            for place in range(high - 1, max(low, high - left) - 1, -1):
                largest = max(largest, state.events.values[block, VALUES + BLOCK * field + place])
            left -= min(left, high - low)
            block = state.events.blocks[block, OLDER]
        state.largest[slot, column] = largest
        column += program.edges[edge, EDGE_WIDTH]


# --- totals of any row ------------------------------------------------------------------------------------------


@kernel(forceinline=True)
def is_seen(state: State, block: int, place: int, hidden: Bool, own_partition_id: int) -> bool:
    """Whether rows of a partition see an event: it is of the same partition, or of one that is not hidden."""
    partition_id = state.events.partitions[block, PARTITIONS + place]
    return partition_id == own_partition_id or not hidden[partition_id]


@kernel
def scan(
    state: State,
    program: Program,
    slot: int,
    time_ms: int,
    floor_ms: int,
    hidden: Bool,
    any_hidden: bool,
    partition_id: int,
) -> tuple[float, bool]:
    """Add up the windows that end at a time from the events that a partition's rows see, in row 0 of the totals.

    Returns the age in seconds of the last event before the time that is later than `floor_ms`, and whether the rows see
    all events of the chain that are not later.
    """
    sums, largest, width = program.sums, program.sums.view(np.float64), program.totals_width
    for field in range(len(program.ticks)):
        _clear_value(sums, largest, 0, field * width, width)
    seconds_since_last = NO_PRECEDING_SECONDS
    sees_all = True
    edge, rows, oldest, oldest_ms = 0, 0, 0, time_ms
    block = state.slots[slot, EVENTS + NEWEST]
    while block:
        for place in range(state.events.blocks[block, HIGH] - 1, state.events.blocks[block, LOW] - 1, -1):
            age_ms = time_ms - state.events.blocks[block, TIMES + place]
            if age_ms < 0:
                continue
            if any_hidden and not is_seen(state, block, place, hidden, partition_id):
                sees_all = False
                continue
            if seconds_since_last < 0.0 and time_ms - age_ms > floor_ms:
                seconds_since_last = age_ms / 1000.0
            while edge < len(program.edges) and age_ms >= program.edges[edge, EDGE_AGE_MS]:
                _write_window(state, program, edge, rows, oldest, oldest_ms)
                edge += 1
            if edge == len(program.edges):
                if not any_hidden:
                    return seconds_since_last, sees_all
                continue
            for field in range(len(program.ticks) if width else 0):
                value = state.events.values[block, VALUES + BLOCK * field + place]
                ticks = in_ticks(value, program.ticks_per_unit[field], program.ticks_max)
                _add_value(sums, largest, 0, field * width, width, ticks, value)
            rows += 1
            oldest, oldest_ms = block * BLOCK + place, time_ms - age_ms
        block = state.events.blocks[block, OLDER]
    while edge < len(program.edges):
        _write_window(state, program, edge, rows, oldest, oldest_ms)
        edge += 1
    return seconds_since_last, sees_all


@kernel
def _write_window(state: State, program: Program, edge: int, rows: int, oldest: int, oldest_ms: int) -> None:
    """Write the sums so far as the totals of an edge to row 0."""
    at, width = program.edges[edge, EDGE_PLACE], program.edges[edge, EDGE_WIDTH]
    if at:
        state.totals[0, at + EDGE_ROWS], state.totals[0, at + EDGE_OLDEST] = rows, oldest
        state.totals[0, at + EDGE_OLDEST_MS] = oldest_ms
        for field in range(len(program.ticks)):
            for number in range(width):
                total = program.sums[0, field * program.totals_width + number]
                state.totals[0, at + EDGE_VALUES + field * width + number] = total


@kernel
def rows_between(
    state: State,
    program: Program,
    slot: int,
    time_ms: int,
    hidden: Bool,
    any_hidden: bool,
    partition_id: int,
    near: int,
    far: int,
) -> int:
    """Count the events that a partition's rows see, with an age from one edge on and smaller than that of another."""
    near_ms, far_ms = program.edges[near, EDGE_AGE_MS], program.edges[far, EDGE_AGE_MS]
    rows = 0
    block = state.slots[slot, EVENTS + NEWEST]
    while block:
        for place in range(state.events.blocks[block, LOW], state.events.blocks[block, HIGH]):
            if near_ms <= time_ms - state.events.blocks[block, TIMES + place] < far_ms:
                rows += not any_hidden or is_seen(state, block, place, hidden, partition_id)
        block = state.events.blocks[block, OLDER]
    return rows


@kernel
def keep(state: State, program: Program, slot: int, audience: int) -> None:
    """Make the totals that `scan` has written those of a slot. They end at its newest event, or at a row after it.

    audience: the only partition whose rows they are for, EVERYONE: for all rows
    """
    for column in range(TOTALS_EDGES, state.totals.shape[1]):
        state.totals[slot, column] = state.totals[0, column]
    state.totals[slot, TOTALS_VISIBILITY], state.totals[slot, TOTALS_AUDIENCE] = program.visibility, audience
