"""The fault simulator: a seed determines its run, the schedules break no promise, and the command reports them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.faults.commands import run_schedules
from bench.faults.run import simulate
from bench.faults.schedule import derive
from bench.faults.world import KINDS
from cascade.cli import main

# Among these are crashes, replays, and circuit breakers that open.
SEEDS = range(12)
SCHEDULES_SHORT, SCHEDULES_LONG = 100, 1_000


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
    assert len(set(map(repr, options))) == 100
    assert {each.config.delivery for each in options} == {"exactly-once", "at-least-once"}
    assert {each.workers for each in options} == {1, 2, 3}
    assert {each.partitions for each in options} == {1, 2, 3, 4}


def test_no_schedule_of_a_hundred_breaks_a_promise() -> None:
    problems = {seed: found for seed in range(1, SCHEDULES_SHORT + 1) if (found := simulate(seed).problems)}
    assert problems == {}


@pytest.mark.long
def test_no_schedule_of_a_thousand_breaks_a_promise_and_every_kind_of_fault_strikes() -> None:
    report = run_schedules(SCHEDULES_LONG, 1)
    assert [(violation.seed, violation.problems) for violation in report.details] == []
    assert report.schedules == SCHEDULES_LONG
    assert set(report.faults) == set(KINDS)
    assert report.never_struck == []


def test_the_command_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "build" / "faults.json"
    assert main(["simulate-faults", "--schedules", "4", "--seed", "7", "--out", str(out)]) == 0
    report = json.loads(out.read_bytes())
    assert (report["schedules"], report["violations"], report["seeds"]) == (4, 0, [])
    assert set(report["faults"]) == set(KINDS)
    assert "violations: 0" in capsys.readouterr().out


def test_replay_prints_options_and_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate-faults", "--replay", "7"]) == 0
    printed = capsys.readouterr().out
    assert '"seed": 7' in printed
    assert "assigned transactions-" in printed
    assert "no promise was broken" in printed


@pytest.mark.parametrize("options", [["--replay", "3"], ["--schedules", "1", "--seed", "3"]])
def test_a_broken_promise_fails_the_command_and_names_the_seed(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = simulate(3)
    broken.problems.append("state: altered")
    monkeypatch.setattr("bench.faults.commands.simulate", lambda seed: broken)
    assert main(["simulate-faults", *options, "--out", str(tmp_path / "faults.json")]) == 1
    printed = capsys.readouterr().out
    assert "state: altered" in printed
    assert "--replay 3" in printed or '"seed": 3' in printed
