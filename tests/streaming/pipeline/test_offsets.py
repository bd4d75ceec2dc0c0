from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streaming.pipeline.offsets import METADATA_BYTES_MAX, Decided, OffsetTracker


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[int], list[tuple[str, list[int]]]]:
    """Offsets of a log (not always without gaps), and an order of taking and deciding, a part at a time."""
    gaps = draw(st.lists(st.integers(1, 3), min_size=1, max_size=40))
    offsets = (np.cumsum(gaps) + draw(st.integers(0, 10**12))).tolist()
    steps: list[tuple[str, list[int]]] = []
    waiting: list[int] = []
    taken = 0
    while taken < len(offsets) or waiting:
        if taken < len(offsets) and (not waiting or draw(st.booleans())):
            count = draw(st.integers(1, len(offsets) - taken))
            steps.append(("taken", offsets[taken : taken + count]))
            waiting += offsets[taken : taken + count]
            taken += count
        else:
            chosen = draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))
            waiting = [offset for offset in waiting if offset not in chosen]
            steps.append(("decided", chosen))
    return offsets, steps


@given(histories())
def test_the_committable_offset_is_the_first_undecided_one(
    history: tuple[list[int], list[tuple[str, list[int]]]],
) -> None:
    offsets, steps = history
    tracker = OffsetTracker()
    taken: list[int] = []
    decided: set[int] = set()
    for name, some in steps:
        getattr(tracker, name)(np.array(some, np.int64))
        taken += some if name == "taken" else []
        decided |= set(some) if name == "decided" else set()
        undecided = [offset for offset in taken if offset not in decided]
        assert tracker.committable == (undecided[0] if undecided else taken[-1] + 1)
        assert tracker.open == len(undecided)
    assert tracker.committable == offsets[-1] + 1
    assert tracker.open == 0


def test_nothing_taken_is_nothing_to_commit() -> None:
    tracker = OffsetTracker()
    tracker.taken(np.zeros(0, np.int64))
    assert tracker.committable is None
    assert tracker.open == 0


def test_memory_is_given_back_once_all_is_decided() -> None:
    tracker = OffsetTracker()
    for start in range(0, 50_000, 1_000):
        offsets = np.arange(start, start + 1_000)
        tracker.taken(offsets)
        tracker.decided(offsets[::-1])
    assert len(tracker._offsets) == len(tracker._known) < 5_000


sets_ahead = st.tuples(st.integers(0, 10**12), st.sets(st.integers(0, 5_000), max_size=300))


@given(sets_ahead)
def test_what_is_decided_ahead_comes_back_from_the_metadata(drawn: tuple[int, set[int]]) -> None:
    until, steps = drawn
    ahead = np.array(sorted(until + step for step in steps), np.int64)
    text = Decided(until, ahead).metadata()
    assert len(text) <= METADATA_BYTES_MAX
    again = Decided.from_commit(until, text)
    assert (again.until, again.ahead.tolist()) == (until, ahead.tolist())
    offsets = np.arange(until - 3, until + 5_010)
    assert again.mask(offsets).tolist() == [
        offset < until or offset in set(ahead.tolist()) for offset in offsets.tolist()
    ]


def test_metadata_beyond_the_brokers_limit_is_cut_and_never_wrong() -> None:
    ahead = np.arange(1, 60_000, 7, dtype=np.int64)
    text = Decided(0, ahead).metadata()
    assert METADATA_BYTES_MAX - 8 < len(text) <= METADATA_BYTES_MAX
    again = Decided.from_commit(0, text).ahead
    assert 1_000 < len(again) < len(ahead)
    assert again.tolist() == ahead[: len(again)].tolist()


def test_a_deep_call_under_a_flood_fits_the_metadata() -> None:
    # one in a hundred waits, for 50 ms, at 100,000 transactions a second: fifty holes
    ahead = np.setdiff1d(np.arange(1, 5_000), np.arange(0, 5_000, 100))
    text = Decided(0, ahead).metadata()
    assert len(text) < 250
    assert len(Decided.from_commit(0, text).ahead) == len(ahead)


@given(st.one_of(st.text(), st.text("abcdefgh0123+/=").map(lambda text: "a1:" + text)))
def test_metadata_of_another_writer_does_no_harm(text: str) -> None:
    decided = Decided.from_commit(5, text)
    assert decided.until == 5
    assert (decided.ahead >= 5).all()


@given(histories())
def test_a_tracker_returns_what_is_decided_and_no_more(history: tuple[list[int], list[tuple[str, list[int]]]]) -> None:
    offsets, steps = history
    tracker, decided, taken = OffsetTracker(), set[int](), set[int]()
    for what, which in steps:
        if what == "taken":
            tracker.taken(np.array(which))
            taken |= set(which)
        else:
            tracker.decided(np.array(which))
            decided |= set(which)
        progress = tracker.progress
        assert progress is not None
        committed = Decided.from_commit(progress.until, progress.metadata())
        known = np.array(offsets)[committed.mask(np.array(offsets))].tolist()
        assert set(known) == decided
