"""Escalated rows and their deadlines, with a deep stage that answers only when the test lets it."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from bench.faults.process import POLICY
from bench.faults.traffic import SCHEMA
from cascade.columns import ColumnBatch, Float64
from cascade.config import Config
from cascade.ledger import Ledger
from cascade.protocols import DeepInputs
from streaming.health_state import HealthState
from streaming.pipeline.decisions import CAUSES, STAGES
from streaming.pipeline.escalate import DeepCall, Escalations
from streaming.pipeline.table import Table
from tests.timing import SetClock

BUDGET_MS = Config().deadline.budget_ms


class StuckStage:
    """A DeepStage at fault: its calls do not end at their timeout."""

    hedged = late_answers = 0

    def __init__(self) -> None:
        self.calls: list[Future[Float64]] = []
        self.probes: list[Future[Float64]] = []

    def submit(self, inputs: DeepInputs, timeout_s: float) -> Future[Float64]:
        self.calls.append(Future())
        return self.calls[-1]

    def probe(self, timeout_s: float) -> Future[Float64]:
        self.probes.append(Future())
        return self.probes[-1]

    def wait_ready(self, timeout_s: float) -> None: ...

    def close(self) -> None: ...


class Rig:
    def __init__(self, stage: StuckStage | None = None) -> None:
        self.clock, self.stage, self.health = SetClock(), stage or StuckStage(), HealthState(10.0)
        card = SCHEMA.roles.card
        self.escalations = Escalations(
            Config(),
            POLICY,
            self.stage,
            card,
            Ledger(),
            self.health,
            self.clock,
            lambda: 0.5,
            lambda: None,
        )

    def send(self, *start_ms: float) -> list[Table]:
        """Escalates rows whose deadlines count from these times, in one call; their offsets are 0, 1, ..."""
        count = len(start_ms)
        numbers = {name: np.arange(count).astype(field.dtype) for name, field in SCHEMA.fields.items()}
        table = Table.of(
            "t", ColumnBatch(numbers, count), ("v1",), offset=np.arange(count), start_ms=start_ms, screener_score=0.25
        )
        inputs = DeepInputs({"card_sequence": np.zeros((count, 1, 1), np.float32)}, np.zeros((count, 2), np.float32))
        return self.escalations.send(table, inputs)

    def decided_at(self, now_ms: float) -> dict[int, tuple[str, str | None]]:
        """Stage and cause of the rows that are decided now, by offset."""
        self.clock.now_s = now_ms / 1e3
        return {int(row["offset"]): stage_and_cause(row) for table in self.escalations.collect() for row in table.rows}


def stage_and_cause(row: Any) -> tuple[str, str | None]:
    return STAGES[row["stage"]], CAUSES[row["cause"]] or None


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_the_screener_decides_at_the_deadline_when_the_call_does_not_end(rig: Rig) -> None:
    rig.send(0.0)
    assert rig.decided_at(BUDGET_MS - 1) == {}
    assert rig.decided_at(BUDGET_MS) == {0: ("screener", "deadline")}
    assert rig.escalations.open == 0


def test_rows_of_one_call_are_decided_at_their_own_deadlines(rig: Rig) -> None:
    rig.send(-20.0, 0.0, -10.0)
    assert rig.decided_at(BUDGET_MS - 20) == {0: ("screener", "deadline")}
    assert rig.decided_at(BUDGET_MS - 10) == {2: ("screener", "deadline")}
    rig.stage.calls[0].set_result(np.zeros(3))
    assert rig.decided_at(BUDGET_MS - 5) == {1: ("deep", None)}


def test_an_answer_after_the_deadline_decides_nothing(rig: Rig) -> None:
    rig.send(0.0)
    assert rig.decided_at(BUDGET_MS + 1) == {0: ("screener", "deadline")}
    rig.stage.calls[0].set_result(np.zeros(1))
    assert rig.decided_at(BUDGET_MS + 2) == {}


def test_a_row_whose_deadline_has_passed_is_not_sent(rig: Rig) -> None:
    outcomes = rig.send(-BUDGET_MS)
    assert [stage_and_cause(table.rows[0]) for table in outcomes] == [("screener", "deadline")]
    assert rig.stage.calls == []


def test_the_wait_follows_from_the_pace_of_the_last_answer_and_from_the_oldest_call(rig: Rig) -> None:
    assert rig.escalations.wait_s == 0.0
    rig.send(0.0, 0.0)
    rig.decided_at(10.0)
    assert rig.escalations.wait_s == pytest.approx(0.010), "no answer yet: at least as long as the oldest has waited"
    rig.send(10.0, 10.0, 10.0)
    rig.stage.calls[0].set_result(np.zeros(2))
    rig.decided_at(12.0)
    assert rig.escalations.wait_s == pytest.approx(3 * 0.012 / 2), "6 ms for each of the three that wait"
    rig.stage.calls[1].set_result(np.zeros(3))
    rig.decided_at(40.0)
    rig.send(40.0)
    assert rig.escalations.wait_s == pytest.approx(0.030 / 5), "the call was the last of five rows that waited"


def call(deadlines_ms: list[float]) -> DeepCall:
    """A call for rows of the partitions 0 and 1 in turn."""
    count = len(deadlines_ms)
    table = Table.of("t", ColumnBatch({}, count), ("v1",), partition_id=np.arange(count) % 2)
    return DeepCall(table, np.zeros(len(table)), np.array(deadlines_ms), Future(), sent_s=0.0, ahead=count)


def test_each_row_expires_once_and_at_its_own_deadline() -> None:
    deep_call = call([50.0, 20.0, 50.0, 80.0])
    assert deep_call.expire(19.9).tolist() == []
    assert deep_call.expire(20.0).tolist() == [1]
    assert deep_call.expire(20.0).tolist() == []
    assert deep_call.expire(60.0).tolist() == [0, 2]
    assert deep_call.open.tolist() == [False, False, False, True]
    assert deep_call.expire(1e9).tolist() == [3]
    assert deep_call.expire(2e9).tolist() == []


def test_an_answer_decides_only_what_has_not_expired() -> None:
    deep_call = call([10.0, 99.0, 99.0])
    deep_call.expire(10.0)
    assert deep_call.close().tolist() == [1, 2]
    assert deep_call.close().tolist() == []
    assert deep_call.expire(1e9).tolist() == [], "a decided row must not be decided again at its deadline"


def test_dropped_rows_of_lost_partitions_are_decided_by_nobody_here() -> None:
    deep_call = call([50.0, 60.0, 70.0, 80.0])
    deep_call.drop(frozenset({("t", 1)}))
    assert deep_call.expire(65.0).tolist() == [0]
    assert deep_call.close().tolist() == [2]
