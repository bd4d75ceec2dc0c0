from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.faults.commands import FaultsReport, run_schedules
from bench.faults.run import simulate
from bench.faults.schedule import derive
from bench.faults.world import KINDS
from cascade.cli import main

SCHEDULES = 1_000
# one that crashes, replays and meets a circuit breaker's jitter
SEEDS = range(12)


def test_the_same_seed_gives_the_same_run() -> None:
    for seed in SEEDS:
        first, second = simulate(seed), simulate(seed)
        assert derive(seed) == derive(seed)
        assert first.trace == second.trace
        assert (first.fired, first.problems, first.seconds) == (second.fired, second.problems, second.seconds)


def test_a_seed_gives_the_same_run_in_another_process() -> None:
    script = "import sys; from bench.faults.run import simulate; print(repr(simulate(int(sys.argv[1])).trace))"
    done = subprocess.run([sys.executable, "-c", script, "5"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(simulate(5).trace)


def test_seeds_differ() -> None:
    options = [derive(seed) for seed in range(100)]
    assert len({repr(one) for one in options}) == 100
    assert {one.config.delivery for one in options} == {"exactly-once", "at-least-once"}
    assert {one.workers for one in options} == {1, 2, 3}
    assert {one.partitions for one in options} == {1, 2, 3, 4}


@pytest.fixture(scope="module")
def report() -> FaultsReport:
    return run_schedules(SCHEDULES, 1)


@pytest.mark.slow
def test_no_schedule_of_a_thousand_breaks_a_promise(report: FaultsReport) -> None:
    assert [(one.seed, one.problems) for one in report.details] == []
    assert report.schedules == SCHEDULES


@pytest.mark.slow
def test_every_kind_of_fault_strikes(report: FaultsReport) -> None:
    assert set(report.faults) == set(KINDS)
    assert report.never_struck == []


def test_the_command_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "build" / "faults.json"
    status = main(["simulate-faults", "--schedules", "4", "--seed", "7", "--out", str(out), "--processes", "1"])
    assert status == 0
    figures = json.loads(out.read_bytes())
    assert (figures["schedules"], figures["violations"], figures["seeds"]) == (4, 0, [])
    assert set(figures["faults"]) == set(KINDS)
    assert "violations: 0" in capsys.readouterr().out


def test_replay_prints_options_and_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate-faults", "--replay", "7"]) == 0
    printed = capsys.readouterr().out
    assert '"seed": 7' in printed
    assert "assigned transactions-" in printed
    assert "no promise was broken" in printed


def test_a_broken_promise_fails_the_command_and_names_the_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = simulate(3)
    broken.problems.append("state: altered")
    monkeypatch.setattr("bench.faults.commands.simulate", lambda seed: broken)
    assert main(["simulate-faults", "--replay", "3"]) == 1
    assert "state: altered" in capsys.readouterr().out
