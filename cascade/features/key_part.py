"""One key field of the feature engine: its state, its program, and how the kernels are called on them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cascade.columns import Array, Bool, ColumnBatch, Int64
from cascade.errors import StateError
from cascade.features import digest, kernels, sharing, transfer
from cascade.features.buffers import FeatureBatch
from cascade.features.layout import BLOCKS_USED, EVENT_POOL, FRAUD_POOL, REMOTE_POOL, SLOTS_USED, SOURCES_MAX, KeyState
from cascade.features.spec import Plan
from cascade.features.state import Program, Scratch, make_key_state, make_program, make_scratch
from cascade.features.summaries import Summaries
from cascade.schema import key_codes


class KeyPart:
    """State, program and working memory of one key field; arguments are as in `FeatureEngine`, already checked."""

    def __init__(self, plan: Plan, key: str) -> None:
        columns = plan.keyed[key]
        self.key = key
        self.values = sorted({column.value for column in columns if column.value})
        self.tags = sorted({column.tag for column in columns if column.tag})
        self.program: Program = make_program(plan, key, self.values, self.tags)
        self.state: KeyState = make_key_state(plan, key, len(self.values), len(self.tags))
        self.scratch: Scratch = make_scratch(self.program, len(self.values), len(self.tags))

    def update(
        self,
        batch: ColumnBatch,
        times: Int64,
        sources: Int64,
        hidden: Bool | None,
        out: FeatureBatch,
    ) -> None:
        """Fold rows, and write their columns of the features, and the sequences where the key has them."""
        values = _matrix([batch[name].astype(np.float64, copy=False) for name in self.values], batch.rows, np.float64)
        tags = _matrix([key_codes(batch[name]) for name in self.tags], batch.rows, np.int64)
        kernels.update(
            *self.state,
            *self.program,
            *self.scratch,
            hidden,
            key_codes(batch[self.key]),
            times,
            sources,
            values,
            tags,
            out.features,
            out.sequence,
        )

    def update_labels(self, keys: Int64, times: Int64, identities: Int64, labels: Int64) -> None:
        """Fold labels."""
        kernels.update_labels(*self.state[:6], self.program.events_per_key_max, keys, times, identities, labels)

    def used(self) -> dict[str, Array]:
        """Views of what is in use of each array."""
        return {name: array[: self._rows().get(name)] for name, array in self.state._asdict().items()}

    def fill(self, arrays: Mapping[str, Array]) -> None:
        """Take what another part's `used` gave, into an empty state; raises StateError where it does not fit."""
        found = self._checked(arrays)
        for name, mine in self.state._asdict().items():
            array = found[name]
            if len(array) > len(mine):
                raise self._refusal(name, array)
            if name in ("table", "counters") and len(array) != len(mine):
                raise self._refusal(name, array)
        if not self._in_order(found):
            raise StateError(f"arrays of {self.key} are not in order: take another snapshot")
        for name, mine in self.state._asdict().items():
            mine[: len(found[name])] = found[name]

    def _in_order(self, arrays: Mapping[str, Array]) -> bool:
        return bool(transfer.state_fits(*(arrays[name] for name in KeyState._fields[:7]), self.program.has_sequence))

    def warm_up(self) -> None:
        """Compile the kernels that rebalances and restarts call; changes nothing."""
        used = self.used()
        self._in_order(used)
        self.forget(-1)  # what no event has
        self.absorb({f"{self.key}.{name}": array for name, array in used.items()}, np.zeros(SOURCES_MAX, np.bool_),
                    False, 0, 1)  # fmt: skip

    def forget(self, source: int) -> None:
        """Drop what is of a source."""
        transfer.forget(*self.state[:6], source)

    def absorb(self, arrays: Mapping[str, Array], wanted: Bool, labels: bool, first: int, count: int) -> bool:
        """Take what is of the wanted sources from slots of another part's `used`; whether there are more slots.

        `wanted` bool [SOURCES_MAX]. Raises StateError where they do not fit or are not in order.
        """
        found = self._checked(arrays)
        slots = len(found["slots"])
        # slot 0 stands for none
        begin, end = first + 1, min(first + 1 + count, slots)
        broken = transfer.absorb(
            *self.state,
            self.program.horizon_ms,
            self.program.events_per_key_max,
            self.program.has_sequence,
            *(found[name] for name in ("slots", "events", "frauds", "step_times", "step_values")),
            wanted,
            labels and self.program.has_labels,
            begin,
            end,
        )
        if broken:
            raise StateError(f"slot {broken} of {self.key} is not in order: take another snapshot")
        return end < slots

    def _checked(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The arrays of this part by their own names, of the right dtypes and widths."""
        found: dict[str, Array] = {}
        for name, mine in self.state._asdict().items():
            array = arrays.get(f"{self.key}.{name}")
            if array is None or array.dtype != mine.dtype or array.shape[1:] != mine.shape[1:] or not len(array):
                raise self._refusal(name, array)
            found[name] = np.ascontiguousarray(array)
        if self.program.has_sequence:
            for name in ("step_times", "step_values"):
                if len(found[name]) != len(found["slots"]):
                    raise self._refusal(name, found[name])
        return found

    def _refusal(self, name: str, array: Array | None) -> StateError:
        mine: Array = getattr(self.state, name)
        shape = "absent" if array is None else f"{array.dtype}{list(array.shape)}"
        return StateError(f"array {self.key}.{name} is {shape}, room is for {mine.dtype}{list(mine.shape)}")

    def _rows(self) -> dict[str, int]:
        counters = self.state.counters
        slots = int(counters[SLOTS_USED]) + 1
        return {
            "slots": slots,
            "events": int(counters[EVENT_POOL + BLOCKS_USED]) + 1,
            "frauds": int(counters[FRAUD_POOL + BLOCKS_USED]) + 1,
            "remotes": int(counters[REMOTE_POOL + BLOCKS_USED]) + 1,
            "step_times": slots,
            "step_values": slots,
        }

    def summarise(self, codes: Int64, sources: Int64, starts: Int64, length_ms: int) -> Summaries:
        """Totals of the events of each code and source from each start on."""
        rows, width = len(codes), len(self.values)
        found = Summaries(
            codes,
            sources,
            starts,
            np.zeros(rows, np.int64),
            np.zeros(rows, np.int64),
            np.zeros((rows, width)),
            np.zeros((rows, width)),
            np.zeros((rows, width)),
        )
        sharing.summarise(
            self.state.table,
            self.state.slots,
            self.state.events,
            codes,
            sources,
            starts,
            length_ms,
            found.counts,
            found.newest,
            found.sums,
            found.squares,
            found.maxima,
        )
        return found

    def fold_summaries(self, told: Summaries) -> None:
        """Put each summary in the place of the one of its code, source and start."""
        sharing.fold_summaries(
            *self.state[:6],
            self.program.horizon_ms,
            self.program.events_per_key_max,
            told.codes,
            told.sources,
            told.starts,
            told.counts,
            told.newest,
            told.sums,
            told.squares,
            told.maxima,
        )

    def feed_source(self, sink: digest.Sink, source: int, after_ms: int | None) -> None:
        """Feed what is of a source to a digest."""
        sink.update(self.key.encode())
        digest.feed_source(sink, self.state, source, self.program.horizon_ms, after_ms)

    def feed_frauds(self, sink: digest.Sink, after_ms: int | None) -> None:
        """Feed the frauds to a digest."""
        sink.update(self.key.encode())
        digest.feed_frauds(sink, self.state, after_ms)


def _matrix(columns: list[Array], rows: int, dtype: type[np.generic]) -> Array:
    matrix: Array = np.column_stack(columns) if columns else np.zeros((rows, 0), dtype)
    return matrix
