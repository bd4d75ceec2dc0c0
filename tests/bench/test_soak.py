"""The arithmetic of soak and delivery: growth is distinguished from noise, and ratios are taken within a round."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bench.delivery import MODES, Turn, _rate, _ratio
from bench.soak import GROWTH_MAX, MemorySampler, measure_growth, run_soak
from cascade.errors import CascadeError


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(3).normal(0.0, 2.0, count)


def test_noise_is_no_growth() -> None:
    found = measure_growth("worker", 400.0 + noise(480))
    assert abs(found.growth) < GROWTH_MAX / 4
    assert found.samples == 480


@pytest.mark.parametrize("count", [180, 480, 28_800])
def test_a_slow_leak_is_found(count: int) -> None:
    # in 480 samples, which are 8 minutes: 16 MB, a megabyte every half minute
    found = measure_growth("worker", 400.0 + np.linspace(0.0, 16.0, count) + noise(count))
    assert found.growth == pytest.approx(0.04 * 5 / 6, abs=0.006)
    assert found.growth > GROWTH_MAX


def test_a_leak_in_steps_is_found() -> None:
    # 3 MB at each snapshot, one in 20 s
    found = measure_growth("worker", 400.0 + 3.0 * (np.arange(180) // 20) + noise(180))
    assert found.growth > 2 * GROWTH_MAX


@pytest.mark.parametrize("at", [10, 24, 45, 80, 90, 150])
def test_memory_that_is_taken_once_is_no_growth(at: int) -> None:
    # seen: 15 MB, when a busy machine made deep calls late for the first time
    found = measure_growth("worker", np.append(np.full(at, 455.0), np.full(180 - at, 470.0)) + noise(180))
    assert abs(found.growth) < GROWTH_MAX / 2
    assert found.ok


def test_much_memory_that_is_taken_once_fails() -> None:
    assert not measure_growth("worker", np.repeat([400.0, 450.0], 240)).ok


def test_memory_that_shrinks_is_no_growth() -> None:
    assert measure_growth("worker", np.linspace(420.0, 400.0, 480)).growth < 0


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(CascadeError, match="2 memory samples"):
        measure_growth("worker", np.array([400.0, 401.0]))


def test_the_sampler_counts_a_processs_children_and_ends_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.soak.SAMPLE_INTERVAL_S", 0.02)
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(60_000_000); input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as parent:
        memory = MemorySampler({"worker": parent.pid})
        samples = memory.rss_mb["worker"]
        while max(samples, default=0) < 60:
            time.sleep(0.02)
        parent.communicate(b"\n")
    memory._thread.join()
    assert max(samples) > 60


@pytest.mark.kafka
@pytest.mark.triton
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_bounded_run_decides_everything_and_does_not_grow(
    tmp_path: Path, kafka_parts: Path, triton_parts: Path
) -> None:
    report = run_soak(tmp_path / "soak", minutes=4.0, rate=200.0, warm_up_s=60.0, seed=1)
    assert report.settled
    assert report.transactions > 20_000
    assert 0.02 < report.escalated_share < 0.3
    worker, triton = report.growth
    assert (worker.name, triton.name) == ("worker with Triton client", "Triton")
    assert worker.samples > 120
    assert worker.ok, worker


def test_the_rate_does_not_count_the_first_fetch() -> None:
    assert _rate(np.array([10.0, 10.0, 10.0, 11.0, 12.0, 12.0])) == pytest.approx(1.5)


def test_ratios_are_taken_within_a_round() -> None:
    figures = [(100.0, 80.0), (50.0, 45.0), (200.0, 100.0)]
    turns = [
        Turn(mode=mode, per_second=value, screened=1, p50_ms=1.0, p99_ms=1.0)
        for pair in figures
        for mode, value in zip(MODES, pair, strict=True)
    ]
    found = _ratio(turns, "per_second")
    assert (found.median, found.least, found.largest) == (0.8, 0.5, 0.9)
