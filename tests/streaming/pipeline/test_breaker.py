from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.config import BreakerSettings
from streaming.pipeline.breaker import CircuitBreaker
from tests.timing import SetClock

SETTINGS = BreakerSettings(calls=4, failures_share=0.5, pause_ms=100, pause_ms_max=350)


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def breaker(clock: SetClock) -> CircuitBreaker:
    return CircuitBreaker(SETTINGS, clock.monotonic, lambda: 0.0)


def tell(breaker: CircuitBreaker, outcomes: str) -> None:
    for outcome in outcomes:
        (breaker.succeeded if outcome == "+" else breaker.failed)()


def pause_s(breaker: CircuitBreaker, clock: SetClock) -> float:
    """How long the breaker, open now, allows nothing; the call that ends the pause is its trial."""
    start_s = clock.now_s
    while not breaker.allows():
        clock.now_s = round(clock.now_s + 0.001, 6)
    return clock.now_s - start_s


@pytest.mark.parametrize(("outcomes", "state"), [
    ("", "closed"), ("---", "closed"), ("----", "open"), ("+-+-", "open"), ("-+-+", "closed"), ("+++-", "closed"),
    ("++++++--", "open"), ("-+++-+++-", "closed"),
])  # fmt: skip
def test_it_opens_at_the_share_of_failures_of_the_last_calls(
    breaker: CircuitBreaker, outcomes: str, state: str
) -> None:
    tell(breaker, outcomes)
    assert breaker.state == state
    assert breaker.allows() == (state == "closed")


def test_pauses_double_up_to_the_limit_while_trials_fail(breaker: CircuitBreaker, clock: SetClock) -> None:
    tell(breaker, "----")
    pauses = []
    for _ in range(4):
        pauses.append(pause_s(breaker, clock))
        assert breaker.state == "half-open"
        breaker.failed()
    assert pauses == pytest.approx([0.1, 0.2, 0.35, 0.35], abs=0.002)
    assert breaker.opened == 5


def test_a_trial_that_succeeds_closes_it_and_forgets(breaker: CircuitBreaker, clock: SetClock) -> None:
    tell(breaker, "----")
    pause_s(breaker, clock)
    breaker.failed()
    pause_s(breaker, clock)
    breaker.succeeded()
    assert breaker.state == "closed"
    tell(breaker, "---")
    assert breaker.state == "closed"
    breaker.failed()
    assert pause_s(breaker, clock) == pytest.approx(0.1, abs=0.002)


def test_one_trial_at_a_time_and_another_where_it_is_never_answered_for(
    breaker: CircuitBreaker, clock: SetClock
) -> None:
    tell(breaker, "----")
    clock.now_s = 0.1
    assert [breaker.allows() for _ in range(3)] == [True, False, False]
    clock.now_s += 0.35
    assert breaker.allows()


def test_calls_from_before_it_opened_change_nothing(breaker: CircuitBreaker, clock: SetClock) -> None:
    tell(breaker, "----" + "++--+")
    assert breaker.state == "open"
    assert breaker.opened == 1
    assert pause_s(breaker, clock) == pytest.approx(0.1, abs=0.002)


@given(st.floats(0.0, 1.0, exclude_max=True))
def test_chance_shortens_a_pause_by_half_at_most(chance: float) -> None:
    clock = SetClock()
    breaker = CircuitBreaker(SETTINGS, clock.monotonic, lambda: chance)
    tell(breaker, "----")
    assert 0.049 <= pause_s(breaker, clock) <= 0.102
