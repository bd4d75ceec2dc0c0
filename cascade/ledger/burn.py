"""Error budgets from a journal: what is left of each, and how fast it burns over several windows.

An objective may be broken by a share of its events, its budget; a burn rate of 1 uses the budget up exactly. Windows
and factors are those of the Site Reliability Workbook (Beyer et al., O'Reilly, 2018), chapter 5, "Alerting on SLOs",
"6: Multiwindow, Multi-Burn-Rate Alerts", for a period of 30 days: an alarm asks for a burn above its factor over the
long window, so that it matters, and over the short one too, so that it still goes on.
`k8s/prometheus/cascade-rules.yaml` has the same for Prometheus; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

import msgspec

from cascade.ledger.account import Account
from cascade.ledger.journal import Life, merged_between
from cascade.ledger.sla import ObjectiveEvents

BurnStatus = Literal["page", "ticket", "within", "no data"]
WINDOWS_S: Final[dict[str, int]] = {"5m": 300, "30m": 1_800, "1h": 3_600, "6h": 21_600, "3d": 259_200}


@dataclass(frozen=True, slots=True)
class Alarm:
    """Burns above `factor` over both windows, names of WINDOWS_S, are worth `severity`."""

    severity: Literal["page", "ticket"]
    long: str
    short: str
    factor: float


# 2 %, 5 % and 10 % of the budget of 30 days; pages first.
ALARMS: Final = (
    Alarm("page", "1h", "5m", 14.4),
    Alarm("page", "6h", "30m", 6.0),
    Alarm("ticket", "3d", "6h", 1.0),
)


class BurnRate(msgspec.Struct, frozen=True, kw_only=True):
    """Over the last `window_s`: of `events`, `breaches` broke the objective.

    `covered_s`: what the journal has of it, from line to line: shorter where the journal is, longer by less than the
    time between two lines. `rate`: the share of breaches over the budget; None without events or without a budget.
    """

    window: str
    window_s: float
    covered_s: float
    events: int
    breaches: int
    rate: float | None


class ObjectiveBurn(msgspec.Struct, frozen=True, kw_only=True):
    """An objective over the whole span, and over the windows that end with it.

    `budget`: the share of events that may break it. `budget_left`: the share of the whole span's budget that was not
    used, negative where more was; None without events or without a budget. `status` by ALARMS: `page`, `ticket`,
    `within`, or `no data` without events in the span.
    """

    name: str
    budget: float
    events: int
    breaches: int
    budget_left: float | None
    rates: tuple[BurnRate, ...]
    status: BurnStatus


def burn_rates(
    lives: Sequence[Life], start: datetime | None = None, end: datetime | None = None
) -> tuple[ObjectiveBurn, ...]:
    """Each objective's budget between two moments, as `merged_between` takes them; empty where there is no account.

    The windows end with the last line up to `end`, and reach back no further than `start`. Raises DataError where the
    accounts were kept under different service levels.
    """
    whole = merged_between(lives, start, end)
    if whole is None:
        return ()
    parts = [
        (name, merged_between(lives, _later(start, whole.ended - timedelta(seconds=window_s)), whole.ended))
        for name, window_s in WINDOWS_S.items()
    ]
    windows = [(name, part, _events(part)) for name, part in parts if part is not None]
    return tuple(
        _objective(one, tuple(_rate(name, part, events[position], whole.ended) for name, part, events in windows))
        for position, one in enumerate(_events(whole))
    )


def _later(start: datetime | None, moment: datetime) -> datetime:
    return moment if start is None else max(start, moment)


def _events(account: Account) -> tuple[ObjectiveEvents, ...]:
    return account.counters.objective_events(account.service_level)


def _rate(window: str, part: Account, counts: ObjectiveEvents, end: datetime) -> BurnRate:
    return BurnRate(
        window=window, window_s=WINDOWS_S[window], covered_s=(end - part.started).total_seconds(),
        events=counts.events, breaches=counts.breaches, rate=counts.burn,
    )  # fmt: skip


def _objective(counts: ObjectiveEvents, rates: tuple[BurnRate, ...]) -> ObjectiveBurn:
    return ObjectiveBurn(
        name=counts.name, budget=counts.budget, events=counts.events, breaches=counts.breaches,
        budget_left=counts.budget_left, rates=rates, status=_status(counts, rates),
    )  # fmt: skip


def _status(counts: ObjectiveEvents, rates: tuple[BurnRate, ...]) -> BurnStatus:
    if not counts.events:
        return "no data"
    by_window = {rate.window: rate for rate in rates}
    for alarm in ALARMS:
        both = [by_window.get(window) for window in (alarm.long, alarm.short)]
        # without a division: an objective that allows no breach burns at once, and one without events does not
        if all(one is not None and one.breaches > alarm.factor * counts.budget * one.events for one in both):
            return alarm.severity
    return "within"
