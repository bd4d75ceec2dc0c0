"""The report of a run: medians and spreads over its rounds, and ratios to the echo of the same round and rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.cluster import origin
from bench.echo.turn import Turn
from bench.echo.variants import ECHO, EchoRun
from bench.tables import figure_table, print_notes, print_table
from bench.turns import Spread
from cascade.ledger.machine import Machine

# A load that is later than this at p99 is part of what the latencies show.
BEHIND_MS = 2.0


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a variant at a rate over all rounds.

    `figures`: by name, see `figures_of`. `ratios`: to the echo's at that rate in the same round, under the same names;
    escalated rows are compared with all rows of the echo. `escalated_share`, `degraded_share`: medians. `missing`: in
    all rounds. `behind_ms_p99`: the latest load of any round.
    """

    variant: str
    rate: float
    figures: dict[str, Spread]
    ratios: dict[str, Spread]
    escalated_share: float
    degraded_share: float
    missing: int
    behind_ms_p99: float


class EchoReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `cascade bench echo`."""

    run: EchoRun
    standings: list[Standing]
    turns: list[Turn]
    machine: Machine
    elapsed_s: float


def figures_of(turn: Turn) -> dict[str, float]:
    """The figures of a turn that are compared, by name; without those of paths that no transaction took.

    For a transaction: `cpu_us`, `voluntary`, `involuntary`. Of screened rows, ms: `p50_ms`, `p99_ms`, `p999_ms`; of
    escalated rows: `escalated_p50_ms`, `escalated_p99_ms`. Without traffic: `idle_core_share`,
    `idle_voluntary_per_s`, `idle_involuntary_per_s`.
    """
    found = {"cpu_us": turn.cpu_us, "voluntary": turn.voluntary, "involuntary": turn.involuntary}
    if (screened := turn.paths.get("screened")) is not None:
        found |= {"p50_ms": screened.p50_ms, "p99_ms": screened.p99_ms, "p999_ms": screened.p999_ms}
    if (escalated := turn.paths.get("escalated")) is not None:
        found |= {"escalated_p50_ms": escalated.p50_ms, "escalated_p99_ms": escalated.p99_ms}
    if (idle := turn.idle) is not None:
        found |= {
            "idle_core_share": idle.core_share,
            "idle_voluntary_per_s": idle.voluntary_per_s,
            "idle_involuntary_per_s": idle.involuntary_per_s,
        }
    return found


def standings(turns: Sequence[Turn]) -> list[Standing]:
    """The figures of each variant at each rate, in order of the rates and of the first round's turns."""
    variants = dict.fromkeys(turn.variant for turn in turns)
    return [
        _standing([turn for turn in turns if (turn.variant, turn.rate) == (variant, rate)], turns)
        for rate in sorted({turn.rate for turn in turns})
        for variant in variants
    ]


def _standing(own: Sequence[Turn], turns: Sequence[Turn]) -> Standing:
    echoes = {(turn.rate, turn.round): figures_of(turn) for turn in turns if turn.variant == ECHO}
    figures: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    for turn in own:
        echo = echoes[turn.rate, turn.round]
        for name, figure in figures_of(turn).items():
            figures.setdefault(name, []).append(figure)
            # involuntary switches, and CPU time without traffic, can be 0
            if base := echo.get(name.removeprefix("escalated_")):
                ratios.setdefault(name, []).append(figure / base)
    return Standing(
        variant=own[0].variant,
        rate=own[0].rate,
        figures={name: Spread.of(values) for name, values in figures.items()},
        ratios={name: Spread.of(values) for name, values in ratios.items()},
        escalated_share=float(np.median([turn.escalated_share for turn in own])),
        degraded_share=float(np.median([turn.degraded_share for turn in own])),
        missing=sum(turn.missing for turn in own),
        behind_ms_p99=max(turn.load.behind_ms_p99 for turn in own),
    )


# --- the terminal -----------------------------------------------------------------------------------------------------


def show(report: EchoReport, console: Console) -> None:
    """Prints the report: tables of CPU time, of latencies and of the time without traffic, and notes."""
    cpu = {"CPU µs": "cpu_us", "voluntary": "voluntary", "involuntary": "involuntary"}
    print_table(console, _table(report, cpu, "CPU time and context switches for a transaction; × echo"))
    latency = {"p50": "p50_ms", "p99": "p99_ms", "p99.9": "p999_ms"}
    print_table(console, _table(report, latency, "Screened, ms; × echo"))
    print_table(console, _escalated_table(report))
    if report.run.idle_s:
        print_table(console, _idle_table(report))
    run = report.run
    print_notes(
        console,
        *_late_loads(report.standings),
        f"medians of {run.rounds} rounds by turns, and of the ratios to the echo in the same round",
        f"turns of {run.seconds:g} s after {run.warm_up_s:g} s of warm-up; Poisson arrivals, open loop, one partition",
        "latency: from scheduled departure to visible decision",
        f"CPU time is of the process and its children; {report.elapsed_s:,.0f} s in all",
        origin(report.machine, run.seed),
    )


def _late_loads(standings: Sequence[Standing]) -> Iterator[str]:
    """A line for each rate whose load was late in a round."""
    for rate in dict.fromkeys(standing.rate for standing in standings):
        behind_ms = max(standing.behind_ms_p99 for standing in standings if standing.rate == rate)
        if behind_ms > BEHIND_MS:
            yield f"at {rate:,.0f}/s the load was up to {behind_ms:.1f} ms late at p99"


def _table(report: EchoReport, figures: dict[str, str], title: str) -> Table:
    """A table of figures, by their headings, each followed by its ratio to the echo's."""
    table = _empty_table("variant", *(heading for name in figures for heading in (name, "×")), title=title)
    for standing in _with_rates(report.standings, table):
        cells = ((_figure(standing, name), _ratio(standing, name)) for name in figures.values())
        table.add_row(f"  {standing.variant}", *(cell for pair in cells for cell in pair))
    return table


def _escalated_table(report: EchoReport) -> Table:
    title = "Escalated, ms; × echo"
    table = _empty_table("variant", "share", "p50", "×", "p99", "×", "degraded", "missing", title=title)
    for standing in _with_rates(report.standings, table):
        latencies = (
            text
            for name in ("escalated_p50_ms", "escalated_p99_ms")
            for text in (_figure(standing, name), _ratio(standing, name))
        )
        share, degraded = f"{standing.escalated_share:.2%}", f"{standing.degraded_share:.2%}"
        if standing.variant == ECHO:
            share = degraded = ""
        table.add_row(f"  {standing.variant}", share, *latencies, degraded, f"{standing.missing:,}")
    return table


def _idle_table(report: EchoReport) -> Table:
    title = f"Without traffic, {report.run.idle_s:g} s"
    table = _empty_table("variant", "CPU, % of a core", "voluntary/s", "involuntary/s", title=title)
    for standing in report.standings:
        if "idle_core_share" in standing.figures:
            switches = (_figure(standing, f"idle_{name}_per_s") for name in ("voluntary", "involuntary"))
            share = 100 * standing.figures["idle_core_share"].median
            table.add_row(standing.variant, f"{share:.2f}", *switches)
    return table


def _empty_table(names: str, *figures: str, title: str) -> Table:
    table = figure_table(names, *figures, title=title)
    # the name of a checkout may be long
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    return table


def _with_rates(standings: Sequence[Standing], table: Table) -> Iterator[Standing]:
    """The standings; a row with the rate is added to the table before the first of each rate."""
    rate = 0.0
    for standing in standings:
        if standing.rate != rate:
            rate = standing.rate
            table.add_row(f"{rate:,.0f}/s", style="bold")
        yield standing


def _figure(standing: Standing, name: str) -> str:
    """A median with three digits; empty where it was not measured."""
    if name not in standing.figures:
        return ""
    median = standing.figures[name].median
    return f"{median:,.0f}" if median >= 100 else f"{median:.3g}"


def _ratio(standing: Standing, name: str) -> str:
    """A ratio to the echo with three digits; empty for the echo itself, or where the echo's figure is 0."""
    return "" if standing.variant == ECHO or name not in standing.ratios else f"{standing.ratios[name].median:.3g}"
