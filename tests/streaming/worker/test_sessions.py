from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cascade.config import KafkaSettings
from cascade.errors import BrokerError, CascadeError, StateError
from cascade.ledger import Ledger
from streaming.health_state import HealthState
from streaming.worker.sessions import Sessions
from tests.timing import SetClock


class Scene:
    """Sessions of a worker that ends after `session_s`: by the next of `errors`, or by itself."""

    def __init__(self, *errors: Exception | None, decides: bool = False, session_s: float = 1.0, **kafka: Any) -> None:
        self.errors, self.decides, self.session_s = list(errors), decides, session_s
        self.settings = KafkaSettings(**kafka)
        self.clock, self.ledger, self.health = SetClock(), Ledger(), HealthState(60)
        self.closed: list[int] = []
        self.pauses_s: list[float] = []
        self.calls: list[str] = []
        self.stop_after = 1_000
        self.opens_none = False

    def make(self, stack: ExitStack) -> Any:
        number = len(self.closed)
        stack.callback(lambda: self.closed.append(number))
        if self.opens_none:
            return None
        if self.decides:
            self.ledger.record_decisions("screened", np.full(1, 0.001))
        self.calls.append("open")
        self.worker = SimpleNamespace(
            stopping=False, start=lambda: self.calls.append("start"), step=self.step, drain=self.drain
        )
        return self.worker

    def step(self) -> None:
        self.calls.append("step")
        self.clock.sleep(self.session_s)
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        self.worker.stopping = True

    def drain(self) -> None:
        self.calls.append("drain")

    def pause(self, seconds: float) -> None:
        self.pauses_s.append(seconds)
        self.clock.sleep(seconds)

    def run(self) -> None:
        self.sessions = Sessions(
            self.make, self.settings, self.ledger, self.health, self.clock, lambda: len(self.closed) >= self.stop_after
        )
        self.sessions.run(self.pause)


def gone() -> BrokerError:
    return BrokerError("injected: the broker is gone")


def test_after_a_lost_broker_every_connection_is_new() -> None:
    scene = Scene(gone(), gone(), None)
    scene.run()
    assert scene.closed == [0, 1, 2], "the connections of a session end with it"
    assert len(scene.pauses_s) == 2
    assert scene.health.not_ready() == ["broker: injected: the broker is gone"]


def test_trying_without_progress_ends_within_the_bound() -> None:
    scene = Scene(*(gone() for _ in range(1_000)), lost_s_max=30.0)
    with pytest.raises(BrokerError, match="injected"):
        scene.run()
    assert 30 < scene.clock.now_s < 40
    assert max(scene.pauses_s) <= 5.0


def test_progress_between_losses_restarts_the_limit() -> None:
    scene = Scene(*(gone() for _ in range(100)), None, lost_s_max=30.0, decides=True)
    scene.run()
    assert scene.clock.now_s > 100


def test_an_idle_worker_outlives_losses_that_are_far_apart() -> None:
    scene = Scene(gone(), gone(), gone(), None, session_s=31.0, lost_s_max=30.0)
    scene.run()
    assert scene.closed == [0, 1, 2, 3]
    assert max(scene.pauses_s) < 0.3, "each loss begins with a short pause"


@pytest.mark.parametrize(
    ("error", "kafka"),
    [(gone(), {"lost": "exit"}), (StateError("the log no longer reaches back"), {})],
    ids=["as configured", "only the operator can mend it"],
)
def test_some_errors_end_the_process_at_once(error: CascadeError, kafka: dict[str, str]) -> None:
    scene = Scene(error, **kafka)
    with pytest.raises(type(error)):
        scene.run()
    assert (scene.closed, scene.pauses_s) == ([0], [])


def test_no_session_begins_after_a_stop() -> None:
    scene = Scene(gone(), gone(), gone())
    scene.stop_after = 2
    scene.run()
    assert scene.closed == [0, 1]


def test_a_worker_is_started_stepped_and_drained_once() -> None:
    scene = Scene(None)
    scene.run()
    assert scene.calls == ["open", "start", "step", "drain"]
    assert scene.closed == [0]
    assert scene.sessions.worker is None


def test_a_lost_worker_is_not_drained() -> None:
    scene = Scene(gone(), None)
    scene.run()
    assert scene.calls == ["open", "start", "step", "open", "start", "step", "drain"]


def test_the_process_may_stop_while_a_session_opens() -> None:
    scene = Scene()
    scene.opens_none = True
    scene.run()
    assert (scene.calls, scene.closed) == ([], [0])


def test_a_connection_that_cannot_be_made_is_tried_again_and_what_was_made_is_closed() -> None:
    scene = Scene(None)
    make, failures = scene.make, [gone(), gone()]

    def failing(stack: ExitStack) -> Any:
        made = make(stack)
        if failures:
            raise failures.pop()
        return made

    scene.make = failing  # type: ignore[method-assign]
    scene.run()
    assert scene.closed == [0, 1, 2]
    assert scene.calls == ["open", "open", "open", "start", "step", "drain"]


def test_between_two_sessions_there_is_no_worker_and_the_pause_is_returned() -> None:
    scene = Scene(gone(), None)
    sessions = Sessions(
        scene.make, scene.settings, scene.ledger, scene.health, scene.clock, lambda: False, lambda: 0.0, (0.3, 0.3)
    )
    assert [sessions.turn(), sessions.worker is scene.worker] == [0.0, True]
    assert [sessions.turn(), sessions.worker] == [0.3, None]
    assert [sessions.turn(), sessions.turn(), sessions.turn()] == [0.0, 0.0, None]
