"""The feature engine: folds micro-batches into bounded state and gives features and sequences, point in time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from cascade.columns import Array, ColumnBatch, Float64, Int64
from cascade.errors import StateError
from cascade.features.buffers import FeatureBatch, FeatureBuffers
from cascade.features.key_part import KeyPart
from cascade.features.layout import EVICTIONS, KEYS, LATE, SOURCES_MAX, TOO_LATE
from cascade.features.spec import DAY_MS, FeatureSpec, Plan, StatelessColumn, resolve
from cascade.features.state import is_shared
from cascade.features.summaries import Summaries
from cascade.schema import Schema, key_codes

HOUR_MS = 3_600_000
NIGHT_ENDS_HOUR = 6
# Keys of each field that one call of `absorb` takes: some milliseconds, so that the caller can go on polling.
ABSORBED_KEYS = 1_000
# 1970-01-01 was a Thursday: shifts day numbers so that Monday is 0.
EPOCH_WEEKDAY = 3


@dataclass(frozen=True, slots=True)
class KeyStatistics:
    """Counts of one key field: keys held, keys forgotten for room, events out of order, events too late to keep."""

    keys: int
    evictions: int
    late: int
    too_late: int


class FeatureEngine:
    """Computes the features of a spec over a schema, one micro-batch after another.

    One implementation for training and serving: fold a data frame or a stream, in any batches; equal to the last
    bit as long as the order of rows is the same.

    Windows are exact and end at the row: (t − window, t]. A row sees itself and the rows of its key that came before
    it in the stream with an event time not after its own. Late rows: a row whose key has seen later events gets the
    features of its own time and is put in its place in time, if it is younger than the longest window plus
    `lateness` before the key's newest event; else it is scored with what is kept and not stored.

    Rows come from sources: the partitions of a topic, by number. What is held of each can be dropped, or taken from
    another engine's export, by itself. All sources are shown at first. The events of a hidden one count for its own
    rows only; for the other rows, what workers told of it (`fold_summaries`) counts instead.
    """

    def __init__(self, spec: FeatureSpec, schema: Schema, origin: str = "features.toml") -> None:
        self.schema = schema
        self.plan: Plan = resolve(spec, schema, origin)
        self.names = self.plan.names
        self.width = len(self.names)
        self.sequence_shape = (self.plan.sequence.length, self.plan.sequence_width)
        self._hidden = np.zeros(SOURCES_MAX, np.bool_)
        self._any_hidden = False
        self._parts: list[KeyPart] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything; which sources are hidden stays."""
        self._parts = [KeyPart(self.plan, key) for key in self.plan.keys]

    def buffers(self) -> FeatureBuffers:
        """What `update` can write one batch after another to."""
        return FeatureBuffers(self.width, self.sequence_shape)

    def update(
        self, batch: ColumnBatch, sources: Int64 | None = None, buffers: FeatureBuffers | None = None
    ) -> FeatureBatch:
        """Fold the rows, in their order, and give their features and sequences.

        `sources` int64 [rows]: the source of each row, 0 ≤ source < SOURCES_MAX; None where all are of source 0. What
        is given lies in `buffers`, and holds until they are written to again; None: in memory of its own. Raises
        ValueError, having folded nothing, where a source is out of range.
        """
        sources = np.zeros(batch.rows, np.int64) if sources is None else _checked_sources(sources, batch.rows)
        found = (self.buffers() if buffers is None else buffers).of(batch.rows)
        times = batch[self.schema.roles.event_time]
        for position, column in enumerate(self.plan.stateless):
            found.features[:, position] = _stateless(column, batch, times)
        for part in self._parts:
            part.update(batch, times, sources, self._hidden if self._any_hidden else None, found)
        return found

    def update_labels(self, labels: ColumnBatch) -> None:
        """Fold labels: the schema's `label_fields`. They show from `label.delay` after the transaction on."""
        roles = self.schema.roles
        identities = key_codes(labels[roles.transaction_id])
        for part in self._parts:
            if part.program.has_labels:
                part.update_labels(
                    key_codes(labels[part.key]), labels[roles.event_time], identities, labels[self.schema.label.field]
                )

    def show(self, source: int) -> None:
        """Let the events of a source count for all rows, and what others told of it for none; ValueError beyond."""
        self._hide(source, False)

    def hide(self, source: int) -> None:
        """Let the events of a source count for its own rows only, and what others told of it for the other rows.

        For a source that is still being rebuilt, or that another worker holds. Raises ValueError beyond SOURCES_MAX.
        """
        self._hide(source, True)

    def _hide(self, source: int, hidden: bool) -> None:
        self._hidden[_checked_source(source)] = hidden
        self._any_hidden = bool(self._hidden.any())

    def forget(self, source: int) -> None:
        """Drop the events and sequences of a source, and keys that have nothing left; labels and summaries stay."""
        for part in self._parts:
            part.forget(_checked_source(source))

    def absorb(
        self,
        arrays: Mapping[str, Array],
        sources: Collection[int],
        *,
        labels: bool,
        first: int = 0,
        count: int = ABSORBED_KEYS,
    ) -> int | None:
        """Take what is of the given sources from exported arrays into the state, `count` keys of a field at a time.

        Each event and step as if its row came now: into its place by time, within the limits, its key the latest used.
        With `labels` the frauds of all keys too. Returns the next `first`, None when all is taken. What is taken twice
        counts twice: `forget` first. Raises StateError where the arrays do not fit or are not in order; what came
        before is in the state then: `forget` the sources.
        """
        wanted = np.zeros(SOURCES_MAX, np.bool_)
        for source in sources:
            wanted[_checked_source(source)] = True
        if first < 0 or count < 1:
            raise ValueError(f"first {first} and count {count}: give a position and a positive number of keys")
        more = [part.absorb(arrays, wanted, labels, first, count) for part in self._parts]
        return first + count if any(more) else None

    @property
    def shared_keys(self) -> tuple[str, ...]:
        """Key fields of which workers tell each other: those with windows, but for the sequence's key."""
        return tuple(part.key for part in self._parts if is_shared(self.plan, part.key))

    @property
    def shared_values(self) -> tuple[int, ...]:
        """How many value fields a summary of each of `shared_keys` totals."""
        return tuple(len(self._shared(key).values) for key in self.shared_keys)

    def summarise(self, key_field: str, codes: Int64, sources: Int64, starts: Int64, length_ms: int) -> Summaries:
        """Totals, as of now, of the events of each code and source with start ≤ time < start + `length_ms`.

        `codes`, `sources`, `starts` (ms) int64 [n]; the summaries are in their order, with a count of 0 where there are
        no events. Raises ValueError where the field is none of `shared_keys`, a source or the length is out of range.
        """
        if length_ms < 1:
            raise ValueError(f"length_ms {length_ms} is not positive")
        checked = _checked_sources(sources, len(codes))
        return self._shared(key_field).summarise(codes, checked, starts, length_ms)

    def fold_summaries(self, key_field: str, summaries: Summaries) -> None:
        """Put each summary in the place of the one of its code, source and start; a count of 0 takes that one out.

        In windows of rows of other sources, while its source is hidden, a summary counts as its number of rows at the
        time of its newest. Raises ValueError where the field is none of `shared_keys` or a source is out of range.
        """
        _checked_sources(summaries.sources, len(summaries))
        self._shared(key_field).fold_summaries(summaries)

    def _shared(self, key_field: str) -> KeyPart:
        for part in self._parts:
            if part.key == key_field and is_shared(self.plan, key_field):
                return part
        raise ValueError(f"{key_field!r} is not shared: use one of {', '.join(self.shared_keys) or 'none'}")

    def digest(self, source: int, after_ms: int | None = None) -> str:
        """SHA-256 (hex) of the events and sequences of a source, whatever else is held and however it lies in memory.

        Of each key, of the events younger than the horizon before its newest of that source, and later than `after_ms`.
        Events of other sources push older ones out of a key's horizon, so digests of states that hold different sources
        are compared with an `after_ms` of the newest of all events minus the horizon (`horizon_ms`).
        """
        sink = hashlib.sha256()
        for part in self._parts:
            part.feed_source(sink, _checked_source(source), after_ms)
        return sink.hexdigest()

    def digest_labels(self, after_ms: int | None = None) -> str:
        """SHA-256 (hex) of the frauds that are kept of all keys, with times later than `after_ms`."""
        sink = hashlib.sha256()
        for part in self._parts:
            part.feed_frauds(sink, after_ms)
        return sink.hexdigest()

    @property
    def horizon_ms(self) -> int:
        """Age beyond which no event counts or is kept: the longest of all key fields."""
        return max(part.program.horizon_ms for part in self._parts)

    def warm_up(self) -> None:
        """Compile the kernels, so that neither the first row nor the first rebalance pays for it; changes nothing."""
        none = np.zeros(0, np.int64)
        rows = ColumnBatch({name: np.zeros(0, one.dtype) for name, one in self.schema.fields.items()}, 0)
        labels = ColumnBatch({name: np.zeros(0, one.dtype) for name, one in self.schema.label_fields().items()}, 0)
        found = self.update(rows)
        self.update_labels(labels)
        for part in self._parts:
            for hidden in (None, self._hidden):
                part.update(rows, none, none, hidden, found)
            part.warm_up()
        for key in self.shared_keys:
            self.fold_summaries(key, self.summarise(key, none, none, none, 1))

    def statistics(self) -> dict[str, KeyStatistics]:
        """Counts by key field."""
        counters = {part.key: part.state.counters for part in self._parts}
        return {
            key: KeyStatistics(int(c[KEYS]), int(c[EVICTIONS]), int(c[LATE]), int(c[TOO_LATE]))
            for key, c in counters.items()
        }

    def export_state(self, buffers: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Copies of the used parts of all arrays, by name; `import_state` and `absorb` of an equal spec take them.

        All of it, summaries too; not which sources are hidden, that is the owner's business.

        With `buffers` of `export_buffers` the copies lie in those, which is more than ten times faster than in fresh
        memory (32 ms against 1.4 s for 674 MB, `bench/snapshots.py`). The next export into them overwrites them.
        """
        copies = {}
        for name, array in self._used().items():
            room = None if buffers is None else buffers.get(name)
            if room is None or len(room) < len(array):
                copies[name] = array.copy()
            else:
                copies[name] = room[: len(array)]
                np.copyto(copies[name], array)
        return copies

    def export_buffers(self) -> dict[str, Array]:
        """Room for an export a quarter larger than one would be now, its pages touched; any thread may ask for it."""
        buffers = {}
        for name, array in self._used().items():
            buffers[name] = np.empty((len(array) + len(array) // 4 + 1, *array.shape[1:]), array.dtype)
            buffers[name].fill(0)
        return buffers

    def exports_into(self, buffers: Mapping[str, Array]) -> bool:
        """Whether an export would find room in the buffers."""
        return all(name in buffers and len(buffers[name]) >= len(array) for name, array in self._used().items())

    def _used(self) -> dict[str, Array]:
        return {f"{part.key}.{name}": array for part in self._parts for name, array in part.used().items()}

    def import_state(self, arrays: Mapping[str, Array]) -> None:
        """Forget everything and go on from exported arrays; raises StateError, empty, where they do not fit."""
        self.reset()
        try:
            for part in self._parts:
                part.fill(arrays)
        except StateError:
            self.reset()
            raise

    def state_bytes_max(self) -> int:
        """Bytes of the state when every limit is reached; less is in memory until then."""
        return sum(array.nbytes for part in self._parts for array in part.state)


def _checked_source(source: int) -> int:
    if not 0 <= source < SOURCES_MAX:
        raise ValueError(f"source {source} is out of range: use 0 to {SOURCES_MAX - 1}")
    return source


def _checked_sources(sources: Int64, rows: int) -> Int64:
    if len(sources) != rows:
        raise ValueError(f"{len(sources)} sources for {rows} rows: give one a row")
    if rows:
        _checked_source(int(sources.min()))
        _checked_source(int(sources.max()))
    # kernels are compiled for this type and layout
    return np.ascontiguousarray(sources, np.int64)


_CLOCK: dict[str, Callable[[Int64], Float64]] = {
    "hour": lambda times: times % DAY_MS / HOUR_MS,
    "weekday": lambda times: ((times // DAY_MS + EPOCH_WEEKDAY) % 7).astype(np.float64),
    "night": lambda times: (times % DAY_MS < NIGHT_ENDS_HOUR * HOUR_MS).astype(np.float64),
    "weekend": lambda times: ((times // DAY_MS + EPOCH_WEEKDAY) % 7 >= 5).astype(np.float64),
}


def _stateless(column: StatelessColumn, batch: ColumnBatch, times: Int64) -> Array:
    if column.function == "value":
        return batch[column.field]
    if column.function == "one_hot":
        matches: Array = batch[column.field] == column.code
        return matches
    return _CLOCK[column.function](times)
