"""One key field of the feature engine: its state and program, and the calls of the kernels with them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cascade.columns import Array, Bool, Float32, Int64
from cascade.errors import StateError
from cascade.features import digest, kernels, sequences, sharing, transfer
from cascade.features.handles import handle_of, set_waiting
from cascade.features.inputs import InputTable
from cascade.features.layout import (
    BLOCKS_USED,
    EVENT_POOL,
    EXPORTED,
    FRAUD_POOL,
    PARTITIONS_MAX,
    REMOTE_POOL,
    SLOTS_USED,
    KeyState,
)
from cascade.features.plan import Plan
from cascade.features.state import make_key_state, make_program, make_waiting
from cascade.features.summaries import Summaries
from cascade.schema import Schema


class KeyPart:
    """State, program and working memory of one key field. Arguments are those of `FeatureEngine`, checked by it."""

    def __init__(self, plan: Plan, schema: Schema, key: str, inputs: InputTable, hidden: Bool) -> None:
        columns = plan.keyed[key]
        self.key = key
        self.sequence = plan.sequence_of(key)
        self.values = sorted({column.value for column in columns if column.value})
        self.tags = sorted({column.tag for column in columns if column.tag})
        fields = [inputs.code(key), *map(inputs.number, self.values), *map(inputs.code, self.tags)]
        self.program = make_program(plan, schema, key, self.values, self.tags, np.array(fields, np.int64))
        self.state = make_key_state(plan, key, len(self.values), len(self.tags))
        self._plan, self._hidden = plan, hidden
        self._waiting = make_waiting(plan, key, hidden, 0)
        self.handle = handle_of(self.state, self.program, self._waiting)

    def make_room(self, rows: int) -> None:
        """Allocate memory for the sequences of micro-batches of up to `rows` rows."""
        self._waiting = make_waiting(self._plan, self.key, self._hidden, rows)
        set_waiting(self.handle, self._waiting)

    def read_sequences(self, rows: Int64) -> Float32:
        """Return the sequences float32 [n, length, width] of rows int64 [n] of the last micro-batch.

        Raises ValueError for a row that was not wanted.
        """
        out: Float32 = np.empty((len(rows), *self._waiting.written.shape[1:]), np.float32)
        refused = sequences.read_sequences(self.handle, rows, out)
        if refused >= 0:
            raise ValueError(f"the sequences of row {refused} were not wanted at the update")
        return out

    def update_labels(self, keys: Int64, times: Int64, identities: Int64, labels: Int64) -> None:
        """Fold labels."""
        kernels.update_labels(self.handle, keys, times, identities, labels)

    def used(self) -> dict[str, Array]:
        """Return views of the used part of each array, by the name of its array."""
        counters = self.state.counters
        slots = int(counters[SLOTS_USED]) + 1
        pools = (("events", EVENT_POOL), ("frauds", FRAUD_POOL), ("remotes", REMOTE_POOL))
        rows = {name: int(counters[pool + BLOCKS_USED]) + 1 for name, pool in pools}
        rows["slots"] = slots
        return {name: getattr(self.state, name)[: rows.get(name)] for name in EXPORTED}

    def used_bytes(self) -> int:
        """Return the bytes of the used part of all arrays, the running totals included."""
        used = self.used()
        return sum(array.nbytes for array in used.values()) + self.state.totals[: len(used["slots"])].nbytes

    def fill(self, arrays: Mapping[str, Array]) -> None:
        """Copy what another part's `used` returned into the empty state; raises StateError where it does not fit."""
        found = self._checked(arrays)
        pairs: dict[str, tuple[Array, Array]] = {
            name: (getattr(self.state, name), getattr(found, name)) for name in EXPORTED
        }
        for name, (target, array) in pairs.items():
            if len(array) > len(target):
                raise self._refusal(name, array)
            if name in ("table", "counters") and len(array) != len(target):
                raise self._refusal(name, array)
        if not transfer.state_fits(handle_of(found, self.program, self._waiting)):
            raise StateError(f"arrays of {self.key} are not in order: take another snapshot")
        for target, array in pairs.values():
            target[: len(array)] = array

    def warm_up(self) -> None:
        """Compile the kernels that rebalances and restarts call; the state does not change."""
        used = self.used()
        transfer.state_fits(handle_of(self.state._replace(**used), self.program, self._waiting))
        if self.sequence:
            self.read_sequences(np.zeros(0, np.int64))
        self.forget(-1)  # no event has this partition id
        arrays = {f"{self.key}.{name}": array for name, array in used.items()}
        self.absorb(arrays, np.zeros(PARTITIONS_MAX, np.bool_), labels=False, first=0, count=1)

    def forget(self, partition_id: int) -> None:
        """Drop the events of a partition."""
        transfer.forget(self.handle, partition_id)

    def absorb(self, arrays: Mapping[str, Array], wanted: Bool, labels: bool, first: int, count: int) -> bool:
        """Take events of the wanted partitions from exported arrays; returns whether there are more slots.

        `wanted` bool [PARTITIONS_MAX]. Raises StateError where the arrays do not fit or are not in order.
        """
        found = self._checked(arrays)
        slots = len(found.slots)
        # slot 0 means none
        begin, end = first + 1, min(first + 1 + count, slots)
        labels = labels and self.program.has_labels
        exported = handle_of(found, self.program, self._waiting)
        broken = transfer.absorb(self.handle, exported, wanted, labels, begin, end)
        if broken:
            raise StateError(f"slot {broken} of {self.key} is not in order: take another snapshot")
        return end < slots

    def check(self, arrays: Mapping[str, Array]) -> None:
        """Raise StateError where the arrays' names, dtypes, widths or lengths do not fit."""
        self._checked(arrays)

    def _checked(self, arrays: Mapping[str, Array]) -> KeyState:
        """Return the arrays of this part, after a check of their dtypes and widths."""
        found: dict[str, Array] = {}
        for name in EXPORTED:
            target: Array = getattr(self.state, name)
            array = arrays.get(f"{self.key}.{name}")
            if array is None or array.dtype != target.dtype or array.shape[1:] != target.shape[1:] or not len(array):
                raise self._refusal(name, array)
            found[name] = np.require(array, requirements=["C", "A"])
        return self.state._replace(**found)

    def _refusal(self, name: str, array: Array | None) -> StateError:
        target: Array = getattr(self.state, name)
        shape = "absent" if array is None else f"{array.dtype}{list(array.shape)}"
        return StateError(f"array {self.key}.{name} is {shape}, there is room for {target.dtype}{list(target.shape)}")

    def summarise(self, codes: Int64, partition_ids: Int64, starts: Int64, length_ms: int) -> Summaries:
        """Return the totals of the events of each key, partition and stretch of event time."""
        rows, width = len(codes), len(self.values)
        found = Summaries(codes, partition_ids, starts, *np.zeros((2, rows), np.int64), *np.zeros((3, rows, width)))
        sharing.summarise(self.handle, length_ms, *found.arrays)
        return found

    def fold_summaries(self, summaries: Summaries) -> None:
        """Store each summary, in place of an earlier one of its code, partition and start."""
        sharing.fold_summaries(self.handle, *summaries.arrays)

    def feed_partition(self, sink: digest.Sink, partition_id: int, after_ms: int | None) -> None:
        """Feed the events of a partition to a digest."""
        sink.update(self.key.encode())
        digest.feed_partition(sink, self.state, partition_id, self.program.horizon_ms, after_ms)

    def feed_frauds(self, sink: digest.Sink, after_ms: int | None) -> None:
        """Feed the frauds to a digest."""
        sink.update(self.key.encode())
        digest.feed_frauds(sink, self.state, after_ms)
