"""What a run showed, over its rounds: medians, spreads, and ratios to the reference of the same round."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bench.cluster import origin
from bench.pipeline.scenario import Scenario, Variant
from bench.pipeline.turn import PathLatency, Turn
from cascade.ledger.machine import Machine


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Over the rounds: the median, the least and the largest."""

    median: float
    least: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where there are no values."""
        if not values:
            return None
        found = np.array(values)
        return cls(median=float(np.median(found)), least=float(found.min()), largest=float(found.max()))


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """A variant over all rounds.

    `per_second`, `cpu_us` (service and model server, a transaction) and `page_faults_per_1000` (service) at full speed;
    `p50_ms`, `p99_ms`, `p999_ms` by path, as they arrive at `live_rate`; `stages_us` of the service by stage. `ratios`
    to the reference, round by round: `per_second`, `cpu_us`, and `p99_ms` by path where both have it.
    `whole_degraded_share`: the most of any turn, full speed included; a service that degrades does less work than was
    asked for. What was not measured is absent or None.
    """

    variant: str
    client: str
    per_second: Spread
    cpu_us: Spread
    cpu_us_by_process: dict[str, float]
    stages_us: dict[str, float]
    live_rate: float | None
    p50_ms: dict[str, float]
    p99_ms: dict[str, float]
    p999_ms: dict[str, float]
    live_cpu_us: Spread | None
    degraded_share: float | None
    missing: int
    behind_ms_p99: float | None
    highest_rate: Spread | None
    ratios: dict[str, Spread]
    whole_degraded_share: float | None = None
    page_faults_per_1000: Spread | None = None


class PipelineReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `cascade bench pipeline` saw. `skipped`: variants that could not be run here, and why."""

    scenario: Scenario
    standings: list[Standing]
    turns: list[Turn]
    skipped: dict[str, str]
    machine: Machine
    elapsed_s: float


# Of all decisions; so much less work changes a figure by less than its spread.
LESS_WORK_SHARE = 0.002
PATHS_SHOWN = ("screened", "escalated")


def standings(scenario: Scenario, turns: Sequence[Turn]) -> list[Standing]:
    """Each variant that was run, in the scenario's order."""
    by_variant = {one.name: [turn for turn in turns if turn.variant == one.name] for one in scenario.variant}
    reference = by_variant[scenario.reference]
    return [_standing(one, by_variant[one.name], reference) for one in scenario.variant if by_variant[one.name]]


def work_us(turn: Turn) -> float:
    """CPU time that deciding a transaction takes, µs: of the service and the model server, not of the broker."""
    return sum(value for name, value in turn.cpu_us.items() if name != "broker")


def _standing(variant: Variant, turns: Sequence[Turn], reference: Sequence[Turn]) -> Standing:
    lives = [turn.live for turn in turns if turn.live is not None]
    highest = [turn.highest_rate for turn in turns if turn.highest_rate is not None]
    per_second, cpu_us = Spread.of([turn.per_second for turn in turns]), Spread.of([work_us(turn) for turn in turns])
    assert per_second is not None and cpu_us is not None  # noqa: S101, PT018 - there is a turn
    return Standing(
        variant=variant.name,
        client=variant.peer or variant.client,
        per_second=per_second,
        cpu_us=cpu_us,
        cpu_us_by_process=_medians([turn.cpu_us for turn in turns]),
        stages_us=_medians([turn.stages_us for turn in turns]),
        live_rate=float(np.median([live.rate for live in lives])) if lives else None,
        p50_ms=_medians([_by_path(live.paths, lambda one: one.p50_ms) for live in lives]),
        p99_ms=_medians([_by_path(live.paths, lambda one: one.p99_ms) for live in lives]),
        p999_ms=_medians([_by_path(live.paths, lambda one: one.p999_ms) for live in lives]),
        live_cpu_us=Spread.of([sum(us for name, us in live.cpu_us.items() if name != "broker") for live in lives]),
        degraded_share=float(np.median([live.degraded_share for live in lives])) if lives else None,
        missing=sum(live.missing for live in lives),
        behind_ms_p99=max((live.load.behind_ms_p99 for live in lives), default=None),
        highest_rate=Spread.of(highest),
        ratios=_ratios(turns, reference),
        whole_degraded_share=max((one.degraded_share for one in turns if one.degraded_share is not None), default=None),
        page_faults_per_1000=Spread.of(
            [one.page_faults_per_1000 for one in turns if one.page_faults_per_1000 is not None]
        ),
    )


def _ratios(turns: Sequence[Turn], reference: Sequence[Turn]) -> dict[str, Spread]:
    beside = {turn.round: turn for turn in reference}
    pairs = [(turn, beside[turn.round]) for turn in turns if turn.round in beside]
    found: dict[str, list[float]] = {
        "per_second": [one.per_second / other.per_second for one, other in pairs],
        # the system counts CPU time in steps: a very short turn may have none
        "cpu_us": [work_us(one) / work_us(other) for one, other in pairs if work_us(other)],
    }
    for one, other in pairs:
        if one.live is not None and other.live is not None:
            for path in one.live.paths.keys() & other.live.paths.keys():
                ratio = one.live.paths[path].p99_ms / other.live.paths[path].p99_ms
                found.setdefault(f"p99_ms_{path}", []).append(ratio)
    return {name: spread for name, values in sorted(found.items()) if (spread := Spread.of(values)) is not None}


def _by_path(paths: dict[str, PathLatency], figure: Callable[[PathLatency], float]) -> dict[str, float]:
    return {name: figure(one) for name, one in paths.items()}


def _medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.median([row[name] for row in rows if name in row])) for name in names}


# --- the terminal -----------------------------------------------------------------------------------------------------


def show(report: PipelineReport, console: Console) -> None:
    """Print the report."""
    console.print()
    console.print(_speed_table(report))
    if any(one.live_rate is not None for one in report.standings):
        console.print()
        console.print(_latency_table(report))
        remarks = [f" {one.variant}: {told}" for one in report.standings if (told := _remarks(one))]
        if remarks:
            console.print("\n".join(["", *remarks]), highlight=False)
    for name, reason in report.skipped.items():
        console.print(f" {name}: not run, {reason}", highlight=False)
    scenario = report.scenario
    console.print(
        f"\n {scenario.name}: medians of {scenario.rounds} rounds, the variants by turns; CPU time of service and model"
        f" server; {report.elapsed_s:,.0f} s in all\n {origin(report.machine, scenario.seed)}",
        highlight=False,
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1), show_edge=False
    )
    table.add_column("variant", min_width=14, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _speed_table(report: PipelineReport) -> Table:
    reference = report.scenario.reference
    table = _table("Full speed, a backlog", ["tx/s", "×", "CPU µs/tx", "×", "faults/1000", ""])
    for one in report.standings:
        table.add_row(
            one.variant, f"{one.per_second.median:,.0f}", ratio_text(one, "per_second", reference),
            f"{one.cpu_us.median:,.1f}", ratio_text(one, "cpu_us", reference), faults_text(one), less_work_text(one),
        )  # fmt: skip
    return table


def _latency_table(report: PipelineReport) -> Table:
    table = _table("As they arrive: departure to visible decision, p50 / p99 / p99.9 in ms", ["tx/s", *PATHS_SHOWN])
    for one in report.standings:
        if one.live_rate is None:
            continue
        cells = [
            " / ".join(f"{ms[path]:.3g}" for ms in (one.p50_ms, one.p99_ms, one.p999_ms)) if path in one.p50_ms else ""
            for path in PATHS_SHOWN
        ]
        table.add_row(one.variant, f"{one.live_rate:,.0f}", *cells)
    return table


def faults_text(one: Standing) -> str:
    """Page faults of the service for 1,000 transactions."""
    return "" if one.page_faults_per_1000 is None else f"{one.page_faults_per_1000.median:,.1f}"


def less_work_text(one: Standing) -> str:
    """Where a variant degraded at full speed, so that its figures are not of the whole work; else empty."""
    share = one.whole_degraded_share or 0.0
    return f"NOT the whole work: {share:.1%} degraded" if share > LESS_WORK_SHARE else ""


def _remarks(one: Standing) -> str:
    told = []
    if one.degraded_share:
        told.append(f"{one.degraded_share:.2%} degraded")
    if one.missing:
        told.append(f"{one.missing} missing")
    if one.highest_rate is not None:
        rate = one.highest_rate.median
        told.append(f"meets the objectives up to {rate:,.0f}/s" if rate else "meets the objectives at no rate tried")
    return ", ".join(told)


def ratio_text(one: Standing, name: str, reference: str) -> str:
    """A ratio to the reference as `1.23`; the reference itself is `1`."""
    if one.variant == reference:
        return "1"
    return f"{one.ratios[name].median:.3g}" if name in one.ratios else ""
