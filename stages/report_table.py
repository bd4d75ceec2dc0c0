"""A bundle's report as tables of at most 80 columns."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from stages.report import Figure, Report


def show_report(report: Report, console: Console) -> None:
    """Prints how good each way to decide is, what escalation brings, and which screener was chosen."""
    part = report.validation
    title = f"validation, {part.first:%Y-%m-%d} to {part.last:%Y-%m-%d}: {part.transactions:,} transactions, "
    title += f"{part.frauds:,} frauds"
    console.print(title, highlight=False)
    if report.note:
        console.print(f"[yellow]{report.note}[/yellow]", highlight=False)
    console.print(_models(report))
    console.print(_curve(report))
    chosen = report.screener.chosen
    settings = chosen.settings
    console.print(
        f"escalated {report.escalation_share:.2%} by {report.rule}; of deep-only the cascade keeps"
        f" {_share(report.precision_kept)} of average precision and {_share(report.caught_kept)} of the caught frauds\n"
        f"screener: {settings.trees} trees of {settings.leaves} leaves for {settings.objective}, the best of"
        f" {len(report.screener.tried)}; {report.screener.us_per_row:.2f} µs a row with the escalation rule (limit"
        f" {report.screener.us_per_row_max:g} in batches of {report.screener.batch_rows})\n"
        f"cost if all were approved: {report.cost_per_thousand_approve_all:,.0f} per thousand transactions\n"
        f"ONNX differs from PyTorch by at most {report.onnx_difference_max:.1g}",
        highlight=False,
    )


def _models(report: Report) -> Table:
    table = _table("", "average precision", "frauds caught", "reviews/day", "cost/1,000")
    for name, model in (
        ("cascade", report.cascade), ("screener only", report.screener_only), ("deep only", report.deep_only),
    ):  # fmt: skip
        table.add_row(
            name, _interval(model.average_precision, 3), _interval(model.caught, 3),
            f"{model.reviews_per_day.value:,.0f}", _interval(model.cost_per_thousand, 0),
        )  # fmt: skip
    table.caption = "in brackets: 95 % by a bootstrap over days and cards, approximate"
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
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _interval(figure: Figure, digits: int) -> str:
    return f"{figure.value:,.{digits}f} ({figure.low:,.{digits}f} to {figure.high:,.{digits}f})"


def _share(figure: Figure) -> str:
    return f"{figure.value:.1%} ({figure.low:.1%} to {figure.high:.1%})"
