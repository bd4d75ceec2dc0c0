"""Kernels of what workers tell each other about a key: totals of their own events, and remotes that stand for others'.

A summary is the total of one key, source and stretch of event time. It is computed anew from the events each time it is
told, and replaces what was told before; so telling it twice is harmless.
"""

from __future__ import annotations

import numpy as np

from cascade.columns import Array, Float64, Int64
from cascade.compilation import kernel
from cascade.features.chains import find, newest_ms, put, take_out, touch, trim
from cascade.features.layout import (
    BLOCK,
    EVENTS,
    HIGH,
    LOW,
    NEWEST,
    OLDER,
    REMOTE_COUNT,
    REMOTE_POOL,
    REMOTE_START,
    REMOTE_VALUES,
    REMOTES,
    SOURCES,
    TIMES,
    VALUES,
)


@kernel(nogil=True)
def summarise(
    table: Array,
    slots: Int64,
    events: Int64,
    codes: Int64,
    sources: Int64,
    starts: Int64,
    length_ms: int,
    counts: Int64,
    newest: Int64,
    sums: Float64,
    squares: Float64,
    maxima: Float64,
) -> None:
    """Total the events of each code and source from `starts` on for `length_ms`; all written arrays come as zeros.

    `codes`, `sources`, `starts` int64 [n]; written: `counts`, `newest` (ms) int64 [n], `sums`, `squares` (squared
    differences to the mean), `maxima` float64 [n, values].
    """
    event_values, event_sources = events.view(np.float64), events.view(np.uint16)
    value_count = sums.shape[1]
    origin = np.zeros(value_count)
    differences = np.zeros(value_count)
    for row in range(len(codes)):
        block = slots[find(table, slots, codes[row]), EVENTS + NEWEST]
        differences[:] = 0.0
        while block:
            for place in range(events[block, HIGH] - 1, events[block, LOW] - 1, -1):
                age_ms = events[block, TIMES + place] - starts[row]
                if not 0 <= age_ms < length_ms or event_sources[block, SOURCES + place] != sources[row]:
                    continue
                for value in range(value_count):
                    stored = event_values[block, VALUES + BLOCK * value + place]
                    if counts[row] == 0:
                        origin[value] = maxima[row, value] = stored
                    sums[row, value] += stored
                    differences[value] += stored - origin[value]
                    squares[row, value] += (stored - origin[value]) ** 2
                    maxima[row, value] = max(maxima[row, value], stored)
                if counts[row] == 0:
                    newest[row] = events[block, TIMES + place]
                counts[row] += 1
            block = events[block, OLDER]
        for value in range(value_count):
            if counts[row]:
                spread = squares[row, value] - differences[value] ** 2 / counts[row]
                squares[row, value] = max(0.0, spread)


@kernel(nogil=True)
def fold_summaries(
    table: Array,
    slots: Int64,
    counters: Int64,
    events: Int64,
    frauds: Int64,
    remotes: Int64,
    horizon_ms: int,
    entries_max: int,
    codes: Int64,
    sources: Int64,
    starts: Int64,
    counts: Int64,
    newest: Int64,
    sums: Float64,
    squares: Float64,
    maxima: Float64,
) -> None:
    """Put each summary in the place of the one of its code, source and start; one of no rows takes that one out."""
    remote_sources = remotes.view(np.uint16)
    value_count = sums.shape[1]
    told = np.zeros((remotes.shape[1] - VALUES) // BLOCK, np.int64)
    told_values = told.view(np.float64)
    for row in range(len(codes)):
        slot = find(table, slots, codes[row])
        if slot:
            block, place = _find_remote(slots, remotes, remote_sources, slot, sources[row], starts[row])
            if block:
                take_out(slots, counters, remotes, remote_sources, slot, REMOTES, REMOTE_POOL, block, place)
        if counts[row] == 0:
            continue
        slot = touch(table, slots, counters, events, frauds, remotes, codes[row])
        latest_ms = newest_ms(slots, remotes, slot, REMOTES, newest[row])
        latest_ms = max(latest_ms, newest_ms(slots, events, slot, EVENTS, latest_ms), newest[row])
        trim(slots, counters, remotes, slot, REMOTES, REMOTE_POOL, latest_ms - horizon_ms)
        if newest[row] <= latest_ms - horizon_ms:
            continue
        told[REMOTE_COUNT], told[REMOTE_START] = counts[row], starts[row]
        for value in range(value_count):
            first = REMOTE_VALUES + value
            told_values[first] = sums[row, value]
            told_values[first + value_count] = squares[row, value]
            told_values[first + 2 * value_count] = maxima[row, value]
        put(
            table,
            slots,
            counters,
            events,
            frauds,
            remotes,
            remotes,
            remote_sources,
            slot,
            REMOTES,
            REMOTE_POOL,
            entries_max,
            newest[row],
            sources[row],
            told,
        )


@kernel
def _find_remote(
    slots: Int64, remotes: Int64, remote_sources: Array, slot: int, source: int, start_ms: int
) -> tuple[int, int]:
    """Block and place of what is told of a source and stretch of time, block 0 where there is nothing."""
    block = slots[slot, REMOTES + NEWEST]
    while block:
        for place in range(remotes[block, LOW], remotes[block, HIGH]):
            if (
                remote_sources[block, SOURCES + place] == source
                and remotes[block, VALUES + BLOCK * REMOTE_START + place] == start_ms
            ):
                return block, place
        block = remotes[block, OLDER]
    return 0, 0
