"""What the report's page shows, gathered from a journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cascade.errors import DataError
from cascade.ledger.account import Account
from cascade.ledger.counters import Counters
from cascade.ledger.figures import summarise
from cascade.ledger.journal import Life, merged_between
from cascade.ledger.sla import ObjectiveEvents
from cascade.ledger.summary import LedgerSummary

# Points of a plot over time: more cannot be told apart.
POINTS_MAX = 96
# Shares of the decisions at which a latency curve is drawn.
CURVE = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999)


@dataclass(frozen=True, slots=True)
class Point:
    """An interval of the report: its figures, and what all since the report's start have left of each budget."""

    at: datetime
    summary: LedgerSummary
    budget_left: dict[str, float]


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything from the journal. `interval_s`: of `points`; `events`: each objective's, over the whole span."""

    account: Account
    summary: LedgerSummary
    events: tuple[ObjectiveEvents, ...]
    points: Sequence[Point]
    interval_s: float
    lives: Sequence[Life]


def gather(lives: Sequence[Life], start: datetime | None, end: datetime | None) -> Figures:
    """The figures between two moments; raises DataError where there is nothing."""
    account = merged_between(lives, start, end)
    if account is None:
        raise DataError("no account between these times: each service writes a line every ledger.interval_s")
    first = account.started if start is None else start
    span = account.ended - first
    count = max(min(POINTS_MAX, max(len(life.accounts) for life in lives)), 1)
    points, told = [], Counters.empty()
    for number in range(count):
        until = account.ended if number == count - 1 else first + span * (number + 1) / count
        part = merged_between(lives, first + span * number / count if number else start, until)
        if part is None:
            continue
        told.merge(part.counters)
        points.append(Point(part.ended, summarise(part), budgets_left(told.objective_events(part.service_level))))
    events = account.counters.objective_events(account.service_level)
    return Figures(account, summarise(account), events, points, span.total_seconds() / count, list(lives))


def budgets_left(events: Sequence[ObjectiveEvents]) -> dict[str, float]:
    """By objective, as its `budget_left`; where that is not known, 1 less its breaches: all, without events."""
    return {one.name: 1.0 - one.breaches if one.budget_left is None else one.budget_left for one in events}
