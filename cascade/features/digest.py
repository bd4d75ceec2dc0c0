"""Digests of a state's content, by partition.

A digest does not depend on blocks, slots, the order of last use, or other partitions. So it serves to compare a
restored state with that of an engine which has folded the same rows without interruption.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cascade.columns import Array, Int64
from cascade.compilation import kernel
from cascade.features.layout import (
    BLOCK,
    COUNT,
    EVENTS,
    FRAUDS,
    HIGH,
    KEY,
    LOW,
    NEWER,
    NEWEST,
    OLDER,
    OLDEST,
    PARTITIONS,
    SLOTS_USED,
    TIMES,
    VALUES,
    KeyState,
)

TIME_MS_MIN = -(2**63)


class Sink(Protocol):
    """A hash of `hashlib`."""

    def update(self, content: bytes, /) -> None:
        """Add bytes to the hash."""


def feed_partition(digest: Sink, state: KeyState, partition_id: int, horizon_ms: int, after_ms: int | None) -> None:
    """Add a partition's events to the hash: by key in ascending order, events in order of time.

    Events count that are later than `after_ms` and, measured from their key's newest there, younger than `horizon_ms`.
    """
    used = int(state.counters[SLOTS_USED]) + 1
    floors = np.zeros(used, np.int64)
    counts = np.zeros(used, np.int64)
    floor_ms = TIME_MS_MIN if after_ms is None else after_ms
    _count_events(state.slots, state.events, partition_id, horizon_ms, floor_ms, floors, counts)
    order = _by_key(state, np.flatnonzero(counts))
    rows = np.zeros((int(counts.sum()), 1 + (state.events.shape[1] - VALUES) // BLOCK), np.int64)
    _gather_events(state.slots, state.events, EVENTS, partition_id, order, floors, rows)
    _feed(digest, state.slots[order, KEY], counts[order], rows)


def feed_frauds(digest: Sink, state: KeyState, after_ms: int | None) -> None:
    """Add the frauds that are later than `after_ms` to the hash, in order of key and transaction."""
    used = int(state.counters[SLOTS_USED]) + 1
    order = np.arange(1, used)
    frauds = np.zeros((int(state.slots[order, FRAUDS + COUNT].sum()), 2), np.int64)
    # a fraud has no partition, which is stored as 0
    _gather_events(state.slots, state.frauds, FRAUDS, 0, order, np.full(used, TIME_MS_MIN), frauds)
    times, identities = frauds.T
    keys = np.repeat(state.slots[order, KEY], state.slots[order, FRAUDS + COUNT])
    rows = np.column_stack([keys, identities, times])
    if after_ms is not None:
        rows = rows[times > after_ms]
    _feed(digest, rows[np.lexsort((rows[:, 1], rows[:, 0]))])


def _by_key(state: KeyState, slots: Int64) -> Int64:
    ordered: Int64 = slots[np.argsort(state.slots[slots, KEY], kind="stable")]
    return ordered


def _feed(digest: Sink, *arrays: Array) -> None:
    for array in arrays:
        # arrays of different shapes may have equal bytes
        digest.update(f"{array.dtype.kind}{list(array.shape)}".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


@kernel(nogil=True)
def _count_events(
    slots: Int64, events: Int64, partition_id: int, horizon_ms: int, floor_ms: int, floors: Int64, counts: Int64
) -> None:
    """Write for each slot the time after which events of the partition count (`floors`), and how many do (`counts`)."""
    event_partitions = events.view(np.uint16)
    for slot in range(1, len(counts)):
        block = slots[slot, EVENTS + NEWEST]
        floors[slot] = floor_ms
        while block:
            for place in range(events[block, HIGH] - 1, events[block, LOW] - 1, -1):
                if event_partitions[block, PARTITIONS + place] != partition_id:
                    continue
                time_ms = events[block, TIMES + place]
                if counts[slot] == 0:
                    floors[slot] = max(floor_ms, time_ms - horizon_ms)
                counts[slot] += time_ms > floors[slot]
            block = events[block, OLDER]


@kernel(nogil=True)
def _gather_events(
    slots: Int64, events: Int64, chain: int, partition_id: int, order: Int64, floors: Int64, rows: Int64
) -> None:
    """Write time and columns of the events that count to `rows`, slot by slot, the oldest first."""
    event_partitions = events.view(np.uint16)
    row = 0
    for slot in order:
        block = slots[slot, chain + OLDEST]
        while block:
            for place in range(events[block, LOW], events[block, HIGH]):
                if (
                    event_partitions[block, PARTITIONS + place] == partition_id
                    and events[block, TIMES + place] > floors[slot]
                ):
                    for column in range(rows.shape[1]):
                        rows[row, column] = events[block, TIMES + BLOCK * column + place]
                    row += 1
            block = events[block, NEWER]
