"""A backlog waits for a slow deep model. The worker is real; broker, clock and model are the fault simulator's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Literal

import msgspec
import pytest

from bench.faults.model import ModelFaults
from bench.faults.run import Simulation
from bench.faults.schedule import AMPLE_BUDGET
from cascade.config import DeadlineSettings
from tests.streaming.worker.test_spares import faultless

BUDGET_MS = 2_000
LOOK_S = 0.005


class Backlog:
    """A run of one worker, whose model takes up to three quarters of the time that a decision has.

    `paused`: at each look, whether the stream pauses. `waits_s`: the wait for the model, at each look.
    """

    def __init__(self, start: Literal["append", "fetch"], answer_s: float) -> None:
        options = faultless(partitions=1)
        self.simulation = Simulation(
            replace(
                options,
                workers=1,
                escalation_budget=AMPLE_BUDGET,
                config=msgspec.structs.replace(
                    options.config, deadline=DeadlineSettings(budget_ms=BUDGET_MS, start=start)
                ),
                traffic=replace(
                    options.traffic,
                    rows=80,
                    seconds=4.0,
                    cards=40,
                    repeated_share=0.0,
                    malformed_share=0.0,
                    aborted_share=0.0,
                    label_share=0.0,
                ),
                model=ModelFaults(answer_s=answer_s),
            )
        )
        self.paused: list[bool] = []
        self.waits_s: list[float] = []
        self._look()

    def _look(self) -> None:
        for process in self.simulation.live():
            if process.worker is not None:
                self.paused.append(process.worker._paused)
                self.waits_s.append(process.worker._pipeline.wait_s)
        self.simulation.world.at(LOOK_S, partial(self._look))


def test_a_stream_pauses_while_the_model_is_behind_and_goes_on_afterwards() -> None:
    backlog = Backlog("fetch", answer_s=1.5)
    assert backlog.simulation.run() == []
    paused = backlog.paused
    assert sum(before and not after for before, after in pairwise(paused)) >= 2
    assert max(backlog.waits_s) > BUDGET_MS / 2e3
    (process,) = backlog.simulation.processes
    assert process.ledger.summary().degraded_by_cause == {}


@pytest.mark.parametrize(("start", "answer_s"), [("append", 1.5), ("fetch", 0.2)])
def test_it_does_not_pause_where_time_runs_from_the_append_or_the_model_is_quick(
    start: Literal["append", "fetch"], answer_s: float
) -> None:
    backlog = Backlog(start, answer_s)
    assert backlog.simulation.run() == []
    assert max(backlog.waits_s) > 0.05
    assert not any(backlog.paused)
