"""A ledger's summary as tables for a terminal of 80 columns or more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    ModelQuality,
    QualityComparison,
)

_ABSENT: Final = "–"
_DECIMALS_MAX: Final = 6
_STATUS_STYLE: Final[dict[Status, str]] = {"met": "bold green", "missed": "bold red", "no data": "yellow"}
_BURN_STYLE: Final[dict[BurnStatus, str]] = {
    "within": "bold green", "ticket": "bold yellow", "page": "bold red", "no data": "yellow"
}  # fmt: skip
# Kafka's stamps are whole milliseconds.
_SKEW_SHOWN_MS: Final = 1.0
_KIND_STYLE: Final = {"measured": "green", "modelled": "yellow"}


def render(summary: LedgerSummary, console: Console) -> None:
    """Print a summary: decisions, objectives, stages, energy, quality, and what the figures belong to."""
    console.print()
    console.print(_headline(summary))
    console.print(_decisions(summary))
    console.print(_objectives(summary.objectives))
    if summary.burn:
        console.print(_burn(summary.burn))
    stages = _stages(summary)
    if stages.row_count:
        console.print(stages)
    console.print(_energy(summary) if summary.energy else _no_meters())
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
    gap = "   "
    line = Text.assemble(
        (f"{summary.transactions:,}", "bold"), " decisions in ", (_duration(summary.elapsed_s), "bold"), gap,
        (f"{summary.per_second:,.0f}", "bold"), "/s", gap,
        (percent_text(summary.escalation_share), "bold"), " escalated", gap,
        (percent_text(summary.degraded_share), "bold"), " degraded",
    )  # fmt: skip
    return Padding(line, (0, 1))


def _table(title: str, first: str, *numbers: str, caption: str | None = None) -> Table:
    """A table with one column of names and the rest right-aligned numbers."""
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
    return table


def _decisions(summary: LedgerSummary) -> Table:
    table = _table(
        "Decisions and latency, append to decision",
        "path", "decisions", "share %", "p50 ms", "p99 ms", "p99.9 ms", "max ms",
        caption=_causes(summary),
    )  # fmt: skip
    for name, path in summary.paths.items():
        if name == "duplicate" and not path.decisions:
            continue
        if name == "all":
            table.add_section()
        cells = (f"{path.decisions:,}", number_text(path.share, 100.0), *_latency(path.latency))
        table.add_row(name, *cells, style="bold" if name == "all" else "")
    return table


def _causes(summary: LedgerSummary) -> str | None:
    besides = {
        "late deep answers": summary.deep.late_answers,
        "hedged deep calls": summary.deep.hedged_calls,
        "gaps in the log": summary.offset_gaps,
        "sessions begun again": max(summary.sessions - summary.processes, 0),
    }
    recovery = summary.recovery
    parts = [
        _listing("degraded by", summary.degraded_by_cause, summary.transactions),
        _listing("dead letters by", summary.dead_letters),
        _listing("besides", {name: count for name, count in besides.items() if count}),
        ""
        if not summary.escalation_raised_max
        else f"overload raised the escalation threshold by up to {summary.escalation_raised_max:.1f} log-odds",
        _clock(summary.clock),
        ""
        if recovery is None
        else f"state of {recovery.count} partitions rebuilt, each within {recovery.max_ms / 1e3:.1f} s",
    ]
    return "\n".join(part for part in parts if part) or None


def _clock(clock: ClockFigures | None) -> str:
    """What the waits say of the worker's clock; empty where that is within what the stamps can tell."""
    if clock is None:
        return ""
    low_ms, high_ms = clock.least_wait_ms, clock.least_wait_ms_highest
    said = []
    if low_ms < -_SKEW_SHOWN_MS:
        said.append(f"behind by at least {number_text(-low_ms)} ms")
    if high_ms > _SKEW_SHOWN_MS:
        said.append(f"ahead by at most {number_text(high_ms)} ms")
    if clock.early_records:
        said.append(f"{clock.early_records:,} records came before their time")
    return f"the worker's clock against the records' stamps: {', '.join(said)}" if said else ""


def _listing(title: str, counts: Mapping[str, int], total: int = 0) -> str:
    shown = (
        f"{name} {count:,}" + (f" ({percent_text(count / total)})" if total else "") for name, count in counts.items()
    )
    return f"{title}: {', '.join(shown)}" if counts else ""


def _objectives(objectives: Sequence[ObjectiveResult]) -> Table:
    table = _table("Service level", "objective", "value", "limit", "unit", "margin %", "status")
    for objective in objectives:
        scale, unit = (100.0, "%") if objective.unit == "share" else (1.0, objective.unit)
        table.add_row(
            objective.name,
            number_text(objective.value, scale),
            number_text(objective.limit, scale),
            unit,
            _ABSENT if objective.margin is None else f"{100 * objective.margin:+.0f}",
            Text(objective.status, style=_STATUS_STYLE[objective.status]),
        )
    return table


def _burn(objectives: Sequence[ObjectiveBurn]) -> Table:
    rules = ", ".join(f"{one.severity} above {one.factor:g} over {one.long} and {one.short}" for one in ALARMS)
    partial = {rate.window: rate.covered_s for rate in objectives[0].rates if rate.covered_s < rate.window_s}
    short = ", ".join(f"{window} {_duration(covered_s)}" for window, covered_s in partial.items())
    table = _table(
        "Error budgets, and how fast they burn: 1 uses a budget up exactly",
        "objective", "left %", *WINDOWS_S, "status",
        caption=f"{rules}" + (f"\nthe journal reaches back less far: {short}" if short else ""),
    )  # fmt: skip
    for one in objectives:
        rates = {rate.window: rate.rate for rate in one.rates}
        table.add_row(
            one.name, number_text(one.budget_left, 100.0), *(number_text(rates.get(window)) for window in WINDOWS_S),
            Text(one.status, style=_BURN_STYLE[one.status]),
        )  # fmt: skip
    return table


def _stages(summary: LedgerSummary) -> Table:
    watts = summary.watts_per_core
    deep = summary.deep
    notes = []
    if watts is not None:
        notes.append(f"* modelled: CPU seconds of the worker's own thread × {watts:g} W per busy core")
    if deep.rows_per_call is not None:
        notes.append(f"deep calls: {deep.calls:,}, {deep.rows_per_call:.1f} transactions each")
    table = _table(
        "Stages, time that a transaction spends",
        "stage", "p50 ms", "p99 ms", "p99.9 ms", "max ms", "CPU µs/tx", "mJ/tx*",
        caption="\n".join(notes) or None,
    )  # fmt: skip
    for name, stage in summary.stages.items():
        if stage.latency is None and not stage.cpu_s:
            continue
        # waiting, and the model server's work, take none of the worker's own CPU
        cpu = (_ABSENT, _ABSENT)
        if stage.cpu_s:
            cpu = (number_text(stage.cpu_us_per_transaction), number_text(stage.modelled_mj_per_transaction))
        table.add_row(name, *_latency(stage.latency), *cpu)
    return table


def _energy(summary: LedgerSummary) -> Table:
    table = _table("Energy", "meter", "J", "mJ/tx", caption="measured and modelled joules are never added up")
    table.add_column("kind", no_wrap=True)
    table.add_column("source", overflow="fold", ratio=1)
    for figure in summary.energy:
        table.add_row(
            figure.meter, number_text(figure.energy_j), number_text(figure.per_transaction_mj), _kind(figure.kind),
            _source(figure),
        )  # fmt: skip
    sums = [total for total in summary.energy_totals if len(total.meters) > 1]
    if sums:
        table.add_section()
    for total in sums:
        cells = (number_text(total.energy_j), number_text(total.per_transaction_mj))
        source = Text(" + ".join(total.meters))
        table.add_row(f"all {total.kind}", *cells, _kind(total.kind), source, style="bold")
    return table


def _books(books: Books, summary: LedgerSummary) -> Table:
    """Both sides of every meter: what it was spent on, and how the page closes."""
    table = _table("Energy by who used it", "line", "J", "% of kind", "mJ/tx", caption=_books_notes(books, summary))
    table.add_column("kind", no_wrap=True)
    for kind in dict.fromkeys(entry.kind for entry in books.entries):
        lines = books.by_line(kind)
        whole_j = sum(lines.values())
        for line, energy_j in lines.items():
            per_tx = 1e3 * energy_j / summary.transactions if summary.transactions else None
            cells = (number_text(energy_j), number_text(energy_j / whole_j if whole_j else None, 100.0))
            table.add_row(line, *cells, number_text(per_tx), _kind(kind))
    return table


def _books_notes(books: Books, summary: LedgerSummary) -> str:
    costs = ", ".join(f"{one.path} {number_text(one.mj_per_decision)} mJ ({one.kind})" for one in books.paths)
    closed = ", ".join(
        f"{one.meter} {number_text(one.residual_share, 100.0)} %"
        + ("" if one.check_share is None else f" (power integrated {one.check_share:+.2%})")
        for one in books.closings
    )
    # joules of these transactions over frauds of others would say nothing
    quality = summary.quality if summary.quality and summary.quality.transactions == summary.transactions else None
    caught = next((one for one in quality.models if one.frauds_caught), None) if quality else None
    per_fraud = ", ".join(
        f"{number_text(total.energy_j / caught.frauds_caught)} J ({total.kind})"
        for total in summary.energy_totals
        if caught is not None and total.energy_j is not None
    )
    notes = [
        f"a decision, without idle: {costs}" if costs else "",
        f"a fraud caught by {caught.name}: {per_fraud}" if caught is not None and per_fraud else "",
        f"residual: {closed}" if closed else "",
        "" if books.idle_stated else "idle power is not stated, so it is within these lines where a meter has it",
    ]
    return "\n".join(note for note in notes if note)


def _carbon(carbon: CarbonFigures) -> Table:
    inputs = "\n".join(carbon.bases)
    table = _table("Carbon", "CO2e", "g", "g a million", caption=f"{inputs}\n((E · I) + M) per R, ISO/IEC 21031:2024")
    table.add_column("kind", no_wrap=True)
    for total in carbon.totals:
        table.add_row(
            "operational", number_text(total.operational_g), number_text(total.per_million_g), _kind(total.kind)
        )
    table.add_row("embodied", number_text(carbon.embodied_g), number_text(carbon.embodied_per_million_g), "stated")
    if carbon.sci_g_per_million is not None:
        table.add_section()
        table.add_row("SCI", "", number_text(carbon.sci_g_per_million), _kind(carbon.totals[0].kind), style="bold")
    return table


def _deep_only(found: Counterfactual) -> Table:
    """Cascade beside deep-only, by kind: in calls as full as arrive in time, and in calls like the cascade's own."""
    table = _table(
        f"Deep-only for the same {found.transactions:,} transactions",
        "service", "J", "×", "saved %", "even at %",
        caption=_deep_only_notes(found),
    )  # fmt: skip
    table.add_column("kind", no_wrap=True)
    for one in found.comparisons:
        table.add_row("cascade", number_text(one.cascade_j), "1", _ABSENT, _ABSENT, _kind(one.kind))
        for other in filter(None, (one.filled, one.as_called)):
            even = other.break_even_share
            table.add_row(
                f"deep-only, {number_text(other.rows_per_call)} each", number_text(other.energy_j.value),
                number_text(other.ratio.value), _interval(other.saving_share, 100.0),
                _ABSENT if even is None else number_text(even.value, 100.0), _kind(one.kind),
            )  # fmt: skip
    return table


def _deep_only_notes(found: Counterfactual) -> str:
    limit = "" if found.limit_ms is None else f" within {found.limit_ms:g} ms"
    notes = [_verdict(one) for one in found.comparisons]
    notes += [
        f"each: transactions a call; first as {found.per_second:,.0f}/s fill it{limit}, second as the cascade's own",
        "even at: share escalated at which both cost the same; it was"
        f" {percent_text(found.asked / found.transactions)}",
        *(_own_calls(one) for one in found.comparisons),
        "both with fetching, decoding, features, producing and idle; deep-only without the screener",
        f"cost of a deep call measured {found.measured_at:%Y-%m-%d %H:%M} UTC on {found.server}:",
        found.method,
    ]
    if found.undivided:
        notes.append(f"not compared, since of the whole machine: {', '.join(found.undivided)}")
    return "\n".join(note for note in notes if note)


def _verdict(one: EnergyComparison) -> str:
    """What the kinder comparison says, in words."""
    share = one.filled.saving_share
    if share.high < 0:
        return f"deep-only would have cost LESS ({one.kind})"
    if share.low <= 0:
        return f"no difference is shown: the interval holds zero ({one.kind})"
    return f"the cascade saves {number_text(share.low, 100.0)} to {number_text(share.high, 100.0)} % ({one.kind})"


def _own_calls(one: EnergyComparison) -> str:
    if one.own_deep_priced_j is None:
        return ""
    metered, priced = number_text(one.own_deep_j.value), number_text(one.own_deep_priced_j.value)
    return f"the cascade's own deep calls: {metered} J by its meters, {priced} J at a call's cost ({one.kind})"


def _interval(estimate: Estimate, scale: float = 1.0) -> str:
    ends = f"{number_text(estimate.low, scale)} to {number_text(estimate.high, scale)}"
    return f"{number_text(estimate.value, scale)} ({ends})"


def _kind(kind: str | None) -> Text:
    return Text(_ABSENT) if kind is None else Text(kind, style=_KIND_STYLE[kind])


def _source(figure: EnergyFigure) -> Text:
    return Text(figure.source, style="dim") if figure.problem is None else Text(figure.problem, style="red")


def _no_meters() -> Padding:
    return Padding(Text("Energy: no meter was given, so nothing is known of it", style="yellow"), (1, 1, 0, 1))


def _quality(quality: QualityComparison) -> Table:
    table = _table(
        f"Quality on {quality.transactions:,} transactions, {quality.frauds:,} frauds",
        "decided by", "caught", "missed", "false alarms", "AUC", "AP", "CP@100",
        caption=f"caught: {quality.alert_rule}\nAP: average precision; CP@100: card precision top-100",
    )  # fmt: skip
    for model in quality.models:
        table.add_row(model.name, *_quality_cells(model))
    return table


def _quality_cells(model: ModelQuality) -> tuple[str, ...]:
    alarms = _ABSENT if model.false_alarms is None else f"{model.false_alarms:,}"
    scores = (model.auc_roc, model.average_precision, model.card_precision_100)
    return (
        f"{model.frauds_caught:,}", f"{model.frauds_missed:,}", alarms,
        *(_ABSENT if score is None else f"{score:.3f}" for score in scores),
    )  # fmt: skip


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
    lost = f", {summary.restarts} ended and started again, without their last second" if summary.restarts else ""
    return f"{summary.processes} workers{lost}; "


def _latency(figures: LatencyFigures | None) -> tuple[str, str, str, str]:
    if figures is None:
        return (_ABSENT,) * 4
    return (
        number_text(figures.p50_ms),
        number_text(figures.p99_ms),
        number_text(figures.p999_ms),
        number_text(figures.max_ms),
    )


def number_text(value: float | None, scale: float = 1.0) -> str:
    """Three significant digits, no exponents: what a histogram within 1 % can claim."""
    if value is None:
        return _ABSENT
    scaled = value * scale
    if not scaled:
        return "0"
    decimals = 2 - math.floor(math.log10(abs(scaled)))
    return f"{scaled:,.{min(max(decimals, 0), _DECIMALS_MAX)}f}"


def percent_text(share: float | None) -> str:
    """A share in 0..1 as per cent, as `number_text` writes it."""
    return _ABSENT if share is None else f"{number_text(share, 100.0)} %"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
