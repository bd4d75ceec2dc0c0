"""A new state, a gap and a restart: what the worker says of them."""

from __future__ import annotations

import numpy as np
import pytest

from cascade.errors import StateError
from streaming.worker.history import DAY_MS, GAP_MS_MIN, History

REACH_MS = 40 * DAY_MS
START_MS = 1_700_000_000_000


def history(days: float = 0.0) -> History:
    """Of a state that has folded a transaction an hour for so many days."""
    made = History(REACH_MS)
    if days:
        fold(made, 0.0, days)
    return made


def fold(made: History, first_day: float, last_day: float) -> None:
    for hour in range(int(24 * first_day), int(24 * last_day)):
        made.folded(START_MS + hour * DAY_MS // 24, START_MS + (hour + 1) * DAY_MS // 24)


def test_a_new_state_covers_nothing_and_grows_with_event_time() -> None:
    assert history().covered == 0.0
    assert history(10).covered == pytest.approx(0.25)
    assert history(36).covered == pytest.approx(0.9)
    assert history(100).covered == 1.0


def test_a_state_without_windows_is_never_cold() -> None:
    made = History(0)
    assert made.covered == 1.0
    assert made.changed() is None


def test_the_log_says_once_that_it_is_cold_and_once_that_it_is_warm() -> None:
    made, lines = history(), []
    for day in range(50):
        lines.append(made.changed())
        fold(made, day, day + 1)
    said = [(day, line) for day, line in enumerate(lines) if line]
    assert [day for day, _ in said] == [0, 36]
    assert said[0][1].startswith("cold: the state covers 0% of its longest window, 40 days: ")
    assert said[1][1] == "the state is warm: it covers its longest window"
    assert made.text == ""


def test_a_state_that_begins_warm_says_nothing() -> None:
    assert history(40).changed() is None


def test_a_gap_makes_a_warm_state_cold_and_a_quiet_weekend_does_not() -> None:
    made = history(60)
    made.changed()
    fold(made, 63, 64)
    assert made.covered == 1.0
    fold(made, 70, 71)
    assert made.covered == pytest.approx(1 / 40)
    assert str(made.changed()).startswith("cold: ")


@pytest.mark.parametrize("reach_ms", [1_000, 3_600_000, DAY_MS])
def test_a_night_is_no_gap_however_short_the_windows_are(reach_ms: int) -> None:
    made = History(reach_ms)
    made.folded(START_MS, START_MS + 2 * reach_ms)
    made.folded(START_MS + 2 * reach_ms + GAP_MS_MIN, START_MS + 2 * reach_ms + GAP_MS_MIN)
    assert made.covered == 1.0


def test_late_rows_and_a_replay_of_an_older_partition_change_nothing() -> None:
    made = history(20)
    made.folded(START_MS - 90 * DAY_MS, START_MS - 90 * DAY_MS)
    assert made.covered == pytest.approx(0.5)
    fold(made, 0, 20)
    assert made.covered == pytest.approx(0.5)


def test_a_snapshot_restores_it_and_of_several_the_least_counts() -> None:
    made = history()
    made.absorb(history(30).export())
    assert made.covered == pytest.approx(0.75)
    later = history()
    fold(later, 20, 30)
    made.absorb(later.export())
    assert made.covered == pytest.approx(0.25)
    fold(made, 30, 40)
    assert made.covered == pytest.approx(0.5)


def test_a_snapshot_of_an_earlier_release_counts_as_warm() -> None:
    made = history()
    made.absorb({"card.slots": np.zeros(1)})
    made.folded(START_MS, START_MS)
    assert made.covered == 1.0


@pytest.mark.parametrize("wrong", [np.array([1]), np.array([2, 1]), np.array([1.0, 2.0])])
def test_a_damaged_history_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(StateError, match="history"):
        history().absorb({"history": wrong})


def test_it_moves_by_whole_per_cents() -> None:
    made = history()
    assert made.moved()
    assert not made.moved()
    fold(made, 0, 0.3)
    assert not made.moved()
    fold(made, 0.3, 0.5)
    assert made.moved()
