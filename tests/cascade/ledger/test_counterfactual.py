"""Deep-only against the cascade: the formula by hand, each refusal, and the coverage of the intervals."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cascade.cli import main
from cascade.errors import DataError
from cascade.ledger import Account, Journal, LedgerSummary, ServiceLevel, deep_cost, merge_accounts, summarise
from cascade.ledger.account import MeterState
from cascade.ledger.counterfactual import deep_only, filled_rows
from cascade.ledger.counters import Counters
from cascade.ledger.deep_cost import CallCost, CostMeter, DeepCost, Estimate, median_estimate
from cascade.ledger.errors import CounterfactualError
from cascade.ledger.machine import describe_machine
from cascade.ledger.summary import Counterfactual
from cascade.protocols import EnergyKind
from tests.cascade.ledger.helpers import rendered

START = datetime(2026, 11, 25, tzinfo=UTC)
MACHINE = describe_machine()
WATTS, SECONDS = 10.0, 100.0
GPU = "NVML total energy of NVIDIA H100 (GPU-1)"


def state(meter: str, energy_j: float | None, kind: str = "modelled", source: str = "CPU") -> MeterState:
    return MeterState(meter, kind, (source,), energy_j, None if energy_j is not None else "no process 7")  # type: ignore[arg-type]


def account(*meters: MeterState, calls: int = 50, rows: int = 100, **more: Any) -> Account:
    """100 seconds: 9,900 screened, 80 escalated, 20 degraded and 5 repeated decisions; 20 J of screening."""
    counters = Counters.empty()
    for path, count in (("screened", 9_900), ("escalated", 80), ("degraded", 20), ("duplicate", 5)):
        counters.paths[path].record(np.full(count, 1e-3))  # type: ignore[index]
    counters.stage_cpu_s |= {"decode": 10.0, "features": 8.0, "screener": 2.0, "produce": 5.0}
    if calls:
        counters.deep_calls.record_many(2e-3, calls)
    counters.deep_rows = rows if calls else 0
    settings: dict[str, Any] = {
        "started": START,
        "ended": START + timedelta(seconds=SECONDS),
        "service_level": ServiceLevel(),
        "bundle_versions": ("b-1",),
        "screeners": (),
        "deep_backends": ("triton",),
        "machines": (MACHINE,),
        "watts_per_core": WATTS,
    }
    return Account(counters=counters, meters=meters, **(settings | more))


SERVICE = (state("cpu-worker", 400.0), state("cpu-deep", 30.0))


def ledger(*meters: MeterState, **more: Any) -> LedgerSummary:
    return summarise(account(*(meters or SERVICE), **more))


def estimate(value: float, off: float = 0.0) -> Estimate:
    return Estimate(value, value * (1 - off), value * (1 + off))


def call(rows: int, off: float = 0.0, **energy_mj: float) -> CallCost:
    by_meter = {name.replace("_", "-"): estimate(value, off) for name, value in energy_mj.items()}
    wall_ms, cpu_ms = estimate(1.0 + 0.01 * rows), estimate(1.0 + 0.01 * rows)
    return CallCost(
        rows=rows, calls=1_000, wall_ms=wall_ms, client_cpu_ms=cpu_ms, server_cpu_ms=cpu_ms, energy_mj=by_meter
    )


def cost_meter(meter: str, kind: EnergyKind, source: str, idle_w: float) -> CostMeter:
    return CostMeter(meter=meter, kind=kind, source=source, idle_w=estimate(idle_w))


def cost(off: float = 0.0, idle_w: float = 0.05, **more: Any) -> DeepCost:
    """Calls of 1, 4 and 64 rows, in mJ by client and server; `off`: half of their intervals, as a share."""
    settings: dict[str, Any] = {
        "measured_at": START,
        "bundle_version": "b-1",
        "model_sha256": "0" * 64,
        "backend": "triton",
        "server": "a Triton",
        "machine": MACHINE,
        "watts_per_core": WATTS,
        "rounds": 9,
        "round_s": 1.0,
        "method": "turns",
        "meters": (
            cost_meter("cpu-worker", "modelled", "CPU", 0.0),
            cost_meter("cpu-deep", "modelled", "CPU", idle_w),
        ),
        "calls": (
            call(1, off, cpu_worker=4.0, cpu_deep=6.0),
            call(4, off, cpu_worker=7.0, cpu_deep=12.0),
            call(64, off, cpu_worker=64.0, cpu_deep=128.0),
        ),
    }
    return DeepCost(**(settings | more))


# --- the formula ------------------------------------------------------------------------------------------------------


def test_the_figures_equal_those_computed_by_hand() -> None:
    found = deep_only(ledger(), cost())
    assert (found.transactions, found.asked, found.limit_ms) == (10_000, 100, 20.0)
    (comparison,) = found.comparisons
    assert (comparison.kind, comparison.meters) == ("modelled", ("cpu-worker", "cpu-deep"))
    assert comparison.cascade_j == pytest.approx(430.0)
    assert comparison.screener_j == pytest.approx(20.0)
    # 50 calls of 2 rows, a third of the way from 1 to 4: client 5 mJ, server 8 mJ
    assert comparison.own_deep_j.value == pytest.approx((30.0 - 0.05 * 100) + 50 * 0.005)
    assert comparison.own_deep_priced_j is not None
    assert comparison.own_deep_priced_j.value == pytest.approx(50 * 0.013)
    shared_j = 430.0 - 20.0 - 25.25
    assert comparison.shared_j.value == pytest.approx(shared_j)
    # at 100 transactions per second, a call of 1 row fills within 20 ms, and a call of 4 does not
    assert comparison.filled.rows_per_call == 1
    assert comparison.filled.energy_j.value == pytest.approx(shared_j + 10_000 * 0.010)
    as_called = comparison.as_called
    assert as_called is not None
    assert as_called.rows_per_call == pytest.approx(2.0)
    whole_j = shared_j + 5_000 * 0.013
    assert as_called.energy_j.value == pytest.approx(whole_j)
    assert as_called.ratio.value == pytest.approx(whole_j / 430.0)
    assert as_called.saving_j.value == pytest.approx(whole_j - 430.0)
    assert as_called.saving_share.value == pytest.approx(1 - 430.0 / whole_j)
    assert as_called.break_even_share is not None
    assert as_called.break_even_share.value == pytest.approx((65.0 - 20.0) / 10_000 / (25.25 / 100))


def test_at_the_break_even_rate_both_use_the_same_energy() -> None:
    """Computes the cascade again at the break-even rate, with the same energy for each escalated transaction."""
    (comparison,) = deep_only(ledger(), cost()).comparisons
    for other in (comparison.filled, comparison.as_called):
        assert other is not None
        assert other.break_even_share is not None
        escalated = other.break_even_share.value * 10_000
        deep_j = comparison.own_deep_j.value / 100 * escalated
        assert comparison.shared_j.value + comparison.screener_j + deep_j == pytest.approx(other.energy_j.value)


def test_a_fast_stream_is_compared_with_large_calls() -> None:
    assert filled_rows(cost(), 100.0, 20.0) == 1
    assert filled_rows(cost(), 1_000.0, 20.0) == 4
    # 63 transactions and a call of 1.64 ms
    assert filled_rows(cost(), 63 / 18.36e-3 * 1.001, 20.0) == 64
    assert filled_rows(cost(), 63 / 18.36e-3 * 0.999, 20.0) == 4
    assert filled_rows(cost(), 1.0, None) == 64
    # no call answers within the limit, so that the size is chosen in deep-only's favour
    assert filled_rows(cost(), 1e6, 0.5) == 64
    assert filled_rows(cost(), 3.5 / 0.5e-3, 0.5) == 4


def test_a_busy_machine_does_not_make_deep_only_call_single_rows() -> None:
    """A call that waits 30 ms for a core would miss the limit of 20 ms at every size."""
    waiting = tuple(msgspec.structs.replace(call, wall_ms=estimate(30.0 + call.rows)) for call in cost().calls)
    busy = cost(calls=waiting)
    # fills in 15.8 ms, and takes 3.28 ms of CPU
    assert filled_rows(busy, 4_000.0, 20.0) == 64
    # fills in 18 ms: 3.28 ms of CPU are too much, those of 4 rows are not
    assert filled_rows(busy, 3_500.0, 20.0) == 4


def test_idle_power_of_server_and_reserved_cores_is_on_both_sides() -> None:
    plain = deep_only(ledger(), cost(idle_w=0.0)).comparisons[0]
    idle = deep_only(ledger(*SERVICE, state("cpu-idle", 1_000.0)), cost(idle_w=0.0)).comparisons[0]
    assert idle.filled.saving_j.value == pytest.approx(plain.filled.saving_j.value)
    assert idle.filled.energy_j.value == pytest.approx(plain.filled.energy_j.value + 1_000.0)
    assert abs(idle.filled.saving_share.value) < abs(plain.filled.saving_share.value)
    more = deep_only(ledger(), cost(idle_w=0.2)).comparisons[0]
    assert more.shared_j.value == pytest.approx(plain.shared_j.value + 20.0)
    all_of_it = deep_only(ledger(), cost(idle_w=7.0)).comparisons[0]
    assert all_of_it.shared_j.value == pytest.approx(plain.shared_j.value + 30.0)


def test_the_table_shows_that_deep_only_uses_less() -> None:
    cheap = cost(calls=(call(1, cpu_worker=0.4, cpu_deep=0.6), call(64, cpu_worker=1.0, cpu_deep=2.0)))
    found = deep_only(ledger(), cheap)
    assert found.comparisons[0].filled.saving_j.value < 0
    assert found.comparisons[0].filled.saving_share.high < 0
    assert "deep-only would have used less energy (modelled)" in shown(found)


def test_a_stream_without_a_deep_call_has_no_calls_of_its_own_and_no_break_even() -> None:
    quiet = account(*SERVICE, calls=0)
    for path in ("escalated", "degraded"):
        quiet.counters.paths[path] = type(quiet.counters.paths[path])()  # type: ignore[index]
    (comparison,) = deep_only(summarise(quiet), cost()).comparisons
    assert comparison.as_called is None
    assert comparison.own_deep_priced_j is None
    assert comparison.filled.break_even_share is None
    assert comparison.filled.energy_j.value == pytest.approx(430.0 - 20.0 - 25.0 + 9_900 * 0.010)


def test_each_kind_is_compared_separately_and_a_counter_of_the_machine_not_at_all() -> None:
    meters = (
        *cost().meters,
        cost_meter("gpu0", "measured", GPU, 50.0),
        cost_meter("rapl", "measured", "RAPL", 30.0),
    )
    calls = tuple(
        msgspec.structs.replace(cheap, energy_mj=cheap.energy_mj | {"gpu0": estimate(gpu), "rapl": estimate(9.0)})
        for cheap, gpu in zip(cost().calls, (60.0, 90.0, 600.0), strict=True)
    )
    gpu = state("gpu0", 5_600.0, "measured", GPU)
    found = deep_only(ledger(*SERVICE, gpu, state("rapl", 9e9, "measured")), cost(meters=meters, calls=calls))
    modelled, measured = found.comparisons
    assert modelled == deep_only(ledger(), cost()).comparisons[0]
    assert found.undivided == ("rapl",)
    assert (measured.kind, measured.meters) == ("measured", ("gpu0",))
    assert (measured.cascade_j, measured.screener_j) == (5_600.0, 0)
    assert measured.own_deep_j.value == pytest.approx(600.0)
    assert measured.filled.energy_j.value == pytest.approx(5_000.0 + 10_000 * 0.060)
    assert measured.filled.break_even_share is not None
    assert measured.filled.break_even_share.value == pytest.approx(0.01)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_an_interval_combines_the_less_favourable_ends_of_the_measured_intervals() -> None:
    filled = deep_only(ledger(), cost(off=0.1)).comparisons[0].filled
    # deep-only adds calls of 1 row, and saves the client's part of the cascade's own calls, of 1 and of 4 rows
    client_of_1 = 10_000 - 50 * 2 / 3
    added_mj, saved_mj = client_of_1 * 4.0 + 10_000 * 6.0, 50 / 3 * 7.0
    assert filled.energy_j.high == pytest.approx(385.0 + added_mj * 1.1e-3 - saved_mj * 0.9e-3)
    assert filled.energy_j.low == pytest.approx(385.0 + added_mj * 0.9e-3 - saved_mj * 1.1e-3)
    assert filled.break_even_share is not None
    for found in (filled.energy_j, filled.saving_share, filled.break_even_share):
        assert found.low < found.value < found.high


def test_calls_that_cancel_leave_no_uncertainty() -> None:
    """If every transaction is escalated alone, without a server, deep-only is the cascade without its screener."""
    calls = (call(1, 0.5, cpu_worker=4.0), call(64, 0.5, cpu_worker=64.0))
    alone = cost(backend="onnxruntime", meters=(cost().meters[0],), calls=calls)
    service = {"deep_backends": ("onnxruntime",), "calls": 10_000, "rows": 10_000}
    found = deep_only(ledger(state("cpu-worker", 400.0), **service), alone)
    energy = found.comparisons[0].filled.energy_j
    assert (energy.low, energy.value, energy.high) == pytest.approx((380.0, 380.0, 380.0))


def test_the_interval_of_a_median_contains_the_true_median() -> None:
    chance = np.random.default_rng(5)
    contained = 0
    for _ in range(200):
        found = median_estimate((10.0 * chance.lognormal(0.0, 0.1, 15)).tolist())
        assert found.low <= found.value <= found.high
        contained += found.low <= 10.0 <= found.high
    assert 0.90 <= contained / 200 <= 0.99


def test_the_interval_of_the_saving_contains_the_true_saving_of_noisy_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_cost, "RESAMPLES", 500)
    chance = np.random.default_rng(6)
    true = deep_only(ledger(), cost()).comparisons[0]
    assert true.as_called is not None
    contained = 0
    for _ in range(200):
        calls = []
        for exact in cost().calls:
            noisy = {name: mj.value * chance.normal(1.0, 0.1, 15) for name, mj in exact.energy_mj.items()}
            energy_mj = {name: median_estimate(rounds.tolist()) for name, rounds in noisy.items()}
            calls.append(msgspec.structs.replace(exact, energy_mj=energy_mj))
        (found,) = deep_only(ledger(), cost(calls=tuple(calls))).comparisons
        assert found.as_called is not None
        contained += found.as_called.saving_j.low <= true.as_called.saving_j.value <= found.as_called.saving_j.high
    assert contained / 200 >= 0.93


# --- refusals ---------------------------------------------------------------------------------------------------------

_other_machine = msgspec.structs.replace(MACHINE, processor="another")
_other_runtime = msgspec.structs.replace(MACHINE, packages=MACHINE.packages | {"onnxruntime": "0.1"})
_worker_only = (cost().meters[0],)


@pytest.mark.parametrize(
    ("make_ledger", "make_cost", "reason"),
    [
        (lambda: ledger(bundle_versions=("b-2",)), cost, r"bundle b-2, but the cost .* with b-1"),
        (lambda: ledger(bundle_versions=()), cost, "bundle unknown"),
        (lambda: ledger(deep_backends=("onnxruntime",)), cost, "ran on onnxruntime, but .* measured on triton"),
        (lambda: ledger(deep_backends=()), cost, "an unknown backend"),
        (lambda: ledger(machines=(_other_machine,)), cost, "processor .* when measured, another in the ledger"),
        (lambda: ledger(machines=(MACHINE, _other_machine)), cost, "processor"),
        (lambda: ledger(machines=(_other_runtime,)), cost, r"onnxruntime .* when measured, 0\.1 in the ledger"),
        (lambda: ledger(watts_per_core=7.0), cost, "7.0 W per busy core, the cost of a deep call 10 W"),
        (lambda: ledger(state("cpu-worker", 1.0)), cost, "the ledger lacks the meter cpu-deep"),
        (lambda: ledger(*SERVICE, state("gpu0", 1.0, "measured")), cost, "cost of a deep call lacks the meter gpu0"),
        (
            lambda: ledger(state("cpu-worker", 1.0), state("cpu-deep", 1.0, "measured")),
            cost,
            "cpu-deep is measured in the ledger and modelled in the cost",
        ),
        (lambda: ledger(SERVICE[0], state("cpu-deep", None)), cost, r"cpu-deep was lost \(no process 7\)"),
        (lambda: ledger(state("rapl", 1.0, "measured")), cost, "no energy of the service alone"),
        (lambda: ledger(rows=5_000), cost, r"have 100\.0 transactions each, but calls of 1 to 64 .* with --rows"),
        (
            lambda: ledger(state("cpu-worker", 1.0)),
            lambda: cost(meters=_worker_only, calls=(call(1, cpu_worker=1.0), call(64, cpu_worker=2.0))),
            "no meter measures the Triton",
        ),
        (
            ledger,
            lambda: cost(calls=tuple(call(rows, 3.0, cpu_worker=1.0, cpu_deep=1.0) for rows in (1, 4))),
            "do not show that a deep call needs more than idle",
        ),
        (
            lambda: summarise(msgspec.structs.replace(account(*SERVICE), counters=Counters.empty())),
            cost,
            "no transaction",
        ),
    ],
)
def test_a_cost_that_was_measured_for_another_service_is_refused_in_one_line(
    make_ledger: Callable[[], LedgerSummary], make_cost: Callable[[], DeepCost], reason: str
) -> None:
    with pytest.raises(CounterfactualError, match=reason) as caught:
        deep_only(make_ledger(), make_cost())
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("deep-only: ")


def test_another_gpu_is_another_machine() -> None:
    meters = (cost_meter("gpu0", "measured", GPU, 50.0),)
    gpu_cost = cost(meters=meters, calls=(call(1, gpu0=60.0), call(4, gpu0=90.0)))
    deep_only(ledger(state("gpu0", 9_000.0, "measured", GPU)), gpu_cost)
    with pytest.raises(CounterfactualError, match=r"gpu0 was NVIDIA H100 \(GPU-1\) when measured"):
        deep_only(ledger(state("gpu0", 9_000.0, "measured", GPU.replace("GPU-1", "GPU-2"))), gpu_cost)


# --- files and tables -------------------------------------------------------------------------------------------------


def test_a_cost_is_read_from_its_file_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    content = msgspec.json.encode(cost(off=0.1))
    path.write_bytes(content)
    assert DeepCost.read(path) == cost(off=0.1)
    another, twice = content.replace(b'"format":1', b'"format":9'), content.replace(b'"rows":4', b'"rows":64')
    for wrong in (b"{}", another, content[:-1], twice):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=r"cost\.json: (not a file of|format 9)"):
            DeepCost.read(path)
    with pytest.raises(DataError, match="bench deep-calls"):
        DeepCost.read(tmp_path / "absent.json")


def shown(found: Counterfactual) -> str:
    return rendered(msgspec.structs.replace(ledger(), counterfactual=found), width=80)


def test_the_table_fits_eighty_columns_and_has_its_verdict_and_its_method() -> None:
    text = shown(deep_only(ledger(), cost(off=0.1)))
    assert "Deep-only for the same 10,000 transactions" in text
    assert "the cascade saves" in text
    assert "25.2 J by its meters, 0.650 J at a call's cost (modelled)" in " ".join(text.split())
    assert "…" not in text
    assert "no difference is shown" in shown(deep_only(ledger(), cost(off=0.6)))


def test_merge_has_the_comparison_in_its_table_and_in_json(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
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
    error = capfdbinary.readouterr().err
    assert b"deep-only: the ledger has bundle b-1" in error
    assert b"Traceback" not in error


def test_a_merged_ledger_has_the_backends_of_all_ledgers() -> None:
    merged = merge_accounts([account(), account(deep_backends=("onnxruntime",))])
    assert summarise(merged).deep_backend == "onnxruntime, triton"
