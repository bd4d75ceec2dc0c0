"""A bundle's report as one HTML page: how each way decides, what escalation brings, how the screener was chosen."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib.resources import files
from typing import Any

from cascade.bundle import REPORT_PAGE, version_of
from cascade.report.page import table
from cascade.report.plots import DOTS, INK, MUTED, PlotsMissingError, svg
from cascade.report.words import words
from stages.curve import DISTANCE, GAIN, HIGHEST, ORACLE, RANDOM, UNCERTAINTY, Curve
from stages.intervals import Figure
from stages.report import Report
from stages.report_table import costs_text
from stages.screener.search import Candidate

# Okabe and Ito, 2008: distinct for the colour-blind too.
COLOURS = {
    GAIN: "#d55e00",
    UNCERTAINTY: "#0072b2",
    HIGHEST: "#009e73",
    RANDOM: MUTED,
    DISTANCE: "#cc79a7",
    ORACLE: "#e69f00",
}
# Ways that no service can use.
HINDSIGHT = (DISTANCE, ORACLE)
CURVE_NOTE = (
    "The cascade's average precision on the validation rows, by the share of the transactions that goes to the deep"
    " model, and by the way to choose them. As in a service, the rows come one after another, and the share holds over"
    " any 10,000 of them. The dashed ways are no rules: one knows the deep score of every row, the"
    " other the labels too. Their distance to the others is what a better rule could still win."
)
SEARCH_NOTE = (
    "Each candidate was trained on the first part of the training rows, and judged on the last. Its merit is the mean"
    " of average precision and of the share of the frauds within the escalation budget. Of those that are nearly as"
    " good as the best, the smallest is taken. µs a row: with the compiled kernel, on the machine that trained."
)
FIGURES_NOTE = (
    "On the validation rows, from which calibration and thresholds come; so these figures serve for comparison."
    " Intervals of 95 % are from a bootstrap over days and cards, and approximate. The cost of each part of the days is"
    " by thresholds from the other parts."
)


def add_page(content: dict[str, bytes], report: Report, name: str) -> None:
    """Adds the page to the files of a bundle of this name. Without matplotlib there is none."""
    try:
        content[REPORT_PAGE] = report_page(report, version_of(name, content)).encode()
    except PlotsMissingError:
        content.pop(REPORT_PAGE, None)


def report_page(report: Report, version: str) -> str:
    """The HTML of the page. `version`: of the bundle. Raises PlotsMissingError without matplotlib."""
    style = files("cascade.report").joinpath("page.css").read_text("utf-8")
    title = f"Bundle {version}"
    part = report.validation
    span = f"{part.first:%Y-%m-%d} to {part.last:%Y-%m-%d}"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style>"
    )
    lead = f"Validation {span}: {part.transactions:,} transactions, {part.frauds:,} frauds. {report.note}"
    return (
        f"<!doctype html>\n<html lang=en><head>{head}</head><body><h1>{escape(title)}</h1>"
        f"<p class=note>{escape(lead)}</p>{''.join(_sections(report))}</body></html>\n"
    )


def _sections(report: Report) -> Iterator[str]:
    yield _section("Decisions", FIGURES_NOTE, _models(report))
    yield _section("What escalation brings", CURVE_NOTE, _plot(report.curve), _curve(report.curve))
    yield _section("The screener", SEARCH_NOTE, _candidates(report))


def _section(title: str, note: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p class=note>{escape(note)}</p>{''.join(parts)}</section>"


def _models(report: Report) -> str:
    rows = []
    for name, model in (
        ("cascade", report.cascade), ("screener only", report.screener_only), ("deep only", report.deep_only),
    ):  # fmt: skip
        rows.append([
            name, _interval(model.average_precision, 3), _interval(model.caught, 3),
            _interval(model.false_alarms_per_thousand, 2), _interval(model.reviews_per_day, 0),
            _interval(model.cost_per_thousand, 0),
        ])  # fmt: skip
    kept = f"<p>Of deep-only the cascade keeps {_kept(report.precision_kept)} of average precision and"
    kept += f" {_kept(report.caught_kept)} of the caught frauds, at {report.escalation_share:.2%} escalated.</p>"
    deep = report.deep
    kept += f"<p>The deep model, {escape(deep.size)}, has {deep.parameters / 1e6:.2f} million parameters. CPU of a row,"
    kept += f" by rows of a call: {escape(costs_text(deep))}.</p>"
    head = ("", "average precision", "frauds caught", "false alarms/1,000", "reviews/day", "cost/1,000")
    return table(head, rows) + kept


def _curve(found: Curve) -> str:
    rows = [[escape(name), *(f"{value:.4f}" for value in values)] for name, values in found.average_precision.items()]
    none = f"<p>Nothing escalated: {found.screener:.4f}; deep only: {found.deep:.4f}; both models for every"
    return (
        table(("escalated by", *(f"{share:.2%}" for share in found.shares)), rows)
        + f"{none} row: {found.both:.4f}.</p>"
    )


def _plot(found: Curve) -> str:
    def draw(axes: Any) -> None:
        percent = [100 * share for share in found.shares]
        for name, values in found.average_precision.items():
            style = "--" if name in HINDSIGHT else "-"
            # the rule may be the highest score: the wider line shows beside the other
            width = 4.0 if name == UNCERTAINTY else 1.5
            axes.plot(percent, values, color=COLOURS[name], linestyle=style, linewidth=width, label=name, **DOTS)
        for name, value, style in (("deep only", found.deep, "-."), ("screener only", found.screener, ":")):
            axes.axhline(value, color=INK, linestyle=style, linewidth=1, label=name)
        axes.set_xscale("log")
        axes.set_xticks(percent, [f"{share:g} %" for share in percent])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("escalated")
        axes.set_ylabel("average precision")
        # beside the plot: the lines fill it
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return svg(draw, 3.6, words("en"))


def _candidates(report: Report) -> str:
    screener = report.screener
    best = [one for one in screener.tried if one == screener.chosen]
    rows = [_candidate(one, one in best) for one in sorted(screener.tried, key=lambda one: -one.merit)]
    head = (
        "trained for",
        "trees × leaves",
        "learning rate",
        "fraud weight",
        "µs a row",
        "average precision",
        "in budget",
    )
    total = f"With the escalation rule it takes {screener.us_per_row:.2f} µs a row (limit {screener.us_per_row_max:g})."
    return table(head, rows) + f"<p>{total}</p>"


def _candidate(one: Candidate, chosen: bool) -> list[str]:
    settings = one.settings
    name = escape(settings.objective + (", monotone" if settings.monotone else ""))
    cells = [
        f"{settings.trees} × {settings.leaves}", f"{settings.learning_rate:g}", f"{settings.fraud_weight:g}",
        f"{one.us_per_row:.2f}", f"{one.average_precision:.4f}", f"{one.recall_at_budget:.3f}",
    ]  # fmt: skip
    return [f"<b>{name}</b>" if chosen else name, *cells]


def _interval(figure: Figure, digits: int) -> str:
    return f"{figure.value:,.{digits}f} ({figure.low:,.{digits}f} … {figure.high:,.{digits}f})"


def _kept(figure: Figure) -> str:
    return f"{figure.value:.1%} ({figure.low:.1%} … {figure.high:.1%})"
