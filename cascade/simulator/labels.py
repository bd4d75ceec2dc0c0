"""Labels as reported: some frauds are never noticed, a few genuine purchases are disputed, and all come late."""

from __future__ import annotations

from typing import Final

import numpy as np

from cascade.columns import Bool, Int64
from cascade.simulator.settings import DAY_MS, SimulatorSettings

UNREPORTED_SHARE: Final = 0.04
# Genuine transactions that are reported, per fraud.
FALSE_REPORTS_PER_FRAUD: Final = 0.02
DELAY_DAYS_MAX: Final = 7.0


def report(rng: np.random.Generator, settings: SimulatorSettings, fraud: Bool) -> tuple[Bool, Int64]:
    """Which transactions are reported as frauds, and how long after, ms (-1: never), both [rows].

    The delay is 7 days times a beta variable (2, 3): half of the reports come within 2.7 days, none after the 7 days
    of the schema's `label.delay`.
    """
    chance = rng.random(len(fraud))
    reported = np.where(fraud, chance >= UNREPORTED_SHARE, chance < false_report_share(settings))
    delay_ms = np.full(len(fraud), -1, np.int64)
    count = int(reported.sum())
    delay_ms[reported] = (rng.beta(2.0, 3.0, count) * DELAY_DAYS_MAX * DAY_MS).astype(np.int64)
    return reported, delay_ms


def false_report_share(settings: SimulatorSettings) -> float:
    """The probability that a genuine transaction is reported as a fraud."""
    return FALSE_REPORTS_PER_FRAUD * settings.fraud_share
