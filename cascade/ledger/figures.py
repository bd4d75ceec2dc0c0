"""Computes the figures of a ledger from its counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from cascade.evidence import alarm_nats, evidence_nats
from cascade.ledger.account import Account, MeterState, sum_if_known
from cascade.ledger.attribution import attribute
from cascade.ledger.counters import Counters
from cascade.ledger.latency import LatencyHistogram
from cascade.ledger.sla import evaluate
from cascade.ledger.summary import (
    CarbonFigures,
    CarbonTotal,
    ClockFigures,
    DeepCallFigures,
    EnergyFigure,
    EnergyTotal,
    LatencyFigures,
    LedgerSummary,
    PathFigures,
    QualityComparison,
    StageFigures,
    WatchFigures,
)
from cascade.protocols import EnergyKind


def summarise(account: Account, quality: QualityComparison | None = None) -> LedgerSummary:
    """All figures of an account. The caller evaluates `quality`, because a ledger has no labels."""
    counters = account.counters
    elapsed_s = (account.ended - account.started).total_seconds()
    decisions = counters.decisions
    escalated = counters.paths["escalated"].count + counters.paths["degraded"].count
    figures = tuple(_energy_figure(state, decisions) for state in account.meters)
    return LedgerSummary(
        started=account.started,
        ended=account.ended,
        elapsed_s=elapsed_s,
        bundle_version=", ".join(account.bundle_versions),
        screener=", ".join(account.screeners),
        deep_backend=", ".join(account.deep_backends),
        transactions=decisions,
        per_second=decisions / elapsed_s if elapsed_s > 0 else 0.0,
        paths=_path_figures(counters),
        escalation_share=_per(escalated, decisions),
        degraded_share=_per(counters.paths["degraded"].count, decisions),
        degraded_by_cause=counters.degraded_by_cause,
        duplicate_share=_per(counters.paths["duplicate"].count, decisions),
        dead_letters=counters.dead_letters,
        labels=counters.labels,
        recovery=LatencyFigures.of(counters.recoveries),
        sessions=counters.sessions,
        offset_gaps=counters.offset_gaps,
        budget_factor_min=counters.budget_factor_min,
        state_covered=counters.state_covered,
        state_covered_min=counters.state_covered_min,
        deep=DeepCallFigures(
            calls=counters.deep_calls.count,
            rows=counters.deep_rows,
            rows_per_call=_per(counters.deep_rows, counters.deep_calls.count),
            latency=LatencyFigures.of(counters.deep_calls),
            late_answers=counters.late_answers,
            hedged_calls=counters.hedged_calls,
        ),
        stages=_stage_figures(counters, account.watts_per_core),
        watts_per_core=account.watts_per_core,
        energy=figures,
        energy_totals=_energy_totals(figures, decisions),
        books=attribute(account) if account.meters else None,
        carbon=_carbon_figures(account, decisions),
        objectives=evaluate(account.service_level, counters.paths),
        clock=_clock_figures(counters),
        machine=account.machines[0],
        other_machines=account.machines[1:],
        quality=quality,
        watch=_watch_figures(account),
    )


def _per(amount: float | None, count: int, scale: float = 1.0) -> float | None:
    """`scale` times the amount per decision or call; None if the amount is unknown or the count is 0."""
    return scale * amount / count if amount is not None and count else None


def _path_figures(counters: Counters) -> dict[str, PathFigures]:
    whole = LatencyHistogram()
    for histogram in counters.paths.values():
        whole.merge(histogram)
    histograms: list[tuple[str, LatencyHistogram]] = [*counters.paths.items(), ("all", whole)]
    return {
        path: PathFigures(
            decisions=histogram.count,
            share=_per(histogram.count, whole.count),
            latency=LatencyFigures.of(histogram),
        )
        for path, histogram in histograms
    }


def _stage_figures(counters: Counters, watts_per_core: float | None) -> dict[str, StageFigures]:
    figures: dict[str, StageFigures] = {}
    for stage, histogram in counters.stages.items():
        cpu_s = counters.stage_cpu_s[stage]
        modelled_j = None if watts_per_core is None else cpu_s * watts_per_core
        figures[stage] = StageFigures(
            latency=LatencyFigures.of(histogram),
            cpu_s=cpu_s,
            cpu_us_per_transaction=_per(cpu_s, counters.decisions, 1e6),
            modelled_mj_per_transaction=_per(modelled_j, counters.decisions, 1e3),
        )
    return figures


def _clock_figures(counters: Counters) -> ClockFigures | None:
    if counters.least_wait_s is None:
        return None
    low_ms, high_ms = (1e3 * wait_s for wait_s in counters.least_wait_s)
    return ClockFigures(least_wait_ms=low_ms, least_wait_ms_highest=high_ms, early_records=counters.early_records)


def _watch_figures(account: Account) -> WatchFigures | None:
    if account.certified is None:
        return None
    caught, missed = account.counters.first_frauds_caught, account.counters.first_frauds_missed
    certified = account.certified
    nats, limit_nats = evidence_nats(caught, missed, certified.at_least), alarm_nats(certified.alarm_level)
    return WatchFigures(
        first_frauds=caught + missed,
        caught=caught,
        at_least=certified.at_least,
        evidence_nats=nats,
        alarm_nats=limit_nats,
        holds=nats < limit_nats,
        expires=certified.expires,
    )


def _energy_figure(state: MeterState, decisions: int) -> EnergyFigure:
    return EnergyFigure(
        meter=state.meter,
        kind=state.kind,
        source=state.source,
        energy_j=state.energy_j,
        per_transaction_mj=_per(state.energy_j, decisions, 1e3),
        problem=state.problem,
    )


def _energy_totals(figures: Sequence[EnergyFigure], decisions: int) -> tuple[EnergyTotal, ...]:
    """A total for each kind that occurs; unknown if a meter of that kind was lost."""
    totals = []
    for kind in get_args(EnergyKind):
        members = [figure for figure in figures if figure.kind == kind]
        if members:
            meters = tuple(figure.meter for figure in members)
            joules = sum_if_known([figure.energy_j for figure in members])
            per_mj = _per(joules, decisions, 1e3)
            totals.append(EnergyTotal(kind=kind, meters=meters, energy_j=joules, per_transaction_mj=per_mj))
    return tuple(totals)


def _carbon_figures(account: Account, decisions: int) -> CarbonFigures | None:
    """Grams by kind of energy; None without carbon accounting."""
    if not account.carbon_bases:
        return None
    totals = []
    for kind in get_args(EnergyKind):
        by_meter = [state.carbon_g for state in account.meters if state.kind == kind]
        if by_meter:
            grams = sum_if_known(by_meter)
            totals.append(CarbonTotal(kind=kind, operational_g=grams, per_million_g=_per(grams, decisions, 1e6)))
    operational_g = totals[0].operational_g if len(totals) == 1 else None
    whole_g = sum_if_known((operational_g, account.embodied_g))
    return CarbonFigures(
        bases=account.carbon_bases,
        totals=tuple(totals),
        embodied_g=account.embodied_g,
        embodied_per_million_g=_per(account.embodied_g, decisions, 1e6),
        sci_g_per_million=_per(whole_g, decisions, 1e6),
    )
