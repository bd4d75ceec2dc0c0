"""The feature engine: folds micro-batches into bounded state and gives features and sequences, point in time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from cascade.columns import Array, ColumnBatch, Float32, Float64, Int64
from cascade.errors import StateError
from cascade.features import kernels
from cascade.features.spec import DAY_MS, FeatureSpec, Plan, StatelessColumn, resolve
from cascade.features.state import (
    BLOCKS_USED,
    EVENT_POOL,
    EVICTIONS,
    FRAUD_POOL,
    KEYS,
    LATE,
    SLOTS_USED,
    TOO_LATE,
    KeyState,
    Program,
    Scratch,
    make_key_state,
    make_program,
    make_scratch,
)
from cascade.schema import Schema, key_codes

HOUR_MS = 3_600_000
NIGHT_ENDS_HOUR = 6
# 1970-01-01 was a Thursday: shifts day numbers so that Monday is 0.
EPOCH_WEEKDAY = 3


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """`features` float32 [rows, width] in the order of `FeatureEngine.names`; `sequence` float32
    [rows, length, sequence width]: steps from oldest to the row itself, in front zero rows where there are fewer.
    """

    features: Float32
    sequence: Float32


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
    """

    def __init__(self, spec: FeatureSpec, schema: Schema, origin: str = "features.toml") -> None:
        self.schema = schema
        self.plan: Plan = resolve(spec, schema, origin)
        self.names = self.plan.names
        self.width = len(self.names)
        self.sequence_shape = (self.plan.sequence.length, self.plan.sequence_width)
        self._parts: list[_KeyPart] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._parts = [_KeyPart(self.plan, key) for key in self.plan.keys]

    def update(self, batch: ColumnBatch) -> FeatureBatch:
        """Fold the rows, in their order, and give their features and sequences."""
        features = np.empty((batch.rows, self.width), np.float32)
        sequence = np.zeros((batch.rows, *self.sequence_shape), np.float32)
        times = batch[self.schema.roles.event_time]
        for position, column in enumerate(self.plan.stateless):
            features[:, position] = _stateless(column, batch, times)
        for part in self._parts:
            part.update(batch, times, features, sequence)
        return FeatureBatch(features, sequence)

    def update_labels(self, labels: ColumnBatch) -> None:
        """Fold labels: the schema's `label_fields`. They show from `label.delay` after the transaction on."""
        roles = self.schema.roles
        identities = key_codes(labels[roles.transaction_id])
        for part in self._parts:
            if part.program.has_labels:
                kernels.update_labels(
                    *part.state[:5],
                    part.program.events_per_key_max,
                    key_codes(labels[part.key]),
                    labels[roles.event_time],
                    identities,
                    labels[self.schema.label.field],
                )

    def statistics(self) -> dict[str, KeyStatistics]:
        """Counts by key field."""
        counters = {part.key: part.state.counters for part in self._parts}
        return {
            key: KeyStatistics(int(c[KEYS]), int(c[EVICTIONS]), int(c[LATE]), int(c[TOO_LATE]))
            for key, c in counters.items()
        }

    def export_state(self, buffers: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Copies of the used parts of all arrays, by name; `import_state` of an equal spec takes them.

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


class _KeyPart:
    """State, program and working memory of one key field."""

    def __init__(self, plan: Plan, key: str) -> None:
        columns = plan.keyed[key]
        self.key = key
        self.values = sorted({column.value for column in columns if column.value})
        self.tags = sorted({column.tag for column in columns if column.tag})
        self.program: Program = make_program(plan, key, self.values, self.tags)
        self.state: KeyState = make_key_state(plan, key, len(self.values), len(self.tags))
        self.scratch: Scratch = make_scratch(self.program, len(self.values), len(self.tags))

    def used(self) -> dict[str, Array]:
        """Views of what is in use of each array."""
        state, counters = self.state, self.state.counters
        slots = int(counters[SLOTS_USED]) + 1
        rows = {
            "slots": slots,
            "events": int(counters[EVENT_POOL + BLOCKS_USED]) + 1,
            "frauds": int(counters[FRAUD_POOL + BLOCKS_USED]) + 1,
            "step_times": slots,
            "step_values": slots,
        }
        return {name: array[: rows.get(name)] for name, array in state._asdict().items()}

    def fill(self, arrays: Mapping[str, Array]) -> None:
        """Take what another part's `used` gave, into an empty state."""
        for name, mine in self.state._asdict().items():
            found = arrays.get(f"{self.key}.{name}")
            fits = found is not None and found.dtype == mine.dtype and found.shape[1:] == mine.shape[1:]
            if found is None or not fits or len(found) > len(mine):
                shape = "absent" if found is None else f"{found.dtype}{list(found.shape)}"
                raise StateError(f"array {self.key}.{name} is {shape}, room is for {mine.dtype}{list(mine.shape)}")
            mine[: len(found)] = found

    def update(self, batch: ColumnBatch, times: Int64, features: Float32, sequence: Float32) -> None:
        values = _matrix([batch[name].astype(np.float64, copy=False) for name in self.values], batch.rows, np.float64)
        tags = _matrix([key_codes(batch[name]) for name in self.tags], batch.rows, np.int64)
        kernels.update(
            *self.state,
            *self.program,
            *self.scratch,
            key_codes(batch[self.key]),
            times,
            values,
            tags,
            features,
            sequence,
        )


def _matrix(columns: list[Array], rows: int, dtype: type[np.generic]) -> Array:
    matrix: Array = np.column_stack(columns) if columns else np.zeros((rows, 0), dtype)
    return matrix


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
