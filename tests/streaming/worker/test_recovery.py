"""Partitions that come, go and come again: what their state is then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest

from bench.faults.traffic import SCHEMA
from cascade.columns import ColumnBatch
from cascade.config import DuplicateSettings
from cascade.features import FeatureEngine
from cascade.features.spec import (
    SPEC_VERSION,
    FeatureSpec,
    LabelFeatures,
    Limits,
    Sequence,
    TransactionFeatures,
    WindowFeatures,
)
from cascade.protocols import SystemClock
from streaming.codecs import codec
from streaming.health_state import HealthState
from streaming.kafka import FetchedBatch, Partition
from streaming.pipeline.duplicates import FirstDecisions
from streaming.worker.history import History
from streaming.worker.labels import LabelFollower
from streaming.worker.partitions import Phase
from streaming.worker.recovery import Recovery
from streaming.worker.snapshots import Snapshot

HOUR_MS = 3_600_000
PARTITION: Partition = ("transactions", 0)
LABELS: Partition = ("labels", 0)
SPEC = FeatureSpec(
    version=SPEC_VERSION,
    sequence=(Sequence(key="card", length=8, fields=("amount", "card_fraud_count_1h")),),
    lateness="1s",
    limits=Limits(keys_max=16, events_per_key_max=64, events_per_key_mean=8),
    transaction=(TransactionFeatures(functions=("value",), field="amount"),),
    window=(WindowFeatures(key="card", functions=("count",), windows=("1h",)),),
    label_window=(LabelFeatures(key="card", windows=("1h",), functions=("fraud_count",)),),
)
START_MS = 1_700_000_000_000
# one card; the first is a fraud, out of reach of the last
TIMES_MS = START_MS + np.array([0, 10_000, 20_000, HOUR_MS - 60_000, HOUR_MS + 600_000])


def rows(first: int, end: int) -> ColumnBatch:
    count = end - first
    return ColumnBatch(
        {
            "transaction_id": np.arange(first, end), "event_time": TIMES_MS[first:end],
            "card_id": np.full(count, 7), "terminal_id": np.full(count, 9), "amount": np.full(count, 10.0),
        },
        count,
    )  # fmt: skip


def label(fraud: int) -> bytes:
    fields = SCHEMA.label_fields()
    label = {"transaction_id": 0, "event_time": TIMES_MS[0], "card_id": 7, "terminal_id": 9, "fraud": fraud}
    columns = {name: np.array([label[name]], field.dtype) for name, field in fields.items()}
    return codec("json", fields, 1_000).encode(ColumnBatch(columns, 1))[0]


class Log:
    """Stands in for a consumer of one partition that nothing else reads."""

    def __init__(self, partition: Partition, values: list[bytes]) -> None:
        self._partition, self.values, self.next = partition, values, 0
        self.decided = self.resumed = 0

    def partitions_for(self, topic: str) -> list[Partition]:
        return [self._partition]

    def assign(self, partitions: Iterable[Partition]) -> None: ...

    def pause(self, partitions: Iterable[Partition]) -> None: ...

    def resume(self, partitions: Iterable[Partition]) -> None:
        self.resumed += 1

    def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return dict.fromkeys(partitions, 0)

    def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        return dict.fromkeys(partitions, len(self.values))

    def committed(self, partitions: Iterable[Partition]) -> dict[Partition, tuple[int, str]]:
        return dict.fromkeys(partitions, (self.decided, "")) if self.decided else {}

    def seek(self, partition: Partition, offset: int) -> None:
        self.next = offset

    def position(self, partition: Partition) -> int:
        return self.next

    def poll(self, timeout_s: float, rows_max: int) -> list[FetchedBatch]:
        first, self.next = self.next, len(self.values)
        values: list[bytes | None] = list(self.values[first:])
        offsets = np.arange(first, first + len(values))
        if not values:
            return []
        return [FetchedBatch(*self._partition, offsets, offsets, [None] * len(values), values, [()] * len(values))]


class Shelf:
    """Stands in for the store of snapshots: the newest that is not ahead."""

    def __init__(self) -> None:
        self.snapshots: dict[str, Snapshot] = {}

    def candidates(self, until: Mapping[Partition, int], beginnings: object) -> dict[Partition, list[str]]:
        return {
            partition: [
                name
                for name, snapshot in sorted(self.snapshots.items(), reverse=True)
                if snapshot.transactions[partition] <= offset
            ]
            for partition, offset in until.items()
        }

    def load(self, name: str) -> Snapshot | None:
        return self.snapshots.get(name)


class Bench:
    """A recovery with everything around it, and a state that is folded by hand."""

    def __init__(self) -> None:
        self.features = FeatureEngine(SPEC, SCHEMA)
        self.first_decisions = FirstDecisions(DuplicateSettings())
        self.transactions, self.labels_log, self.shelf = Log(PARTITION, []), Log(LABELS, []), Shelf()
        self.health = HealthState(60.0)
        clock: Any = SystemClock()
        follower_of: Any = LabelFollower
        self.labels: LabelFollower = follower_of(
            self.labels_log, "labels", codec("json", SCHEMA.label_fields(), 1_000), "exact",
            self.features.update_labels, lambda *_: pytest.fail("a label was refused"), clock, self.transactions,
        )  # fmt: skip
        recovery_of: Any = Recovery

        class Ledger:
            def record_recovery(self, seconds: float) -> None: ...

        self.recovery: Recovery = recovery_of(
            self.transactions, self.labels, self.features, self.first_decisions, self.shelf, Ledger(),
            self.health, clock, lambda owned: None, History(0), False,
        )  # fmt: skip

    def gain(self, until: int) -> None:
        """The partition is assigned, decided as far as `until`, and brought to life."""
        self.transactions.decided = until
        self.recovery.gain([PARTITION])
        while not self.recovery.done:
            self.recovery.advance()
            owned = self.recovery.owned[PARTITION]
            if owned.phase is Phase.REPLAYING and owned.next < until:
                self.fold(until)

    def fold(self, end: int) -> None:
        """Fold the transactions up to an offset, each by itself."""
        owned = self.recovery.owned[PARTITION]
        while owned.next < end:
            self.labels.catch_up()
            self.features.update(rows(owned.next, owned.next + 1))
            owned.next += 1
        self.transactions.next = owned.next

    def keep(self, name: str) -> None:
        owned = self.recovery.owned[PARTITION]
        state = self.features.export_state() | self.first_decisions.export()
        self.shelf.snapshots[name] = Snapshot(
            state, {PARTITION: owned.next}, dict(self.labels.positions), {PARTITION: owned.next}
        )


def uninterrupted(labels: list[bytes], end: int) -> str:
    bench = Bench()
    bench.labels_log.values += labels
    bench.gain(0)
    bench.fold(end)
    return bench.features.digest(0)


@pytest.mark.parametrize("with_snapshot", [True, False], ids=["from a snapshot", "from the log"])
def test_a_partition_that_comes_again_at_an_older_place_finds_the_frauds_of_that_time(with_snapshot: bool) -> None:
    bench = Bench()
    bench.labels_log.values.append(label(1))
    bench.gain(0)
    bench.fold(3)
    if with_snapshot:
        bench.keep("001")
    # the last one is so much later that the fraud is forgotten
    bench.fold(5)
    assert bench.features.digest(0) == uninterrupted([label(1)], 5)
    bench.recovery.lose([PARTITION])
    bench.gain(5)
    assert bench.features.digest(0) == uninterrupted([label(1)], 5)


def test_a_fraud_that_was_taken_back_does_not_come_again_with_an_older_snapshot() -> None:
    bench = Bench()
    bench.labels_log.values.append(label(1))
    bench.gain(0)
    bench.fold(2)
    bench.keep("001")
    bench.labels_log.values.append(label(0))
    bench.fold(3)
    bench.recovery.lose([PARTITION])
    bench.gain(3)
    bench.fold(4)
    assert bench.features.digest_labels() == FeatureEngine(SPEC, SCHEMA).digest_labels()


@pytest.mark.parametrize("advanced", [False, True])
def test_a_worker_that_loses_what_it_rebuilds_does_not_wait_for_it_for_ever(advanced: bool) -> None:
    bench = Bench()
    bench.gain(0)
    bench.fold(3)
    bench.recovery.lose([PARTITION])
    bench.transactions.decided = 3
    bench.recovery.gain([PARTITION])
    if advanced:
        bench.recovery.advance()
    assert bench.health.waits("state")
    bench.recovery.lose([PARTITION])
    assert bench.recovery.done
    assert not bench.health.waits("state")


@pytest.mark.parametrize(("until", "resumed"), [(3, 0), (4, 1)])
def test_no_fetch_begins_before_the_partition_is_live_where_nothing_is_left_to_fold(until: int, resumed: int) -> None:
    bench = Bench()
    bench.gain(0)
    bench.fold(3)
    bench.keep("001")
    bench.fold(4)
    bench.recovery.lose([PARTITION])
    bench.transactions.resumed = 0
    bench.gain(until)
    assert bench.recovery.owned[PARTITION].phase is Phase.LIVE
    assert bench.transactions.resumed == resumed
    assert bench.transactions.next == until
