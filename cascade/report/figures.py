"""The figures of the report's page, from a journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cascade.errors import DataError
from cascade.ledger.account import Account
from cascade.ledger.counters import Counters
from cascade.ledger.figures import summarise
from cascade.ledger.journal import NO_ACCOUNT, Run, merged_between
from cascade.ledger.sla import ObjectiveEvents, count_events
from cascade.ledger.summary import LedgerSummary

# Points of a plot over time. Readers cannot distinguish more.
POINTS_MAX = 96
# The shares of decisions at which a latency curve has points.
CURVE = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999)


@dataclass(frozen=True, slots=True)
class Point:
    """An interval of the report that ends `at`: its summary, and the share of each error budget that is left.

    `budget_left`: by objective, of all decisions since the start of the report.
    """

    at: datetime
    summary: LedgerSummary
    budget_left: dict[str, float]


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of the whole report, and of its intervals of `interval_s` seconds (`points`).

    `events`: of each objective, over the whole report. `runs`: the journal.
    """

    account: Account
    summary: LedgerSummary
    events: tuple[ObjectiveEvents, ...]
    points: Sequence[Point]
    interval_s: float
    runs: Sequence[Run]


def gather(runs: Sequence[Run], start: datetime | None, end: datetime | None) -> Figures:
    """The figures between two moments; raises DataError without an account between them."""
    account = merged_between(runs, start, end)
    if account is None:
        raise DataError(NO_ACCOUNT)
    first = account.started if start is None else start
    span = account.ended - first
    count = max(min(POINTS_MAX, max(len(run.accounts) for run in runs)), 1)
    points, total = [], Counters.empty()
    for number in range(count):
        until = account.ended if number == count - 1 else first + span * (number + 1) / count
        part = merged_between(runs, first + span * number / count if number else start, until)
        if part is None:
            continue
        total.merge(part.counters)
        points.append(Point(part.ended, summarise(part), budgets_left(count_events(part.service_level, total.paths))))
    events = count_events(account.service_level, account.counters.paths)
    return Figures(account, summarise(account), events, points, span.total_seconds() / count, list(runs))


def budgets_left(events: Sequence[ObjectiveEvents]) -> dict[str, float]:
    """The `budget_left` of each objective; without events or a budget, 1 minus the number of breaches."""
    return {
        objective.name: 1.0 - objective.breaches if objective.budget_left is None else objective.budget_left
        for objective in events
    }
