"""Futures fail at their deadlines, and only those that are not done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest

from cascade.columns import Float64
from cascade.errors import DeepStageError
from stages.deep.deadlines import Deadlines, complete
from tests.stages.deep.conftest import failure


@pytest.fixture
def deadlines() -> Iterator[Deadlines]:
    made = Deadlines("too late")
    yield made
    made.close()
    assert not made._thread.is_alive()


def test_each_future_fails_at_its_own_deadline_whatever_the_order_in_which_they_came(deadlines: Deadlines) -> None:
    ended: dict[int, float] = {}
    futures: dict[int, Future[Float64]] = {place: Future() for place in (3, 1, 2)}
    started_s = time.monotonic()
    for place, future in futures.items():
        future.add_done_callback(lambda _, place=place: ended.setdefault(place, time.monotonic()))
        deadlines.add(future, started_s + place / 10)
    errors = {place: failure(future) for place, future in futures.items()}
    assert {(error.cause, str(error)) for error in errors.values()} == {("deadline", "too late")}
    assert sorted(ended, key=lambda place: ended[place]) == [1, 2, 3]
    assert all(ended[place] - started_s >= place / 10 for place in ended)


def test_a_future_that_is_done_keeps_its_result_and_is_forgotten(deadlines: Deadlines) -> None:
    for _ in range(1_000):
        future: Future[Float64] = Future()
        deadlines.add(future, time.monotonic() + 60)
        assert complete(future, np.ones(1))
        assert not complete(future, DeepStageError("error", "no"))
        assert future.result() == np.ones(1)
    assert len(deadlines._futures) <= 1


def test_a_thread_that_waits_for_a_late_deadline_does_not_miss_an_earlier_one(deadlines: Deadlines) -> None:
    late, early = Future[Float64](), Future[Float64]()
    deadlines.add(late, time.monotonic() + 60)
    time.sleep(0.05)
    deadlines.add(early, time.monotonic() + 0.05)
    assert failure(early).cause == "deadline"
    assert not late.done()
