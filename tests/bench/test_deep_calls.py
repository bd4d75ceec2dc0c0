"""The cost of a deep call: the arithmetic by hand, a GPU's trace recorded and played back, and a short real run."""

from __future__ import annotations

import io
import math
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from bench.deep_calls import (
    DeepCallsReport,
    Load,
    Turn,
    by_power,
    call_cost,
    checked_sizes,
    configured,
    embedded,
    run_deep_calls,
    show_deep_calls,
)
from bench.gpu_trace import GpuTrace, RecordedGpu
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.cli import main
from cascade.config import BundleSettings, Config, DeepSettings
from cascade.errors import CascadeError, ModelServerError
from cascade.ledger.deep_cost import DeepCost
from cascade.ledger.nvml import nvml_meters
from tests.recorded_nvml import RecordedNvml
from tests.timing import SetClock


def shown(report: DeepCallsReport) -> str:
    console = Console(file=io.StringIO(), width=80, record=True)
    show_deep_calls(report, console)
    text = console.export_text()
    assert "…" not in text
    return text


# --- arithmetic -------------------------------------------------------------------------------------------------------


def turn(calls: int, wall_s: float, energy_j: dict[str, float]) -> Turn:
    return Turn(load=Load("fp32", 8) if calls else None, start_s=0.0, calls=calls, wall_s=wall_s, energy_j=energy_j)


def test_a_calls_joules_are_those_above_the_idle_turn_of_the_same_round() -> None:
    turns = [turn(100, 2.0, {"cpu-worker": 1.0, "cpu-deep": 3.0, "gpu0": 130.0})] * 5
    idle = [turn(0, 4.0, {"cpu-worker": 0.0, "cpu-deep": 2.0, "gpu0": 240.0})] * 5
    found = call_cost(8, turns, idle, 10.0)
    assert (found.rows, found.calls, found.wall_ms.value) == (8, 500, pytest.approx(20.0))
    assert {name: estimate.value for name, estimate in found.energy_mj.items()} == pytest.approx(
        {"cpu-worker": 10.0, "cpu-deep": 20.0, "gpu0": 100.0}
    )
    assert found.client_cpu_ms.value == pytest.approx(1.0)
    assert found.server_cpu_ms is not None
    assert found.server_cpu_ms.value == pytest.approx(2.0)


def test_without_a_server_process_there_is_no_server_cpu_time() -> None:
    busy = turn(10, 1.0, {"cpu-worker": 1.0})
    assert call_cost(1, [busy] * 5, [turn(0, 1.0, {"cpu-worker": 0.0})] * 5, 10.0).server_cpu_ms is None


def test_a_drift_that_idle_turns_share_is_subtracted_and_the_interval_covers_the_truth() -> None:
    chance = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        drift_w = 50.0 + 10.0 * np.arange(15)
        calls = [turn(100, 2.0, {"cpu-worker": 2.0 * watts + 5.0 + chance.normal(0, 0.5)}) for watts in drift_w]
        idle = [turn(0, 2.0, {"cpu-worker": 2.0 * watts}) for watts in drift_w]
        found = call_cost(1, calls, idle, 10.0).energy_mj["cpu-worker"]
        covered += found.low <= 50.0 <= found.high
    assert covered >= 88


# --- a GPU's trace ----------------------------------------------------------------------------------------------------


def test_a_trace_plays_back_what_was_recorded() -> None:
    clock = SetClock()
    time_s, energy_mj, power_mw = (0.0, 1.0, 2.0, 3.0), (0, 90_000, 250_000, 300_000), (90_000, 160_000, 50_000, 50_000)
    gpu = RecordedGpu(uuid="GPU-1", name="NVIDIA H100", time_s=time_s, energy_mj=energy_mj, power_mw=power_mw)
    trace = GpuTrace(
        RecordedNvml([gpu, msgspec.structs.replace(gpu, uuid="GPU-2", power_mw=None)], clock.time), clock.time
    )
    assert trace.gpus == 2
    for second in range(4):
        clock.now_s = float(second)
        trace.sample()
    first, second_gpu = trace.recorded()
    assert first == gpu
    assert second_gpu.power_mw is None
    again = msgspec.json.decode(msgspec.json.encode(trace.recorded()), type=tuple[RecordedGpu, ...])
    (meter, _) = nvml_meters(RecordedNvml(again, clock.time), clock.time)
    clock.now_s += 3.0
    assert meter.read().energy_j == pytest.approx(300.0)


def test_without_a_driver_there_is_nothing_to_record() -> None:
    trace = GpuTrace(RecordedNvml([]))
    trace.sample()
    assert trace.gpus == 0
    assert trace.recorded() == ()


# --- a real GPU's trace -----------------------------------------------------------------------------------------------

# NVIDIA H200, FP32 and FP16 by turns: the files of `cascade bench deep-calls --backend onnxruntime --device cuda
# --precision fp32 --precision fp16 --rows 1 --rows 8 --rows 64 --rounds 8`, without the card's UUID and kernel's build.
H200 = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def h200() -> DeepCallsReport:
    return DeepCallsReport(
        costs=(DeepCost.read(H200 / "h200.json"), DeepCost.read(H200 / "h200.fp16.json")),
        turns=msgspec.json.decode((H200 / "h200.turns.json").read_bytes(), type=tuple[Turn, ...]),
        trace=msgspec.json.decode((H200 / "h200.nvml.json").read_bytes(), type=tuple[RecordedGpu, ...]),
    )


def test_a_real_counter_and_its_integrated_power_agree(h200: DeepCallsReport) -> None:
    clock = SetClock()
    (meter,) = nvml_meters(RecordedNvml(h200.trace, clock.time), clock.time)
    for time_s in h200.trace[0].time_s:
        clock.now_s = time_s
        reading = meter.read()
    assert (reading.kind, reading.source) == ("measured", f"NVML total energy of NVIDIA H200 ({meter.uuid})")
    assert reading.energy_j == pytest.approx(34_769.5, abs=0.1)
    assert reading.check_j == pytest.approx(reading.energy_j, rel=0.002)


def test_the_joules_a_call_of_a_real_gpu_follow_from_its_turns(h200: DeepCallsReport) -> None:
    idle = [turn for turn in h200.turns if turn.load is None]
    for cost in h200.costs:
        for call in cost.calls:
            turns = [turn for turn in h200.turns if turn.load == (cost.precision, call.rows)]
            assert call_cost(call.rows, turns, idle, cost.watts_per_core) == call


def test_a_real_gpus_power_gives_the_counters_joules_a_call_within_its_step(h200: DeepCallsReport) -> None:
    for cost in h200.costs:
        (checks,) = by_power(h200, cost.precision).values()
        for call in cost.calls:
            counted, checked = call.energy_mj["gpu0"], checks[call.rows]
            assert checked.value == pytest.approx(counted.value, abs=0.35)
            assert checked.high - checked.low < 2.0
    full, half = (cost.calls[-1].energy_mj["gpu0"] for cost in h200.costs)
    assert half.high < full.low  # 64 rows: FP16 takes less


def test_on_a_whole_gpu_idle_is_nearly_everything(h200: DeepCallsReport) -> None:
    cost = h200.costs[0]
    (gpu,) = (meter for meter in cost.meters if meter.meter == "gpu0")
    for call in cost.calls:
        idle_mj = gpu.idle_w.value * call.wall_ms.value
        assert call.energy_mj["gpu0"].value < 0.03 * idle_mj
    text = shown(h200)
    assert "gpu0 123 W (measured)" in text
    assert "gpu0 by its power, integrated, mJ: 1: 0.277" in text


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--rows", "8"], "add --rows 1"),
        (["--rows", "1", "--rows", "257"], "--rows 257: use sizes of 1 to 256"),
        (["--backend", "tensorrt"], "use triton or onnxruntime"),
        (["--device", "tpu"], "use cpu or cuda"),
        (["--device", "cuda"], "the embedded Triton has no GPU"),
        (["--precision", "fp8"], "use fp32 or fp16"),
        (["--precision", "fp16"], "add --backend onnxruntime --device cuda"),
        (["--config", "absent.toml", "--precision", "fp32"], "--precision beside --config"),
        (["--config", "absent.toml", "--backend", "triton"], "--backend beside --config"),
        (["--bundle", "absent"], "cascade train"),
    ],
)
def test_what_cannot_be_measured_is_an_error_of_a_line(
    arguments: list[str], reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status = main(["bench", "deep-calls", "--out", str(tmp_path / "out"), *arguments])
    error = capfd.readouterr().err
    assert status == 1
    assert reason in error
    assert "Traceback" not in error


def test_a_model_server_on_another_machine_is_not_measured() -> None:
    remote = Config(bundle=BundleSettings(path=str(SHIPPED_BUNDLE)), deep=DeepSettings(url="triton.example:8001"))
    with pytest.raises(ModelServerError, match="no process of this machine listens there"):
        configured(remote)


def test_too_few_rounds_for_an_interval_are_refused() -> None:
    with pytest.raises(CascadeError, match="--rounds 4: an interval needs 5 or more"):
        checked_sizes([1, 8], 4)


# --- real runs --------------------------------------------------------------------------------------------------------


def check(cost: DeepCost, rows: tuple[int, ...]) -> None:
    assert cost.rows == rows
    per_row_ms = [
        (call.client_cpu_ms.value + (0.0 if call.server_cpu_ms is None else call.server_cpu_ms.value)) / call.rows
        for call in cost.calls
    ]
    assert all(later < earlier for earlier, later in pairwise(per_row_ms)), per_row_ms
    # 3.9 to 5.2 times in process on an Intel Xeon, more on an AMD EPYC
    assert per_row_ms[-1] < per_row_ms[0] / 3
    for call in cost.calls:
        modelled_j = sum(call.energy_mj[name].value for name in ("cpu-worker", "cpu-deep") if name in call.energy_mj)
        assert math.isclose(modelled_j, 7.0 * per_row_ms[rows.index(call.rows)] * call.rows, rel_tol=1e-6)
        assert call.calls >= 5
    # an idle server uses next to no CPU time
    assert all(abs(meter.idle_w.value) < 0.5 for meter in cost.meters if meter.kind == "modelled")


# Triton 2.51 can crash where a connection closes at the moment of an answer (decision 0003).
@pytest.mark.long
@pytest.mark.triton
def test_on_a_real_triton_a_row_costs_less_cpu_time_in_fuller_calls(triton_parts: Path, tmp_path: Path) -> None:
    del triton_parts
    path = tmp_path / "cost.json"
    arguments = ["--rows", "1", "--rows", "8", "--rows", "64", "--rounds", "5", "--seconds", "0.5"]
    assert main(["bench", "deep-calls", *arguments, "--out", str(tmp_path / "out"), "--json", str(path)]) == 0
    cost = DeepCost.read(path)
    check(cost, (1, 8, 64))
    assert (cost.backend, cost.bundle_version) == ("triton", load_bundle(SHIPPED_BUNDLE).version)
    assert {meter.meter for meter in cost.meters} >= {"cpu-worker", "cpu-deep"}
    assert "the embedded Triton" in shown(DeepCallsReport(costs=(cost,), turns=(), trace=()))


def test_in_process_all_cpu_time_is_the_clients(tmp_path: Path) -> None:
    with embedded(SHIPPED_BUNDLE, DeepSettings(backend="onnxruntime"), ["fp32"], 7.0, tmp_path) as served:
        report = run_deep_calls(served, [64, 8, 1, 8], 5, 0.1, 1, lambda step, share: None)
    (cost,) = report.costs
    check(cost, (1, 8, 64))
    assert cost.scores_apart == 0.0
    assert all(call.server_cpu_ms is None for call in cost.calls)
    assert [meter.meter for meter in cost.meters if meter.kind == "modelled"] == ["cpu-worker"]
