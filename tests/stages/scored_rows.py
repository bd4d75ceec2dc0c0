"""Validation rows of a small world: what both models know of each transaction, and whether it is a fraud."""

from __future__ import annotations

import numpy as np

from cascade.columns import Float64
from cascade.costs import Costs
from cascade.features.spec import DAY_MS
from cascade.policy import Escalation, Policy
from stages.calibration import calibrate
from stages.validation import ValidationRows

FIRST_DAY = 19_000
BY_UNCERTAINTY = Escalation(budget=0.05, rule="uncertainty", threshold=0.0, centre=-1.0)


def drawn_rows(
    seed: int = 1, rows: int = 20_000, days: int = 28, cards: int = 400, base: float = -4.5, by_card: float = 0.0
) -> ValidationRows:
    """Rows whose log-odds of fraud are known: the screener sees them with much noise, the deep model with little.

    base: mean log-odds. by_card: standard deviation of what the rows of a card have in common.
    """
    chance = np.random.default_rng(seed)
    card = chance.integers(cards, size=rows)
    log_odds = base + 1.8 * chance.standard_normal(rows) + by_card * chance.standard_normal(cards)[card]
    fraud = chance.random(rows) < 1.0 / (1.0 + np.exp(-log_odds))

    def seen(noise: float) -> Float64:
        return log_odds + noise * chance.standard_normal(rows)

    screener_raw, deep_raw = seen(2.0), seen(0.5)
    time_ms = FIRST_DAY * DAY_MS + np.arange(rows) * (days * DAY_MS) // rows
    amount = chance.exponential(60.0, rows)
    return ValidationRows.of(time_ms, card, fraud, amount, screener_raw, deep_raw, gain=np.abs(deep_raw - screener_raw))


def policy_of(rows: ValidationRows, escalation: Escalation = BY_UNCERTAINTY, costs: Costs | None = None) -> Policy:
    """The policy that the rows give."""
    return calibrate(rows, escalation, costs or Costs())
