"""Calibration on validation data: probabilities from raw scores, and thresholds from a budget and from costs."""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace
from sklearn.linear_model import LogisticRegression

from cascade.columns import Array, Bool, Float64
from cascade.costs import Costs, decision_thresholds
from cascade.errors import DataError
from cascade.policy import Calibration, Combination, Escalation, Policy
from stages.validation import ValidationRows

# With fewer frauds neither calibration nor thresholds mean anything.
FRAUDS_MIN = 20


def fit_calibration(raw: Float64, fraud: Bool, weight: Float64 | None = None) -> Calibration:
    """Fit Platt's slope and intercept to raw scores float64 [rows] and labels bool [rows]. `weight` float64 [rows].

    Raises DataError if there are fewer than FRAUDS_MIN of a kind, or if higher scores do not mean more frauds.
    """
    (slope,), intercept = _logistic(raw.reshape(-1, 1), fraud, weight)
    if slope <= 0:
        raise DataError(
            f"frauds have lower scores than genuine transactions (slope {slope:.3g}): the model"
            " learned nothing useful; check the labels and the features"
        )
    return Calibration(slope, intercept)


def fit_combination(
    screener_raw: Float64, deep_raw: Float64, fraud: Bool, weight: Float64 | None = None
) -> Combination:
    """Fit the logistic regression on both models' raw scores, float64 [rows] each.

    `fraud` bool [rows], `weight` float64 [rows]. Where the deep model knows nothing that the screener does not know, as
    after training on few frauds, its weight is 0. Raises DataError if there are fewer than FRAUDS_MIN of a kind.
    """
    (screener, deep), intercept = _logistic(np.stack([screener_raw, deep_raw], axis=1), fraud, weight)
    if deep > 0:
        return Combination(screener, deep, intercept)
    alone = fit_calibration(screener_raw, fraud, weight)
    return Combination(alone.slope, 0.0, alone.intercept)


def _logistic(columns: Array, fraud: Bool, weight: Float64 | None) -> tuple[list[float], float]:
    frauds = int(fraud.sum())
    if min(frauds, len(fraud) - frauds) < FRAUDS_MIN:
        raise DataError(
            f"the data to calibrate scores with has {frauds} frauds in {len(fraud)} transactions; at least {FRAUDS_MIN}"
            " of each kind are needed: use more data, or divide it otherwise in [data] of the training file"
        )
    fitted = LogisticRegression(C=np.inf, max_iter=1_000).fit(columns, fraud, sample_weight=weight)
    return [float(factor) for factor in fitted.coef_[0]], float(fitted.intercept_[0])


def calibrate(rows: ValidationRows, escalation: Escalation, costs: Costs) -> Policy:
    """Derive the policy from validation rows: calibrations, the escalation threshold, and the decision thresholds.

    `escalation`: the rule and its budget; its threshold is replaced. The decision thresholds have the least cost for
    the cascade's probabilities.
    """
    policy = Policy(
        escalation=rows.at_budget(escalation, escalation.budget),
        screener=fit_calibration(rows.screener_raw, rows.fraud),
        combined=fit_combination(rows.screener_raw, rows.deep_raw, rows.fraud),
        deep=fit_calibration(rows.deep_raw, rows.fraud),
        review_from=0.0,
        decline_from=0.0,
        costs=costs,
    )
    review_from, decline_from = decision_thresholds(
        rows.cascade(policy), costs.of_actions(rows.fraud, rows.amount), reviews_max(costs, rows.days)
    )
    return replace(policy, review_from=review_from, decline_from=decline_from)


def reviews_max(costs: Costs, days: float) -> int | None:
    """How many transactions of so many days may be reviewed; None: any number."""
    return None if costs.reviews_per_day_max is None else int(costs.reviews_per_day_max * days)
