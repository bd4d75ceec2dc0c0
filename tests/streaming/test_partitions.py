from __future__ import annotations

import numpy as np
import pytest

from streaming.clients import FetchedBatch
from streaming.offsets import Decided
from streaming.partitions import OwnedPartition, Phase

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


def test_records_are_taken_in_order_and_each_once() -> None:
    owned = partition()
    for offsets, expected in (((0, 1, 2), [0, 1, 2]), ((1, 2, 3), [3]), ((2, 3), None), ((4,), [4])):
        batch = owned.accept(fetch(*offsets)).batch
        assert (None if batch is None else batch.offsets.tolist()) == expected
        if batch is not None:
            assert batch.values == [b"%d" % offset for offset in expected or ()]
    assert owned.next == 5


def test_a_fetch_that_skips_is_not_taken_before_the_place_was_fetched_again() -> None:
    owned = partition()
    accepted = owned.accept(fetch(2, 3))
    assert (accepted.batch, accepted.seek, accepted.gap) == (None, 0, False)
    accepted = owned.accept(fetch(0, 1, 2, 3))
    assert accepted.batch is not None
    assert accepted.batch.offsets.tolist() == [0, 1, 2, 3]
    assert not accepted.gap


def test_a_gap_that_the_log_itself_has_is_passed_and_counted() -> None:
    owned = partition()
    owned.accept(fetch(2, 3))
    accepted = owned.accept(fetch(2, 3))
    assert accepted.gap
    assert accepted.batch is not None
    assert owned.next == 4


def test_two_different_skips_are_not_taken_for_one_gap() -> None:
    owned = partition()
    assert owned.accept(fetch(5)).seek == 0
    assert owned.accept(fetch(3, 4)).seek == 0
    assert owned.next == 0


@pytest.mark.parametrize(
    ("offsets", "taken", "seek", "following"),
    [((0, 1), [0, 1], None, 2), ((0, 1, 2, 3, 4), [0, 1, 2], 3, 3), ((0, 1, 2), [0, 1, 2], None, 3)],
)
def test_a_replay_ends_where_decisions_begin(
    offsets: tuple[int, ...], taken: list[int], seek: int | None, following: int
) -> None:
    owned = partition(Phase.REPLAYING, until=3)
    accepted = owned.accept(fetch(*offsets))
    assert accepted.batch is not None
    assert (accepted.batch.offsets.tolist(), accepted.seek, owned.next) == (taken, seek, following)


def test_a_replay_whose_last_records_are_gone_from_the_log_ends_too() -> None:
    owned = partition(Phase.REPLAYING, until=3, beginning=1)
    assert owned.accept(fetch(5, 6)).seek == 1
    accepted = owned.accept(fetch(5, 6))
    assert (accepted.batch, accepted.seek, owned.next) == (None, 3, 3)


def test_a_skip_across_the_end_of_a_replay_leaves_nothing_out_of_the_state() -> None:
    owned = partition(Phase.REPLAYING, until=3)
    assert owned.accept(fetch(4, 5)).seek == 0
    accepted = owned.accept(fetch(0, 1, 2, 3, 4, 5))
    assert accepted.batch is not None
    assert accepted.batch.offsets.tolist() == [0, 1, 2]
    assert (accepted.seek, owned.next) == (3, 3)


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
