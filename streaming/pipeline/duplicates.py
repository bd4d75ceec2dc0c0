"""The idempotency cache: a repeated transaction gets its first decision again.

A repeat has the same id, card and amount, in the same partition, at most `window_s` after the first occurrence by the
partition's clock (its greatest append time so far). Repeats do not extend the window. The same id with another card or
amount is another transaction and is scored, so that an approved id cannot approve another amount.

The result depends only on the partition's log, as long as at most `ids_max` transactions of all partitions are within
the window. Beyond that the oldest entries are dropped, and their repeats are scored again. With
`message.timestamp.type=CreateTime` producers set the clock, and a time far in the future extends the window of its
partition.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np

from cascade.columns import Array, Bool, Float64, Int64
from cascade.config import DuplicateSettings
from cascade.errors import StateError
from cascade.policy import ACTIONS
from cascade.schema import Roles
from streaming.pipeline import duplicate_kernels as kernels
from streaming.pipeline.codes import digest_codes
from streaming.pipeline.decisions import CAUSES, STAGES
from streaming.pipeline.duplicate_kernels import (
    APPENDED,
    ENTRIES,
    ENTRY_WIDTH,
    FORGOTTEN,
    ID,
    NEXT,
    OFFSET,
    OLDEST,
    PARTITION,
)
from streaming.pipeline.row import ROW
from streaming.pipeline.table import Table

# The most bundle versions: an entry has two bytes for its version.
BUNDLES_MAX = 1 << 16
# Far above the partitions of a topic: a greater id is a mistake, and would take memory.
PARTITIONS_MAX = 1 << 20
PREFIX = "duplicates."
_NAMES = ("entries", "known", "decided", "scores", "decision_times_ms", "bundle_numbers", "bundles", "clocks")
_ENTRIES, _KNOWN, _DECIDED, _SCORES, _TIMES, _BUNDLE_NUMBERS, _BUNDLES, _CLOCKS = (PREFIX + name for name in _NAMES)
# The arrays of an export with a row for each entry: dtype and shape of a row. Entries begin with the column ID.
_ROWS: Mapping[str, tuple[type[np.generic], tuple[int, ...]]] = {
    _ENTRIES: (np.int64, (ENTRY_WIDTH - ID,)),
    _KNOWN: (np.uint8, ()),
    _DECIDED: (np.uint8, (3,)),
    _SCORES: (np.float64, (2,)),
    _TIMES: (np.int64, ()),
    _BUNDLE_NUMBERS: (np.uint16, ()),
}


@dataclass(frozen=True, slots=True)
class Verdicts:
    """How transactions were decided, a row each.

    `actions`, `stages`, `causes` uint8: indexes into `cascade.policy.ACTIONS`, STAGES and CAUSES. `scores`,
    `screener_scores` float64: probabilities. `times_ms` int64: of the decisions, ms since the epoch.
    """

    actions: Array
    stages: Array
    causes: Array
    scores: Float64
    screener_scores: Float64
    times_ms: Int64

    def take(self, index: Array) -> Verdicts:
        """Returns a copy of some of the rows, by index or mask."""
        return Verdicts(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class FirstColumns:
    """First occurrences of transactions and their decisions, a row each.

    `present`: whether the cache still has the entry; if not, the other columns are meaningless. `known`: whether it has
    the decision; if not, the columns after `offsets` are meaningless. `partitions`, `offsets` int64: partition id and
    offset of the first record. `bundles`: versions.
    """

    present: Bool
    known: Bool
    partitions: Int64
    offsets: Int64
    verdicts: Verdicts
    bundles: list[str]


class FirstDecisions:
    """The last `ids_max` transactions and their decisions, in flat arrays; for one thread.

    Entries past the window are not found, not exported and not in a digest. They stay in memory until newer ones
    replace them, so that a waiting repeat can get a decision that is made after the window.

    Rows of a partition must come in the order of the log. To read the log again from an earlier offset, `forget` the
    partition, and `absorb` an export of that offset. With `window_s = 0` it finds nothing and takes no memory.
    """

    def __init__(self, settings: DuplicateSettings) -> None:
        self.enabled = settings.window_s > 0
        self._window_ms = round(settings.window_s * 1e3)
        # a disabled cache has a single empty slot, so that other methods need no check
        ids_max = settings.ids_max if self.enabled else 1
        index_length = 1 << max(3, (2 * ids_max - 1).bit_length())
        # np.zeros takes address space only; memory is allocated as transactions come
        self._by_identity = np.zeros(index_length, np.int64)
        self._by_record = np.zeros(index_length, np.int64)
        self._entries = np.zeros((ids_max, ENTRY_WIDTH), np.int64)
        self._counters = np.zeros(kernels.COUNTERS, np.int64)
        self._clocks = np.zeros(0, np.int64)
        self._known = np.zeros(ids_max, np.uint8)
        self._decided = np.zeros((ids_max, 3), np.uint8)
        self._scores = np.zeros((ids_max, 2), np.float64)
        self._times_ms = np.zeros(ids_max, np.int64)
        self._bundle_numbers = np.zeros(ids_max, np.uint16)
        self._bundles: list[str] = []
        # hashes differ in each process, so that nobody can aim for collisions
        self._seed = secrets.randbits(63)

    def __len__(self) -> int:
        return int(self._counters[ENTRIES])

    def warm_up(self) -> None:
        """Compiles the kernels ahead of the first transactions."""
        none = np.zeros(0, np.int64)
        rows = np.zeros(0, ROW)
        self._look_up(none, none, np.zeros(0), rows)
        self._settle(rows, none, 0)
        kernels.find_records(self._by_record, self._entries, self._seed, 0, none, none.copy())
        kernels.forget(self._by_identity, self._by_record, self._entries, self._counters, 0)
        self._register(np.zeros((0, ENTRY_WIDTH), np.int64), none.copy())

    def look_up(self, table: Table, roles: Roles) -> int:
        """Fills the table's columns `entry` and `first`; returns the number of repeats.

        First occurrences are registered, and later rows of the table may repeat them. An entry exists until `ids_max`
        further ones are registered, or its partition is forgotten. roles: names of the fields.
        """
        if not self.enabled:
            return 0
        columns, rows = table.batch.columns, table.rows
        ids, cards = _codes(columns[roles.transaction_id]), _codes(columns[roles.card])
        amounts = np.ascontiguousarray(columns[roles.amount], np.float64)
        repeats = self._look_up(ids, cards, amounts, rows)
        if repeats < 0:
            self._make_clocks(int(rows["partition_id"].max()))
            repeats = self._look_up(ids, cards, amounts, rows)
        return repeats

    def _look_up(self, ids: Int64, cards: Int64, amounts: Float64, rows: Array) -> int:
        return kernels.look_up(
            self._by_identity, self._by_record, self._entries, self._counters, self._clocks, self._known, self._seed,
            self._window_ms, ids, cards, amounts, rows,
        )  # fmt: skip

    def settle_rows(self, table: Table, chosen: Int64) -> None:
        """Stores the decisions of the table's rows with these positions, by the worker's own bundle.

        Ignores rows without an entry (repeats, or dropped), and entries that have a decision: it is final.
        """
        if self.enabled:
            self._settle(table.rows, chosen, self._bundle_number(table.bundles[0]))

    def _settle(self, rows: Array, chosen: Int64, bundle: int) -> None:
        kernels.settle(
            self._entries, self._counters, self._known, self._decided, self._scores, self._times_ms,
            self._bundle_numbers, bundle, rows, chosen,
        )  # fmt: skip

    def settle(self, partition: int, offsets: Int64, verdicts: Verdicts, bundle: str) -> None:
        """Stores the decisions of a partition's records (`offsets`: int64, [verdicts]) by a bundle's version.

        Ignores offsets without an entry (of repeats, or dropped), and entries that have a decision: it is final.
        """
        if not self.enabled or not len(offsets):
            return
        slots = np.empty(len(offsets), np.int64)
        kernels.find_records(self._by_record, self._entries, self._seed, partition, _plain(offsets), slots)
        fresh = np.flatnonzero(slots >= 0)
        fresh = fresh[self._known[slots[fresh]] == 0]
        slots, verdicts = slots[fresh], verdicts.take(fresh)
        for column, values in enumerate((verdicts.actions, verdicts.stages, verdicts.causes)):
            self._decided[slots, column] = values
        self._scores[slots, 0] = verdicts.scores
        self._scores[slots, 1] = verdicts.screener_scores
        self._times_ms[slots] = verdicts.times_ms
        self._bundle_numbers[slots] = self._bundle_number(bundle)
        self._known[slots] = 1

    def first(self, entries: Int64) -> FirstColumns:
        """Returns the first occurrences of entries that `look_up` returned."""
        present = (entries >= self._counters[OLDEST]) & (entries < self._counters[NEXT])
        slots = np.where(present, entries, 0) % len(self._entries)
        rows = self._entries[slots]
        present &= rows[:, PARTITION] != FORGOTTEN
        versions = self._bundles or [""]
        codes, scores = self._decided[slots].T, self._scores[slots].T
        return FirstColumns(
            present=present,
            known=present & (self._known[slots] == 1),
            partitions=rows[:, PARTITION],
            offsets=rows[:, OFFSET],
            verdicts=Verdicts(codes[0], codes[1], codes[2], scores[0], scores[1], self._times_ms[slots]),
            bundles=[versions[number] for number in self._bundle_numbers[slots].tolist()],
        )

    def forget(self, partition: int) -> None:
        """Drops the entries of a partition that was lost, or is read again from an earlier offset."""
        if partition < len(self._clocks):
            kernels.forget(self._by_identity, self._by_record, self._entries, self._counters, partition)
            self._clocks[partition] = kernels.NEVER

    def export(self) -> dict[str, Array]:
        """Returns copies of the entries within the window, by array name; empty if the cache is disabled."""
        if not self.enabled:
            return {}
        slots = self._slots_within()
        numbers, used = np.unique(self._bundle_numbers[slots], return_inverse=True)
        versions = [self._bundles[number].encode() for number in numbers.tolist()] if self._bundles else []
        set_clocks = np.flatnonzero(self._clocks != kernels.NEVER)
        return {
            _ENTRIES: self._entries[slots, ID:],
            _KNOWN: self._known[slots],
            _DECIDED: self._decided[slots],
            _SCORES: self._scores[slots],
            _TIMES: self._times_ms[slots],
            _BUNDLE_NUMBERS: used.astype(np.uint16),
            _BUNDLES: np.array(versions, np.bytes_),
            _CLOCKS: np.column_stack([set_clocks, self._clocks[set_clocks]]).astype(np.int64),
        }

    def check_export(self, arrays: Mapping[str, Array]) -> None:
        """Raises StateError unless these have the names, dtypes and lengths of an export; takes microseconds."""
        if self.enabled:
            _check_shapes(arrays)

    def without_later(self, arrays: Mapping[str, Array], until: Mapping[int, int]) -> Mapping[str, Array]:
        """Returns an export without the decisions of these partitions from the offsets `until` on.

        Raises StateError if the arrays are not a valid export.
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
        """Replaces the entries of these partitions by those of an export.

        Raises StateError if the arrays are not a valid export; the partitions then have no entries.
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
            raise StateError(f"array {_ENTRIES} has a transaction or an offset twice")
        self._absorb_decisions(arrays, chosen, entries)

    def _register(self, rows: Int64, entries: Int64) -> bool:
        return kernels.absorb(
            self._by_identity, self._by_record, self._entries, self._counters, self._known, self._seed, rows, entries
        )

    def _absorb_decisions(self, arrays: Mapping[str, Array], chosen: Int64, entries: Int64) -> None:
        """Copies the decisions of the rows `chosen`, now `entries`; some may have been replaced already."""
        known = (arrays[_KNOWN][chosen] == 1) & (entries >= self._counters[OLDEST])
        chosen, slots = chosen[known], entries[known] % len(self._entries)
        self._decided[slots] = arrays[_DECIDED][chosen]
        self._scores[slots] = arrays[_SCORES][chosen]
        self._times_ms[slots] = arrays[_TIMES][chosen]
        numbers = [self._bundle_number(version.decode()) for version in arrays[_BUNDLES].tolist()]
        self._bundle_numbers[slots] = np.array(numbers, np.uint16)[arrays[_BUNDLE_NUMBERS][chosen]]
        self._known[slots] = 1

    def digest(self, partition: int) -> str:
        """Returns the SHA-256 (hex) of a partition's entries within the window: the same after any crash.

        Decisions are not a part of it: a deep model may answer in time once and too late another time.
        """
        slots = self._slots_within()
        rows = self._entries[slots[self._entries[slots, PARTITION] == partition], ID:]
        clock_ms = self._clocks[partition] if partition < len(self._clocks) else kernels.NEVER
        content = np.concatenate([[clock_ms], rows[np.argsort(rows[:, OFFSET - ID])].ravel()]).astype("<i8")
        return hashlib.sha256(content.tobytes()).hexdigest()

    def _slots_within(self) -> Int64:
        """Slots of the entries within their partition's window, in order of arrival."""
        slots = np.arange(self._counters[OLDEST], self._counters[NEXT]) % len(self._entries)
        slots = slots[self._entries[slots, PARTITION] != FORGOTTEN]
        age_ms = self._clocks[self._entries[slots, PARTITION]] - self._entries[slots, APPENDED]
        within: Int64 = slots[age_ms <= self._window_ms]
        return within

    def _make_clocks(self, partition: int) -> None:
        """Adds clocks for the partitions up to this one."""
        if partition >= PARTITIONS_MAX:
            raise StateError(
                f"partition {partition} is out of range: at most {PARTITIONS_MAX} partitions are supported"
            )
        missing = partition + 1 - len(self._clocks)
        if missing > 0:
            self._clocks = np.concatenate([self._clocks, np.full(missing, kernels.NEVER, np.int64)])

    def _bundle_number(self, version: str) -> int:
        """The number of a version, nearly always the newest."""
        if self._bundles and self._bundles[-1] == version:
            return len(self._bundles) - 1
        if version not in self._bundles:
            if len(self._bundles) == BUNDLES_MAX:
                raise StateError(f"decisions of more than {BUNDLES_MAX} bundles in one run; restart the worker")
            self._bundles.append(version)
        return self._bundles.index(version)


def _codes(column: Array) -> Int64:
    """Returns integers unchanged, and texts as codes that resist second preimages."""
    if column.dtype.kind == "S":
        return digest_codes(column.tolist())
    return np.ascontiguousarray(column)


def _plain(column: Int64) -> Int64:
    """A copy in the layout that the kernels are compiled for; another layout would be compiled at its first use."""
    return np.array(column, np.int64)


def _check_shapes(arrays: Mapping[str, Array]) -> None:
    """Raises StateError if a name, dtype or length is not that of an export."""
    for name in (*_ROWS, _BUNDLES, _CLOCKS):
        if name not in arrays:
            raise StateError(f"array {name} is absent")
    count = len(arrays[_ENTRIES])
    for name, (dtype, width) in _ROWS.items():
        if arrays[name].dtype != dtype or arrays[name].shape != (count, *width):
            raise StateError(
                f"array {name} is {arrays[name].dtype}{list(arrays[name].shape)}, expected {count} entries"
            )
    clocks, versions = arrays[_CLOCKS], arrays[_BUNDLES]
    if clocks.dtype != np.int64 or clocks.ndim != 2 or clocks.shape[1] != 2:
        raise StateError(f"array {_CLOCKS} is {clocks.dtype}{list(clocks.shape)}")
    if versions.dtype.kind != "S" or versions.ndim != 1:
        raise StateError(f"array {_BUNDLES} is {versions.dtype}{list(versions.shape)}")


def _check_export(arrays: Mapping[str, Array]) -> None:
    """Raises StateError if the arrays are not a valid export."""
    _check_shapes(arrays)
    clocks, versions = arrays[_CLOCKS], arrays[_BUNDLES]
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
    for name, valid in sound.items():
        if not valid:
            raise StateError(f"array {name} has values that no export has")


def _within(values: Array, end: Array | float) -> bool:
    """Whether all values are in 0 ≤ value < `end`."""
    return bool(((values >= 0) & (values < end)).all())
