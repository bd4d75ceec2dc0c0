"""A sustained overload lowers the escalation budget within limits; a burst, a stall or a dead server does not."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.config import OverloadSettings
from streaming.pipeline.overload import OverloadControl

SETTINGS = OverloadSettings(
    factor_min=0.2, factor_step=0.5, in_flight_share=0.5, late_share=0.2, after_s=2.0, calm_s=10.0
)
IN_FLIGHT_MAX = 100
TURN_S = 0.01


class Timeline:
    """A control and its own clock, with the same arguments in each turn of a period."""

    def __init__(self, chosen: OverloadSettings = SETTINGS) -> None:
        self.now_s = 1_000.0
        self.control = OverloadControl(chosen, IN_FLIGHT_MAX, self)
        self.moves: list[tuple[float, float]] = []

    def time(self) -> float:
        raise AssertionError("the time of day may jump")

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def go(self, seconds: float, in_flight: int = 0, escalated: int = 2, late: int = 0) -> float:
        """Returns the factor at the end; each move and its moment go to `moves`."""
        for _ in range(round(seconds / TURN_S)):
            before = self.control.factor
            self.now_s += TURN_S
            self.control.observe(in_flight, escalated, late)
            if self.control.factor != before:
                self.moves.append((self.now_s - 1_000.0, self.control.factor))
        return self.control.factor


@pytest.fixture
def timeline() -> Timeline:
    return Timeline()


def test_rows_that_wait_lower_the_budget_by_steps_down_to_the_limit(timeline: Timeline) -> None:
    assert timeline.go(20, in_flight=60) == 0.2
    moments, values = zip(*timeline.moves, strict=True)
    assert values == (0.5, 0.25, 0.2)
    assert moments == pytest.approx((2.0, 4.0, 6.0), abs=0.1)


@pytest.mark.parametrize(
    ("turn", "lowers"),
    [
        ({"late": 0}, False),
        ({"late": 2}, False),
        ({"late": 3}, True),
        ({"late": 10}, True),
        ({"in_flight": 50}, False),
        ({"in_flight": 51}, True),
    ],
)
def test_only_a_share_above_its_limit_lowers_it(timeline: Timeline, turn: dict[str, int], lowers: bool) -> None:
    assert (timeline.go(4, escalated=10, **turn) < 1.0) == lowers


def test_rows_that_come_and_go_count_by_their_mean(timeline: Timeline) -> None:
    for _ in range(200):
        timeline.go(0.01, in_flight=100)
        timeline.go(0.01, in_flight=10)
    assert timeline.control.factor < 1.0


def test_a_burst_shorter_than_half_of_after_s_moves_nothing(timeline: Timeline) -> None:
    for _ in range(5):
        timeline.go(0.9, in_flight=100, escalated=50, late=50)
        assert timeline.go(3) == 1.0


def test_it_comes_back_step_by_step_after_calm_s_each(timeline: Timeline) -> None:
    timeline.go(7, in_flight=100)
    assert timeline.go(50, in_flight=100) == 0.2
    timeline.moves.clear()
    timeline.go(40)
    moments, values = zip(*timeline.moves, strict=True)
    assert values == (0.25, 0.5, 1.0)
    assert moments == pytest.approx((67.5, 77.5, 87.5), abs=0.6)


def test_between_calm_and_pressed_nothing_moves(timeline: Timeline) -> None:
    timeline.go(2.5, in_flight=100)
    assert timeline.go(100, in_flight=40) == 0.5
    assert timeline.go(100, in_flight=0, escalated=10, late=2) == 0.5
    assert timeline.go(12, in_flight=25, escalated=10, late=1) == 1.0


def test_an_interrupted_calm_starts_again(timeline: Timeline) -> None:
    timeline.go(2.5, in_flight=100)
    for _ in range(5):
        timeline.go(9)
        assert timeline.go(1.5, in_flight=60) == 0.5


def test_it_moves_rarely_where_each_step_helps_too_much(timeline: Timeline) -> None:
    while timeline.now_s < 1_600.0:
        timeline.go(TURN_S, in_flight=0 if timeline.control.factor < 1.0 else 100)
    assert len(timeline.moves) <= 2 * 600 / (SETTINGS.after_s + SETTINGS.calm_s) + 1


@pytest.mark.parametrize(("late", "every_s"), [(1, 0.3), (2, 0.6)])
def test_a_handful_of_outcomes_is_no_share(timeline: Timeline, late: int, every_s: float) -> None:
    for _ in range(20):
        timeline.go(TURN_S, escalated=late, late=late)
        timeline.go(every_s, escalated=0)
    assert timeline.control.factor == 1.0


def test_a_burst_is_forgotten_where_turns_are_few_too(timeline: Timeline) -> None:
    timeline.control.observe(0, 100, 100)
    for _ in range(12):
        timeline.now_s += 0.5
        timeline.control.observe(0, 1, 0)
    assert timeline.control.factor == 1.0


def test_a_loop_that_stood_still_is_no_overload(timeline: Timeline) -> None:
    for _ in range(20):
        timeline.go(0.5)
        timeline.now_s += 8.0
        timeline.go(TURN_S, in_flight=100, escalated=100, late=100)
    assert timeline.control.factor == 1.0


def test_a_turn_longer_than_a_short_after_s_is_seen_all_the_same() -> None:
    control = (timeline := Timeline(msgspec.structs.replace(SETTINGS, after_s=0.1))).control
    for _ in range(5):
        timeline.now_s += 0.2
        control.observe(100, 0, 0)
    assert control.factor < 1.0


def test_a_limit_of_one_leaves_the_budget_alone() -> None:
    assert Timeline(msgspec.structs.replace(SETTINGS, factor_min=1.0)).go(10, in_flight=100, late=2) == 1.0


def test_each_move_is_logged_once(timeline: Timeline) -> None:
    control = timeline.control
    assert control.changed() is None
    timeline.go(2.5, in_flight=80, escalated=10, late=4)
    assert control.changed() == (
        "deep stage overloaded (80 of at most 100 rows in flight, 40% of escalated rows too late): escalation"
        " budget at 50.0% of the bundle's, at least 20.0%"
    )
    assert control.changed() is None
    timeline.go(2, in_flight=80)
    timeline.go(12)
    assert control.changed() is None
    timeline.go(10)
    assert control.changed() == "deep stage no longer overloaded: escalation budget back to the bundle's"


def test_memory_does_not_depend_on_the_number_of_calls(timeline: Timeline) -> None:
    for _ in range(20_000):
        timeline.now_s += 1e-5
        timeline.control.observe(10, 1, 0)
    assert len(timeline.control._recent._buckets) <= 10


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.0, 30.0), st.integers(0, 200), st.integers(0, 50), st.floats(0.0, 1.0)), max_size=200
    )
)
def test_it_stays_within_its_limits_and_calm_brings_it_back(
    turns: list[tuple[float, int, int, float]],
) -> None:
    timeline = Timeline()
    for passed_s, in_flight, escalated, share in turns:
        timeline.now_s += passed_s
        timeline.control.observe(in_flight, escalated, int(share * escalated))
        assert SETTINGS.factor_min <= timeline.control.factor <= 1.0
    assert timeline.go(3 * SETTINGS.calm_s + SETTINGS.after_s) == 1.0
