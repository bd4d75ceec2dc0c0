"""Energy meters: wrap-around, permissions, lost counters and fallbacks. An absent counter never reads zero."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench.gpu_trace import RecordedGpu
from cascade.config import EnergySettings
from cascade.errors import SettingError
from cascade.ledger import (
    CpuIdleMeter,
    CpuModelMeter,
    EnergySampler,
    MeterError,
    find_meters,
    watts_per_core,
)
from cascade.ledger.nvml import NvmlMeter, nvml_meters
from cascade.ledger.rapl import RaplMeter
from tests.cascade.ledger.helpers import ManualClock
from tests.recorded_nvml import RecordedNvml

A100 = "NVIDIA A100-SXM4-40GB"


def _zone(root: Path, zone: str, name: str, energy_uj: int, range_uj: int | None = 1_000_000_000) -> Path:
    path = root / zone
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    if range_uj is not None:
        (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return path


def test_rapl_adds_up_packages_and_no_other_domain(tmp_path: Path) -> None:
    zones = [
        _zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000),
        _zone(tmp_path, "intel-rapl:1", "package-1", 7_000_000),
        _zone(tmp_path, "intel-rapl:0:0", "core", 1_000_000),
        _zone(tmp_path, "intel-rapl:2", "psys", 9_000_000),
        _zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000_000),
    ]
    meter = RaplMeter(tmp_path)
    for zone in zones:
        (zone / "energy_uj").write_text("10000000")
    reading = meter.read()
    assert reading.energy_j == pytest.approx(5.0 + 3.0)
    assert reading.kind == "measured"
    assert "package-0" in reading.source
    assert "package-1" in reading.source


@pytest.mark.parametrize(("range_uj", "before_wrap_j"), [(1_000_000_000, 1.0), (None, 0.0)])
def test_rapl_counts_across_a_wrap_from_zero_on_without_a_maximum(
    tmp_path: Path, range_uj: int | None, before_wrap_j: float
) -> None:
    zone = _zone(tmp_path, "intel-rapl:0", "package-0", 999_000_000, range_uj)
    meter = RaplMeter(tmp_path)
    for after_wrap_j in (2.0, 4.0):
        (zone / "energy_uj").write_text(f"{after_wrap_j * 1e6:.0f}")
        reading = meter.read()
        assert reading.energy_j == pytest.approx(before_wrap_j + after_wrap_j)
        assert ("lower bound" in reading.source) == (range_uj is None)


def test_rapl_without_permission_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _zone(tmp_path, "intel-rapl:0", "package-0", 1)
    read_text = Path.read_text

    def refuse(path: Path, *arguments: str, **options: str) -> str:  # as the kernel does, but root may read any file
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(MeterError, match=r"only root may read.*udev"):
        RaplMeter(tmp_path)


def test_a_lost_or_absent_rapl_counter_raises_instead_of_reading_zero(tmp_path: Path) -> None:
    with pytest.raises(MeterError, match="no processor package"):
        RaplMeter(tmp_path)
    zone = _zone(tmp_path, "intel-rapl:0", "package-0", 1)
    meter = RaplMeter(tmp_path)
    (zone / "energy_uj").unlink()
    with pytest.raises(MeterError, match="cannot be read"):
        meter.read()


def _gpu(**changes: object) -> RecordedGpu:
    fields: dict[str, object] = {
        "uuid": "GPU-1",
        "name": A100,
        "time_s": (0.0, 1.0, 2.0, 3.0),
        "energy_mj": (1_000_000, 1_100_000, 1_250_000, 1_300_000),
        "power_mw": (100_000, 150_000, 50_000, 50_000),
    }
    return RecordedGpu(**{**fields, **changes})  # type: ignore[arg-type]


def test_nvml_reads_the_energy_counter_since_construction() -> None:
    clock = ManualClock()
    (meter,) = nvml_meters(RecordedNvml([_gpu()], clock), clock)
    assert meter.read().energy_j == 0.0
    clock.now_s += 2.5
    reading = meter.read()
    assert reading.energy_j == pytest.approx(250.0)
    assert reading.kind == "measured"
    assert "total energy" in reading.source
    assert A100 in reading.source


def test_nvml_without_a_counter_integrates_power() -> None:
    clock = ManualClock()
    (meter,) = nvml_meters(RecordedNvml([_gpu(energy_mj=None)], clock), clock)
    for _ in range(3):
        clock.now_s += 1.0
        reading = meter.read()
    assert reading.energy_j == pytest.approx(125.0 + 100.0 + 50.0)
    assert "power integrated over 4 samples in 3.0 s" in reading.source


def test_a_meter_of_a_lost_gpu_raises_even_after_the_gpu_is_back() -> None:
    clock = ManualClock()
    (meter,) = nvml_meters(RecordedNvml([_gpu(lost_after_s=1.5)], clock), clock)
    clock.now_s += 2.0
    with pytest.raises(MeterError, match="GPU is lost"):
        meter.read()
    clock.now_s -= 2.0
    with pytest.raises(MeterError, match="GPU is lost"):
        meter.read()


def test_an_nvml_counter_that_goes_back_is_lost() -> None:
    clock = ManualClock()
    (meter,) = nvml_meters(RecordedNvml([_gpu(energy_mj=(9_000, 9_500, 10, 20))], clock), clock)
    clock.now_s += 2.0
    with pytest.raises(MeterError, match="driver was reloaded"):
        meter.read()


def test_the_meter_of_a_mig_device_reads_the_whole_gpu_and_names_it() -> None:
    clock = ManualClock()
    nvml = RecordedNvml([_gpu(mig_uuids=("MIG-a", "MIG-b"))], clock)
    meter = NvmlMeter(nvml, "MIG-b", clock=clock)
    clock.now_s += 1.0
    reading = meter.read()
    assert meter.uuid == "GPU-1"
    assert reading.energy_j == pytest.approx(100.0)
    assert "all MIG slices together" in reading.source


def test_a_gpu_without_counter_and_power_has_no_meter() -> None:
    assert nvml_meters(RecordedNvml([_gpu(energy_mj=None, power_mw=None)])) == []
    assert nvml_meters(RecordedNvml([])) == []


def test_pynvml_has_the_functions_that_the_meters_call() -> None:
    pynvml = pytest.importorskip("pynvml")
    used = [name for name in vars(RecordedNvml) if name.startswith("nvml")]
    assert len(used) >= 10
    assert all(hasattr(pynvml, name) for name in [*used, "NVMLError"])


def test_the_cpu_model_is_modelled_and_names_its_inputs() -> None:
    meter = CpuModelMeter([os.getpid()], 10.0)
    spent_s = time.process_time()
    while time.process_time() - spent_s < 0.05:
        pass
    reading = meter.read()
    assert reading.energy_j >= 0.5
    assert reading.kind == "modelled"
    assert "this process" in reading.source
    assert "10 W per busy core" in reading.source


def test_the_cpu_model_counts_another_process_with_its_children_and_raises_after_its_end() -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass\n"
    run = f"subprocess.run([sys.executable, '-c', {spin!r}])"
    code = f"import subprocess, sys; input(); {run}; print('done', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    meter = CpuModelMeter([child.pid], 1.0)
    print(file=child.stdin, flush=True)  # the work begins after the meter, however late that was
    assert child.stdout.readline() == "done\n"
    assert meter.read().energy_j >= 0.25
    child.communicate("\n", timeout=30)
    with pytest.raises(MeterError, match="has ended"):
        meter.read()


def test_the_cpu_model_refuses_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="watts"):
        CpuModelMeter([os.getpid()], 0.0)
    with pytest.raises(ValueError, match="no process"):
        CpuModelMeter([], 5.0)
    with pytest.raises(MeterError, match="no process"):
        CpuModelMeter([2**22 + 1], 5.0)


def test_only_present_hardware_has_a_meter(tmp_path: Path) -> None:
    assert find_meters([os.getpid()], 5.0)[-1].read().kind == "modelled"
    without = find_meters([os.getpid()], 5.0, nvml=RecordedNvml([]), powercap=tmp_path)
    assert [meter.name for meter in without] == ["cpu-worker"]
    _zone(tmp_path, "intel-rapl:0", "package-0", 1)
    present = find_meters([os.getpid()], 5.0, nvml=RecordedNvml([_gpu(), _gpu(uuid="GPU-2")]), powercap=tmp_path)
    assert [meter.name for meter in present] == ["gpu0", "gpu1", "rapl", "cpu-worker"]
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        apart = find_meters(
            [os.getpid(), child.pid], 5.0, idle_watts_per_core=2.0, nvml=RecordedNvml([]), powercap=tmp_path / "none"
        )
        assert [meter.name for meter in apart] == ["cpu-worker", "cpu-deep", "cpu-idle"]
    finally:
        child.communicate(b"\n", timeout=30)


def test_reserved_cores_have_their_idle_power_all_the_time() -> None:
    clock = ManualClock()
    meter = CpuIdleMeter(2.0, 4, clock)
    clock.now_s += 10.0
    reading = meter.read()
    assert (reading.energy_j, reading.kind) == (80.0, "modelled")
    assert "4 reserved cores" in reading.source


def test_watts_come_from_the_table_of_processors_or_are_stated() -> None:
    assert watts_per_core(EnergySettings(watts_per_core=3.0)) == 3.0
    assert watts_per_core(EnergySettings(watts_per_core=3.0, processor="epyc-7763")) == pytest.approx(280 / 128)
    with pytest.raises(SettingError, match=r"energy\.processor.*pentium.*epyc-7763"):
        watts_per_core(EnergySettings(processor="pentium"))


def test_nvml_checks_the_counter_by_integrated_power_and_has_its_uncertainty() -> None:
    clock = ManualClock()
    steady = _gpu(energy_mj=(0, 100_000, 200_000, 300_000), power_mw=(98_000, 98_000, 98_000, 98_000))
    (meter,) = nvml_meters(RecordedNvml([steady], clock), clock)
    clock.now_s += 3.0
    reading = meter.read()
    assert reading.energy_j == pytest.approx(300.0)
    assert reading.check_j == pytest.approx(294.0)
    assert reading.uncertainty == 0.05
    (alone,) = nvml_meters(RecordedNvml([_gpu(power_mw=None)], clock), clock)
    assert alone.read().check_j is None


def test_the_sampler_samples_until_its_block_ends() -> None:
    calls, twice = [0], threading.Event()

    def sample() -> None:
        calls[0] += 1
        if calls[0] == 2:
            twice.set()

    with EnergySampler(sample, interval_s=0.1) as sampler:
        assert twice.wait(30.0)
    assert not sampler._thread.is_alive()
    with pytest.raises(ValueError, match="at least"):
        EnergySampler(lambda: None, interval_s=0.01)
