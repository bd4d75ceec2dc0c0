"""`cascade bench pipeline`: schedules, scenarios, figures, and a small run from topic to topic."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from bench.load import LoadReport, Plan, departures
from bench.open_loop import PathLatency
from bench.pipeline.page import make_page
from bench.pipeline.processes import page_faults_of
from bench.pipeline.report import PipelineReport, less_work_text, show, standings
from bench.pipeline.scenario import SCENARIOS, Objectives, Scenario, Variant, load_scenario
from bench.pipeline.turn import LiveFigures, Turn
from bench.smoke import compare_to_baseline, read_baseline
from bench.turns import Spread
from cascade.cli import main
from cascade.errors import CascadeError
from cascade.ledger.machine import describe_machine

# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrivals", ["constant", "poisson", "burst", "day"])
def test_a_schedule_is_ascending_with_the_mean_rate_and_the_same_every_time(arrivals: str) -> None:
    due_s = departures(arrivals, 1_000.0, 20.0, 7)  # type: ignore[arg-type]
    assert len(due_s) == 20_000
    assert (np.diff(due_s) >= 0).all()
    assert 0 <= due_s[0] <= due_s[-1] <= 20.0
    assert (departures(arrivals, 1_000.0, 20.0, 7) == due_s).all()  # type: ignore[arg-type]


def test_poisson_gaps_are_exponential_and_constant_ones_even() -> None:
    gaps = np.diff(departures("poisson", 1_000.0, 50.0, 1))
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)
    assert np.diff(departures("constant", 1_000.0, 5.0, 1)) == pytest.approx(0.001)


def test_a_burst_is_five_times_the_mean_for_a_tenth_of_each_second() -> None:
    due_s = departures("burst", 1_000.0, 30.0, 1)
    inside = (due_s % 1.0 < 0.1).mean()
    assert inside == pytest.approx(0.5, abs=0.02)


def test_a_day_is_quiet_at_its_ends_and_busy_in_the_middle() -> None:
    counts, _ = np.histogram(departures("day", 1_000.0, 24.0, 1), 24)
    assert counts[0] < 0.3 * counts[12]
    assert counts[23] < 0.3 * counts[12]


def test_a_plan_read_from_its_file_is_the_plan_written(tmp_path: Path) -> None:
    plan = Plan("t", np.array([0.0, 0.5, 0.75]), [b"a", b"", b"ccc"], [b"one", b"two", b""])
    plan.write(tmp_path / "plan.msgpack")
    found = Plan.read(tmp_path / "plan.msgpack")
    assert (found.topic, found.keys, found.values) == (plan.topic, plan.keys, plan.values)
    assert (found.due_s == plan.due_s).all()


# --- scenarios --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in SCENARIOS.glob("*.toml")))
def test_every_shipped_scenario_can_be_read(name: str) -> None:
    assert load_scenario(name).variant


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('name = "a"\nreference = "x"\nvariant = []', "at least one"),
        ('name = "a"\nreference = "x"\n[[variant]]\nname = "b"', "reference 'x'"),
        ('name = "a"\nreference = "b"\n[[variant]]\nname = "b"\n[[variant]]\nname = "b"', "no name twice"),
        ('name = "a"\nreference = "b"\nrounds = 0\n[[variant]]\nname = "b"', "rounds"),
        ('name = "a"\nreference = "b"\n[[variant]]\nname = "b"\nclient = "carrier pigeon"', "client"),
        ('name = "a"\nreference = "b"\nspeed = 3\n[[variant]]\nname = "b"', "speed"),
        ("name = ", "scenario.toml"),
    ],
)
def test_an_error_in_a_scenario_is_a_single_line(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    with pytest.raises(CascadeError, match=re.escape(reason)) as caught:
        load_scenario(str(path))
    assert "\n" not in str(caught.value)


def test_a_comparison_has_its_first_variant_as_the_reference_and_refuses_an_unknown_variant() -> None:
    scenario = Scenario(name="s", reference="a", variant=[Variant(name=name) for name in "abc"])
    chosen = scenario.only(["c", "a"])
    assert (chosen.reference, [variant.name for variant in chosen.variant]) == ("c", ["c", "a"])
    with pytest.raises(CascadeError, match="no variant x; use a, b, c"):
        scenario.only(["x"])


# --- figures ----------------------------------------------------------------------------------------------------------


def latency(p99_ms: float) -> PathLatency:
    p50_ms, p999_ms, max_ms = p99_ms / 4, 2 * p99_ms, 3 * p99_ms
    curve = {"0": 0.1, "0.5": p50_ms, "0.99": p99_ms, "1": max_ms}
    return PathLatency(count=100, p50_ms=p50_ms, p99_ms=p99_ms, p999_ms=p999_ms, max_ms=max_ms, curve=curve)


def live(p99_ms: float, degraded: float = 0.0, missing: int = 0) -> LiveFigures:
    return LiveFigures(
        rate=500.0,
        paths={"screened": latency(p99_ms), "escalated": latency(3 * p99_ms)},
        degraded_share=degraded,
        missing=missing,
        cpu_us={"service": 20.0, "triton": 2.0, "broker": 9.0},
        load=LoadReport(sent=10, seconds=1.0, behind_ms_p99=0.2, behind_ms_max=0.4),
    )


def turn(variant: str, round_: int, per_second: float, us: float, p99_ms: float) -> Turn:
    return Turn(
        variant=variant,
        round=round_,
        transactions=1_000,
        per_second=per_second,
        cpu_us={"service": us, "triton": 1.0, "broker": 50.0},
        stages_us={"decode": 1.0, "features": 2.0},
        live=live(p99_ms),
        highest_rate=None,
        tried=[],
        page_faults_per_1000=us / 2,
    )


TURNS = [
    turn("a", 0, 1_000, 9.0, 4.0),
    turn("b", 0, 3_000, 4.0, 2.0),
    turn("a", 1, 2_000, 19.0, 8.0),
    turn("b", 1, 8_000, 4.0, 2.0),
    turn("a", 2, 1_500, 9.0, 4.0),
    turn("b", 2, 3_000, 4.0, 1.0),
]
SCENARIO = Scenario(name="s", reference="a", variant=[Variant(name="a"), Variant(name="b"), Variant(name="not run")])


def report_of(turns: list[Turn], scenario: Scenario = SCENARIO) -> PipelineReport:
    return PipelineReport(
        scenario=scenario,
        standings=standings(scenario, turns),
        turns=turns,
        skipped={"not run": "no <java>"},
        machine=describe_machine(),
        elapsed_s=1.0,
    )


def test_ratios_are_of_the_same_round_and_leave_out_the_brokers_cpu_time() -> None:
    a, b = standings(SCENARIO, TURNS)
    assert b.ratios["per_second"].median == 3.0
    assert (b.ratios["per_second"].least, b.ratios["per_second"].largest) == (2.0, 4.0)
    assert b.ratios["cpu_us"].median == 0.5
    assert b.ratios["p99_ms_screened"].median == 0.25
    assert (a.per_second.median, a.cpu_us.median, a.p99_ms["escalated"]) == (1_500, 10.0, 12.0)
    assert a.page_faults_per_1000 == Spread(median=4.5, least=4.5, largest=9.5)


TOUCH = """
import mmap, sys
memory = mmap.mmap(-1, 32 << 20)
memory.madvise(mmap.MADV_NOHUGEPAGE)
print("started", flush=True)
sys.stdin.readline()
for start in range(0, 32 << 20, 4096):
    memory[start] = 1
print("touched", flush=True)
sys.stdin.readline()
"""


def test_page_faults_of_a_process_and_its_children_are_counted() -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TOUCH!r}])"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        before = page_faults_of([parent.pid])
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == "touched\n"
        faults = page_faults_of([parent.pid]) - before
        parent.communicate("\n")
    assert (32 << 20) // 4096 <= faults < (64 << 20) // 4096
    assert page_faults_of([parent.pid, None]) == 0


def test_objectives_are_met_only_without_missing_and_degraded_decisions() -> None:
    objectives = Objectives(screened_p99_ms=5, escalated_p99_ms=15, degraded_share_max=0.001)
    assert live(5.0).meets(objectives)
    assert not live(5.1).meets(objectives)
    assert not live(5.0, degraded=0.002).meets(objectives)
    assert not live(5.0, missing=1).meets(objectives)


def test_a_variant_that_degraded_at_full_speed_has_a_warning_in_terminal_and_page() -> None:
    turns = [TURNS[0], msgspec.structs.replace(TURNS[1], degraded_share=0.4), TURNS[2], TURNS[3]]
    report = report_of(turns)
    a, b = report.standings
    assert less_work_text(a) == ""
    assert less_work_text(b) == "NOT the whole work: 40.0% degraded"
    assert less_work_text(b) in make_page(report)
    console = Console(width=80, record=True)
    show(report, console)
    text = console.export_text()
    assert less_work_text(b) in text
    assert "…" not in text


def test_the_page_is_self_contained_and_escapes_texts() -> None:
    page = make_page(report_of(TURNS, msgspec.structs.replace(SCENARIO, name="<b>&")))
    assert page.count("<svg") == 4
    assert "<b>&</h1>" not in page
    assert "no &lt;java&gt;" in page
    assert not re.search(r'(src|href)="(?!#)', page)


def test_a_ratio_that_fell_by_more_than_thirty_percent_is_named_and_one_that_rose_is_not() -> None:
    baseline = {"a": 10.0, "b": 10.0, "c": 10.0}
    assert compare_to_baseline({"a": 7.1, "b": 6.9, "c": 20.0}, baseline).fallen == ["b"]
    assert compare_to_baseline({"a": float("nan"), "b": 10.0, "c": 10.0}, baseline).fallen == ["a"]
    with pytest.raises(CascadeError, match="c, d"):
        compare_to_baseline({"a": 1.0, "b": 1.0, "d": 1.0}, baseline)


# --- a run ------------------------------------------------------------------------------------------------------------

TINY = """
name = "tiny"
reference = "cascade"
rounds = 1
[data]
cards = 500
terminals = 500
days = 10
[backlog]
# the system counts CPU time by 10 ms, and Triton's share of half a second was less at times
seconds = 2.0
[live]
rate = 300.0
seconds = 3.0
warm_up_s = 1.0
[[variant]]
name = "cascade"
client = "librdkafka"
"""


@pytest.mark.kafka
@pytest.mark.triton
@pytest.mark.long
def test_a_run_measures_from_topic_to_topic_and_nothing_is_missing(
    tmp_path: Path, kafka_parts: Path, triton_parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    json, html = tmp_path / "report.json", tmp_path / "report.html"
    command = ["bench", "pipeline", "--scenario", str(path), "--out", str(tmp_path / "out")]
    assert main([*command, "--json", str(json), "--html", str(html)]) == 0
    report = msgspec.json.decode(json.read_bytes(), type=PipelineReport)
    (measured,) = report.turns
    assert measured.transactions > 0
    assert measured.per_second > 0
    assert measured.live is not None
    assert measured.live.missing == 0
    assert sum(latency.count for latency in measured.live.paths.values()) == pytest.approx(900, abs=60)
    assert 0 < measured.live.paths["screened"].p50_ms < measured.live.paths["screened"].p99_ms
    assert measured.cpu_us.keys() == {"service", "triton", "broker"}
    assert min(measured.cpu_us.values()) > 0
    # a page fault a transaction would mean that each allocates memory anew
    assert measured.page_faults_per_1000 is not None
    assert 0 <= measured.page_faults_per_1000 < 1_000
    assert "<svg" in html.read_text()
    assert "cascade" in capsys.readouterr().out


def test_the_baseline_names_the_ratios_of_the_smoke_scenario_and_of_every_stage() -> None:
    scenario = load_scenario("smoke")
    variants = [variant.name for variant in scenario.variant if variant.name != scenario.reference]
    stages = ("decode JSON", "features", "screener", "duplicates", "encode decisions")
    names = {f"stage: {stage}" for stage in stages}
    assert read_baseline().keys() == names | {f"throughput: {name} / {scenario.reference}" for name in variants}
