"""The rest between two turns of the loop."""

from __future__ import annotations

from streaming.worker.pace import LOAD_S, REST, REST_S_MAX, Pace


def test_a_turn_now_and_then_is_followed_by_the_next_at_once() -> None:
    pace = Pace()
    assert [pace.ended(began_s, began_s + 0.001) for began_s in (0.0, 0.01, 0.02, 0.02 + LOAD_S)] == [0.0] * 4


def test_under_load_the_work_of_a_turn_sets_the_rest_up_to_a_limit() -> None:
    pace = Pace()
    pace.ended(0.0, 0.001)
    assert pace.ended(0.002, 0.0025) == REST * (0.0025 - 0.002)
    assert pace.ended(0.004, 0.104) == REST_S_MAX, "a slow turn"
    assert pace.ended(1.0, 1.001) == 0.0, "a pause of the load"


def test_a_clock_that_stands_still_gives_no_rest() -> None:
    pace = Pace()
    assert [pace.ended(5.0, 5.0) for _ in range(3)] == [0.0] * 3
