"""Calibration on validation data: probabilities from raw scores, thresholds from a budget and from costs."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from cascade.columns import Bool, Float64
from cascade.errors import DataError
from cascade.policy import Calibration, Costs, Policy, decision_thresholds, escalation_band, in_band

# Of a slope fitted on a handful of frauds nothing can be said.
FRAUDS_MIN = 20
# Where the band may begin, as shares of the escalation budget that are skipped at the top.
SKIPS = tuple(tenth / 10 for tenth in range(31))


def fit_calibration(raw: Float64, fraud: Bool) -> Calibration:
    """Platt's slope and intercept for raw scores float64 [rows]; raises DataError where there are too few frauds."""
    frauds = int(fraud.sum())
    if min(frauds, len(fraud) - frauds) < FRAUDS_MIN:
        raise DataError(
            f"validation data holds {frauds} frauds in {len(fraud)} transactions; at least {FRAUDS_MIN} of"
            " each kind are needed: give more data or a longer --validation"
        )
    fitted = LogisticRegression(C=np.inf, max_iter=1_000).fit(raw.reshape(-1, 1), fraud)
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    if slope <= 0:
        raise DataError(
            f"validation scores fall with fraud (slope {slope:.3g}): the model has learned nothing that"
            " holds; check the labels and the features"
        )
    return Calibration(slope, intercept)


def calibrate(
    screener_raw: Float64, deep_raw: Float64, fraud: Bool, amount: Float64, budget: float, costs: Costs
) -> Policy:
    """The policy from validation rows: `fraud` bool, `amount` in the currency of the costs.

    Where to escalate: of the bands of scores that keep the budget, the one with the best average precision of the
    cascade. The decision thresholds are the cheapest pair for the cascade's own probabilities. Both on these rows.
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
