from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streaming.offsets import OffsetTracker


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
            waiting = [one for one in waiting if one not in chosen]
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


@given(histories())
def test_the_committable_offset_never_goes_back(history: tuple[list[int], list[tuple[str, list[int]]]]) -> None:
    tracker = OffsetTracker()
    before = -1
    for name, some in history[1]:
        getattr(tracker, name)(np.array(some, np.int64))
        assert tracker.committable is not None
        assert tracker.committable >= before
        before = tracker.committable


def test_nothing_taken_is_nothing_to_commit() -> None:
    tracker = OffsetTracker()
    tracker.taken(np.zeros(0, np.int64))
    assert tracker.committable is None
    assert tracker.open == 0


def test_a_long_straggler_holds_the_commit_and_then_frees_it_at_once() -> None:
    tracker = OffsetTracker()
    tracker.taken(np.arange(10_000))
    tracker.decided(np.arange(1, 10_000))
    assert (tracker.committable, tracker.open) == (0, 1)
    tracker.decided(np.array([0]))
    assert (tracker.committable, tracker.open) == (10_000, 0)


def test_memory_is_given_back_once_all_is_decided() -> None:
    tracker = OffsetTracker()
    for start in range(0, 50_000, 1_000):
        offsets = np.arange(start, start + 1_000)
        tracker.taken(offsets)
        tracker.decided(offsets[::-1])
    assert not tracker._waiting
    assert not tracker._decided
