"""The inner loops of the recall watch, compiled by numba: a call for a micro-batch, and one for the labels of a poll.

Both tables are indexed by a hash, one slot each, and a later entry replaces an earlier one. What is replaced depends on
hashes alone, so what is left is a random sample, whatever was decided.
"""

from __future__ import annotations

import numpy as np

from cascade.columns import Array, Int64
from cascade.compilation import kernel
from streaming.pipeline.mixing import mixed

# Columns of an entry: the hash of the transaction id, and what is known of the decision.
KEY, FACTS = range(2)
# The facts: the event time in ms, the depth of its sample, and whether it was reviewed or declined.
CAUGHT_BITS, DEPTH_BITS = 1, 5
DEPTH_MAX = (1 << DEPTH_BITS) - 1
TIME_SHIFT = CAUGHT_BITS + DEPTH_BITS
EMPTY = 0


@kernel
def _hashed(octets: Array, row: int, seed: int) -> int:
    """FNV-1a of a row without the zeros at its end, mixed with the seed; never EMPTY."""
    length = octets.shape[1]
    while length and octets[row, length - 1] == 0:
        length -= 1
    state = np.uint64(0xCBF29CE484222325)
    for place in range(length):
        state = (state ^ np.uint64(octets[row, place])) * np.uint64(0x100000001B3)
    code = mixed(np.int64(state) ^ seed)
    return code if code != EMPTY else 1


@kernel
def _depth(partition_id: int, offset: int, seed: int) -> int:
    """The sample of a record: each depth has half as many as the one before, at most DEPTH_MAX."""
    code = np.uint64(mixed(mixed(partition_id ^ seed) ^ offset))
    depth = 0
    while depth < DEPTH_MAX and code & np.uint64(1) == np.uint64(0):
        code >>= np.uint64(1)
        depth += 1
    return depth


@kernel
def note(
    rows: Array, chosen: Int64, ids: Array, seed: int, depth_min: int, entries: Int64, awaited: Int64, counts: Int64
) -> tuple[int, int]:
    """Stores the decisions of the table's rows with these positions, if they are in the sample.

    rows: of the table. ids (uint8, [rows, width]): the bytes of their transaction ids. depth_min: of the sample.
    entries (int64, [slots, 2]): the table of decisions. awaited, counts: as for `judge`.

    Returns the numbers of rows that were stored, and that were counted because their label had come before.
    """
    stored, counted, mask, awaited_mask = 0, 0, len(entries) - 1, len(awaited) - 1
    for place in range(len(chosen)):
        row = chosen[place]
        depth = _depth(rows[row].partition_id, rows[row].offset, seed)
        if depth < depth_min:
            continue
        key = _hashed(ids, row, seed)
        caught = 1 if rows[row].action > 0 else 0
        if awaited[key & awaited_mask] == key:
            awaited[key & awaited_mask] = EMPTY
            counts[caught] += 1
            counted += 1
            continue
        entries[key & mask, KEY] = key
        entries[key & mask, FACTS] = (max(rows[row].event_time_ms, 0) << TIME_SHIFT) | (depth << CAUGHT_BITS) | caught
        stored += 1
    return stored, counted


@kernel
def judge(
    ids: Array, cards: Array, event_times_ms: Int64, frauds: Int64, seed: int, period_ms: int, entries: Int64,
    awaited: Int64, seen: Int64, counts: Int64,
) -> None:  # fmt: skip
    """Counts each card's first fraud of a period by whether it was caught, if its decision is in the table.

    If it is not, the transaction may be decided later: its key is awaited.

    ids, cards (uint8, [labels, width]): the bytes of transaction ids and cards. frauds (int64, [labels]): 1 for a
    fraud. awaited (int64, [slots]): the table of labels that came before their decision. seen (int64, [slots]): the
    table of cards and periods that have had their first fraud. counts (int64, [2]): the missed and the caught, to which
    these are added.
    """
    mask, seen_mask = len(entries) - 1, len(seen) - 1
    for label in range(len(frauds)):
        if frauds[label] != 1:
            continue
        unit = mixed(_hashed(cards, label, seed) ^ (event_times_ms[label] // period_ms))
        unit = unit if unit != EMPTY else 1
        if seen[unit & seen_mask] == unit:
            continue
        seen[unit & seen_mask] = unit
        key = _hashed(ids, label, seed)
        slot = key & mask
        if entries[slot, KEY] == key:
            counts[entries[slot, FACTS] & 1] += 1
            entries[slot, KEY] = EMPTY
        else:
            awaited[key & (len(awaited) - 1)] = key


@kernel
def drop(entries: Int64, oldest_ms: int, depth_min: int) -> int:
    """Drops the entries of transactions before `oldest_ms` and of lower depths; returns the number that is left."""
    left = 0
    for slot in range(len(entries)):
        if entries[slot, KEY] != EMPTY:
            facts = entries[slot, FACTS]
            if facts >> TIME_SHIFT < oldest_ms or (facts >> CAUGHT_BITS) & DEPTH_MAX < depth_min:
                entries[slot, KEY] = EMPTY
            else:
                left += 1
    return left
