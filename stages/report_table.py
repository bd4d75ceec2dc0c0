"""A bundle's report as tables of at most 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from stages.intervals import Figure
from stages.report import DeepReport, Report


def show_report(report: Report, console: Console) -> None:
    """Prints how good each way to decide is, what escalation brings, and which screener was chosen."""
    part = report.validation
    title = f"validation, {part.first:%Y-%m-%d} to {part.last:%Y-%m-%d}: {part.transactions:,} transactions, "
    title += f"{part.frauds:,} frauds"
    console.print(title, highlight=False)
    if report.note:
        console.print(f"[yellow]{report.note}[/yellow]", highlight=False)
    console.print(_models(report))
    console.print()
    console.print(_curve(report))
    console.print()
    screener, settings, deep = report.screener, report.screener.chosen.settings, report.deep
    console.print(
        f"escalated: {report.escalation_share:.2%}, by {report.rule}\n"
        f"kept of deep-only's average precision: {_share(report.precision_kept)}\n"
        f"kept of deep-only's caught frauds: {_share(report.caught_kept)}\n"
        f"screener: {settings.trees} trees of {settings.leaves} leaves for {settings.objective}, the best of"
        f" {len(screener.tried)} candidates\n"
        f"time of a row: {screener.us_per_row:.2f} µs with the escalation rule (limit {screener.us_per_row_max:g} in"
        f" batches of {screener.batch_rows})\n"
        f"cost if all were approved: {report.cost_per_thousand_approve_all:,.0f} per thousand transactions\n"
        f"deep model: {deep.size}, {deep.parameters / 1e6:.2f} million parameters\n"
        f"CPU of a row, by rows of a call: {costs_text(deep)}\n"
        f"ONNX differs from PyTorch by at most {deep.onnx_difference_max:.1g}",
        highlight=False,
    )


def costs_text(deep: DeepReport) -> str:
    """What a row costs in calls of each number of rows."""
    return ", ".join(f"{us / 1e3:.2f} ms of {rows}" for rows, us in deep.us_per_row.items())


def show_sizes(reports: Sequence[Report], console: Console) -> None:
    """Prints what each size of the deep model brings and costs, if there are several."""
    if len(reports) < 2:
        return
    # the sizes of calls that all have
    calls = sorted(set.intersection(*(set(report.deep.us_per_row) for report in reports)))
    costs = (f"ms,\n{rows} rows" for rows in calls)
    table = _table("\nmodel", "\ncascade", "\ndeep only", "both,\nall rows", *costs)
    table.add_row("none", f"{reports[0].screener_only.average_precision.value:.3f}", *[""] * (2 + len(calls)))
    for report in reports:
        table.add_row(
            report.deep.size, with_reach(report.cascade.average_precision, 3),
            with_reach(report.deep_only.average_precision, 3), f"{report.curve.both:.3f}",
            *(f"{report.deep.us_per_row[rows] / 1e3:.2f}" for rows in calls),
        )  # fmt: skip
    console.print()
    console.print(table)
    console.print("average precision on the validation rows; CPU of a row, by rows of a call", highlight=False)


def _models(report: Report) -> Table:
    # two lines leave room for costs of seven digits
    table = _table("", "average\nprecision", "frauds\ncaught", "reviews\na day", "cost per\n1,000")
    for name, model in (
        ("cascade", report.cascade), ("screener only", report.screener_only), ("deep only", report.deep_only),
    ):  # fmt: skip
        table.add_row(
            name, with_reach(model.average_precision, 3), with_reach(model.caught, 3),
            f"{model.reviews_per_day.value:,.0f}", with_reach(model.cost_per_thousand, 0),
        )  # fmt: skip
    table.caption = "±: 95 % by a bootstrap over days and cards, approximate"
    table.caption_justify = "left"
    return table


def _curve(report: Report) -> Table:
    found = report.curve
    table = _table("average precision, escalated by", *(f"{share:.2%}" for share in found.shares))
    for name, values in found.average_precision.items():
        table.add_row(name, *(f"{value:.4f}" for value in values))
    table.caption = f"nothing escalated {found.screener:.4f}, deep only {found.deep:.4f}, both models {found.both:.4f}"
    table.caption_justify = "left"
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def with_reach(figure: Figure, digits: int) -> str:
    """A figure, and how far its interval reaches."""
    return f"{figure.value:,.{digits}f} ± {figure.reach:,.{digits}f}"


def _share(figure: Figure) -> str:
    return f"{figure.value:.1%} ± {figure.reach:.1%}"
