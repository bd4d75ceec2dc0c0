"""The inner loops of the idempotency cache, compiled by numba.

Entries lie in a ring, in the order in which they came; a number that counts up for ever names an entry, and its
remainder by the ring's length is its slot. Two indexes (open addressing, linear probing, at most half full) lead to it:
by identity and by place in the log. A place of an index, int64, holds 32 bits of the code and the slot, counted from 1:
searching and taking out need not look at entries, each of which would be a miss of the cache.
"""

from __future__ import annotations

import numpy as np

from cascade.columns import Array, Int64
from cascade.compilation import kernel

# Columns of an entry, one cache line. The two codes are what the indexes go by.
IDENTITY_CODE, PLACE_CODE, ID, CARD, AMOUNT, PARTITION, OFFSET, APPENDED = range(8)
ENTRY_WIDTH = 8
GONE = -1  # as PARTITION: the slot's entry is forgotten
# Places in `counters`: the numbers of the next and of the oldest entry, and how many are held between them.
NEXT, OLDEST, HELD = range(3)
COUNTERS = 3
# Times are brought into this range first, so that differences of two do not overflow.
TIME_MS_MAX = 1 << 53
# A clock that was never told anything; records without a time, or with one before 1970, count as of 1970.
NEVER = -1


@kernel(inline="always")
def _mixed(code: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    mixed = np.uint64(code)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64(mixed ^ (mixed >> np.uint64(31)))


@kernel(inline="always")
def _home(held: int, mask: int) -> int:
    """The place at which what an index holds would best be."""
    return (held >> 32) & mask


@kernel(inline="always")
def _held(code: int, slot: int) -> int:
    return (code << 32) | (slot + 1)


@kernel(inline="always")
def _slot(held: int) -> int:
    return (held & 0xFFFFFFFF) - 1


@kernel
def _code(seed: int, first: int, second: int, third: int, fourth: int) -> int:
    """Where an index begins to look; the seed is secret, so that nobody can send what all lands in one place."""
    return _mixed(_mixed(_mixed(_mixed(first ^ seed) ^ second) ^ third) ^ fourth)


@kernel
def _find(index: Int64, entries: Int64, wanted: Int64, code: int, first: int, last: int) -> int:
    """The slot whose columns `first` to `last` equal those of `wanted` (a row like an entry), or -1.

    `code`: the column of the index's code, IDENTITY_CODE or PLACE_CODE.
    """
    mask = len(index) - 1
    sought = _held(wanted[code], 0) >> 32
    place = sought & mask
    while index[place]:
        if index[place] >> 32 == sought:
            slot = _slot(index[place])
            column = first
            while column <= last and entries[slot, column] == wanted[column]:
                column += 1
            if column > last:
                return slot
        place = (place + 1) & mask
    return -1


@kernel
def _put(index: Int64, entries: Int64, code: int, slot: int) -> None:
    mask = len(index) - 1
    held = _held(entries[slot, code], slot)
    place = _home(held, mask)
    while index[place]:
        place = (place + 1) & mask
    index[place] = held


@kernel
def _take_out(index: Int64, entries: Int64, code: int, slot: int) -> None:
    """Take a slot out of an index if it is there, moving later ones back so that no gap breaks a search."""
    mask = len(index) - 1
    held = _held(entries[slot, code], slot)
    gap = _home(held, mask)
    while index[gap] != held:
        if index[gap] == 0:
            return
        gap = (gap + 1) & mask
    place = gap
    while True:
        place = (place + 1) & mask
        if index[place] == 0:
            break
        home = _home(index[place], mask)
        if (place - home) & mask >= (place - gap) & mask:
            index[gap] = index[place]
            gap = place
    index[gap] = 0


@kernel
def _drop(by_identity: Int64, by_place: Int64, entries: Int64, counters: Int64, slot: int) -> None:
    if entries[slot, PARTITION] == GONE:
        return
    _take_out(by_identity, entries, IDENTITY_CODE, slot)
    _take_out(by_place, entries, PLACE_CODE, slot)
    entries[slot, PARTITION] = GONE
    counters[HELD] -= 1


@kernel
def _register(by_identity: Int64, by_place: Int64, entries: Int64, counters: Int64, known: Array, entry: Int64) -> None:
    """Put an entry into the ring, in the place of the oldest where it is full."""
    slot = counters[NEXT] % len(entries)
    if counters[NEXT] - counters[OLDEST] == len(entries):
        _drop(by_identity, by_place, entries, counters, slot)
        counters[OLDEST] += 1
    for column in range(ENTRY_WIDTH):
        entries[slot, column] = entry[column]
    known[slot] = 0
    _put(by_identity, entries, IDENTITY_CODE, slot)
    _put(by_place, entries, PLACE_CODE, slot)
    counters[NEXT] += 1
    counters[HELD] += 1


@kernel(inline="always")
def _place_code(seed: int, partition: int, offset: int) -> int:
    """Of eight records in a row the places are neighbours, and lie in one cache line."""
    return (_mixed(_mixed(partition ^ seed) ^ (offset >> 3)) & ~7) | (offset & 7)


@kernel
def _fill_codes(entry: Int64, seed: int) -> None:
    entry[IDENTITY_CODE] = _code(seed, entry[ID], entry[CARD], entry[AMOUNT], entry[PARTITION])
    entry[PLACE_CODE] = _place_code(seed, entry[PARTITION], entry[OFFSET])


@kernel(nogil=True)
def look_up(
    by_identity: Int64, by_place: Int64, entries: Int64, counters: Int64, clocks: Int64, known: Array, seed: int,
    window_ms: int, ids: Int64, cards: Int64, amounts: Int64, partitions: Int64, offsets: Int64, appended_ms: Int64,
    out: Int64,
) -> None:  # fmt: skip
    """Write to `out` int64 [rows] the number of each row's first occurrence, or -1; register the rows that are first.

    A partition's clock is the greatest append time that it has seen: it does not go back where a broker's does.
    """
    entry = np.zeros(ENTRY_WIDTH, np.int64)
    for row in range(len(ids)):
        out[row] = -1
        partition = partitions[row]
        now_ms = max(clocks[partition], min(max(appended_ms[row], 0), TIME_MS_MAX))
        clocks[partition] = now_ms
        entry[ID], entry[CARD], entry[AMOUNT] = ids[row], cards[row], amounts[row]
        entry[PARTITION], entry[OFFSET], entry[APPENDED] = partition, offsets[row], now_ms
        _fill_codes(entry, seed)
        slot = _find(by_identity, entries, entry, IDENTITY_CODE, ID, PARTITION)
        if slot >= 0:
            if now_ms - entries[slot, APPENDED] <= window_ms:
                # a row that is read again is no duplicate of itself
                if entries[slot, OFFSET] != offsets[row]:
                    oldest = counters[OLDEST]
                    out[row] = oldest + (slot - oldest) % len(entries)
                continue
            # past the window: not found any more, but kept for those that were just told of it
            _take_out(by_identity, entries, IDENTITY_CODE, slot)
        _register(by_identity, by_place, entries, counters, known, entry)


@kernel(nogil=True)
def find_places(by_place: Array, entries: Int64, seed: int, partition: int, offsets: Int64, out: Int64) -> None:
    """Write to `out` int64 [offsets] the slots of a partition's records, -1 for those that are not held."""
    entry = np.zeros(ENTRY_WIDTH, np.int64)
    entry[PARTITION] = partition
    for row in range(len(offsets)):
        entry[OFFSET] = offsets[row]
        entry[PLACE_CODE] = _place_code(seed, partition, offsets[row])
        out[row] = _find(by_place, entries, entry, PLACE_CODE, PARTITION, OFFSET)


@kernel(nogil=True)
def forget(by_identity: Int64, by_place: Int64, entries: Int64, counters: Int64, partition: int) -> None:
    """Drop all entries of a partition."""
    for number in range(counters[OLDEST], counters[NEXT]):
        slot = number % len(entries)
        if entries[slot, PARTITION] == partition:
            _drop(by_identity, by_place, entries, counters, slot)


@kernel(nogil=True)
def absorb(
    by_identity: Int64, by_place: Int64, entries: Int64, counters: Int64, known: Array, seed: int, rows: Int64,
    out: Int64,
) -> bool:  # fmt: skip
    """Register entries `rows` int64 [rows, ENTRY_WIDTH] (codes aside) as they are; their numbers go to `out`.

    Returns whether no two of them had one identity or one place.
    """
    for row in range(len(rows)):
        entry = rows[row]
        _fill_codes(entry, seed)
        again = _find(by_identity, entries, entry, IDENTITY_CODE, ID, PARTITION) >= 0
        if again or _find(by_place, entries, entry, PLACE_CODE, PARTITION, OFFSET) >= 0:
            return False
        out[row] = counters[NEXT]
        _register(by_identity, by_place, entries, counters, known, entry)
    return True
