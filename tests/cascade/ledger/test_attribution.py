"""The books of the ledger: both sides equal, nothing counted twice, nothing mixed silently."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import numpy as np
import pytest

from cascade.ledger import Account, Books, MixedEnergyError, attribute, merge_accounts
from cascade.ledger.account import MeterState
from cascade.ledger.attribution import DEEP, IDLE, RESIDUAL, UNDIVIDED, WASTED, WORKER_REST
from cascade.ledger.counters import Counters
from cascade.ledger.machine import describe_machine
from cascade.ledger.sla import ServiceLevel

START = datetime(2026, 11, 25, tzinfo=UTC)
MACHINE = describe_machine()
WATTS = 7.0


def _account(*meters: MeterState, gpu_idle_watts: float | None = None, deep_rows: int = 100) -> Account:
    """A hundred seconds: 9,900 screened, 80 escalated, 20 degraded; a hundred rows were sent to the deep model."""
    counters = Counters.empty()
    for path, count in (("screened", 9_900), ("escalated", 80), ("degraded", 20)):
        counters.paths[path].record(np.full(count, 1e-3))  # type: ignore[index]
    counters.stage_cpu_s |= {"decode": 1.0, "features": 2.0, "produce": 0.5}
    counters.deep_rows = deep_rows
    return Account(
        started=START, ended=START + timedelta(seconds=100), counters=counters, meters=meters,
        service_level=ServiceLevel(), watts_per_core=WATTS, bundle_versions=(), screeners=(), machines=(MACHINE,),
        gpu_idle_watts=gpu_idle_watts,
    )  # fmt: skip


def _state(meter: str, energy_j: float | None, kind: str = "modelled", **more: object) -> MeterState:
    return msgspec.structs.replace(
        MeterState.of(meter, kind, "a counter", energy_j, None if energy_j is not None else "lost"),  # type: ignore[arg-type]
        **more,
    )


def _lines(books: Books, kind: str) -> dict[str, float]:
    return books.by_line(kind)  # type: ignore[arg-type]


WORKER = _state("cpu-worker", 5.0 * WATTS)
GPU = _state("gpu0", 9_000.0, "measured", check_j=8_910.0)


def test_the_workers_joules_go_to_its_stages_and_what_it_does_besides() -> None:
    lines = _lines(attribute(_account(WORKER)), "modelled")
    assert lines == {
        "decode": pytest.approx(1.0 * WATTS), "features": pytest.approx(2.0 * WATTS),
        "produce": pytest.approx(0.5 * WATTS), WORKER_REST: pytest.approx(1.5 * WATTS),
    }  # fmt: skip


def test_deep_joules_of_answers_that_decided_nothing_stand_apart() -> None:
    lines = _lines(attribute(_account(_state("cpu-deep", 50.0))), "modelled")
    assert lines == {DEEP: pytest.approx(40.0), WASTED: pytest.approx(10.0)}


def test_a_gpus_idle_is_apart_where_it_is_stated_and_never_more_than_there_is() -> None:
    stated = attribute(_account(GPU, gpu_idle_watts=50.0))
    assert stated.idle_stated
    assert _lines(stated, "measured") == {
        IDLE: pytest.approx(5_000.0), DEEP: pytest.approx(3_200.0), WASTED: pytest.approx(800.0)
    }  # fmt: skip
    unstated = attribute(_account(GPU))
    assert not unstated.idle_stated
    assert _lines(unstated, "measured") == {DEEP: pytest.approx(7_200.0), WASTED: pytest.approx(1_800.0)}
    too_much = attribute(_account(GPU, gpu_idle_watts=500.0))
    assert _lines(too_much, "measured")[IDLE] == pytest.approx(9_000.0)
    two = attribute(merge_accounts([_account(GPU, gpu_idle_watts=50.0)] * 2))
    assert _lines(two, "measured")[IDLE] == pytest.approx(10_000.0)


def test_joules_without_any_deep_call_are_the_residual() -> None:
    books = attribute(_account(GPU, gpu_idle_watts=50.0, deep_rows=0))
    assert _lines(books, "measured") == {IDLE: pytest.approx(5_000.0), RESIDUAL: pytest.approx(4_000.0)}
    (closing,) = books.closings
    assert closing.residual_share == pytest.approx(4 / 9)
    assert closing.check_share == pytest.approx(-0.01)


def test_a_machine_wide_counter_is_not_divided() -> None:
    assert _lines(attribute(_account(_state("rapl", 10.0, "measured"))), "measured") == {UNDIVIDED: 10.0}


@pytest.mark.parametrize("seed", range(20))
def test_both_sides_are_equal_whatever_the_meters_say(seed: int) -> None:
    chance = np.random.default_rng(seed)
    names = ["cpu-worker", "cpu-deep", "cpu-idle", "gpu0", "gpu1", "rapl"]
    meters = [_state(name, float(chance.exponential(1_000.0)), "measured" if chance.random() < 0.5 else "modelled")
              for name in names if chance.random() < 0.8]  # fmt: skip
    account = _account(
        *meters, gpu_idle_watts=float(chance.uniform(0, 80)) or None, deep_rows=int(chance.integers(0, 200))
    )
    books = attribute(account)
    for state in meters:
        told = sum(entry.energy_j for entry in books.entries if entry.meter == state.meter)
        assert told == pytest.approx(state.energy_j)
    assert books.total_j(mixed=True) == pytest.approx(sum(state.energy_j or 0.0 for state in meters))


def test_stage_clocks_that_tell_more_than_the_process_used_leave_a_negative_residual() -> None:
    books = attribute(_account(_state("cpu-worker", 3.0 * WATTS)))
    assert _lines(books, "modelled")[RESIDUAL] == pytest.approx(-0.5 * WATTS)


def test_measured_and_modelled_are_only_added_up_by_name() -> None:
    books = attribute(_account(WORKER, GPU))
    with pytest.raises(MixedEnergyError, match="by name"):
        books.total_j()
    assert books.total_j(mixed=True) == pytest.approx(9_000.0 + 5.0 * WATTS)
    assert books.total_j(["decode", WORKER_REST]) == pytest.approx(2.5 * WATTS)


def test_a_lost_meter_has_no_page_and_is_named() -> None:
    books = attribute(_account(WORKER, _state("gpu0", None, "measured")))
    assert books.lost == ("gpu0",)
    assert [closing.meter for closing in books.closings] == ["cpu-worker"]


def test_an_escalated_decision_costs_its_share_and_its_answer() -> None:
    costs = {(one.path, one.kind): one.mj_per_decision for one in attribute(_account(WORKER, GPU)).paths}
    shared_mj = 1e3 * 5.0 * WATTS / 10_000
    assert costs == {
        ("screened", "modelled"): pytest.approx(shared_mj), ("escalated", "modelled"): pytest.approx(shared_mj),
        ("escalated", "measured"): pytest.approx(1e3 * 7_200.0 / 80),
    }  # fmt: skip
