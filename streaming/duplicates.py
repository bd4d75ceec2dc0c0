"""The idempotency cache: a transaction that comes again gets its first decision again.

Again means: with the same id, card and amount, in the same partition, at most `window_s` after the first by the log's
own clock (the greatest append time of the partition so far); the first one's time counts, repeats do not renew it. An
id that comes with another card or amount is another transaction, and is scored: whoever repeats an approved id must
not get another amount approved by it.

What is found is a function of one partition's log alone, as long as no more than `ids_max` transactions of all
partitions lie within the window: beyond it the oldest are forgotten, and a repeat of those is scored again. The clock
is the topic's: with `message.timestamp.type=CreateTime` a producer sets it, and one with times far in the future
stretches the window for its partition.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from cascade.columns import Array, Bool, ColumnBatch, Float64, Int64
from cascade.config import DuplicateSettings
from cascade.errors import StateError
from cascade.policy import ACTIONS
from cascade.schema import Roles
from streaming import duplicate_kernels as kernels
from streaming.codes import digest_codes
from streaming.decisions import CAUSES, STAGES
from streaming.duplicate_kernels import APPENDED, ENTRY_WIDTH, GONE, HELD, ID, NEXT, OFFSET, OLDEST, PARTITION

# Versions of bundles that entries may name: a number has two bytes.
BUNDLES_MAX = 1 << 16
# Far above what a topic can have: a greater number is a mistake, and would cost memory.
PARTITIONS_MAX = 1 << 20
PREFIX = "duplicates."
_ENTRIES, _KNOWN, _DECIDED, _SCORES, _TIMES, _BUNDLE_NUMBERS, _BUNDLES, _CLOCKS = (
    PREFIX + name
    for name in (
        "entries", "known", "decided", "scores", "decision_times_ms", "bundle_numbers", "bundles", "clocks",
    )
)  # fmt: skip
# Of an export, a row an entry: dtype and the shape of a row. Entries begin with the column ID.
_ROWS: Mapping[str, tuple[type[np.generic], tuple[int, ...]]] = {
    _ENTRIES: (np.int64, (ENTRY_WIDTH - ID,)),
    _KNOWN: (np.uint8, ()),
    _DECIDED: (np.uint8, (3,)),
    _SCORES: (np.float64, (2,)),
    _TIMES: (np.int64, ()),
    _BUNDLE_NUMBERS: (np.uint16, ()),
}


@dataclass(frozen=True, slots=True)
class FirstColumns:
    """First occurrences of transactions and their decisions, a row each.

    `present`: whether the cache still has the entry; if not, the other columns are meaningless. `known`: whether it has
    the decision; if not, the columns after `offsets` are meaningless. `partitions`, `offsets` int64: partition id and
    offset of the first record. `actions`, `stages`, `causes` uint8: indexes into `cascade.policy.ACTIONS`, STAGES and
    CAUSES. `scores`, `screener_scores` float64: probabilities. `decision_times_ms` int64: ms since the epoch.
    `bundles`: versions.
    """

    present: Bool
    known: Bool
    partitions: Int64
    offsets: Int64
    actions: Array
    stages: Array
    causes: Array
    scores: Float64
    screener_scores: Float64
    decision_times_ms: Int64
    bundles: list[str]

    def __len__(self) -> int:
        return len(self.present)


class FirstDecisions:
    """The last `ids_max` transactions and their decisions, in flat arrays; one thread uses it.

    What is past the window is no longer found, exported or part of a digest. It stays in memory until newer ones take
    its place, so that a repeat can still ask for a decision that is made after the window.

    Rows of a partition come in the order of the log. Whoever goes back in it (after a crash, or to read again what an
    aborted transaction held) begins with `forget`, and `absorb` of what was exported at that place. With
    `window_s = 0` it finds nothing, keeps nothing and takes no memory.
    """

    def __init__(self, settings: DuplicateSettings) -> None:
        self.enabled = settings.window_s > 0
        self._window_ms = round(settings.window_s * 1e3)
        # one slot that stays empty where it is disabled, so that nothing else needs to ask
        ids_max = settings.ids_max if self.enabled else 1
        index_length = 1 << max(3, (2 * ids_max - 1).bit_length())
        # zeros take address space only: memory is used as transactions come
        self._by_identity = np.zeros(index_length, np.int64)
        self._by_place = np.zeros(index_length, np.int64)
        self._entries = np.zeros((ids_max, ENTRY_WIDTH), np.int64)
        self._counters = np.zeros(kernels.COUNTERS, np.int64)
        self._clocks = np.zeros(0, np.int64)
        self._known = np.zeros(ids_max, np.uint8)
        self._decided = np.zeros((ids_max, 3), np.uint8)
        self._scores = np.zeros((ids_max, 2), np.float64)
        self._times_ms = np.zeros(ids_max, np.int64)
        self._bundle_numbers = np.zeros(ids_max, np.uint16)
        self._bundles: list[str] = []
        # the same transaction has another place in each process, and nobody can aim for one
        self._seed = secrets.randbits(63)

    def __len__(self) -> int:
        return int(self._counters[HELD])

    def warm_up(self) -> None:
        """Compiles the kernels ahead of the first transactions."""
        none = np.zeros(0, np.int64)
        self._look_up(none, none, none, none, none, none, none.copy())
        kernels.find_places(self._by_place, self._entries, self._seed, 0, none, none.copy())
        kernels.forget(self._by_identity, self._by_place, self._entries, self._counters, 0)
        self._register(np.zeros((0, ENTRY_WIDTH), np.int64), none.copy())

    def look_up(self, batch: ColumnBatch, roles: Roles, partitions: Int64, offsets: Int64, appended_ms: Int64) -> Int64:
        """Entries int64 [rows] of the rows' first occurrences, for `first`; -1 where the row is itself a first one.

        First ones are registered, and may be what a later row of the batch repeats. An entry is held until `ids_max`
        further ones are registered, or its partition is forgotten. `partitions` (numbers in the topic), `offsets` and
        `appended_ms` (the record's time, ms since the epoch) are int64 [rows].
        """
        found = np.full(batch.rows, -1, np.int64)
        if self.enabled:
            self._look_up(
                _codes(batch[roles.transaction_id]), _codes(batch[roles.card]), _bits(batch[roles.amount]),
                partitions, offsets, appended_ms, found,
            )  # fmt: skip
        return found

    def _look_up(
        self, ids: Int64, cards: Int64, amounts: Int64, partitions: Int64, offsets: Int64, appended_ms: Int64,
        found: Int64,
    ) -> None:  # fmt: skip
        self._make_clocks(int(partitions.max(initial=-1)))
        kernels.look_up(
            self._by_identity, self._by_place, self._entries, self._counters, self._clocks, self._known, self._seed,
            self._window_ms, _plain(ids), _plain(cards), _plain(amounts), _plain(partitions), _plain(offsets),
            _plain(appended_ms), found,
        )  # fmt: skip

    def settle(
        self,
        partition: int,
        offsets: Int64,
        actions: Array,
        stages: Array,
        causes: Array,
        scores: Float64,
        screener_scores: Float64,
        decision_times_ms: Int64,
        bundle: str,
    ) -> None:
        """Tell the decisions of some records of a partition; the columns are as in FirstColumns, `bundle` a version.

        Offsets that are not held (repeats, and what was forgotten) are passed over, as are those that are settled: a
        decision is final.
        """
        if not self.enabled or not len(offsets):
            return
        slots = np.empty(len(offsets), np.int64)
        kernels.find_places(self._by_place, self._entries, self._seed, partition, _plain(offsets), slots)
        fresh = np.flatnonzero(slots >= 0)
        fresh = fresh[self._known[slots[fresh]] == 0]
        slots = slots[fresh]
        for column, values in enumerate((actions, stages, causes)):
            self._decided[slots, column] = values[fresh]
        self._scores[slots, 0] = scores[fresh]
        self._scores[slots, 1] = screener_scores[fresh]
        self._times_ms[slots] = decision_times_ms[fresh]
        self._bundle_numbers[slots] = self._bundle_number(bundle)
        self._known[slots] = 1

    def first(self, entries: Int64) -> FirstColumns:
        """What is known of entries that `look_up` gave."""
        present = (entries >= self._counters[OLDEST]) & (entries < self._counters[NEXT])
        slots = np.where(present, entries, 0) % len(self._entries)
        rows = self._entries[slots]
        present &= rows[:, PARTITION] != GONE
        versions = self._bundles or [""]
        return FirstColumns(
            present=present,
            known=present & (self._known[slots] == 1),
            partitions=rows[:, PARTITION],
            offsets=rows[:, OFFSET],
            actions=self._decided[slots, 0],
            stages=self._decided[slots, 1],
            causes=self._decided[slots, 2],
            scores=self._scores[slots, 0],
            screener_scores=self._scores[slots, 1],
            decision_times_ms=self._times_ms[slots],
            bundles=[versions[number] for number in self._bundle_numbers[slots].tolist()],
        )

    def forget(self, partition: int) -> None:
        """Drop what a partition has: it belongs to another worker, or is read again from an earlier place."""
        if partition < len(self._clocks):
            kernels.forget(self._by_identity, self._by_place, self._entries, self._counters, partition)
            self._clocks[partition] = kernels.NEVER

    def export(self) -> dict[str, Array]:
        """Copies of all that is within the window, by name; empty where the cache is disabled."""
        if not self.enabled:
            return {}
        slots = self._slots_within()
        numbers, used = np.unique(self._bundle_numbers[slots], return_inverse=True)
        versions = [self._bundles[number].encode() for number in numbers.tolist()] if self._bundles else []
        told = np.flatnonzero(self._clocks != kernels.NEVER)
        return {
            _ENTRIES: self._entries[slots, ID:],
            _KNOWN: self._known[slots],
            _DECIDED: self._decided[slots],
            _SCORES: self._scores[slots],
            _TIMES: self._times_ms[slots],
            _BUNDLE_NUMBERS: used.astype(np.uint16),
            _BUNDLES: np.array(versions, np.bytes_),
            _CLOCKS: np.column_stack([told, self._clocks[told]]).astype(np.int64),
        }

    def without_later(self, arrays: Mapping[str, Array], until: Mapping[int, int]) -> Mapping[str, Array]:
        """An export in which the decisions of these partitions are known below the offsets `until` only.

        Raises StateError where the arrays cannot be an export.
        """
        if not self.enabled:
            return arrays
        _check_export(arrays)
        numbers, offsets = (arrays[_ENTRIES][:, column - ID] for column in (PARTITION, OFFSET))
        known = arrays[_KNOWN].copy()
        for number, offset in until.items():
            known[(numbers == number) & (offsets >= offset)] = 0
        return {**arrays, _KNOWN: known}

    def absorb(self, arrays: Mapping[str, Array], partitions: Iterable[int]) -> None:
        """Go on with what `export` gave of these partitions, in place of what is held of them.

        Raises StateError where the arrays are absent or cannot be an export; nothing is held of the partitions then.
        """
        wanted = sorted(set(partitions))
        for partition in wanted:
            self.forget(partition)
        if not self.enabled or not wanted:
            return
        _check_export(arrays)
        self._make_clocks(wanted[-1])
        clocks = arrays[_CLOCKS][np.isin(arrays[_CLOCKS][:, 0], wanted)]
        self._clocks[clocks[:, 0]] = clocks[:, 1]
        chosen = np.flatnonzero(np.isin(arrays[_ENTRIES][:, PARTITION - ID], wanted))
        rows = np.zeros((len(chosen), ENTRY_WIDTH), np.int64)
        rows[:, ID:] = arrays[_ENTRIES][chosen]
        entries = np.empty(len(rows), np.int64)
        if not self._register(rows, entries):
            for partition in wanted:
                self.forget(partition)
            raise StateError(f"array {_ENTRIES} holds a transaction or an offset twice")
        self._absorb_decisions(arrays, chosen, entries)

    def _register(self, rows: Int64, entries: Int64) -> bool:
        return kernels.absorb(
            self._by_identity, self._by_place, self._entries, self._counters, self._known, self._seed, rows, entries
        )

    def _absorb_decisions(self, arrays: Mapping[str, Array], chosen: Int64, entries: Int64) -> None:
        """Copy the decisions of the rows `chosen`, which became `entries`; some may have made room for others."""
        known = (arrays[_KNOWN][chosen] == 1) & (entries >= self._counters[OLDEST])
        chosen, slots = chosen[known], entries[known] % len(self._entries)
        self._decided[slots] = arrays[_DECIDED][chosen]
        self._scores[slots] = arrays[_SCORES][chosen]
        self._times_ms[slots] = arrays[_TIMES][chosen]
        numbers = [self._bundle_number(version.decode()) for version in arrays[_BUNDLES].tolist()]
        self._bundle_numbers[slots] = np.array(numbers, np.uint16)[arrays[_BUNDLE_NUMBERS][chosen]]
        self._known[slots] = 1

    def digest(self, partition: int) -> str:
        """SHA-256 (hex) of which transactions of a partition are remembered: the same after any crash.

        The decisions are left out: what a deep model answered in time once, it may answer too late another time.
        """
        slots = self._slots_within()
        rows = self._entries[slots[self._entries[slots, PARTITION] == partition], ID:]
        clock_ms = self._clocks[partition] if partition < len(self._clocks) else kernels.NEVER
        content = np.concatenate([[clock_ms], rows[np.argsort(rows[:, OFFSET - ID])].ravel()]).astype("<i8")
        return hashlib.sha256(content.tobytes()).hexdigest()

    def _slots_within(self) -> Int64:
        """Slots of the entries within their partition's window, in the order in which they came."""
        slots = np.arange(self._counters[OLDEST], self._counters[NEXT]) % len(self._entries)
        slots = slots[self._entries[slots, PARTITION] != GONE]
        age_ms = self._clocks[self._entries[slots, PARTITION]] - self._entries[slots, APPENDED]
        within: Int64 = slots[age_ms <= self._window_ms]
        return within

    def _make_clocks(self, partition: int) -> None:
        """Have a clock for each partition up to this one."""
        if partition >= PARTITIONS_MAX:
            raise StateError(f"partition {partition} is out of range, at most {PARTITIONS_MAX} are looked after")
        missing = partition + 1 - len(self._clocks)
        if missing > 0:
            self._clocks = np.concatenate([self._clocks, np.full(missing, kernels.NEVER, np.int64)])

    def _bundle_number(self, version: str) -> int:
        """The number of a version; nearly always that of the newest."""
        if self._bundles and self._bundles[-1] == version:
            return len(self._bundles) - 1
        if version not in self._bundles:
            if len(self._bundles) == BUNDLES_MAX:
                raise StateError(f"decisions of more than {BUNDLES_MAX} bundles in one run; restart the worker")
            self._bundles.append(version)
        return self._bundles.index(version)


def _codes(column: Array) -> Int64:
    """The integers themselves; of strings, codes of which nobody finds a second text for a given one."""
    if column.dtype.kind == "S":
        return digest_codes(column.tolist())
    return column


def _plain(column: Int64) -> Int64:
    """A copy in the one memory layout that the kernels are compiled for: others would be compiled when they come."""
    return np.array(column, np.int64)


def _bits(amounts: Float64) -> Int64:
    # adding zero makes -0.0 and 0.0 one amount
    bits: Int64 = (amounts + 0.0).view(np.int64)
    return bits


def _check_export(arrays: Mapping[str, Array]) -> None:
    """Raise StateError where the arrays cannot be what `export` gave."""
    for name in (*_ROWS, _BUNDLES, _CLOCKS):
        if name not in arrays:
            raise StateError(f"array {name} is absent")
    count = len(arrays[_ENTRIES])
    for name, (dtype, width) in _ROWS.items():
        if arrays[name].dtype != dtype or arrays[name].shape != (count, *width):
            raise StateError(f"array {name} is {arrays[name].dtype}{list(arrays[name].shape)}, not of {count} entries")
    clocks, versions = arrays[_CLOCKS], arrays[_BUNDLES]
    if clocks.dtype != np.int64 or clocks.ndim != 2 or clocks.shape[1] != 2:
        raise StateError(f"array {_CLOCKS} is {clocks.dtype}{list(clocks.shape)}")
    if versions.dtype.kind != "S" or versions.ndim != 1:
        raise StateError(f"array {_BUNDLES} is {versions.dtype}{list(versions.shape)}")
    known = arrays[_KNOWN] == 1
    decided, scores = arrays[_DECIDED][known], arrays[_SCORES][known]
    entries = arrays[_ENTRIES]
    sound = {
        _CLOCKS: _within(clocks[:, 0], PARTITIONS_MAX) and len(np.unique(clocks[:, 0])) == len(clocks),
        _ENTRIES: bool(np.isin(entries[:, PARTITION - ID], clocks[:, 0]).all())
        and _within(entries[:, APPENDED - ID], kernels.TIME_MS_MAX + 1),
        _KNOWN: _within(arrays[_KNOWN], 2),
        _DECIDED: _within(decided, np.array([len(ACTIONS), len(STAGES), len(CAUSES)])),
        _SCORES: _within(scores, np.nextafter(1.0, 2.0)),
        _BUNDLE_NUMBERS: _within(arrays[_BUNDLE_NUMBERS][known], len(versions)),
    }
    for name, holds in sound.items():
        if not holds:
            raise StateError(f"array {name} holds what no export holds")


def _within(values: Array, end: Array | float) -> bool:
    """Whether all values lie from 0 on and below `end`."""
    return bool(((values >= 0) & (values < end)).all())
