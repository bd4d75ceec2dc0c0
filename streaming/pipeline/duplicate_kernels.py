"""The inner loops of the idempotency cache, compiled by numba.

Entries are in a ring, in order of arrival. An entry has a serial number; its remainder by the ring's length is its
slot. Two hash indexes (open addressing, linear probing, at most half full) find a slot: by identity, and by record,
which is partition and offset. A bucket of an index, int64, has 32 bits of the code, and the slot plus 1; 0 is an empty
bucket. So search and removal need not read entries, each of which would be a cache miss.
"""

from __future__ import annotations

import numpy as np

from cascade.columns import Array, Float64, Int64
from cascade.compilation import kernel
from streaming.pipeline.mixing import mixed

# Columns of an entry, which fills a cache line. The indexes use the two codes.
IDENTITY_CODE, RECORD_CODE, ID, CARD, AMOUNT, PARTITION, OFFSET, APPENDED = range(8)
ENTRY_WIDTH = 8
FORGOTTEN = -1  # as PARTITION: the entry of the slot is forgotten
# Indexes of `counters`: the serial numbers of the next and of the oldest entry, and the number of entries.
NEXT, OLDEST, ENTRIES = range(3)
COUNTERS = 3
# Times are clipped to this range, so that differences do not overflow.
TIME_MS_MAX = 1 << 53
# A clock without a record; records without a time, or with a time before 1970, count as of 1970.
NEVER = -1


@kernel(inline="always")
def _home(bucket: int, mask: int) -> int:
    """The index at which the search for a bucket's content begins."""
    return (bucket >> 32) & mask


@kernel(inline="always")
def _bucket(code: int, slot: int) -> int:
    return (code << 32) | (slot + 1)


@kernel(inline="always")
def _slot(bucket: int) -> int:
    return (bucket & 0xFFFFFFFF) - 1


@kernel
def _code(seed: int, first: int, second: int, third: int, fourth: int) -> int:
    """The hash of an entry; the seed is secret, so that nobody can send transactions with the same hash."""
    return mixed(mixed(mixed(mixed(first ^ seed) ^ second) ^ third) ^ fourth)


@kernel
def _find(index: Int64, entries: Int64, wanted: Int64, code: int, first: int, last: int) -> int:
    """The slot whose columns `first` to `last` equal those of `wanted` (int64, [ENTRY_WIDTH]), or -1.

    `code`: the column of the index's code, IDENTITY_CODE or RECORD_CODE.
    """
    mask = len(index) - 1
    sought = _bucket(wanted[code], 0) >> 32
    position = sought & mask
    while index[position]:
        if index[position] >> 32 == sought:
            slot = _slot(index[position])
            column = first
            while column <= last and entries[slot, column] == wanted[column]:
                column += 1
            if column > last:
                return slot
        position = (position + 1) & mask
    return -1


@kernel
def _put(index: Int64, entries: Int64, code: int, slot: int) -> None:
    mask = len(index) - 1
    bucket = _bucket(entries[slot, code], slot)
    position = _home(bucket, mask)
    while index[position]:
        position = (position + 1) & mask
    index[position] = bucket


@kernel
def _remove(index: Int64, entries: Int64, code: int, slot: int) -> None:
    """Removes a slot from an index if it is there, and moves later buckets back so that no gap ends a search early."""
    mask = len(index) - 1
    bucket = _bucket(entries[slot, code], slot)
    gap = _home(bucket, mask)
    while index[gap] != bucket:
        if index[gap] == 0:
            return
        gap = (gap + 1) & mask
    position = gap
    while True:
        position = (position + 1) & mask
        if index[position] == 0:
            break
        home = _home(index[position], mask)
        if (position - home) & mask >= (position - gap) & mask:
            index[gap] = index[position]
            gap = position
    index[gap] = 0


@kernel
def _drop(by_identity: Int64, by_record: Int64, entries: Int64, counters: Int64, slot: int) -> None:
    if entries[slot, PARTITION] == FORGOTTEN:
        return
    _remove(by_identity, entries, IDENTITY_CODE, slot)
    _remove(by_record, entries, RECORD_CODE, slot)
    entries[slot, PARTITION] = FORGOTTEN
    counters[ENTRIES] -= 1


@kernel
def _register(
    by_identity: Int64, by_record: Int64, entries: Int64, counters: Int64, known: Array, entry: Int64
) -> None:
    """Adds an entry to the ring, and replaces the oldest entry of a full ring."""
    slot = counters[NEXT] % len(entries)
    if counters[NEXT] - counters[OLDEST] == len(entries):
        _drop(by_identity, by_record, entries, counters, slot)
        counters[OLDEST] += 1
    for column in range(ENTRY_WIDTH):
        entries[slot, column] = entry[column]
    known[slot] = 0
    _put(by_identity, entries, IDENTITY_CODE, slot)
    _put(by_record, entries, RECORD_CODE, slot)
    counters[NEXT] += 1
    counters[ENTRIES] += 1


@kernel(inline="always")
def _record_code(seed: int, partition: int, offset: int) -> int:
    """The hash of a record: eight consecutive offsets have neighbouring buckets, in a cache line."""
    return (mixed(mixed(partition ^ seed) ^ (offset >> 3)) & ~7) | (offset & 7)


@kernel
def _fill_codes(entry: Int64, seed: int) -> None:
    entry[IDENTITY_CODE] = _code(seed, entry[ID], entry[CARD], entry[AMOUNT], entry[PARTITION])
    entry[RECORD_CODE] = _record_code(seed, entry[PARTITION], entry[OFFSET])


@kernel(nogil=True)
def look_up(
    by_identity: Int64, by_record: Int64, entries: Int64, counters: Int64, clocks: Int64, known: Array, seed: int,
    window_ms: int, ids: Int64, cards: Int64, amounts: Float64, rows: Array,
) -> int:  # fmt: skip
    """Finds the first occurrences of rows, and registers the rows that occur for the first time.

    rows: of the table; `first` gets the serial number of each row's first occurrence, or -1, and `entry` that of its
    own, or -1. A partition's clock in `clocks` is its greatest append time so far, and never goes back. The other
    arrays: see FirstDecisions. Returns the number of repeats; -1, and does nothing, if a partition has no clock yet.
    """
    for row in range(len(rows)):
        if rows[row].partition_id >= len(clocks):
            return -1
    entry, repeats = np.zeros(ENTRY_WIDTH, np.int64), 0
    bits = amounts.view(np.int64)
    for row in range(len(ids)):
        into = rows[row]
        partition = into.partition_id
        now_ms = max(clocks[partition], min(max(into.appended_ms, 0), TIME_MS_MAX))
        clocks[partition] = now_ms
        # 0.0 and -0.0 are the same amount
        entry[ID], entry[CARD], entry[AMOUNT] = ids[row], cards[row], bits[row] if amounts[row] != 0.0 else 0
        entry[PARTITION], entry[OFFSET], entry[APPENDED] = partition, into.offset, now_ms
        _fill_codes(entry, seed)
        slot = _find(by_identity, entries, entry, IDENTITY_CODE, ID, PARTITION)
        if slot >= 0:
            if now_ms - entries[slot, APPENDED] <= window_ms:
                oldest = counters[OLDEST]
                serial = oldest + (slot - oldest) % len(entries)
                # a record that is read again is not a repeat of itself
                if entries[slot, OFFSET] == into.offset:
                    into.entry = serial
                else:
                    into.first = serial
                    repeats += 1
                continue
            # past the window: not found any more, but its decision can still be read
            _remove(by_identity, entries, IDENTITY_CODE, slot)
        into.entry = counters[NEXT]
        _register(by_identity, by_record, entries, counters, known, entry)
    return repeats


@kernel(nogil=True)
def settle(
    entries: Int64, counters: Int64, known: Array, decided: Array, scores: Float64, times_ms: Int64,
    bundle_numbers: Array, bundle: int, rows: Array, chosen: Int64,
) -> None:  # fmt: skip
    """Stores the decisions of rows of the table in their entries, but in none that is dropped or has a decision.

    chosen (int64): positions of the rows. bundle: number of the version. The other arrays: see FirstDecisions.
    """
    for row in chosen:
        of = rows[row]
        if of.entry < counters[OLDEST] or of.entry >= counters[NEXT]:
            continue
        slot = of.entry % len(entries)
        if entries[slot, PARTITION] != of.partition_id or entries[slot, OFFSET] != of.offset or known[slot]:
            continue
        decided[slot, 0], decided[slot, 1], decided[slot, 2] = of.action, of.stage, of.cause
        scores[slot, 0], scores[slot, 1] = of.score, of.screener_score
        times_ms[slot], bundle_numbers[slot], known[slot] = int(of.decided_ms), bundle, 1


@kernel(nogil=True)
def find_records(by_record: Array, entries: Int64, seed: int, partition: int, offsets: Int64, out: Int64) -> None:
    """Writes to `out` (int64, [offsets]) the slots of a partition's records, -1 for records without an entry."""
    entry = np.zeros(ENTRY_WIDTH, np.int64)
    entry[PARTITION] = partition
    for row in range(len(offsets)):
        entry[OFFSET] = offsets[row]
        entry[RECORD_CODE] = _record_code(seed, partition, offsets[row])
        out[row] = _find(by_record, entries, entry, RECORD_CODE, PARTITION, OFFSET)


@kernel(nogil=True)
def forget(by_identity: Int64, by_record: Int64, entries: Int64, counters: Int64, partition: int) -> None:
    """Drops all entries of a partition."""
    for number in range(counters[OLDEST], counters[NEXT]):
        slot = number % len(entries)
        if entries[slot, PARTITION] == partition:
            _drop(by_identity, by_record, entries, counters, slot)


@kernel(nogil=True)
def absorb(
    by_identity: Int64, by_record: Int64, entries: Int64, counters: Int64, known: Array, seed: int, rows: Int64,
    out: Int64,
) -> bool:  # fmt: skip
    """Registers entries `rows` (int64, [rows, ENTRY_WIDTH], without codes); writes their serial numbers to `out`.

    Returns whether all identities and all records are distinct.
    """
    for row in range(len(rows)):
        entry = rows[row]
        _fill_codes(entry, seed)
        repeated = _find(by_identity, entries, entry, IDENTITY_CODE, ID, PARTITION) >= 0
        if repeated or _find(by_record, entries, entry, RECORD_CODE, PARTITION, OFFSET) >= 0:
            return False
        out[row] = counters[NEXT]
        _register(by_identity, by_record, entries, counters, known, entry)
    return True
