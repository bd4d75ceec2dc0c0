"""The books of the ledger: both sides are equal, nothing counts twice, and kinds are never mixed silently."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from cascade.ledger import Account, MixedEnergyError, attribute, merge_accounts
from cascade.ledger.account import MeterState
from cascade.ledger.attribution import DEEP, IDLE, RESIDUAL, UNDIVIDED, WASTED, WORKER_REST
from tests.cascade.ledger.test_counterfactual import account, state

WATTS = 7.0


def _account(*meters: MeterState, gpu_idle_watts: float | None = None, deep_rows: int = 100) -> Account:
    """100 seconds with 80 escalated and 20 degraded of 10,005 decisions, and `deep_rows` deep rows."""
    found = account(*meters, rows=deep_rows, gpu_idle_watts=gpu_idle_watts, watts_per_core=WATTS)
    cpu_s = {"decode": 1.0, "features": 2.0, "screener": 0.0, "produce": 0.5}
    found.counters.stage_cpu_s |= cpu_s  # type: ignore[arg-type]
    return found


def _state(meter: str, energy_j: float | None, kind: str = "modelled", **more: object) -> MeterState:
    return msgspec.structs.replace(state(meter, energy_j, kind), **more)


WORKER = _state("cpu-worker", 5.0 * WATTS)
GPU = _state("gpu0", 9_000.0, "measured", check_j=8_910.0)


def test_the_workers_joules_are_divided_among_its_stages_and_the_rest() -> None:
    lines = attribute(_account(WORKER)).by_line("modelled")
    cpu_s = {"decode": 1.0, "features": 2.0, "produce": 0.5, WORKER_REST: 1.5}
    assert lines == pytest.approx({line: seconds * WATTS for line, seconds in cpu_s.items()})


def test_deep_answers_that_decided_nothing_have_their_own_line() -> None:
    lines = attribute(_account(_state("cpu-deep", 50.0))).by_line("modelled")
    assert lines == pytest.approx({DEEP: 40.0, WASTED: 10.0})


def test_stated_idle_of_a_gpu_has_its_own_line_and_at_most_all_joules() -> None:
    stated = attribute(_account(GPU, gpu_idle_watts=50.0))
    assert stated.idle_stated
    assert stated.by_line("measured") == pytest.approx({IDLE: 5_000.0, DEEP: 3_200.0, WASTED: 800.0})
    unstated = attribute(_account(GPU))
    assert not unstated.idle_stated
    assert unstated.by_line("measured") == pytest.approx({DEEP: 7_200.0, WASTED: 1_800.0})
    too_much = attribute(_account(GPU, gpu_idle_watts=500.0))
    assert too_much.by_line("measured")[IDLE] == pytest.approx(9_000.0)
    two_gpus = attribute(merge_accounts([_account(GPU, gpu_idle_watts=50.0)] * 2))
    assert two_gpus.by_line("measured")[IDLE] == pytest.approx(10_000.0)


def test_joules_of_a_gpu_without_a_deep_call_are_the_residual() -> None:
    books = attribute(_account(GPU, gpu_idle_watts=50.0, deep_rows=0))
    assert books.by_line("measured") == pytest.approx({IDLE: 5_000.0, RESIDUAL: 4_000.0})
    (closing,) = books.closings
    assert closing.residual_share == pytest.approx(4 / 9)
    assert closing.check_share == pytest.approx(-0.01)


def test_a_machine_wide_counter_is_not_divided() -> None:
    assert attribute(_account(_state("rapl", 10.0, "measured"))).by_line("measured") == {UNDIVIDED: 10.0}


@pytest.mark.parametrize("seed", range(20))
def test_the_entries_of_a_meter_add_up_to_its_reading(seed: int) -> None:
    chance = np.random.default_rng(seed)
    names = ["cpu-worker", "cpu-deep", "cpu-idle", "gpu0", "gpu1", "rapl"]
    meters = [
        _state(name, float(chance.exponential(1_000.0)), "measured" if chance.random() < 0.5 else "modelled")
        for name in names
        if chance.random() < 0.8
    ]
    gpu_idle_watts, deep_rows = float(chance.uniform(0, 80)) or None, int(chance.integers(0, 200))
    books = attribute(_account(*meters, gpu_idle_watts=gpu_idle_watts, deep_rows=deep_rows))
    for meter in meters:
        entries_j = sum(entry.energy_j for entry in books.entries if entry.meter == meter.meter)
        assert entries_j == pytest.approx(meter.energy_j)
    assert books.total_j(mixed=True) == pytest.approx(sum(meter.energy_j or 0.0 for meter in meters))


def test_the_residual_is_negative_if_the_stage_clocks_exceed_the_process() -> None:
    books = attribute(_account(_state("cpu-worker", 3.0 * WATTS)))
    assert books.by_line("modelled")[RESIDUAL] == pytest.approx(-0.5 * WATTS)


def test_measured_and_modelled_joules_are_only_added_up_on_request() -> None:
    books = attribute(_account(WORKER, GPU))
    with pytest.raises(MixedEnergyError, match="mixed=True"):
        books.total_j()
    assert books.total_j(mixed=True) == pytest.approx(9_000.0 + 5.0 * WATTS)
    assert books.total_j(["decode", WORKER_REST]) == pytest.approx(2.5 * WATTS)


def test_a_lost_meter_has_no_entries_and_is_named() -> None:
    books = attribute(_account(WORKER, _state("gpu0", None, "measured")))
    assert books.lost == ("gpu0",)
    assert [closing.meter for closing in books.closings] == ["cpu-worker"]


def test_an_escalated_decision_uses_its_share_and_its_deep_answer() -> None:
    costs = {(cost.path, cost.kind): cost.mj_per_decision for cost in attribute(_account(WORKER, GPU)).paths}
    shared_mj, deep_mj = 1e3 * 5.0 * WATTS / 10_005, 1e3 * 7_200.0 / 80
    modelled = {("screened", "modelled"): shared_mj, ("escalated", "modelled"): shared_mj}
    assert costs == pytest.approx(modelled | {("escalated", "measured"): deep_mj})
