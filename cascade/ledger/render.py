"""Prints a ledger's summary as tables for a terminal of 80 columns or more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cascade.ledger.attribution import Books
from cascade.ledger.burn import ALARMS, WINDOWS_S, BurnStatus, ObjectiveBurn
from cascade.ledger.deep_cost import Estimate
from cascade.ledger.sla import ObjectiveResult, Status
from cascade.ledger.summary import (
    CarbonFigures,
    ClockFigures,
    Counterfactual,
    EnergyComparison,
    EnergyFigure,
    LatencyFigures,
    LedgerSummary,
    QualityComparison,
    WatchFigures,
)

_ABSENT: Final = "–"
LATENCY_COLUMNS: Final = ("p50 ms", "p99 ms", "p99.9 ms", "max ms")
_DECIMALS_MAX: Final = 6
_STATUS_STYLE: Final[dict[Status, str]] = {"met": "bold green", "missed": "bold red", "no data": "yellow"}
_BURN_STYLE: Final[dict[BurnStatus, str]] = {
    "within": "bold green",
    "ticket": "bold yellow",
    "page": "bold red",
    "no data": "yellow",
}
# Kafka stamps records in whole milliseconds.
_SKEW_SHOWN_MS: Final = 1.0
# As the worker does, which calls a state that covers less of its longest window cold.
_COVERED_SHOWN: Final = 0.9
_KIND_STYLE: Final = {"measured": "green", "modelled": "yellow"}
_NO_METERS: Final = Padding(Text("Energy: unknown, because the ledger has no meter", style="yellow"), (1, 1, 0, 1))


def render(summary: LedgerSummary, console: Console) -> None:
    """Prints decisions, objectives, stages, energy, carbon and quality, and the machine and bundle behind them."""
    console.print()
    console.print(_headline(summary))
    console.print(_decisions(summary))
    console.print(_objectives(summary.objectives))
    if summary.burn:
        console.print(_burn(summary.burn))
    stages = _stages(summary)
    if stages.row_count:
        console.print(stages)
    console.print(_energy(summary) if summary.energy else _NO_METERS)
    if summary.books is not None and summary.books.entries:
        console.print(_books(summary.books, summary))
    if summary.carbon is not None:
        console.print(_carbon(summary.carbon))
    if summary.counterfactual is not None:
        console.print(_deep_only(summary.counterfactual))
    if summary.quality is not None:
        console.print(_quality(summary.quality))
    console.print(_footer(summary))


def _headline(summary: LedgerSummary) -> Padding:
    figures = [
        (f"{summary.transactions:,}", " decisions in "),
        (_duration(summary.elapsed_s), "   "),
        (f"{summary.per_second:,.0f}", "/s   "),
        (percent_text(summary.escalation_share), " escalated   "),
        (percent_text(summary.degraded_share), " degraded"),
    ]
    return Padding(Text.assemble(*(part for figure, text in figures for part in ((figure, "bold"), text))), (0, 1))


def _table(title: str, first: str, *numbers: str, last: str = "", caption: str | None = None) -> Table:
    """A table with a column of names, right-aligned columns of numbers and, if it has a header, a column of words."""
    table = Table(
        title=f"\n {title}",
        caption=None if caption is None else "\n".join(f" {line}" for line in caption.splitlines()),
        title_justify="left",
        caption_justify="left",
        title_style="bold cyan",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        header_style="dim",
        padding=(0, 1),
        show_edge=False,
    )
    table.add_column(first, min_width=12, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    if last:
        table.add_column(last, no_wrap=True)
    return table


def _decisions(summary: LedgerSummary) -> Table:
    columns = ("decisions", "share %", *LATENCY_COLUMNS)
    table = _table("Decisions, and latency from append to decision", "path", *columns, caption=_events(summary))
    for name, path in summary.paths.items():
        if name == "duplicate" and not path.decisions:
            continue
        if name == "all":
            table.add_section()
        cells = (f"{path.decisions:,}", number_text(path.share, 100.0), *latency_cells(path.latency))
        table.add_row(name, *cells, style="bold" if name == "all" else "")
    return table


def _events(summary: LedgerSummary) -> str | None:
    """Causes, reasons and unusual events, one line each; None if there are none."""
    events = {
        "late deep answers": summary.deep.late_answers,
        "hedged deep calls": summary.deep.hedged_calls,
        "gaps in the log": summary.offset_gaps,
        "reconnections": max(summary.sessions - summary.processes, 0),
    }
    lines = [
        _listing("causes of degraded decisions", summary.degraded_by_cause, summary.transactions),
        _listing("reasons of dead letters", summary.dead_letters),
        _listing("events", {name: count for name, count in events.items() if count}),
        _clock(summary.clock),
        _watch(summary.watch, summary.ended),
    ]
    if summary.budget_factor_min < 1.0:
        lines.append(f"overload lowered the escalation budget to as little as {summary.budget_factor_min:.1%} of it")
    covered = summary.state_covered_min
    if covered is not None and covered < _COVERED_SHOWN:
        now = f"{summary.state_covered or 0.0:.0%}"
        lines.append(f"cold state: it covered as little as {covered:.0%} of its longest window; {now} at the end")
    if summary.recovery is not None:
        seconds = summary.recovery.max_ms / 1e3
        lines.append(f"partitions whose state was restored: {summary.recovery.count}, each within {seconds:.1f} s")
    return "\n".join(line for line in lines if line) or None


def _clock(clock: ClockFigures | None) -> str:
    """The bounds on the offset of the worker's clock; empty if they are within the resolution of the stamps."""
    if clock is None:
        return ""
    low_ms, high_ms = clock.least_wait_ms, clock.least_wait_ms_highest
    bounds = []
    if low_ms < -_SKEW_SHOWN_MS:
        bounds.append(f"behind by at least {number_text(-low_ms)} ms")
    if high_ms > _SKEW_SHOWN_MS:
        bounds.append(f"ahead by at most {number_text(high_ms)} ms")
    if clock.early_records:
        bounds.append(f"{clock.early_records:,} records with a stamp ahead of it")
    return f"the worker's clock against the stamps of records: {', '.join(bounds)}" if bounds else ""


def _watch(watch: WatchFigures | None, ended: datetime) -> str:
    """What labels say of the certificate; empty without one."""
    if watch is None:
        return ""
    state = "no longer holds" if not watch.holds else "has expired" if ended >= watch.expires else "holds"
    found = f"{watch.caught:,} of {watch.first_frauds:,} first frauds caught"
    return f"certificate {state}: {found}, at least {percent_text(watch.at_least)} certified"


def _listing(title: str, counts: Mapping[str, int], total: int = 0) -> str:
    shares = {name: f" ({percent_text(count / total)})" if total else "" for name, count in counts.items()}
    listed = ", ".join(f"{name} {count:,}{shares[name]}" for name, count in counts.items())
    return f"{title}: {listed}" if counts else ""


def _objectives(objectives: Sequence[ObjectiveResult]) -> Table:
    table = _table("Service level", "objective", "value", "limit", last="status")
    for objective in objectives:
        status = Text(objective.status, style=_STATUS_STYLE[objective.status])
        table.add_row(objective.name, *objective_cells(objective), status)
    return table


def _burn(objectives: Sequence[ObjectiveBurn]) -> Table:
    notes = ["at a burn rate of 1, the budget is used up exactly at the end of its period"]
    notes += [f"{alarm.severity}: above {alarm.factor:g} over {alarm.long} and over {alarm.short}" for alarm in ALARMS]
    partial = [rate for rate in objectives[0].rates if rate.covered_s < rate.window_s]
    if partial:
        covered = ", ".join(f"{_duration(rate.covered_s)} of {rate.window}" for rate in partial)
        notes.append(f"the journal covers only {covered}")
    title = "Error budgets left (negative: exceeded), and burn rates by window"
    table = _table(title, "objective", "left %", *WINDOWS_S, last="status", caption="\n".join(notes))
    for objective in objectives:
        by_window = {rate.window: rate.rate for rate in objective.rates}
        rates = (number_text(by_window.get(window)) for window in WINDOWS_S)
        status = Text(objective.status, style=_BURN_STYLE[objective.status])
        table.add_row(objective.name, number_text(objective.budget_left, 100.0), *rates, status)
    return table


def _stages(summary: LedgerSummary) -> Table:
    watts = summary.watts_per_core
    deep = summary.deep
    notes = []
    if watts is not None:
        notes.append(f"* modelled: CPU seconds of the worker's thread × {watts:g} W per busy core")
    if deep.rows_per_call is not None:
        notes.append(f"deep calls: {deep.calls:,}, {deep.rows_per_call:.1f} transactions each")
    columns = (*LATENCY_COLUMNS, "CPU µs/tx", "mJ/tx*")
    table = _table("Stages, and the time of a transaction in them", "stage", *columns, caption="\n".join(notes) or None)
    for name, stage in summary.stages.items():
        if stage.latency is None and not stage.cpu_s:
            continue
        # the worker uses no CPU while it waits, or while the model server works
        cpu = (_ABSENT, _ABSENT)
        if stage.cpu_s:
            cpu = (number_text(stage.cpu_us_per_transaction), number_text(stage.modelled_mj_per_transaction))
        table.add_row(name, *latency_cells(stage.latency), *cpu)
    return table


def _energy(summary: LedgerSummary) -> Table:
    caption = "measured and modelled joules are never added up"
    table = _table("Energy", "meter", "J", "mJ/tx", last="kind", caption=caption)
    table.add_column("source", overflow="fold", ratio=1)
    for figure in summary.energy:
        cells = (number_text(figure.energy_j), number_text(figure.per_transaction_mj))
        table.add_row(figure.meter, *cells, _kind(figure.kind), _source(figure))
    sums = [total for total in summary.energy_totals if len(total.meters) > 1]
    if sums:
        table.add_section()
    for total in sums:
        cells = (number_text(total.energy_j), number_text(total.per_transaction_mj))
        source = Text(" + ".join(total.meters))
        table.add_row(f"all {total.kind}", *cells, _kind(total.kind), source, style="bold")
    return table


def _books(books: Books, summary: LedgerSummary) -> Table:
    """The joules by use, and the residual of each meter."""
    notes = _books_notes(books, summary)
    table = _table("Energy by use", "use", "J", "% of kind", "mJ/tx", last="kind", caption=notes)
    for kind in dict.fromkeys(entry.kind for entry in books.entries):
        lines = books.by_line(kind)
        whole_j = sum(lines.values())
        for line, energy_j in lines.items():
            per_tx = 1e3 * energy_j / summary.transactions if summary.transactions else None
            cells = (number_text(energy_j), number_text(energy_j / whole_j if whole_j else None, 100.0))
            table.add_row(line, *cells, number_text(per_tx), _kind(kind))
    return table


def _books_notes(books: Books, summary: LedgerSummary) -> str:
    costs = ", ".join(f"{path.path} {number_text(path.mj_per_decision)} mJ ({path.kind})" for path in books.paths)
    residuals = ", ".join(
        f"{closing.meter} {number_text(closing.residual_share, 100.0)} %"
        + ("" if closing.check_share is None else f" (power integrated {closing.check_share:+.2%})")
        for closing in books.closings
    )
    # joules per fraud need joules and frauds of the same transactions
    quality = summary.quality if summary.quality and summary.quality.transactions == summary.transactions else None
    model = next((model for model in quality.models if model.frauds_caught), None) if quality else None
    per_fraud = ", ".join(
        f"{number_text(total.energy_j / model.frauds_caught)} J ({total.kind})"
        for total in summary.energy_totals
        if model is not None and total.energy_j is not None
    )
    notes = [
        f"per decision, without idle: {costs}" if costs else "",
        f"per fraud caught by {model.name}: {per_fraud}" if model is not None and per_fraud else "",
        f"residual: {residuals}" if residuals else "",
        "" if books.idle_stated else "idle power is not stated: these lines include it if the meter does",
    ]
    return "\n".join(note for note in notes if note)


def _carbon(carbon: CarbonFigures) -> Table:
    caption = "\n".join([*carbon.bases, "((E · I) + M) per R, ISO/IEC 21031:2024"])
    table = _table("Carbon", "gCO2e", "total", "per million decisions", last="kind", caption=caption)
    for total in carbon.totals:
        cells = (number_text(total.operational_g), number_text(total.per_million_g))
        table.add_row("operational", *cells, _kind(total.kind))
    table.add_row("embodied", number_text(carbon.embodied_g), number_text(carbon.embodied_per_million_g), "stated")
    if carbon.sci_g_per_million is not None:
        table.add_section()
        table.add_row("SCI", "", number_text(carbon.sci_g_per_million), _kind(carbon.totals[0].kind), style="bold")
    return table


def _deep_only(counterfactual: Counterfactual) -> Table:
    """The cascade against deep-only, by kind: with large calls, and with calls as large as the cascade's own."""
    title = f"Deep-only for the same {counterfactual.transactions:,} transactions"
    columns = ("J", "×", "saved %", "even at %")
    table = _table(title, "service", *columns, last="kind", caption=_deep_only_notes(counterfactual))
    for comparison in counterfactual.comparisons:
        kind = _kind(comparison.kind)
        table.add_row("cascade", number_text(comparison.cascade_j), "1", _ABSENT, _ABSENT, kind)
        for other in filter(None, (comparison.filled, comparison.as_called)):
            even = other.break_even_share
            cells = (number_text(other.energy_j.value), number_text(other.ratio.value))
            even_text = _ABSENT if even is None else number_text(even.value, 100.0)
            name = f"deep-only, {other.rows_per_call:.3g} each"
            table.add_row(name, *cells, _interval(other.saving_share, 100.0), even_text, kind)
    return table


def _deep_only_notes(counterfactual: Counterfactual) -> str:
    limit = "" if counterfactual.limit_ms is None else f" within {counterfactual.limit_ms:g} ms"
    escalated = percent_text(counterfactual.asked / counterfactual.transactions)
    notes = [
        *(_verdict(comparison) for comparison in counterfactual.comparisons),
        "each: transactions per deep call; in the first row as many as arrive at"
        f" {counterfactual.per_second:,.0f}/s{limit}, in the second as many as in the cascade's own calls",
        f"even at: the escalation rate at which both use the same energy; here it was {escalated}",
        *(_own_calls(comparison) for comparison in counterfactual.comparisons),
        "both include fetching, decoding, features, producing and idle; deep-only has no screener",
        f"cost of a deep call: measured {counterfactual.measured_at:%Y-%m-%d %H:%M} UTC on {counterfactual.server}:",
        counterfactual.method,
    ]
    if counterfactual.undivided:
        notes.append(f"not compared, because they measure the whole machine: {', '.join(counterfactual.undivided)}")
    return "\n".join(note for note in notes if note)


def _verdict(comparison: EnergyComparison) -> str:
    """The result of `filled`, which favours deep-only, in words."""
    share, kind = comparison.filled.saving_share, comparison.kind
    if share.high < 0:
        return f"deep-only would have used less energy ({kind})"
    if share.low <= 0:
        return f"no difference is shown: the interval of the saving contains zero ({kind})"
    return f"the cascade saves {number_text(share.low, 100.0)} to {number_text(share.high, 100.0)} % ({kind})"


def _own_calls(comparison: EnergyComparison) -> str:
    if comparison.own_deep_priced_j is None:
        return ""
    metered, priced = number_text(comparison.own_deep_j.value), number_text(comparison.own_deep_priced_j.value)
    return f"the cascade's own deep calls: {metered} J by its meters, {priced} J at a call's cost ({comparison.kind})"


def _interval(estimate: Estimate, scale: float = 1.0) -> str:
    ends = f"{number_text(estimate.low, scale)} to {number_text(estimate.high, scale)}"
    return f"{number_text(estimate.value, scale)} ({ends})"


def _kind(kind: str | None) -> Text:
    return Text(_ABSENT) if kind is None else Text(kind, style=_KIND_STYLE[kind])


def _source(figure: EnergyFigure) -> Text:
    return Text(figure.source, style="dim") if figure.problem is None else Text(figure.problem, style="red")


def _quality(quality: QualityComparison) -> Table:
    title = f"Quality on {quality.transactions:,} transactions, {quality.frauds:,} of them fraud"
    columns = ("caught", "missed", "false alarms", "AUC", "AP", "CP@100")
    caption = f"alerts: {quality.alert_rule}\nAP: average precision; CP@100: card precision top-100"
    table = _table(title, "decided by", *columns, caption=caption)
    for model in quality.models:
        counts = (model.frauds_caught, model.frauds_missed, model.false_alarms)
        scores = (model.auc_roc, model.average_precision, model.card_precision_100)
        table.add_row(
            model.name,
            *(_ABSENT if count is None else f"{count:,}" for count in counts),
            *(_ABSENT if score is None else f"{score:.3f}" for score in scores),
        )
    return table


def _footer(summary: LedgerSummary) -> Padding:
    bundle = f"bundle {summary.bundle_version}; " if summary.bundle_version else ""
    bundle += f"screener by {summary.screener}; " if summary.screener else ""
    machines = "\n".join(machine.text for machine in (summary.machine, *summary.other_machines))
    span = f"{summary.started:%Y-%m-%d %H:%M:%S} to {summary.ended:%H:%M:%S} UTC"
    text = f"{machines}\n{_processes(summary)}{bundle}{span}"
    return Padding(Text(text, style="dim"), (1, 1))


def _processes(summary: LedgerSummary) -> str:
    if summary.processes == 1:
        return ""
    lost = f", {summary.restarts} unexpected ends (each lost its last second)" if summary.restarts else ""
    return f"{summary.processes} workers{lost}; "


def objective_cells(objective: ObjectiveResult) -> tuple[str, str]:
    """The value and the limit of an objective with their unit."""
    scale, unit = (100.0, "%") if objective.unit == "share" else (1.0, objective.unit)
    value = _ABSENT if objective.value is None else f"{number_text(objective.value, scale)} {unit}"
    return value, f"≤ {objective.limit * scale:g} {unit}"


def latency_cells(figures: LatencyFigures | None) -> tuple[str, str, str, str]:
    """The cells of LATENCY_COLUMNS."""
    if figures is None:
        return (_ABSENT,) * 4
    p50, p99, p999 = number_text(figures.p50_ms), number_text(figures.p99_ms), number_text(figures.p999_ms)
    return p50, p99, p999, number_text(figures.max_ms)


def number_text(value: float | None, scale: float = 1.0) -> str:
    """A number with three significant digits, the accuracy of the histograms, and without an exponent."""
    if value is None:
        return _ABSENT
    scaled = value * scale
    if not scaled:
        return "0"
    # of the rounded number, because 9.996 becomes 10.0
    decimals = 2 - math.floor(math.log10(abs(float(f"{scaled:.2e}"))))
    return f"{scaled:,.{min(max(decimals, 0), _DECIMALS_MAX)}f}"


def percent_text(share: float | None) -> str:
    """A share in 0..1 as per cent, in the form of `number_text`."""
    return _ABSENT if share is None else f"{number_text(share, 100.0)} %"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
