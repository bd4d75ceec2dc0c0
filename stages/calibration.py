"""Calibration on validation data: probabilities from raw scores, and thresholds from a budget and from costs."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from cascade.columns import Bool, Float64
from cascade.errors import DataError
from cascade.policy import Calibration, Costs, Policy, decision_thresholds, escalation_band, in_band

# With fewer frauds the fitted slope is meaningless.
FRAUDS_MIN = 20
# Candidates for the rows above the escalation band, as multiples of the escalation budget.
SKIPS = tuple(tenth / 10 for tenth in range(31))


def fit_calibration(raw: Float64, fraud: Bool) -> Calibration:
    """Fit Platt's slope and intercept to raw scores float64 [rows] and labels bool [rows].

    Raises DataError if there are too few frauds, or if higher scores do not mean more frauds.
    """
    frauds = int(fraud.sum())
    if min(frauds, len(fraud) - frauds) < FRAUDS_MIN:
        raise DataError(
            f"the validation data has {frauds} frauds in {len(fraud)} transactions; at least {FRAUDS_MIN} of each kind"
            " are needed: use more data or a longer --validation"
        )
    fitted = LogisticRegression(C=np.inf, max_iter=1_000).fit(raw.reshape(-1, 1), fraud)
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    if slope <= 0:
        raise DataError(
            f"frauds have lower scores than genuine transactions in the validation data (slope {slope:.3g}): the model"
            " learned nothing useful; check the labels and the features"
        )
    return Calibration(slope, intercept)


def calibrate(
    screener_raw: Float64, deep_raw: Float64, fraud: Bool, amount: Float64, budget: float, costs: Costs
) -> Policy:
    """Derive the policy from validation rows.

    Of the score bands within the budget it chooses the band with the best average precision of the cascade, then the
    decision thresholds with the least cost for the cascade's probabilities.

    - `screener_raw`, `deep_raw` float64 [rows]: log-odds of both models.
    - `fraud` bool [rows], `amount` float64 [rows]: labels, and amounts in the currency of the costs.
    - `budget`: share of the rows that may be escalated.
    """
    screener, deep = fit_calibration(screener_raw, fraud), fit_calibration(deep_raw, fraud)
    by_screener, by_deep = screener.probability(screener_raw), deep.probability(deep_raw)

    def cascade(band: tuple[float, float]) -> Float64:
        return np.where(in_band(screener_raw, *band), by_deep, by_screener)

    bands = [
        escalation_band(screener_raw, budget, skip * budget) for skip in SKIPS if (skip + 1) * budget <= 1 or not skip
    ]
    best = max(bands, key=lambda band: average_precision_score(fraud, cascade(band)))
    review_from, decline_from = decision_thresholds(cascade(best), fraud, amount, costs)
    return Policy(budget, *best, screener, deep, review_from, decline_from, costs)
