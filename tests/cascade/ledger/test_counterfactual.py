"""Deep-only against the cascade: the formula by hand, every refusal, and intervals that hold the truth."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console

from cascade.cli import main
from cascade.errors import DataError
from cascade.ledger import Account, Journal, LedgerSummary, ServiceLevel, merge_accounts, render, summarise
from cascade.ledger.account import MeterState
from cascade.ledger.counterfactual import deep_only, filled_rows
from cascade.ledger.counters import Counters
from cascade.ledger.deep_cost import CallCost, CostMeter, DeepCost, Estimate, median_estimate
from cascade.ledger.errors import CounterfactualError
from cascade.ledger.machine import describe_machine
from cascade.ledger.summary import Counterfactual

START = datetime(2026, 11, 25, tzinfo=UTC)
MACHINE = describe_machine()
WATTS, SECONDS = 10.0, 100.0
GPU = "NVML total energy of NVIDIA H100 (GPU-1)"


def state(meter: str, energy_j: float | None, kind: str = "modelled", source: str = "CPU") -> MeterState:
    return MeterState.of(meter, kind, source, energy_j, None if energy_j is not None else "no process 7")  # type: ignore[arg-type]


def account(*meters: MeterState, calls: int = 50, rows: int = 100, **more: Any) -> Account:
    """A hundred seconds: 9,900 screened, 80 escalated, 20 degraded, 5 duplicates; 20 J of screening; 100 rows."""
    counters = Counters.empty()
    for path, count in (("screened", 9_900), ("escalated", 80), ("degraded", 20), ("duplicate", 5)):
        counters.paths[path].record(np.full(count, 1e-3))  # type: ignore[index]
    counters.stage_cpu_s |= {"decode": 10.0, "features": 8.0, "screener": 2.0, "produce": 5.0}
    if calls:
        counters.deep_calls.record_many(2e-3, calls)
    counters.deep_rows = rows if calls else 0
    settings: dict[str, Any] = {
        "bundle_versions": ("b-1",), "deep_backends": ("triton",), "machines": (MACHINE,), "watts_per_core": WATTS
    }  # fmt: skip
    return Account(
        started=START, ended=START + timedelta(seconds=SECONDS), counters=counters, meters=meters,
        service_level=ServiceLevel(), screeners=(), **(settings | more),
    )  # fmt: skip


SERVICE = (state("cpu-worker", 400.0), state("cpu-deep", 30.0))


def ledger(*meters: MeterState, **more: Any) -> LedgerSummary:
    return summarise(account(*(meters or SERVICE), **more))


def estimate(value: float, off: float = 0.0) -> Estimate:
    return Estimate(value=value, low=value * (1 - off), high=value * (1 + off))


def call(rows: int, off: float = 0.0, **energy_mj: float) -> CallCost:
    return CallCost(
        rows=rows, calls=1_000, wall_ms=estimate(1.0 + 0.01 * rows), client_cpu_ms=estimate(0.5),
        server_cpu_ms=estimate(0.5),
        energy_mj={name.replace("_", "-"): estimate(value, off) for name, value in energy_mj.items()},
    )  # fmt: skip


def cost(off: float = 0.0, idle_w: float = 0.05, **more: Any) -> DeepCost:
    """A call of 1: 4 + 6 mJ; of 4: 7 + 12 mJ; of 64: 64 + 128 mJ, by client and server."""
    settings: dict[str, Any] = {
        "measured_at": START, "bundle_version": "b-1", "model_sha256": "0" * 64, "backend": "triton",
        "server": "a Triton", "machine": MACHINE, "watts_per_core": WATTS, "rounds": 9, "round_s": 1.0,
        "method": "turns",
        "meters": (
            CostMeter(meter="cpu-worker", kind="modelled", source="CPU", idle_w=estimate(0.0)),
            CostMeter(meter="cpu-deep", kind="modelled", source="CPU", idle_w=estimate(idle_w)),
        ),
        "calls": (
            call(1, off, cpu_worker=4.0, cpu_deep=6.0), call(4, off, cpu_worker=7.0, cpu_deep=12.0),
            call(64, off, cpu_worker=64.0, cpu_deep=128.0),
        ),
    }  # fmt: skip
    return DeepCost(**(settings | more))


# --- the formula ------------------------------------------------------------------------------------------------------


def test_the_figures_are_those_computed_by_hand() -> None:
    found = deep_only(ledger(), cost())
    assert (found.transactions, found.asked, found.limit_ms) == (10_000, 100, 20.0)
    (one,) = found.comparisons
    assert (one.kind, one.meters) == ("modelled", ("cpu-worker", "cpu-deep"))
    assert one.cascade_j == pytest.approx(430.0)
    assert one.screener_j == pytest.approx(20.0)
    # 50 calls of 2 rows: a third of the way from 1 to 4; client 5 mJ, server 8 mJ
    assert one.own_deep_j.value == pytest.approx((30.0 - 0.05 * 100) + 50 * 0.005)
    assert one.own_deep_priced_j is not None
    assert one.own_deep_priced_j.value == pytest.approx(50 * 0.013)
    shared = 430.0 - 20.0 - 25.25
    assert one.shared_j.value == pytest.approx(shared)
    # 100 a second fill one transaction in 20 ms, and no four
    assert one.filled.rows_per_call == 1
    assert one.filled.energy_j.value == pytest.approx(shared + 10_000 * 0.010)
    assert one.as_called is not None
    assert one.as_called.rows_per_call == pytest.approx(2.0)
    whole = shared + 5_000 * 0.013
    assert one.as_called.energy_j.value == pytest.approx(whole)
    assert one.as_called.ratio.value == pytest.approx(whole / 430.0)
    assert one.as_called.saving_j.value == pytest.approx(whole - 430.0)
    assert one.as_called.saving_share.value == pytest.approx(1 - 430.0 / whole)
    assert one.as_called.break_even_share is not None
    assert one.as_called.break_even_share.value == pytest.approx((65.0 - 20.0) / 10_000 / (25.25 / 100))


def test_at_the_break_even_rate_both_cost_the_same() -> None:
    """The cascade again, with as many escalated as the break-even says, each at the cost that it had."""
    (one,) = deep_only(ledger(), cost()).comparisons
    for other in (one.filled, one.as_called):
        assert other is not None
        assert other.break_even_share is not None
        escalated = other.break_even_share.value * 10_000
        cascade_j = one.shared_j.value + one.screener_j + one.own_deep_j.value / 100 * escalated
        assert cascade_j == pytest.approx(other.energy_j.value)


def test_a_stream_that_fills_large_calls_in_time_is_compared_with_large_calls() -> None:
    assert filled_rows(cost(), 100.0, 20.0) == 1
    assert filled_rows(cost(), 1_000.0, 20.0) == 4
    # 63 transactions and a call of 1.64 ms
    assert filled_rows(cost(), 63 / 18.36e-3 * 1.001, 20.0) == 64
    assert filled_rows(cost(), 63 / 18.36e-3 * 0.999, 20.0) == 4
    assert filled_rows(cost(), 1.0, None) == 64
    assert filled_rows(cost(), 1e6, 0.5) == 1


def test_idle_power_of_server_and_reserved_cores_stands_on_both_sides() -> None:
    plain = deep_only(ledger(), cost(idle_w=0.0)).comparisons[0]
    idle = deep_only(ledger(*SERVICE, state("cpu-idle", 1_000.0)), cost(idle_w=0.0)).comparisons[0]
    assert idle.filled.saving_j.value == pytest.approx(plain.filled.saving_j.value)
    assert idle.filled.energy_j.value == pytest.approx(plain.filled.energy_j.value + 1_000.0)
    assert abs(idle.filled.saving_share.value) < abs(plain.filled.saving_share.value)
    more = deep_only(ledger(), cost(idle_w=0.2)).comparisons[0]
    assert more.shared_j.value == pytest.approx(plain.shared_j.value + 20.0)
    all_of_it = deep_only(ledger(), cost(idle_w=7.0)).comparisons[0]
    assert all_of_it.shared_j.value == pytest.approx(plain.shared_j.value + 30.0)


def test_where_deep_only_costs_less_it_is_told() -> None:
    cheap = cost(calls=(call(1, cpu_worker=0.4, cpu_deep=0.6), call(64, cpu_worker=1.0, cpu_deep=2.0)))
    found = deep_only(ledger(), cheap)
    assert found.comparisons[0].filled.saving_j.value < 0
    assert found.comparisons[0].filled.saving_share.high < 0
    assert "deep-only would have cost LESS (modelled)" in shown(found)


def test_a_stream_without_a_deep_call_has_no_size_of_its_own_and_no_break_even() -> None:
    quiet = account(*SERVICE, calls=0)
    for path in ("escalated", "degraded"):
        quiet.counters.paths[path] = type(quiet.counters.paths[path])()  # type: ignore[index]
    (one,) = deep_only(summarise(quiet), cost()).comparisons
    assert one.as_called is None
    assert one.own_deep_priced_j is None
    assert one.filled.break_even_share is None
    assert one.filled.energy_j.value == pytest.approx(430.0 - 20.0 - 25.0 + 9_900 * 0.010)


def test_measured_and_modelled_are_compared_apart_and_a_machines_counter_not_at_all() -> None:
    meters = (
        *cost().meters,
        CostMeter(meter="gpu0", kind="measured", source=GPU, idle_w=estimate(50.0)),
        CostMeter(meter="rapl", kind="measured", source="RAPL", idle_w=estimate(30.0)),
    )
    calls = tuple(
        msgspec.structs.replace(one, energy_mj=one.energy_mj | {"gpu0": estimate(gpu), "rapl": estimate(9.0)})
        for one, gpu in zip(cost().calls, (60.0, 90.0, 600.0), strict=True)
    )
    gpu = state("gpu0", 5_600.0, "measured", GPU)
    found = deep_only(ledger(*SERVICE, gpu, state("rapl", 9e9, "measured")), cost(meters=meters, calls=calls))
    modelled, measured = found.comparisons
    assert modelled == deep_only(ledger(), cost()).comparisons[0]
    assert found.undivided == ("rapl",)
    assert (measured.kind, measured.meters, measured.cascade_j, measured.screener_j) == (
        "measured",
        ("gpu0",),
        5_600.0,
        0,
    )
    assert measured.own_deep_j.value == pytest.approx(600.0)
    assert measured.filled.energy_j.value == pytest.approx(5_000.0 + 10_000 * 0.060)
    assert measured.filled.break_even_share is not None
    assert measured.filled.break_even_share.value == pytest.approx(0.01)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_ends_of_the_saving_are_the_measured_ends_each_at_its_worse_side() -> None:
    (one,) = deep_only(ledger(), cost(off=0.1)).comparisons
    # up: calls of all, less the client's part of the cascade's own of 1; down: of 4, where nothing is put on
    client_of_1 = 10_000 - 50 * 2 / 3
    assert one.filled.energy_j.high == pytest.approx(
        385.0 + (client_of_1 * 4.0 + 10_000 * 6.0) * 1.1e-3 - 50 / 3 * 7.0 * 0.9e-3
    )
    assert one.filled.energy_j.low == pytest.approx(
        385.0 + (client_of_1 * 4.0 + 10_000 * 6.0) * 0.9e-3 - 50 / 3 * 7.0 * 1.1e-3
    )
    assert one.filled.energy_j.low < one.filled.energy_j.value < one.filled.energy_j.high
    assert one.filled.saving_share.low < one.filled.saving_share.value < one.filled.saving_share.high
    even = one.filled.break_even_share
    assert even is not None
    assert even.low < even.value < even.high


def test_what_cancels_leaves_no_uncertainty() -> None:
    """Everything asked, in calls of one, by a client alone: deep-only is the cascade without its screener."""
    alone = cost(
        off=0.5, backend="onnxruntime", meters=(cost().meters[0],),
        calls=(call(1, 0.5, cpu_worker=4.0), call(64, 0.5, cpu_worker=64.0)),
    )  # fmt: skip
    found = deep_only(
        ledger(state("cpu-worker", 400.0), deep_backends=("onnxruntime",), calls=10_000, rows=10_000), alone
    )
    energy = found.comparisons[0].filled.energy_j
    assert (energy.low, energy.value, energy.high) == pytest.approx((380.0, 380.0, 380.0))


def test_the_interval_of_a_median_holds_the_truth() -> None:
    chance = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        found = median_estimate((10.0 * chance.lognormal(0.0, 0.1, 15)).tolist())
        assert found.low <= found.value <= found.high
        held += found.low <= 10.0 <= found.high
    assert 0.90 <= held / 200 <= 0.99


def test_the_interval_of_the_saving_holds_the_truth_where_calls_are_measured_with_noise() -> None:
    chance = np.random.default_rng(6)
    true = deep_only(ledger(), cost()).comparisons[0]
    assert true.as_called is not None
    held = 0
    for _ in range(200):
        calls = tuple(
            msgspec.structs.replace(
                one, energy_mj={
                    name: median_estimate((energy.value * chance.normal(1.0, 0.1, 15)).tolist())
                    for name, energy in one.energy_mj.items()
                },
            )
            for one in cost().calls
        )  # fmt: skip
        (found,) = deep_only(ledger(), cost(calls=calls)).comparisons
        assert found.as_called is not None
        held += found.as_called.saving_j.low <= true.as_called.saving_j.value <= found.as_called.saving_j.high
    assert held / 200 >= 0.93


# --- refusals ---------------------------------------------------------------------------------------------------------

_other_machine = msgspec.structs.replace(MACHINE, processor="another")
_other_runtime = msgspec.structs.replace(MACHINE, packages=MACHINE.packages | {"onnxruntime": "0.1"})
_one_meter = (cost().meters[0],)


@pytest.mark.parametrize(
    ("told", "priced", "reason"),
    [
        (lambda: ledger(bundle_versions=("b-2",)), cost, r"bundle b-2, the cost .* with b-1"),
        (lambda: ledger(bundle_versions=()), cost, "bundle unknown"),
        (lambda: ledger(deep_backends=("onnxruntime",)), cost, "ran on onnxruntime, .* measured on triton"),
        (lambda: ledger(deep_backends=()), cost, "an unknown backend"),
        (lambda: ledger(machines=(_other_machine,)), cost, "processor .* when measured, another in the ledger"),
        (lambda: ledger(machines=(MACHINE, _other_machine)), cost, "processor"),
        (lambda: ledger(machines=(_other_runtime,)), cost, r"onnxruntime .* when measured, 0\.1 in the ledger"),
        (lambda: ledger(watts_per_core=7.0), cost, "7.0 W per busy core, the cost of a deep call 10 W"),
        (lambda: ledger(state("cpu-worker", 1.0)), cost, "the ledger lacks the meter cpu-deep"),
        (lambda: ledger(*SERVICE, state("gpu0", 1.0, "measured")), cost, "cost of a deep call lacks the meter gpu0"),
        (lambda: ledger(state("cpu-worker", 1.0), state("cpu-deep", 1.0, "measured")), cost,
         "cpu-deep is measured in the ledger and modelled in the cost"),
        (lambda: ledger(SERVICE[0], state("cpu-deep", None)), cost, r"cpu-deep was lost \(no process 7\)"),
        (lambda: ledger(state("rapl", 1.0, "measured")), cost, "no energy that belongs to the service"),
        (lambda: ledger(rows=5_000), cost, r"have 100\.0 transactions each, measured were 1 to 64; .* with --rows"),
        (lambda: ledger(state("cpu-worker", 1.0)),
         lambda: cost(meters=_one_meter, calls=(call(1, cpu_worker=1.0), call(64, cpu_worker=2.0))),
         "no meter sees the Triton"),
        (ledger, lambda: cost(calls=tuple(call(rows, 3.0, cpu_worker=1.0, cpu_deep=1.0) for rows in (1, 4))),
         "not surely above idle"),
    ],
)  # fmt: skip
def test_what_was_not_measured_for_this_service_is_refused_in_a_line(
    told: Callable[[], LedgerSummary], priced: Callable[[], DeepCost], reason: str
) -> None:
    with pytest.raises(CounterfactualError, match=reason) as caught:
        deep_only(told(), priced())
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("deep-only: ")


def test_another_gpu_is_another_machine() -> None:
    meters = (CostMeter(meter="gpu0", kind="measured", source=GPU, idle_w=estimate(50.0)),)
    priced = cost(meters=meters, calls=(call(1, gpu0=60.0), call(4, gpu0=90.0)))
    deep_only(ledger(state("gpu0", 9_000.0, "measured", GPU)), priced)
    with pytest.raises(CounterfactualError, match=r"gpu0 was NVIDIA H100 \(GPU-1\) when measured"):
        deep_only(ledger(state("gpu0", 9_000.0, "measured", GPU.replace("GPU-1", "GPU-2"))), priced)


def test_an_empty_ledger_is_refused() -> None:
    empty = msgspec.structs.replace(account(*SERVICE), counters=Counters.empty())
    with pytest.raises(CounterfactualError, match="no transaction"):
        deep_only(summarise(empty), cost())


# --- files and tables -------------------------------------------------------------------------------------------------


def test_a_cost_comes_back_from_its_file_and_nothing_else_is_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    content = msgspec.json.encode(cost(off=0.1))
    path.write_bytes(content)
    assert DeepCost.read(path) == cost(off=0.1)
    for wrong in (
        b"{}",
        content.replace(b'"format":1', b'"format":9'),
        content[:-1],
        content.replace(b'"rows":4', b'"rows":64'),
    ):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=r"cost\.json: (not written|format 9)"):
            DeepCost.read(path)
    with pytest.raises(DataError, match="bench deep-calls"):
        DeepCost.read(tmp_path / "absent.json")


def shown(found: Counterfactual) -> str:
    console = Console(file=io.StringIO(), width=80, record=True)
    render(msgspec.structs.replace(ledger(), counterfactual=found), console)
    return console.export_text()


def test_the_table_fits_eighty_columns_and_says_how_it_came_about() -> None:
    text = shown(deep_only(ledger(), cost(off=0.1)))
    assert "Deep-only for the same 10,000 transactions" in text
    assert "the cascade saves" in text
    assert "25.2 J by its meters, 0.650 J at a call's cost (modelled)" in " ".join(text.split())
    assert "…" not in text
    assert "no difference is shown" in shown(deep_only(ledger(), cost(off=0.6)))


def test_merge_shows_it_and_keeps_it_in_its_json(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    path = tmp_path / "cost.json"
    path.write_bytes(msgspec.json.encode(cost()))
    journal = Journal(tmp_path / "ledger", lambda: account(*SERVICE), file_bytes_max=10**9, files_max=10)
    journal.close()
    assert main(["ledger", "merge", str(tmp_path / "ledger"), "--deep-cost", str(path), "--json"]) == 0
    summary = LedgerSummary.from_json_line(capfdbinary.readouterr().out)
    assert summary.counterfactual == deep_only(ledger(), cost())
    assert main(["ledger", "merge", str(tmp_path / "ledger"), "--deep-cost", str(path)]) == 0
    assert b"Deep-only for the same" in capfdbinary.readouterr().out
    path.write_bytes(msgspec.json.encode(cost(bundle_version="b-9")))
    assert main(["ledger", "merge", str(tmp_path / "ledger"), "--deep-cost", str(path)]) == 1
    told = capfdbinary.readouterr().err
    assert b"deep-only: the ledger is of bundle b-1" in told
    assert b"Traceback" not in told


def test_the_backends_of_merged_ledgers_are_all_told() -> None:
    merged = merge_accounts([account(), account(deep_backends=("onnxruntime",))])
    assert summarise(merged).deep_backend == "onnxruntime, triton"
