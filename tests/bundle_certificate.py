"""A certificate with made-up figures, for tests of what reads one, and the first day that may certify a bundle."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

from cascade.bundle import Bundle
from cascade.certificate import Bound, Certificate, Claim, Evidence, Power, Recall

LAST = datetime(2025, 7, 30, 12, tzinfo=UTC)


def made_up_certificate(
    bundle_version: str, caught: int = 50, at_least: float = 0.4, expires: datetime = datetime(2100, 1, 1, tzinfo=UTC)
) -> Certificate:
    bounds = tuple(
        Bound(unit=unit, units=80, method="made up", exact=True, value=0.981, p_value=0.2)
        for unit in ("each fraud", "each card", "each terminal")
    )
    kept = Claim(
        name="frauds", statement="made up", sense="at least", asked=0.99, observed=0.996, bounds=bounds, shown=0.981,
        holds=False, approximate=False, largest=0.98,
    )  # fmt: skip
    escalated = Claim(
        name="escalated", statement="made up", sense="at most", asked=0.01, observed=0.00931, bounds=bounds,
        shown=0.0099, holds=True, approximate=True,
    )  # fmt: skip
    alarms = Claim(
        name="false alarms", statement="made up", sense="at most", asked=1.05, observed=1.01, bounds=bounds,
        shown=1.051, holds=False, approximate=True,
    )  # fmt: skip
    return Certificate(
        bundle_version=bundle_version,
        created=datetime(2025, 8, 1, tzinfo=UTC),
        command="cascade certify --data later.parquet",
        confidence=0.95,
        evidence=Evidence(
            file="later.parquet", sha256="00" * 32, decisions="replay", first=datetime(2025, 5, 1, tzinfo=UTC),
            last=LAST, history_days=120.0, days=91, transactions=987_654_321, cards=12_345_678, frauds=1_234_567,
            caught=caught, caught_by_deep=52, lost=5, gained=3,
        ),
        claims=(kept, escalated, alarms),
        power=Power(
            power=0.8, frauds_min=299, needed={"each fraud": 717, "each card": 12_998}, chance={"each fraud": 0.431}
        ),
        recall=Recall(period_days=30, first_frauds=100, caught=caught, at_least=at_least, alarm_level=0.01),
        method=("made up",),
        assumptions=("made up",),
        expires=expires,
        ends_earlier="when it no longer holds",
    )  # fmt: skip


def first_unseen_day(bundle: Bundle) -> datetime:
    """The day after the bundle's validation data."""
    last = datetime.fromisoformat(json.loads(bundle.content["report.json"])["validation"]["last"])
    return datetime(last.year, last.month, last.day, tzinfo=UTC) + timedelta(days=1)
