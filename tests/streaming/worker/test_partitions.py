from __future__ import annotations

import numpy as np
import pytest

from streaming.kafka import FetchedBatch
from streaming.pipeline.offsets import Decided
from streaming.worker.partitions import OwnedPartition, Phase

PARTITION = ("t", 3)


def fetch(*offsets: int) -> FetchedBatch:
    count = len(offsets)
    return FetchedBatch(
        "t", 3, np.array(offsets, np.int64), np.zeros(count, np.int64), [None] * count, [b"%d" % o for o in offsets],
        [()] * count,
    )  # fmt: skip


def partition(phase: Phase = Phase.LIVE, until: int = 0, beginning: int = 0) -> OwnedPartition:
    owned = OwnedPartition(PARTITION, Decided(until), beginning, 0.0)
    owned.phase = phase
    return owned


Step = tuple[tuple[int, ...], list[int], int | None]
# A partition, fetches with the offsets that are taken of each and the offset to seek to, the next offset, and the gaps.
FETCHES: dict[str, tuple[OwnedPartition, list[Step], int, int]] = {
    "each record once and in order": (
        partition(),
        [((0, 1, 2), [0, 1, 2], None), ((1, 2, 3), [3], None), ((2, 3), [], None), ((4,), [4], None)],
        5,
        0,
    ),
    "a skipped offset is fetched again": (partition(), [((2, 3), [], 0), ((0, 1, 2, 3), [0, 1, 2, 3], None)], 4, 0),
    "a gap of the log itself is passed": (partition(), [((2, 3), [], 0), ((2, 3), [2, 3], None)], 4, 1),
    "two different skips are not one gap": (partition(), [((5,), [], 0), ((3, 4), [], 0)], 0, 0),
    "a replay goes on": (partition(Phase.REPLAYING, 3), [((0, 1), [0, 1], None)], 2, 0),
    "a replay ends": (partition(Phase.REPLAYING, 3), [((0, 1, 2), [0, 1, 2], None)], 3, 0),
    "a replay ends before records to decide": (partition(Phase.REPLAYING, 3), [((0, 1, 2, 3), [0, 1, 2], 3)], 3, 0),
    "a replay ends in a gap": (partition(Phase.REPLAYING, 3, 1), [((5, 6), [], 1), ((5, 6), [], 3)], 3, 1),
    "a skip across the end of a replay leaves nothing out": (
        partition(Phase.REPLAYING, 3),
        [((4, 5), [], 0), ((0, 1, 2, 3, 4), [0, 1, 2], 3)],
        3,
        0,
    ),
}


@pytest.mark.parametrize(("owned", "steps", "following", "gaps"), FETCHES.values(), ids=FETCHES)
def test_fetches_are_taken_in_order(owned: OwnedPartition, steps: list[Step], following: int, gaps: int) -> None:
    for offsets, taken, seek in steps:
        accepted = owned.accept(fetch(*offsets))
        values = [] if accepted.batch is None else accepted.batch.values
        assert (values, accepted.seek) == ([b"%d" % offset for offset in taken], seek)
        gaps -= accepted.gap
    assert (owned.next, gaps) == (following, 0)


def test_what_the_commit_named_is_decided_when_it_is_read() -> None:
    owned = OwnedPartition(PARTITION, Decided(2, np.array([3, 5])), 0, 0.0)
    owned.take(np.arange(6))
    assert (owned.tracker.committable, owned.tracker.open) == (2, 2)
    owned.tracker.decided(np.array([2]))
    assert owned.tracker.committable == 4


def test_offsets_decided_by_the_previous_owner_are_committed_again_until_they_are_read() -> None:
    owned = OwnedPartition(("t", 0), Decided(2, np.array([3, 5, 6])), 0, 0.0)
    owned.phase, owned.next = Phase.LIVE, 2
    assert owned.progress is None
    for offsets, decided, until, ahead in (([2], [], 2, [3, 5, 6]), ([3, 4], [2], 4, [5, 6]), ([5, 6, 7], [4], 7, [])):
        accepted = owned.accept(fetch(*offsets))
        assert accepted.batch is not None
        owned.take(accepted.batch.offsets)
        owned.tracker.decided(np.array(decided, np.int64))
        assert owned.progress is not None
        assert (owned.progress.until, owned.progress.ahead.tolist()) == (until, ahead)
