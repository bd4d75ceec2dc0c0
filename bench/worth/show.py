"""Prints the report of `cascade worth` within 80 columns: decisions, energy by kind, and a sentence."""

from __future__ import annotations

from decimal import Decimal

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bench.tables import figure_table, print_table
from bench.worth.report import KindWorth, WayEnergy, WorthReport
from bench.worth.verdict import verdict
from cascade.ledger.deep_cost import Estimate
from cascade.ledger.render import number_text, percent_text
from stages.intervals import Figure
from stages.worth import Way

_ALL = 1.0


def show_worth(report: WorthReport, console: Console) -> None:
    """Prints the tables, what they rest on, and the verdict last."""
    most = report.reviews_per_day_max
    reviews = "no limit" if most is None else f"at most {most:g}"
    print_table(
        console,
        _decisions(report),
        f"{report.transactions:,} validation rows, {report.frauds:,} frauds; 95 % intervals by days and cards",
        f"thresholds: the cheapest of other days; reviews a day: {reviews}",
    )
    for found in report.kinds:
        print_table(console, _energy(report, found), *_energy_notes(report, found))
    console.print()
    for found in report.kinds:
        console.print(Padding(Text(verdict(report, found), style="bold"), (0, 0, 0, 1)))


def _name(share: float | None) -> str:
    if share is None:
        return "deep-only"
    return {0.0: "0 % (screener)", _ALL: "100 % (both)"}.get(share) or percent_text(share)


def _decisions(report: WorthReport) -> Table:
    title = f"Decisions of bundle {report.bundle}, by escalated share"
    columns = ("average precision", "caught %", f"{report.electricity.currency}/1,000")
    table = figure_table("escalated", *columns, title=title)
    for way in report.ways:
        table.add_row(_name(way.share), *_decision_cells(way))
    return table


def _decision_cells(way: Way) -> tuple[str, str, str]:
    precision = f"{way.average_precision.value:.3f} ({way.average_precision.low:.3f}–{way.average_precision.high:.3f})"
    return precision, _figure(way.caught, 100.0), _figure(way.cost_per_thousand)


def _energy(report: WorthReport, found: KindWorth) -> Table:
    title = f"Energy ({found.kind}) at {report.rate:,.0f} transactions a second"
    columns = ("rows/call", "J/1,000", "saving ×", f"{report.electricity.currency}/1,000 *")
    table = figure_table("escalated", *columns, title=title)
    for way in found.energy:
        table.add_row(_name(way.share), *_energy_cells(way))
    return table


def _energy_cells(way: WayEnergy) -> tuple[str, ...]:
    rows = "" if way.rows_per_call is None else f"{way.rows_per_call:.3g}"
    return rows, number_text(way.mj.value), _figure(way.saving), money_text(way.money_per_thousand)


def _energy_notes(report: WorthReport, found: KindWorth) -> list[str]:
    *_, both, deep_only = found.energy
    unit, own = deep_only.unit_costs, both.unit_costs
    single = next(way for way in found.energy if way.share).unit_costs.own_deep_mj
    cost = report.cost
    notes = [
        "saving = (c0 + D) ÷ (c0 + s + e · D), e: the escalated share; in mJ a transaction",
        f"c0 {_figure(unit.shared_mj)}, s {number_text(own.screener_mj)}, D {_figure(unit.deep_only_mj)} in calls of"
        f" {deep_only.rows_per_call:.0f}, {'–' if single is None else _figure(single)} in the smallest share's",
        f"of c0, idle power: {number_text(unit.idle_mj.value)}"
        if unit.idle_mj.value
        else "of c0, idle power: not known",
        report.shared.origin,
        f"D: {cost.server}, {cost.measured_at:%Y-%m-%d %H:%M} UTC; {cost.method}",
    ]
    if found.kind == "modelled":
        busy_w = cost.watts_per_core
        cores = [report.rate * mj / 1e3 / busy_w for mj in (found.energy[0].mj.value, deep_only.mj.value)]
        notes += [
            f"modelled: CPU seconds × {busy_w:g} W a busy core; that is {number_text(cores[0])} cores for the screener"
            f" alone, {number_text(cores[1])} for deep-only",
        ]
    price, pue = report.electricity.price, report.electricity.pue
    return [
        *notes,
        f"* electricity at {report.electricity.currency} {price:g} a kWh, PUE {pue:g}; no price of hardware",
    ]


def _figure(figure: Figure | Estimate, scale: float = 1.0) -> str:
    value, low, high = (number_text(end, scale) for end in (figure.value, figure.low, figure.high))
    return value if low == high else f"{value} ({low}–{high})"


def money_text(money: float) -> str:
    """Two significant digits without an exponent, since electricity of 1,000 transactions costs very little.

    >>> money_text(0.000000123)
    '0.00000012'
    """
    return format(Decimal(f"{money:.2g}"), "f")
