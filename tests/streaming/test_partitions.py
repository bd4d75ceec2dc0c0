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
    one = OwnedPartition(PARTITION, Decided(until), beginning, 0.0)
    one.phase = phase
    return one


def test_records_are_taken_in_order_and_each_once() -> None:
    one = partition()
    for offsets, expected in (((0, 1, 2), [0, 1, 2]), ((1, 2, 3), [3]), ((2, 3), None), ((4,), [4])):
        batch = one.accept(fetch(*offsets)).batch
        assert (None if batch is None else batch.offsets.tolist()) == expected
        if batch is not None:
            assert batch.values == [b"%d" % offset for offset in expected or ()]
    assert one.next == 5


def test_a_fetch_that_skips_is_not_taken_before_the_place_was_fetched_again() -> None:
    one = partition()
    accepted = one.accept(fetch(2, 3))
    assert (accepted.batch, accepted.seek, accepted.gap) == (None, 0, False)
    accepted = one.accept(fetch(0, 1, 2, 3))
    assert accepted.batch is not None
    assert accepted.batch.offsets.tolist() == [0, 1, 2, 3]
    assert not accepted.gap


def test_a_gap_that_the_log_itself_has_is_passed_and_counted() -> None:
    one = partition()
    one.accept(fetch(2, 3))
    accepted = one.accept(fetch(2, 3))
    assert accepted.gap
    assert accepted.batch is not None
    assert one.next == 4


def test_two_different_skips_are_not_taken_for_one_gap() -> None:
    one = partition()
    assert one.accept(fetch(5)).seek == 0
    assert one.accept(fetch(3, 4)).seek == 0
    assert one.next == 0


@pytest.mark.parametrize(
    ("offsets", "taken", "seek", "following"),
    [((0, 1), [0, 1], None, 2), ((0, 1, 2, 3, 4), [0, 1, 2], 3, 3), ((0, 1, 2), [0, 1, 2], None, 3)],
)
def test_a_replay_ends_where_decisions_begin(
    offsets: tuple[int, ...], taken: list[int], seek: int | None, following: int
) -> None:
    one = partition(Phase.REPLAYING, until=3)
    accepted = one.accept(fetch(*offsets))
    assert accepted.batch is not None
    assert (accepted.batch.offsets.tolist(), accepted.seek, one.next) == (taken, seek, following)


def test_a_replay_whose_last_records_are_gone_from_the_log_ends_too() -> None:
    one = partition(Phase.REPLAYING, until=3, beginning=1)
    assert one.accept(fetch(5, 6)).seek == 1
    accepted = one.accept(fetch(5, 6))
    assert (accepted.batch, accepted.seek, one.next) == (None, 3, 3)


def test_a_skip_across_the_end_of_a_replay_leaves_nothing_out_of_the_state() -> None:
    one = partition(Phase.REPLAYING, until=3)
    assert one.accept(fetch(4, 5)).seek == 0
    accepted = one.accept(fetch(0, 1, 2, 3, 4, 5))
    assert accepted.batch is not None
    assert accepted.batch.offsets.tolist() == [0, 1, 2]
    assert (accepted.seek, one.next) == (3, 3)


def test_what_the_commit_named_is_decided_when_it_is_read() -> None:
    one = OwnedPartition(PARTITION, Decided(2, np.array([3, 5])), 0, 0.0)
    one.take(np.arange(6))
    assert (one.tracker.committable, one.tracker.open) == (2, 2)
    one.tracker.decided(np.array([2]))
    assert one.tracker.committable == 4


def test_what_was_decided_further_on_is_said_again_until_it_is_read() -> None:
    one = OwnedPartition(("t", 0), Decided(2, np.array([3, 5, 6])), 0, 0.0)
    one.phase, one.next = Phase.LIVE, 2
    assert one.progress is None
    for offsets, decided, until, ahead in (([2], [], 2, [3, 5, 6]), ([3, 4], [2], 4, [5, 6]), ([5, 6, 7], [4], 7, [])):
        accepted = one.accept(fetch(*offsets))
        assert accepted.batch is not None
        one.take(accepted.batch.offsets)
        one.tracker.decided(np.array(decided, np.int64))
        assert one.progress is not None
        assert (one.progress.until, one.progress.ahead.tolist()) == (until, ahead)
