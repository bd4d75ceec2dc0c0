"""How good the cascade is at each escalation budget, by each way to choose what is escalated."""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
from sklearn.metrics import average_precision_score

from cascade.columns import Bool, Float64
from cascade.escalation_budget import EscalationBudget
from cascade.policy import Policy, uncertainty
from stages.escalation.gains import GainTable, gains
from stages.validation import ValidationRows, escalation_threshold

SHARES: Final = (0.0025, 0.005, 0.01, 0.02, 0.05)
# Four ways that a service could use, then two that know what no service can.
GAIN, UNCERTAINTY, HIGHEST, RANDOM = "gain", "uncertainty", "highest score", "random"
DISTANCE, ORACLE = "|deep − screener|", "labels known"


class Curve(msgspec.Struct, frozen=True):
    """Average precision of the cascade on the validation rows, in their order, with the budget held as a service does.

    - `shares`: escalated shares. `average_precision`: a figure for each share, by the way to choose. The last two ways
      are no rules for a service: they know the deep score of every row, and the labels as well.
    - `screener`, `deep`, `both`: nothing escalated, deep-only, and both models' combination for every row.
    """

    shares: tuple[float, ...]
    average_precision: dict[str, tuple[float, ...]]
    screener: float
    deep: float
    both: float


def curve(rows: ValidationRows, policy: Policy, seed: int) -> Curve:
    """Compares the ways at SHARES."""
    screened = policy.screener.probability(rows.screener_raw)
    combined = policy.combined.probability(rows.screener_raw, rows.deep_raw)
    table = GainTable.of(screened, rows.fraud, np.ones(len(rows)))
    ways = {
        GAIN: rows.gain,
        UNCERTAINTY: uncertainty(rows.screener_raw, policy.escalation.centre),
        HIGHEST: rows.screener_raw,
        RANDOM: np.random.default_rng(seed).random(len(rows)),
        DISTANCE: np.abs(combined - screened),
        ORACLE: gains(table, screened, combined, rows.fraud),
    }

    def at(score: Float64, share: float) -> float:
        budget = EscalationBudget(share, escalation_threshold(score, share))
        return _precision(rows.fraud, np.where(budget.choose(score), combined, screened))

    return Curve(
        shares=SHARES,
        average_precision={name: tuple(at(score, share) for share in SHARES) for name, score in ways.items()},
        screener=_precision(rows.fraud, screened),
        deep=_precision(rows.fraud, rows.deep_raw),
        both=_precision(rows.fraud, combined),
    )


def _precision(fraud: Bool, score: Float64) -> float:
    return float(average_precision_score(fraud, score))
