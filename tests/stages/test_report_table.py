"""The report as a person reads it: 80 columns, nothing cut and no cell wrapped."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import msgspec
import pytest
from rich.console import Console

from stages.intervals import Figure
from stages.report import DeepReport, Report, ScreenerReport, Span, figures
from stages.report_table import show_report, show_sizes
from stages.screener.search import Candidate
from stages.screener.train import ScreenerSettings
from tests.stages.scored_rows import drawn_rows, policy_of

COLUMNS = 80
CANDIDATE = Candidate(ScreenerSettings(objective="lambdarank", trees=312, leaves=31), 1.62, 0.31, 0.42)


@pytest.fixture(scope="module")
def report() -> Report:
    rows = drawn_rows(rows=4_000)
    span = Span(datetime(2025, 1, 31, tzinfo=UTC), datetime(2025, 2, 27, tzinfo=UTC), 4_000, int(rows.fraud.sum()))
    found = figures(rows, policy_of(rows), seed=1)
    return Report(
        schema="simulator",
        seed=1,
        train=span,
        validation=span,
        note="",
        features=30,
        screener=ScreenerReport(CANDIDATE, (CANDIDATE,) * 10, 1.83, 2.0, 256),
        rule="gain",
        rule_average_precision={"gain": 0.4, "uncertainty": 0.39},
        deep=DeepReport("large", 1_543_210, {1: 8_123.0, 16: 3_210.0, 256: 1_234.0}, 1.2e-6),
        versions={},
        **{name: getattr(found, name) for name in found.__struct_fields__},
    )


def large(report: Report) -> Report:
    """The same report with the widest figures that are to be expected."""
    cost = Figure(4_567_890.0, 4_222_212.0, 4_913_568.0)
    wide = {
        name: msgspec.structs.replace(
            getattr(report, name),
            cost_per_thousand=cost,
            reviews_per_day=Figure(1_234_567.0, 1_000_000.0, 1_469_134.0),
        )
        for name in ("cascade", "screener_only", "deep_only")
    }
    span = msgspec.structs.replace(report.validation, transactions=123_456_789, frauds=1_234_567)
    return msgspec.structs.replace(
        report,
        **wide,
        validation=span,
        note="28 frauds in the validation data, fewer than 300: the intervals are wide",
        rule="uncertainty",
        cost_per_thousand_approve_all=4_567_890.0,
        precision_kept=Figure(1.123, -0.123, 2.369),
    )


def printed(report: Report) -> list[str]:
    target = io.StringIO()
    show_report(report, Console(file=target, width=COLUMNS))
    return target.getvalue().splitlines()


def lines_of(lines: list[str], start: str) -> list[str]:
    return [line for line in lines if line.startswith(start)]


@pytest.mark.parametrize("size", ["usual", "large"])
def test_no_line_is_cut_wrapped_or_wider_than_80_columns(report: Report, size: str) -> None:
    shown = report if size == "usual" else large(report)
    lines = printed(shown)
    assert max(map(len, lines)) <= COLUMNS
    assert not any("…" in line for line in lines)
    target = io.StringIO()
    show_report(shown, Console(file=target, width=500))
    assert [line.rstrip() for line in lines] == [line.rstrip() for line in target.getvalue().splitlines()]


def test_what_each_size_brings_and_costs_is_in_a_table_where_there_are_several(report: Report) -> None:
    target = io.StringIO()
    show_sizes([report], Console(file=target, width=COLUMNS))
    assert not target.getvalue()
    small = msgspec.structs.replace(report, deep=DeepReport("small", 166_470, {1: 512.0, 16: 300.0}, 1e-6))
    show_sizes([small, report], Console(file=target, width=COLUMNS))
    lines = target.getvalue().splitlines()
    assert max(map(len, lines)) <= COLUMNS
    assert not any("…" in line for line in lines)
    (none,), (of_small,), (of_large,) = (lines_of(lines, name) for name in ("none", "small", "large"))
    assert none.split() == ["none", f"{report.screener_only.average_precision.value:.3f}"]
    precision = report.cascade.average_precision
    assert of_small.split()[1:4] == [f"{precision.value:.3f}", "±", f"{precision.reach:.3f}"]
    assert of_small.split()[-2:] == ["0.51", "0.30"]
    assert of_large.split()[-2:] == ["8.12", "3.21"]


def test_each_way_to_decide_has_its_figures_with_their_reach(report: Report) -> None:
    lines = printed(report)
    for name, model in (
        ("cascade", report.cascade),
        ("screener only", report.screener_only),
        ("deep only", report.deep_only),
    ):
        (line,) = lines_of(lines, name)
        precision, cost = model.average_precision, model.cost_per_thousand
        reach = (precision.high - precision.low) / 2
        assert f"{precision.value:.3f} ± {reach:.3f}" in line
        assert f"{model.caught.value:.3f} ± {model.caught.reach:.3f}" in line
        assert line.endswith(f"{cost.value:,.0f} ± {cost.reach:,.0f}")
    assert any("95 % by a bootstrap over days and cards, approximate" in line for line in lines)


def test_large_figures_are_whole(report: Report) -> None:
    (line,) = lines_of(printed(large(report)), "deep only")
    assert "4,567,890 ± 345,678" in line
    assert "1,234,567" in line


def test_the_curve_has_a_line_for_each_way_to_choose(report: Report) -> None:
    lines = printed(report)
    for way, values in report.curve.average_precision.items():
        (line,) = [
            found for found in lines_of(lines, way) if found.split()[-5:] == [f"{value:.4f}" for value in values]
        ]
        assert line
    assert any("0.25%" in line and "5.00%" in line for line in lines)


def test_the_rest_says_what_was_chosen_and_what_is_kept(report: Report) -> None:
    text = "\n".join(printed(report))
    assert f"escalated: {report.escalation_share:.2%}, by gain" in text
    assert "screener: 312 trees of 31 leaves for lambdarank, the best of 10 candidates" in text
    assert "time of a row: 1.83 µs with the escalation rule (limit 2 in batches of 256)" in text
    kept = report.precision_kept
    assert f"kept of deep-only's average precision: {kept.value:.1%} ± {kept.reach:.1%}" in text


def test_a_note_is_shown_only_where_there_is_one(report: Report) -> None:
    note = "28 frauds in the validation data, fewer than 300: the intervals are wide"
    assert note not in printed(report)
    assert note in printed(large(report))
