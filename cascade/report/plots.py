"""The plots of the report, as SVG. Text stays text, so that the browser's fonts draw the letters of any language."""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import cycle
from typing import Any

from cascade.errors import CascadeError
from cascade.ledger.attribution import Books
from cascade.ledger.render import number_text
from cascade.report.business import Swing
from cascade.report.figures import CURVE, Figures
from cascade.report.words import Words

# Distinct for the colour-blind too (Okabe and Ito, 2008).
PATH_COLOURS = {"screened": "#0072b2", "escalated": "#d55e00", "degraded": "#6b6b6b"}
KIND_COLOURS = {"measured": "#009e73", "modelled": "#e69f00"}
MUTED, INK = "#57606a", "#1b1f24"
WIDTH_IN = 8.6
MS_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
# Space at the left, as a share of the width: full-width letters are wider than matplotlib assumes.
MARGINS = {"en": 0.0, "ja": 0.08}
# Part of every installation of matplotlib. It lays out the text; the page's own fonts draw it.
FONT = "DejaVu Sans"

DOTS: Any = {"marker": "o", "markersize": 3}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cascade",
    "font.sans-serif": [FONT],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "grid.color": "#e6e9ed",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": INK,
}


class PlotsMissingError(CascadeError):
    """matplotlib is not installed."""


def latency(figures: Figures, words: Words) -> str:
    """The latency of each path by share of decisions, with the limits of the latency objectives."""

    def draw(axes: Any) -> None:
        for path, colour in PATH_COLOURS.items():
            histogram = figures.account.counters.paths[path]  # type: ignore[index]
            if not histogram.count:
                continue
            shares = [share for share in CURVE if histogram.count >= 1.0 / (1.0 - share)] or [0.5]
            latency_ms = [1e3 * histogram.quantile(share) for share in shares]
            places = [-_log_rest(share) for share in shares]
            axes.plot(places, latency_ms, color=colour, label=words(f"path_{path}"), **DOTS)
        for objective in figures.account.service_level.latency:
            axes.axhline(objective.limit_ms, color=PATH_COLOURS.get(objective.path, MUTED), linestyle=":", linewidth=1)
            limit = words("plot_limit", objective=objective_text(objective.name, words))
            axes.text(0.05, objective.limit_ms, limit, fontsize=8, color=MUTED, va="bottom")
        ticks = {"50 %": 0.5, "90 %": 0.9, "99 %": 0.99, "99.9 %": 0.999, "99.99 %": 0.9999}
        axes.set_xticks([-_log_rest(share) for share in ticks.values()], ticks)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_yticks([tick for tick in MS_TICKS if low <= tick <= high], minor=False)
        axes.set_yticks([], minor=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(words("plot_latency_x"))
        axes.set_ylabel(words("plot_latency_y"))
        _legend(axes)

    return svg(draw, 3.4, words)


def energy(books: Books, decisions: int, words: Words) -> str:
    """mJ per decision, a bar for each use and kind. `decisions`: more than 0."""

    def draw(axes: Any) -> None:
        rows = [
            (line, kind, 1e3 * joules / decisions)
            for kind in KIND_COLOURS
            for line, joules in books.by_line(kind).items()  # type: ignore[arg-type]
        ]
        rows.sort(key=lambda row: row[2])
        places = range(len(rows))
        axes.barh(places, [value for _, _, value in rows], color=[KIND_COLOURS[kind] for _, kind, _ in rows])
        for place, (_, _, value) in zip(places, rows, strict=True):
            axes.text(value, place, f" {number_text(value)}", va="center", fontsize=8, color=MUTED)
        axes.set_yticks(places, [line_text(line, words) for line, _, _ in rows])
        axes.set_xlabel(words("plot_energy"))
        axes.margins(x=0.12)
        for kind in dict.fromkeys(kind for _, kind, _ in rows):
            axes.barh([0], [0], color=KIND_COLOURS[kind], label=words(f"kind_{kind}"))
        _legend(axes, "lower right")

    return svg(draw, 0.9 + 0.28 * max(len(books.entries), 3), words)


def energy_over_time(figures: Figures, words: Words) -> str:
    """mJ per decision in each interval, by kind."""

    def draw(axes: Any) -> None:
        for kind, colour in KIND_COLOURS.items():
            values = [
                next((total.per_transaction_mj for total in point.summary.energy_totals if total.kind == kind), None)
                for point in figures.points
            ]
            _over_time(axes, figures, values, colour, words(f"kind_{kind}"))
        axes.set_ylabel(words("plot_energy"))
        axes.set_ylim(bottom=0)
        _legend(axes)

    return svg(draw, 2.4, words)


def escalated_over_time(figures: Figures, words: Words) -> str:
    """The escalation rate in each interval, per cent."""

    def draw(axes: Any) -> None:
        shares = [point.summary.escalation_share for point in figures.points]
        percentages = [None if share is None else 100 * share for share in shares]
        _over_time(axes, figures, percentages, PATH_COLOURS["escalated"])
        axes.set_ylabel(words("plot_escalated"))
        axes.set_ylim(bottom=0)

    return svg(draw, 2.4, words)


def budget_over_time(figures: Figures, words: Words) -> str:
    """The part of each error budget that is left after each interval, per cent, at least -100."""

    def draw(axes: Any) -> None:
        for event, colour in zip(figures.events, cycle((*PATH_COLOURS.values(), "#cc79a7"))):
            left = [max(100 * point.budget_left[event.name], -100.0) for point in figures.points]
            _over_time(axes, figures, left, colour, objective_text(event.name, words))
        axes.axhline(0, color=INK, linewidth=1)
        axes.set_ylabel(words("plot_budget"))
        axes.set_ylim(-105, 105)
        _legend(axes, "lower left")

    return svg(draw, 2.8, words)


def sensitivity(swings: Sequence[Swing], value: float, unit: str, words: Words) -> str:
    """A bar for the swing of each input around a figure other than 0.

    swings: the widest first. value: the figure as assumed. unit: its unit, for the axis. words: texts of the labels.
    """

    def draw(axes: Any) -> None:
        shown = list(reversed(swings))
        rows = range(len(shown))
        axes.barh(rows, [bar.high - bar.low for bar in shown], left=[bar.low for bar in shown], color="#56b4e9")
        axes.axvline(value, color=INK, linewidth=1)
        for row, bar in zip(rows, shown, strict=True):
            axes.text(bar.low, row, f"{bar.low_text} ", va="center", ha="right", fontsize=8, color=MUTED)
            axes.text(bar.high, row, f" {bar.high_text}", va="center", ha="left", fontsize=8, color=MUTED)
        axes.set_yticks(rows, [words(f"input_{bar.input}") for bar in shown])
        axes.set_xlabel(unit)
        low, high = min(bar.low for bar in shown), max(bar.high for bar in shown)
        axes.set_xlim(low - 0.14 * (high - low), high + 0.14 * (high - low))

    return svg(draw, 0.9 + 0.34 * len(swings), words)


def line_text(line: str, words: Words) -> str:
    """The name of a line of the books in the report's language; stages keep their own names."""
    return words.get(f"line_{line}", line)


def objective_text(name: str, words: Words) -> str:
    """The name of an objective in the report's language."""
    quantile, of, path = name.partition(" of ")
    if not of:
        return words("objective_degraded")
    return words("objective_latency", quantile=quantile.removeprefix("p"), path=words.get(f"path_{path}", path))


def _log_rest(share: float) -> float:
    return math.log10(1.0 - share)


def _legend(axes: Any, place: str = "best") -> None:
    """Adds a legend where there is something to name."""
    # matplotlib warns of a legend without entries
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, loc=place)


def _over_time(
    axes: Any, figures: Figures, values: Sequence[float | None], colour: str, label: str | None = None
) -> None:
    """Plots a value for each point of the report, without those that are None."""
    from matplotlib import dates

    known = [(point.at, value) for point, value in zip(figures.points, values, strict=True) if value is not None]
    if known:
        axes.plot(*zip(*known, strict=True), color=colour, label=label, **DOTS)
    # without limits, matplotlib finds no ticks for a single point
    step = timedelta(seconds=max(figures.interval_s, 1.0))
    axes.set_xlim(figures.points[0].at - step, figures.points[-1].at + step)
    library: Any = dates  # without types
    # with the default of minticks, matplotlib warns that it has no ticks for 4 minutes, 4 hours or 4 days
    locator = library.AutoDateLocator(minticks=3, maxticks=8)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(library.ConciseDateFormatter(locator, show_offset=False))


def svg(draw: Callable[[Any], None], height_in: float, words: Words) -> str:
    """The SVG of what `draw` draws into matplotlib's axes. Raises PlotsMissingError without matplotlib.

    height_in: inches. words: of the page's language.
    """
    # matplotlib's log warns of its font cache and its configuration directory, which the report does not need
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotsMissingError("the plots of the report need matplotlib: install cascade-fraud[report]") from error
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()  # the user's own settings could name fonts that do not exist
        mpl.rcParams.update(STYLE)
        # the browser draws the letters that are missing in FONT
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        draw(figure.subplots())
        margin = MARGINS[words.language]
        figure.get_layout_engine().set(rect=(margin, 0.0, 1.0 - margin, 1.0))  # type: ignore[union-attr,call-arg]
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return f"<div class=wide>{text[text.index('<svg') :].replace(repr(FONT), 'sans-serif')}</div>"
