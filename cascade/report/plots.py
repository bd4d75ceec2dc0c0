"""The report's plots, as SVG whose text stays text, so that any language's letters are the reader's own."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from cascade.errors import CascadeError
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
# Room at the left, as a share of the width: full-width letters are wider than the drawing library takes them for.
MARGINS = {"en": 0.0, "ja": 0.08}
_FONT = re.compile(r" 'DejaVu Sans'(?:, [^;\"]*)?")


class PlotsMissingError(CascadeError):
    """The library that draws is not installed."""


def latency(figures: Figures, words: Words) -> str:
    """Latency by share of decisions, for each path, with the limits of its p99."""

    def draw(axes: Any) -> None:
        for path, colour in PATH_COLOURS.items():
            held = figures.account.counters.paths[path]  # type: ignore[index]
            if not held.count:
                continue
            shares = [share for share in CURVE if held.count >= 1.0 / (1.0 - share)] or [0.5]
            places = [-_log_rest(share) for share in shares]
            axes.plot(places, [1e3 * held.quantile(share) for share in shares], marker="o", markersize=3,
                      color=colour, label=words(f"path_{path}"))  # fmt: skip
        for objective in figures.account.service_level.latency:
            axes.axhline(objective.limit_ms, color=PATH_COLOURS.get(objective.path, MUTED), linestyle=":", linewidth=1)
        ticks = [0.5, 0.9, 0.99, 0.999, 0.9999]
        axes.set_xticks([-_log_rest(share) for share in ticks], [f"{share:.2%}".rstrip("0%").rstrip(".") + " %"
                                                                 for share in ticks])  # fmt: skip
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_yticks([tick for tick in MS_TICKS if low <= tick <= high], minor=False)
        axes.set_yticks([], minor=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for objective in figures.account.service_level.latency:
            axes.text(0.05, objective.limit_ms, words("plot_limit"), fontsize=8, color=MUTED, va="bottom")
        axes.set_xlabel(words("plot_latency_x"))
        axes.set_ylabel(words("plot_latency_y"))
        axes.legend(frameon=False)

    return _svg(draw, 3.4, words)


def energy(figures: Figures, words: Words) -> str:
    """mJ a decision by line, a bar for each kind."""
    books = figures.summary.books
    decisions = figures.summary.transactions

    def draw(axes: Any) -> None:
        if books is None:
            return
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
        axes.legend(frameon=False, loc="lower right")

    lines = 0 if books is None else len(books.entries)
    return _svg(draw, 0.9 + 0.28 * max(lines, 3), words)


def energy_over_time(figures: Figures, words: Words) -> str:
    """mJ a decision by kind."""

    def draw(axes: Any) -> None:
        for kind, colour in KIND_COLOURS.items():
            told = [
                (point.at, total.per_transaction_mj)
                for point in figures.points
                for total in point.summary.energy_totals
                if total.kind == kind and total.per_transaction_mj is not None
            ]
            if told:
                axes.plot([at for at, _ in told], [value for _, value in told], color=colour, marker="o",
                          markersize=3, label=words(f"kind_{kind}"))  # fmt: skip
        axes.set_ylabel(words("plot_energy"))
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        _time(axes)

    return _svg(draw, 2.4, words)


def escalated_over_time(figures: Figures, words: Words) -> str:
    """Per cent of the decisions that the deep model was asked for."""

    def draw(axes: Any) -> None:
        told = [(point.at, 100 * share) for point in figures.points
                if (share := point.summary.escalation_share) is not None]  # fmt: skip
        axes.plot([at for at, _ in told], [value for _, value in told], color=PATH_COLOURS["escalated"], marker="o",
                  markersize=3)  # fmt: skip
        axes.set_ylabel(words("plot_escalated"))
        axes.set_ylim(bottom=0)
        _time(axes)

    return _svg(draw, 2.4, words)


def budget_over_time(figures: Figures, words: Words) -> str:
    """Per cent left of each objective's error budget."""

    def draw(axes: Any) -> None:
        for place, event in enumerate(figures.events):
            told = [(point.at, max(100 * point.budget_left[event.name], -100.0)) for point in figures.points]
            colour = (*PATH_COLOURS.values(), "#cc79a7")[place % 4]
            axes.plot([at for at, _ in told], [value for _, value in told], color=colour, marker="o", markersize=3,
                      label=objective_text(event.name, words))  # fmt: skip
        axes.axhline(0, color=INK, linewidth=1)
        axes.set_ylabel(words("plot_budget"))
        axes.set_ylim(-105, 105)
        axes.legend(frameon=False, loc="lower left")
        _time(axes)

    return _svg(draw, 2.8, words)


def sensitivity(found: Sequence[Swing], value: float, unit: str, words: Words) -> str:
    """A bar for each input, from the figure at its low end to that at its high end."""

    def draw(axes: Any) -> None:
        shown = list(reversed(found))
        places = range(len(shown))
        axes.barh(places, [one.high - one.low for one in shown], left=[one.low for one in shown], color="#56b4e9")
        axes.axvline(value, color=INK, linewidth=1)
        for place, one in zip(places, shown, strict=True):
            axes.text(one.low, place, f"{one.low_text} ", va="center", ha="right", fontsize=8, color=MUTED)
            axes.text(one.high, place, f" {one.high_text}", va="center", ha="left", fontsize=8, color=MUTED)
        axes.set_yticks(places, [words(f"input_{one.input}") for one in shown])
        axes.set_xlabel(unit)
        low, high = min(one.low for one in shown), max(one.high for one in shown)
        axes.set_xlim(low - 0.14 * (high - low), high + 0.14 * (high - low))

    return _svg(draw, 0.9 + 0.34 * len(found), words)


def line_text(line: str, words: Words) -> str:
    """A line of the books in the report's language; a stage's name is its own."""
    keys = {
        "idle": "line_idle", "worker, besides its stages": "line_rest", "deep answers": "line_deep",
        "deep answers that decided nothing": "line_wasted", "machine, not divided": "line_undivided",
        "residual": "line_residual",
    }  # fmt: skip
    return words(keys[line]) if line in keys else line


def objective_text(name: str, words: Words) -> str:
    """An objective's name in the report's language."""
    quantile, of, path = name.partition(" of ")
    if not of:
        return words("objective_degraded")
    return words("objective_latency", quantile=quantile.removeprefix("p"), path=words.either(f"path_{path}", path))


def _log_rest(share: float) -> float:
    return math.log10(1.0 - share)


def _time(axes: Any) -> None:
    from matplotlib import dates

    library: Any = dates  # without types
    locator = library.AutoDateLocator(maxticks=8)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(library.ConciseDateFormatter(locator, show_offset=False))


def _svg(draw: Callable[[Any], None], height_in: float, words: Words) -> str:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotsMissingError("the report's plots need matplotlib: install cascade-fraud[report]") from error
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "cascade", "font.family": "sans-serif", "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e9ed",
        "axes.axisbelow": True, "axes.edgecolor": MUTED, "text.color": INK, "axes.labelcolor": INK,
        "xtick.color": MUTED, "ytick.color": INK,
    }  # fmt: skip
    with mpl.rc_context(settings), warnings.catch_warnings():
        # letters that the drawing library's own font does not have are the reader's to draw
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        draw(figure.subplots())
        margin = MARGINS[words.language]
        figure.get_layout_engine().set(rect=(margin, 0.0, 1.0 - margin, 1.0))  # type: ignore[union-attr,call-arg]
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return _FONT.sub(" sans-serif", text[text.index("<svg") :])
