"""The checks before a commit and around snapshots: each finds what it is for, and ends the session."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.faults.run import simulate
from cascade.errors import StateError
from streaming.pipeline.duplicates import FirstDecisions
from streaming.pipeline.offsets import NOTHING_DECIDED, Decided
from streaming.worker import snapshots
from streaming.worker.boundaries import InvariantError, check_commit, check_snapshot
from streaming.worker.loop import Worker
from streaming.worker.partitions import OwnedPartition, Phase
from streaming.worker.sessions import Sessions
from streaming.worker.snapshots import Header, Snapshot
from tests.streaming.worker.test_sessions import Scene

PARTITION, OTHER = ("transactions", 3), ("transactions", 4)
# Its schedule commits and writes snapshots.
SEED = 14


def owned_at(offset: int, decided: Decided = NOTHING_DECIDED, phase: Phase = Phase.LIVE) -> OwnedPartition:
    owned = OwnedPartition(PARTITION, decided, 0, 0.0)
    owned.next, owned.phase = offset, phase
    return owned


def decided(until: int, *ahead: int) -> Decided:
    return Decided(until, np.array(ahead, np.int64))


@pytest.mark.parametrize(
    ("progress", "committed"),
    [
        (decided(5), None),
        (decided(10), 10),
        (decided(7, 8, 9), 5),
        # what the previous owner decided further on
        (decided(7, 9, 14), 5),
    ],
)
def test_what_may_be_committed_passes(progress: Decided, committed: int | None) -> None:
    check_commit(owned_at(10, decided(5, 12, 14)), progress, committed)


def test_the_prefix_may_end_at_a_record_that_the_previous_owner_decided_and_nobody_has_read_again() -> None:
    check_commit(owned_at(12, decided(5, 12, 14)), decided(12, 12, 14), 7)


@pytest.mark.parametrize(
    ("progress", "committed", "problem"),
    [
        (decided(4), None, "offset 4 to commit is below 5, which is committed"),
        (decided(6), 7, "offset 6 to commit is below 7, which is committed"),
        (decided(11), 7, "offset 11 to commit is above the next record, 10"),
        (decided(7, 7, 9), 7, "decided offset 7 is ahead of the decided prefix, which ends at 7"),
        (decided(7, 6), 7, "decided offset 6 is ahead of the decided prefix, which ends at 7"),
        (decided(7, 9, 8), 7, "not ascending"),
        (decided(7, 8, 8), 7, "not ascending"),
        (decided(7, 8, 15), 7, "decided offset 15 is above 14, the last one that was read"),
    ],
)
def test_what_may_not_be_committed_is_named(progress: Decided, committed: int | None, problem: str) -> None:
    with pytest.raises(InvariantError, match=problem) as raised:
        check_commit(owned_at(10, decided(5, 12, 14)), progress, committed)
    assert str(raised.value).startswith("transactions-3: ")
    assert "\n" not in str(raised.value)


GOOD = Snapshot({}, {PARTITION: 10}, {("labels", 0): 2}, {PARTITION: 8})


def test_a_snapshot_of_the_present_offsets_passes() -> None:
    check_snapshot(GOOD, {PARTITION: owned_at(10)})
    check_snapshot(Snapshot({}, {}, {}, {}), {})


@pytest.mark.parametrize(
    ("snapshot", "owned", "problem"),
    [
        (GOOD, {}, "a snapshot of .*transactions', 3.*, with .. assigned"),
        (GOOD, {PARTITION: owned_at(10), OTHER: owned_at(10)}, "'transactions', 4"),
        (GOOD, {PARTITION: owned_at(11)}, "at offset 10, with 11 as the next record"),
        (GOOD, {PARTITION: owned_at(10, phase=Phase.REPLAYING)}, "while the partition is replaying"),
        (replace(GOOD, committed={PARTITION: 11}), {PARTITION: owned_at(10)}, "below the committed offset 11"),
    ],
)
def test_a_snapshot_of_other_offsets_is_not_written(
    snapshot: Snapshot, owned: dict[Any, OwnedPartition], problem: str
) -> None:
    with pytest.raises(InvariantError, match=problem):
        check_snapshot(snapshot, owned)


def written(**changes: Any) -> bytes:
    snapshot = replace(GOOD, arrays={"a": np.arange(3)})
    return snapshots._encoded(replace(snapshot, **changes), "mark", 1)


def test_offsets_that_were_read_are_those_that_were_written() -> None:
    found = snapshots._decoded(written(), "mark")
    assert (found.transactions, found.labels, found.committed) == (GOOD.transactions, GOOD.labels, GOOD.committed)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"transactions": {PARTITION: -1}, "committed": {}}, "a negative one"),
        ({"labels": {("labels", 0): -1}}, "a negative one"),
        ({"committed": {PARTITION: 11}}, "transactions-3 was committed up to 11, and the state ends at 10"),
        ({"committed": {OTHER: 1}}, "transactions-4 was committed up to 1, and the state ends at None"),
    ],
)
def test_a_snapshot_whose_offsets_are_not_in_order_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(StateError, match=problem):
        snapshots._decoded(written(**changes), "mark")


def test_a_snapshot_with_a_partition_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = [("transactions", 3, 10), ("transactions", 3, 12)]

    def with_repeat(**fields: Any) -> Header:
        return Header(**fields | {"transactions": twice})

    monkeypatch.setattr(snapshots, "Header", with_repeat)
    octets = written()
    monkeypatch.undo()
    with pytest.raises(StateError, match="a partition has two"):
        snapshots._decoded(octets, "mark")


def problems_of(seed: int) -> list[str]:
    return [problem for problem in simulate(seed).problems if "a check failed" in problem]


def test_a_wrong_offset_ends_the_session_before_it_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems_of(SEED) == []
    right = OwnedPartition.progress.fget  # type: ignore[attr-defined]

    def too_far(self: OwnedPartition) -> Decided | None:
        found: Decided | None = right(self)
        return None if found is None else Decided(self.next + 1)

    monkeypatch.setattr(OwnedPartition, "progress", property(too_far))
    outcome = simulate(SEED)
    assert any("a check failed: transactions-" in problem for problem in outcome.problems)
    assert any("a check of the worker's own state failed" in event for _, _, event in outcome.trace)
    assert not any("was lost" in problem for problem in outcome.problems)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {name: array for name, array in state.items() if not name.endswith(".slots")},
        lambda state: {name: array[:0] for name, array in state.items()},
        lambda state: {name: array.astype(np.float32) for name, array in state.items()},
    ],
    ids=["an array is missing", "no rows", "another dtype"],
)
def test_wrong_arrays_end_the_session_before_they_are_written(spoil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Worker._snapshot
    monkeypatch.setattr(Worker, "_snapshot", lambda self, state: right(self, spoil(state)))
    assert any("a check failed: snapshot not written: array " in problem for problem in problems_of(SEED))


def test_wrong_first_decisions_end_the_session_before_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FirstDecisions.export

    def uneven(self: FirstDecisions) -> dict[str, Any]:
        arrays = right(self)
        return {name: array[1:] if array.ndim == 1 else array for name, array in arrays.items()}

    monkeypatch.setattr(FirstDecisions, "export", uneven)
    assert any("a check failed: snapshot not written: array " in problem for problem in problems_of(SEED))


def test_a_session_with_a_failed_check_ends_and_the_next_one_begins() -> None:
    scene = Scene(InvariantError("an offset is wrong"), None)
    scene.run()
    assert scene.calls == ["open", "start", "step", "open", "start", "step", "drain"]
    assert isinstance(scene.sessions, Sessions)
    assert isinstance(scene.sessions.error, InvariantError)
