"""The report as a self-contained HTML page with its plots as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable
from html import escape
from typing import Any

import msgspec
import numpy as np

from bench.cluster import origin
from bench.pipeline.report import PATHS_SHOWN, PipelineReport, Standing, faults_text, less_work_text, ratio_text
from bench.pipeline.turn import LiveFigures
from cascade.errors import CascadeError

# Colours that colour-blind readers can tell apart (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#6b6b6b", "#b8a200", "#000000", "#7a3b9e")
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note, footer { color: #57606a; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #d8dee4; white-space: nowrap; }
th { color: #57606a; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tr.reference td { font-weight: 600; } td.spread { color: #57606a; font-size: .8rem; }
svg { max-width: 100%; height: auto; } pre { overflow-x: auto; background: #f6f8fa; padding: .8rem; font-size: .8rem; }
"""
STAGES = ("decode", "features", "screener", "decide", "produce")


def make_page(report: PipelineReport) -> str:
    """The page as HTML; it needs matplotlib, see `check_plots`."""
    scenario = report.scenario
    machine = f"{report.machine.processor}, {report.machine.cores} cores, shared by service, broker, Triton and load."
    parts = [
        f"<h1>Cascade: {escape(scenario.name)}</h1>",
        f"<p class=note>Medians of {scenario.rounds} rounds in which the variants took turns on the same machine;"
        f" ratios are to <b>{escape(scenario.reference)}</b> in the same round. {escape(machine)}</p>",
        "<h2>Full speed: a backlog</h2>",
        _speed(report),
        *(
            f"<p class=note>{escape(standing.variant)}: {text}</p>"
            for standing in report.standings
            if (text := less_work_text(standing))
        ),
        _plot(_speeds, report),
        "<p class=note>CPU time is of the service and its model server, for a transaction, without the broker's.</p>",
    ]
    if any(turn.live is not None for turn in report.turns):
        goals = scenario.objectives
        parts += [
            "<h2>Open-loop load: from scheduled departure to visible decision</h2>",
            _latency(report),
            "<p class=note>The load follows its schedule whatever the service does, and latency counts from the"
            " schedule, so that coordinated omission cannot hide a delay. Objectives: screened p99 ≤"
            f" {goals.screened_p99_ms:g} ms, escalated p99 ≤ {goals.escalated_p99_ms:g} ms.</p>",
            "<h2>Latency by percentile</h2>",
            _plot(_percentiles, report),
            "<h2>p99 by throughput</h2>",
            _plot(_throughput, report),
        ]
    if any(standing.stages_us for standing in report.standings):
        parts += ["<h2>CPU time of the service by stage</h2>", _plot(_stages, report)]
    if report.skipped:
        rows = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in report.skipped.items())
        parts += ["<h2>Not run here</h2>", f"<ul>{rows}</ul>"]
    settings = msgspec.json.format(msgspec.json.encode(scenario), indent=2).decode()
    parts += [
        f"<h2>Scenario</h2><pre>{escape(settings)}</pre>",
        f"<footer>{escape(origin(report.machine, scenario.seed))}; {report.elapsed_s:,.0f} s in all</footer>",
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Cascade: {escape(scenario.name)}</title><style>{STYLE}</style><body>{body}</body></html>\n"
    )


def check_plots() -> None:
    """Raises CascadeError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CascadeError("the page needs matplotlib: pip install 'cascade-fraud[report]'") from error


# --- tables -----------------------------------------------------------------------------------------------------------


def _rows(header: list[str], rows: list[tuple[bool, list[str]]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in header)
    body = "".join(
        f"<tr{' class=reference' if marked else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for marked, cells in rows
    )
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _speed(report: PipelineReport) -> str:
    reference = report.scenario.reference
    rows = []
    for standing in report.standings:
        cells = [
            standing.variant,
            standing.client,
            f"{standing.per_second.median:,.0f}",
            f"{standing.per_second.least:,.0f}–{standing.per_second.largest:,.0f}",
            ratio_text(standing, "per_second", reference),
            f"{standing.cpu_us.median:,.1f}",
            ratio_text(standing, "cpu_us", reference),
            *(_cpu_us(standing, process) for process in ("service", "triton", "broker")),
            faults_text(standing),
        ]
        rows.append((standing.variant == reference, cells))
    header = ["variant", "client", "tx/s", "least–largest", "×", "CPU µs/tx", "×"]
    return _rows([*header, "service", "Triton", "(broker)", "faults/1,000"], rows)


def _latency(report: PipelineReport) -> str:
    rows = []
    for standing in report.standings:
        if standing.live_rate is None:
            continue
        percentiles = [
            f"{by_path[path]:.1f}" if path in by_path else ""
            for path in PATHS_SHOWN
            for by_path in (standing.p50_ms, standing.p99_ms, standing.p999_ms)
        ]
        highest = "" if standing.highest_rate is None else f"{standing.highest_rate.median:,.0f}"
        counts = [f"{standing.degraded_share:.2%}", f"{standing.missing}", highest]
        cells = [standing.variant, f"{standing.live_rate:,.0f}", *percentiles, *counts]
        rows.append((standing.variant == report.scenario.reference, cells))
    percentile_names = [name for path in PATHS_SHOWN for name in (f"{path} p50", "p99", "p99.9")]
    return _rows(["variant", "tx/s", *percentile_names, "degraded", "missing", "highest tx/s"], rows)


def _cpu_us(standing: Standing, process: str) -> str:
    found = standing.cpu_us_by_process.get(process)
    return "" if found is None else f"{found:.1f}"


# --- plots ------------------------------------------------------------------------------------------------------------


def _plot(draw: Callable[[Any, PipelineReport], None], report: PipelineReport) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    draw(figure, report)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both", color="#e6e9ec", linewidth=0.8)
        axes.set_axisbelow(True)
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None})
    text = target.getvalue()
    return f"<div class=wide>{text[text.index('<svg') :]}</div>"


def _colour(report: PipelineReport, name: str) -> str:
    names = [variant.name for variant in report.scenario.variant]
    return COLOURS[names.index(name) % len(COLOURS)]


def _speeds(figure: Any, report: PipelineReport) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    left, right = figure.subplots(1, 2, sharey=True)
    shown = report.standings[::-1]
    for row, standing in enumerate(shown):
        colour = _colour(report, standing.variant)
        for axes, spread, point in ((left, standing.per_second, "none"), (right, standing.cpu_us, "o")):
            errors = [[spread.median - spread.least], [spread.largest - spread.median]]
            # a bar's length has no meaning on a logarithmic axis, so it shows points
            style = {"fmt": point, "markersize": 7, "color": colour, "ecolor": "#57606a", "elinewidth": 1}
            axes.errorbar(spread.median, row, xerr=errors, **style)
        left.barh(row, standing.per_second.median, color=colour)
    left.set_yticks(range(len(shown)), [standing.variant for standing in shown])
    left.set_xlabel("transactions a second")
    right.set_xlabel("CPU µs a transaction (logarithmic)")
    left.xaxis.set_major_formatter(lambda value, _: f"{value / 1e3:g} k" if value else "0")
    right.set_xscale("log")
    right.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.xaxis.set_minor_formatter(NullFormatter())


def _lives(report: PipelineReport, variant: str, tried: bool = False) -> list[LiveFigures]:
    """Figures of a variant's open-loop loads; `tried`: also those of the search for the highest rate."""
    turns = [turn for turn in report.turns if turn.variant == variant and turn.live is not None]
    return [live for turn in turns for live in (turn.live, *(turn.tried if tried else ())) if live is not None]


def _percentiles(figure: Any, report: PipelineReport) -> None:
    for axes, path in zip(figure.subplots(1, 2, sharey=True), PATHS_SHOWN, strict=True):
        limit = getattr(report.scenario.objectives, f"{path}_p99_ms")
        for standing in report.standings:
            lives = _lives(report, standing.variant)
            curves = [live.paths[path].curve for live in lives if path in live.paths]
            if not curves:
                continue
            shares = [float(share) for share in curves[0] if float(share) < 1]
            nines = [-np.log10(1 - share) for share in shares]
            medians = [float(np.median([curve[f"{share:g}"] for curve in curves])) for share in shares]
            colour = _colour(report, standing.variant)
            axes.plot(nines, medians, marker="o", markersize=3, label=standing.variant, color=colour)
        axes.axhline(limit, color="#57606a", linestyle="--", linewidth=1)
        axes.annotate(f"p99 ≤ {limit:g} ms", (4.0, limit), color="#57606a", fontsize=8, va="bottom", ha="right")
        axes.set_yscale("log")
        _plain_ms(axes)
        axes.set_xticks([0, 1, 2, 3, 4], ["0", "90", "99", "99.9", "99.99"])
        axes.set_xlabel(f"{path}: percentile")
    figure.axes[0].set_ylabel("ms (logarithmic)")
    figure.axes[0].legend(frameon=False, fontsize=8)


def _plain_ms(axes: Any) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")


def _throughput(figure: Any, report: PipelineReport) -> None:
    for axes, path in zip(figure.subplots(1, 2, sharey=True), PATHS_SHOWN, strict=True):
        for standing in report.standings:
            lives = _lives(report, standing.variant, tried=True)
            points = sorted((live.rate, live.paths[path].p99_ms) for live in lives if path in live.paths)
            if points:
                line = {"linewidth": 0 if standing.highest_rate is None else 1, "marker": "o", "markersize": 4}
                colour = _colour(report, standing.variant)
                axes.plot(*zip(*points, strict=True), label=standing.variant, color=colour, **line)
        axes.axhline(getattr(report.scenario.objectives, f"{path}_p99_ms"), color="#57606a", ls="--", linewidth=1)
        axes.set_yscale("log")
        _plain_ms(axes)
        axes.set_xlabel(f"{path}: transactions a second")
    figure.axes[0].set_ylabel("p99, ms (logarithmic)")
    figure.axes[0].legend(frameon=False, fontsize=8)


def _stages(figure: Any, report: PipelineReport) -> None:
    axes = figure.subplots()
    shown = [standing for standing in report.standings if standing.stages_us][::-1]
    left = np.zeros(len(shown))
    names = [standing.variant for standing in shown]
    for number, stage in enumerate(STAGES):
        widths = np.array([standing.stages_us.get(stage, 0.0) for standing in shown])
        axes.barh(names, widths, left=left, label=stage, color=COLOURS[number])
        left = left + widths
    service = np.array([standing.cpu_us_by_process.get("service", 0.0) for standing in shown])
    axes.barh(names, np.maximum(service - left, 0), left=left, label="client, commits and loop", color="#d0d7de")
    axes.set_xlabel("CPU µs a transaction: stages by the worker's clock, the rest by the process's")
    axes.legend(frameon=False, fontsize=8, ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))
