"""Kernels of the summaries that workers share: they total a worker's own events, and store other workers' totals.

A summary is the total of one key, partition and stretch of event time. A worker computes it anew each time it publishes
it, and it replaces the previous summary, so a summary that is published twice does no harm. A remote is the stored
summary of another worker.
"""

from __future__ import annotations

import numpy as np

from cascade.columns import Float64, Int64
from cascade.compilation import kernel
from cascade.features.chains import find, newest_ms, put, remove, touch, trim
from cascade.features.handles import open_program, open_state
from cascade.features.layout import (
    BLOCK,
    EVENTS,
    HIGH,
    LOW,
    NEWEST,
    OLDER,
    PARTITIONS,
    REMOTE_COUNT,
    REMOTE_START,
    REMOTE_VALUES,
    REMOTES,
    TIMES,
    VALUES,
    State,
)


@kernel(nogil=True)
def summarise(
    handle: Int64,
    length_ms: int,
    codes: Int64,
    partition_ids: Int64,
    starts: Int64,
    counts: Int64,
    newest: Int64,
    sums: Float64,
    squares: Float64,
    maxima: Float64,
) -> None:
    """Total the events of each key and partition with start ≤ time < start + `length_ms`.

    codes, partition_ids, starts: int64 [n]; starts in ms
    counts, newest: int64 [n], zeros, written: number of events, time of the newest in ms
    sums, squares, maxima: float64 [n, value fields], zeros, written; squares: squared differences to the mean
    """
    state = open_state(handle)
    events, event_values, event_partitions = state.events.blocks, state.events.values, state.events.partitions
    value_count = sums.shape[1]
    origin = np.zeros(value_count)
    differences = np.zeros(value_count)
    for row in range(len(codes)):
        block = state.slots[find(state, codes[row]), EVENTS + NEWEST]
        differences[:] = 0.0
        while block:
            for place in range(events[block, HIGH] - 1, events[block, LOW] - 1, -1):
                age_ms = events[block, TIMES + place] - starts[row]
                if not 0 <= age_ms < length_ms or event_partitions[block, PARTITIONS + place] != partition_ids[row]:
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
    handle: Int64,
    codes: Int64,
    partition_ids: Int64,
    starts: Int64,
    counts: Int64,
    newest: Int64,
    sums: Float64,
    squares: Float64,
    maxima: Float64,
) -> None:
    """Store each summary, in place of an earlier one of its code, partition and start; a count of 0 removes that.

    handle: of the key field. Its horizon is the age, from the key's newest event or remote, at which it drops summaries
    The others are the fields of `Summaries`.
    """
    state, program = open_state(handle), open_program(handle)
    value_count = sums.shape[1]
    remote = np.zeros((state.remotes.blocks.shape[1] - VALUES) // BLOCK, np.int64)
    remote_values = remote.view(np.float64)
    for row in range(len(codes)):
        slot = find(state, codes[row])
        if slot:
            block, place = _find_remote(state, slot, partition_ids[row], starts[row])
            if block:
                remove(state, state.remotes, slot, block, place)
        if counts[row] == 0:
            continue
        slot = touch(state, codes[row])
        latest_ms = newest_ms(state, state.remotes, slot, newest[row])
        latest_ms = max(latest_ms, newest_ms(state, state.events, slot, latest_ms), newest[row])
        trim(state, state.remotes, slot, latest_ms - program.horizon_ms, 0)
        if newest[row] <= latest_ms - program.horizon_ms:
            continue
        remote[REMOTE_COUNT], remote[REMOTE_START] = counts[row], starts[row]
        for value in range(value_count):
            first = REMOTE_VALUES + value
            remote_values[first] = sums[row, value]
            remote_values[first + value_count] = squares[row, value]
            remote_values[first + 2 * value_count] = maxima[row, value]
        put(state, state.remotes, slot, program.events_per_key_max, newest[row], partition_ids[row], remote)


@kernel
def _find_remote(state: State, slot: int, partition_id: int, start_ms: int) -> tuple[int, int]:
    """Return block and place of the remote of a partition and stretch of time, block 0 where there is none."""
    remotes, remote_partitions = state.remotes.blocks, state.remotes.partitions
    block = state.slots[slot, REMOTES + NEWEST]
    while block:
        for place in range(remotes[block, LOW], remotes[block, HIGH]):
            if (
                remote_partitions[block, PARTITIONS + place] == partition_id
                and remotes[block, VALUES + BLOCK * REMOTE_START + place] == start_ms
            ):
                return block, place
        block = remotes[block, OLDER]
    return 0, 0
