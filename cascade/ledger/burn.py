"""Error budgets from a journal: the part of each that is left, and its burn rate over several windows.

The error budget of an objective is the share of its events that may miss it. A burn rate of 1 uses the budget up
exactly at the end of its period. Windows and factors are those of the Site Reliability Workbook (Beyer et al.,
O'Reilly, 2018), chapter 5, "Alerting on SLOs", "6: Multiwindow, Multi-Burn-Rate Alerts", for a period of 30 days. An
alarm requires a burn rate above its factor over two windows: over the long window, so that the loss is significant, and
over the short window, so that the problem is still present.
`k8s/prometheus/cascade-rules.yaml` has the same rules for Prometheus; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

import msgspec

from cascade.ledger.account import Account
from cascade.ledger.journal import Run, merged_between
from cascade.ledger.sla import ObjectiveEvents, count_events

BurnStatus = Literal["page", "ticket", "within", "no data"]
WINDOWS_S: Final[dict[str, int]] = {"5m": 300, "30m": 1_800, "1h": 3_600, "6h": 21_600, "3d": 259_200}


@dataclass(frozen=True, slots=True)
class Alarm:
    """The severity of burn rates above `factor` over both windows, which are names of WINDOWS_S."""

    severity: Literal["page", "ticket"]
    long: str
    short: str
    factor: float


# These use up 2 %, 5 % and 10 % of the budget of 30 days. Pages come first.
ALARMS: Final = (
    Alarm("page", "1h", "5m", 14.4),
    Alarm("page", "6h", "30m", 6.0),
    Alarm("ticket", "3d", "6h", 1.0),
)


class BurnRate(msgspec.Struct, frozen=True):
    """The last `window_s` seconds: of `events`, `breaches` missed the objective.

    covered_s: seconds between the journal's lines that were used: less than `window_s` if the journal is shorter, more
        by up to the time between two lines.
    rate: the share of breaches over the budget; None without events or without a budget.
    """

    window: str
    window_s: float
    covered_s: float
    events: int
    breaches: int
    rate: float | None


class ObjectiveBurn(msgspec.Struct, frozen=True):
    """An objective over a period, and over the windows at its end.

    budget: the share of events that may miss the objective.
    budget_left: the unused share of the period's budget, negative if it is exceeded; None without events or budget.
    status: by ALARMS `page`, `ticket` or `within`; `no data` without events in the period.
    """

    name: str
    budget: float
    events: int
    breaches: int
    budget_left: float | None
    rates: tuple[BurnRate, ...]
    status: BurnStatus


def burn_rates(
    runs: Sequence[Run], start: datetime | None = None, end: datetime | None = None
) -> tuple[ObjectiveBurn, ...]:
    """The error budgets of all objectives between two moments, as in `merged_between`; empty without an account.

    The windows end with the last line up to `end`, and reach back to `start` at most. Raises DataError if the service
    levels of the accounts differ.
    """
    whole = merged_between(runs, start, end)
    if whole is None:
        return ()
    by_window: list[list[BurnRate]] = []
    for window, window_s in WINDOWS_S.items():
        begin = whole.ended - timedelta(seconds=window_s)
        part = merged_between(runs, begin if start is None else max(start, begin), whole.ended)
        if part is not None:
            covered_s = (whole.ended - part.started).total_seconds()
            found = [(counts.events, counts.breaches, counts.burn) for counts in _events(part)]
            by_window.append([BurnRate(window, window_s, covered_s, *figures) for figures in found])
    burns = []
    for index, counts in enumerate(_events(whole)):
        rates = tuple(of_window[index] for of_window in by_window)
        left, status = counts.budget_left, _status(counts, rates)
        burns.append(ObjectiveBurn(counts.name, counts.budget, counts.events, counts.breaches, left, rates, status))
    return tuple(burns)


def _events(account: Account) -> tuple[ObjectiveEvents, ...]:
    return count_events(account.service_level, account.counters.paths)


def _status(counts: ObjectiveEvents, rates: tuple[BurnRate, ...]) -> BurnStatus:
    if not counts.events:
        return "no data"
    by_window = {rate.window: rate for rate in rates}
    for alarm in ALARMS:
        both = [by_window.get(window) for window in (alarm.long, alarm.short)]
        # no division: without a budget the first breach is above every factor, and without events nothing is
        if all(rate is not None and rate.breaches > alarm.factor * counts.budget * rate.events for rate in both):
            return alarm.severity
    return "within"
