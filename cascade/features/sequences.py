"""Sequences: the last events of a key, up to a row.

A row's step fields are stored with its event, in each key field that has a sequence. The sequence itself is written
when it is asked for, since the deep model reads it of few rows only: `read_sequences`. Until then the row waits. Where
its key changes before (by a later row of the micro-batch, or because it is forgotten), `write_waiting` writes it first.
So it is always what it was right after the row.

Arguments are explained in `chains`. Besides:

event_place: place of an event, as BLOCK × block + place; 0: none
"""

from __future__ import annotations

import numpy as np

from cascade.columns import Float32, Int64
from cascade.compilation import kernel
from cascade.features.handles import open_program, open_state
from cascade.features.layout import (
    BLOCK,
    EVENTS,
    FIRST_GENERATION,
    GENERATION,
    HIGH,
    LOW,
    NEWEST,
    OLDER,
    PARTITIONS,
    STORED_PLACE,
    STORED_SLOT,
    TIMES,
    TOTALS_ROW,
    VALUES,
    WAITING_ROWS,
    Program,
    State,
)
from cascade.features.totals import is_seen

# Entries of `Waiting.places` that are no places
WRITTEN, NOT_WANTED = 0, -1


@kernel
def write_steps(
    state: State, event_place: int, time_ms: int, partition_id: int, target: int, row: int, out: Float32
) -> None:
    """Write the events that a row sees as steps, from one of them back to the oldest, or until there is no room.

    event_place: the newest of the events; those that are later than `time_ms` do not count
    time_ms, partition_id: of the row
    target: position of the newest step
    out: float32 [≥ row, length, 2 + fields]; the steps before the oldest become 0
    """
    events, steps = state.events.blocks, state.events.steps
    fields = out.shape[2] - 2
    first = 2 * (events.shape[1] - BLOCK * ((fields + 1) // 2))
    block, place = divmod(event_place, BLOCK)
    while block and target >= 0:
        while place >= events[block, LOW] and target >= 0:
            age_ms = time_ms - events[block, TIMES + place]
            if age_ms >= 0 and is_seen(state, block, place, state.waiting.hidden, partition_id):
                out[row, target, 0] = 1.0
                out[row, target, 1] = age_ms / 1000.0
                for field in range(fields):
                    out[row, target, 2 + field] = steps[block, first + 2 * (BLOCK * (field // 2) + place) + field % 2]
                target -= 1
            place -= 1
        block = events[block, OLDER]
        place = events[block, HIGH] - 1
    out[row, : target + 1] = 0.0


@kernel
def _write_stored(state: State, event_place: int, row: int, out: Float32) -> None:
    """Write the sequence of a row whose event is stored; its key is as the row left it."""
    block, place = divmod(event_place, BLOCK)
    time_ms = state.events.blocks[block, TIMES + place]
    partition_id = np.int64(state.events.partitions[block, PARTITIONS + place])
    write_steps(state, event_place, time_ms, partition_id, out.shape[1] - 1, row, out)


@kernel
def _write_row(state: State, row: int) -> None:
    places = state.waiting.places
    _write_stored(state, places[WAITING_ROWS + row], row, state.waiting.written)
    places[WAITING_ROWS + row] = WRITTEN


@kernel(forceinline=True)
def write_waiting(state: State, slot: int) -> None:
    """Write the sequence of the slot's last row of this micro-batch, if it waits. Call it before the key changes."""
    row = state.totals[slot, TOTALS_ROW] - state.waiting.places[FIRST_GENERATION]
    if row >= 0 and state.waiting.places[WAITING_ROWS + row] > 0:
        _write_row(state, row)


@kernel(forceinline=True)
def add_step(
    state: State, program: Program, row: int, time_ms: int, partition_id: int, wanted: bool, features: Float32
) -> None:
    """Store the step fields of a row that was folded into its key just before, and let the row wait if it is wanted.

    features: float32 [rows, width], where this row's features are
    """
    first, places = len(program.inputs) - 1, state.waiting.places
    slot, event_place = program.stored[STORED_SLOT], program.stored[STORED_PLACE]
    fields = program.event.view(np.float32)
    for field in range(len(program.sequence_columns)):
        fields[2 * first + field] = features[row, program.sequence_columns[field]]
    if event_place:
        block, place = divmod(event_place, BLOCK)
        for column in range(first, len(program.event)):
            state.events.blocks[block, VALUES + BLOCK * column + place] = program.event[column]
    if not wanted:
        places[WAITING_ROWS + row] = NOT_WANTED
    elif event_place:
        places[WAITING_ROWS + row] = event_place
        state.totals[slot, TOTALS_ROW] = state.counters[GENERATION]
    else:
        _write_unstored(state, program, slot, row, time_ms, partition_id, features)


@kernel
def _write_unstored(
    state: State, program: Program, slot: int, row: int, time_ms: int, partition_id: int, features: Float32
) -> None:
    """Write the sequence of a row whose event was too old to be stored."""
    out = state.waiting.written
    last = out.shape[1] - 1
    out[row, last, 0], out[row, last, 1] = 1.0, 0.0
    for field in range(len(program.sequence_columns)):
        out[row, last, 2 + field] = features[row, program.sequence_columns[field]]
    newest = state.slots[slot, EVENTS + NEWEST]
    newest_place = newest * BLOCK + state.events.blocks[newest, HIGH] - 1 if newest else 0
    write_steps(state, newest_place, time_ms, partition_id, last - 1, row, out)
    state.waiting.places[WAITING_ROWS + row] = WRITTEN


@kernel(nogil=True)
def read_sequences(handle: Int64, rows: Int64, out: Float32) -> int:
    """Write the sequences of rows of the last micro-batch.

    handle: of the key field
    rows: int64 [n], positions in the micro-batch
    out: float32 [n, length, 2 + fields]

    Returns −1, or the first row that was not wanted.
    """
    state = open_state(handle)
    for number in range(len(rows)):
        row = int(rows[number])
        event_place = state.waiting.places[WAITING_ROWS + row]
        if event_place == NOT_WANTED:
            return row
        if event_place == WRITTEN:
            out[number] = state.waiting.written[row]
        else:
            _write_stored(state, event_place, number, out)
    return -1


@kernel(forceinline=True)
def begin_batch(handle: Int64) -> None:
    """Let no row of an earlier micro-batch wait any more."""
    state = open_state(handle)
    if open_program(handle).has_sequence:
        state.waiting.places[FIRST_GENERATION] = state.counters[GENERATION] + 1
