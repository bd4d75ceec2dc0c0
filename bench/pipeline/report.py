"""The report of a run: medians and spreads over its rounds, and ratios to the reference of the same round."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.cluster import origin
from bench.pipeline.scenario import Scenario, Variant
from bench.pipeline.turn import Turn
from bench.tables import figure_table, print_table
from bench.turns import Spread
from cascade.ledger.machine import Machine


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a variant over all rounds; what was not measured is absent or None.

    At full speed: `per_second`; `cpu_us`, CPU time of service and model server for a transaction, µs; the service's
    `page_faults_per_1000` transactions. `stages_us`: the service's CPU time for a transaction by stage, µs. Under the
    open-loop load of `live_rate`: `p50_ms`, `p99_ms` and `p999_ms` by path. `ratios`: to the reference of the same
    round: `per_second`, `cpu_us`, `live_cpu_us`, and `p99_ms` by path where both have it. `whole_degraded_share`: the
    largest of any turn, full speed included, since a service that degrades does less work.
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
    """The result of `cascade bench pipeline`. `skipped`: variants that cannot run here, and why."""

    scenario: Scenario
    standings: list[Standing]
    turns: list[Turn]
    skipped: dict[str, str]
    machine: Machine
    elapsed_s: float


# A smaller share of degraded decisions changes a figure by less than its spread.
LESS_WORK_SHARE = 0.002
# A variant that takes so many times the reference's CPU time is remarked on.
MUCH_MORE = 2.0
PATHS_SHOWN = ("screened", "escalated")


def standings(scenario: Scenario, turns: Sequence[Turn]) -> list[Standing]:
    """The figures of each variant that ran, in the scenario's order."""
    reference = [turn for turn in turns if turn.variant == scenario.reference]
    found = []
    for variant in scenario.variant:
        if own := [turn for turn in turns if turn.variant == variant.name]:
            found.append(_standing(variant, own, reference))
    return found


def work_us(cpu_us: dict[str, float]) -> float:
    """CPU time of the service and the model server for a transaction, µs, of all processes; without the broker's."""
    return sum(us for process, us in cpu_us.items() if process != "broker")


def _standing(variant: Variant, turns: Sequence[Turn], reference: Sequence[Turn]) -> Standing:
    lives = [turn.live for turn in turns if turn.live is not None]
    highest = [turn.highest_rate for turn in turns if turn.highest_rate is not None]
    degraded = [turn.degraded_share for turn in turns if turn.degraded_share is not None]
    faults = [turn.page_faults_per_1000 for turn in turns if turn.page_faults_per_1000 is not None]
    return Standing(
        variant=variant.name,
        client=variant.peer or variant.client,
        per_second=Spread.of([turn.per_second for turn in turns]),
        cpu_us=Spread.of([work_us(turn.cpu_us) for turn in turns]),
        cpu_us_by_process=_medians([turn.cpu_us for turn in turns]),
        stages_us=_medians([turn.stages_us for turn in turns]),
        live_rate=float(np.median([live.rate for live in lives])) if lives else None,
        p50_ms=_medians([{path: latency.p50_ms for path, latency in live.paths.items()} for live in lives]),
        p99_ms=_medians([{path: latency.p99_ms for path, latency in live.paths.items()} for live in lives]),
        p999_ms=_medians([{path: latency.p999_ms for path, latency in live.paths.items()} for live in lives]),
        live_cpu_us=Spread.of([work_us(live.cpu_us) for live in lives]) if lives else None,
        degraded_share=float(np.median([live.degraded_share for live in lives])) if lives else None,
        missing=sum(live.missing for live in lives),
        behind_ms_p99=max((live.load.behind_ms_p99 for live in lives), default=None),
        highest_rate=Spread.of(highest) if highest else None,
        ratios=_ratios(turns, reference),
        whole_degraded_share=max(degraded, default=None),
        page_faults_per_1000=Spread.of(faults) if faults else None,
    )


def _ratios(turns: Sequence[Turn], reference: Sequence[Turn]) -> dict[str, Spread]:
    by_round = {turn.round: turn for turn in reference}
    pairs = [(turn, by_round[turn.round]) for turn in turns if turn.round in by_round]
    ratios: dict[str, list[float]] = {
        "per_second": [turn.per_second / base.per_second for turn, base in pairs],
        # the system counts CPU time in steps, so that a very short turn can have none
        "cpu_us": [work_us(turn.cpu_us) / work_us(base.cpu_us) for turn, base in pairs if work_us(base.cpu_us)],
    }
    for turn, base in pairs:
        if turn.live is not None and base.live is not None:
            if own := work_us(base.live.cpu_us):
                ratios.setdefault("live_cpu_us", []).append(work_us(turn.live.cpu_us) / own)
            for path in turn.live.paths.keys() & base.live.paths.keys():
                ratio = turn.live.paths[path].p99_ms / base.live.paths[path].p99_ms
                ratios.setdefault(f"p99_ms_{path}", []).append(ratio)
    return {name: Spread.of(values) for name, values in sorted(ratios.items()) if values}


def _medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.median([row[name] for row in rows if name in row])) for name in names}


# --- the terminal -----------------------------------------------------------------------------------------------------


def show(report: PipelineReport, console: Console) -> None:
    """Prints the report: a table at full speed, a table under the open-loop load, and notes."""
    scenario = report.scenario
    table = _speed_table(report)
    if any(standing.live_rate is not None for standing in report.standings):
        print_table(console, table)
        table = _latency_table(report)
    remarks = (f"{standing.variant}: {text}" for standing in report.standings if (text := _remarks(standing)))
    print_table(
        console,
        table,
        *remarks,
        *(f"{name}: not run, {reason}" for name, reason in report.skipped.items()),
        f"{scenario.name}: medians of {scenario.rounds} rounds in which the variants take turns",
        "latency: from scheduled departure to visible decision",
        f"CPU time is of service and model server; {report.elapsed_s:,.0f} s in all",
        origin(report.machine, scenario.seed),
    )


def _speed_table(report: PipelineReport) -> Table:
    reference = report.scenario.reference
    columns = ("tx/s", "×", "CPU µs/tx", "×", "faults/1000")
    table = figure_table("variant", *columns, title="Full speed: a backlog")
    for standing in report.standings:
        table.add_row(
            standing.variant,
            f"{standing.per_second.median:,.0f}",
            ratio_text(standing, "per_second", reference),
            f"{standing.cpu_us.median:,.1f}",
            ratio_text(standing, "cpu_us", reference),
            faults_text(standing),
        )
    return table


def _latency_table(report: PipelineReport) -> Table:
    title = "Open-loop load: p50 / p99 / p99.9 in ms"
    table = figure_table("variant", "tx/s", *PATHS_SHOWN, "CPU µs/tx", title=title)
    for standing in report.standings:
        if standing.live_rate is not None:
            percentiles = (standing.p50_ms, standing.p99_ms, standing.p999_ms)
            cells = (
                " / ".join(f"{ms[path]:.3g}" for ms in percentiles) if path in standing.p50_ms else ""
                for path in PATHS_SHOWN
            )
            cpu = "" if standing.live_cpu_us is None else f"{standing.live_cpu_us.median:,.0f}"
            table.add_row(standing.variant, f"{standing.live_rate:,.0f}", *cells, cpu)
    return table


def faults_text(standing: Standing) -> str:
    """Page faults of the service for 1,000 transactions."""
    return "" if standing.page_faults_per_1000 is None else f"{standing.page_faults_per_1000.median:,.1f}"


def less_work_text(standing: Standing) -> str:
    """A warning where a variant degraded so much that its figures are not comparable; else empty."""
    share = standing.whole_degraded_share or 0.0
    return f"NOT the whole work: {share:.1%} degraded" if share > LESS_WORK_SHARE else ""


def _remarks(standing: Standing) -> str:
    remarks = [less_work_text(standing)]
    if standing.degraded_share:
        remarks.append(f"{standing.degraded_share:.2%} degraded under load")
    for name, when in (("cpu_us", "at full speed"), ("live_cpu_us", f"at {standing.live_rate or 0.0:,.0f}/s")):
        if (ratio := standing.ratios.get(name)) is not None and ratio.median > MUCH_MORE:
            remarks.append(f"{ratio.median:.3g} × the CPU ({ratio.least:.3g} to {ratio.largest:.3g}) {when}")
    if standing.missing:
        remarks.append(f"{standing.missing} missing")
    if standing.highest_rate is not None:
        rate = standing.highest_rate.median
        remarks.append(f"meets the objectives up to {rate:,.0f}/s" if rate else "meets the objectives at no rate tried")
    return ", ".join(filter(None, remarks))


def ratio_text(standing: Standing, name: str, reference: str) -> str:
    """A ratio to the reference as `1.23`; `1` for the reference itself."""
    if standing.variant == reference:
        return "1"
    return f"{standing.ratios[name].median:.3g}" if name in standing.ratios else ""
