"""The policy determines which transactions are escalated, and what is decided.

It converts the raw scores (log-odds) of the models to calibrated probabilities of fraud, and compares the probability
with two thresholds. `stages.calibration` derives all its numbers from validation data.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from cascade.columns import Bool, Float64
from cascade.costs import ACTIONS as ACTIONS  # noqa: PLC0414 (others import them from here)
from cascade.costs import Action as Action  # noqa: PLC0414
from cascade.costs import Costs
from cascade.errors import BundleError

# Larger than every score; finite, since JSON has no infinity.
RAW_MAX = sys.float_info.max


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Probability = 1 / (1 + exp(−(slope · raw + intercept))), slope > 0.

    Source: Platt, "Probabilistic Outputs for Support Vector Machines", 1999.
    """

    slope: float
    intercept: float

    def probability(self, raw: Float64) -> Float64:
        """Calibrated probabilities float64 [rows] from raw scores float64 [rows]."""
        return np.asarray(1.0 / (1.0 + np.exp(-(self.slope * raw + self.intercept))), np.float64)


class Combination(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Probability = 1 / (1 + exp(−(screener · screener_raw + deep · deep_raw + intercept))).

    The logistic regression on both scores: stacking, Wolpert, "Stacked Generalization", 1992.
    """

    screener: float
    deep: float
    intercept: float

    def probability(self, screener_raw: Float64, deep_raw: Float64) -> Float64:
        """Calibrated probabilities float64 [rows] from the raw scores of both models, float64 [rows] each.

        The screener's is used as the deep model gets it, rounded to float32.
        """
        log_odds = self.screener * screener_raw.astype(np.float32).astype(np.float64) + self.deep * deep_raw
        log_odds += self.intercept
        return np.asarray(1.0 / (1.0 + np.exp(-log_odds)), np.float64)


class Escalation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which transactions go to the deep model: those with the highest escalation scores, as many as the budget allows.

    - `budget`: the share of the transactions that is escalated.
    - `rule`: where the escalation score comes from. `gain`: the bundle's model of what the ranking gains.
      `uncertainty`: −|raw − centre|, the nearness of the screener's raw score to `centre`.
    - `threshold`: the budget's share of the validation rows has a higher escalation score. The service begins with it.
      −RAW_MAX: everything is escalated; RAW_MAX: nothing.
    """

    budget: float
    rule: Literal["gain", "uncertainty"]
    threshold: float
    centre: float = 0.0


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Thresholds and calibrations of a bundle.

    - `screener`: probability of a transaction that the screener alone decides.
    - `combined`: probability of an escalated transaction, by both models.
    - `deep`: probability by the deep model alone, for comparison with a service that has nothing else.
    - `review_from`, `decline_from`: probabilities from which transactions are reviewed and declined.
    """

    escalation: Escalation
    screener: Calibration
    combined: Combination
    deep: Calibration
    review_from: float
    decline_from: float
    costs: Costs = Costs()

    def probability(self, screener_raw: Float64, deep_raw: Float64, escalated: Bool) -> Float64:
        """The cascade's probabilities of fraud, float64 [rows]: by both models where a row is escalated, bool [rows].

        `screener_raw`, `deep_raw` float64 [rows]: log-odds of both models.
        """
        both = self.combined.probability(screener_raw, deep_raw)
        return np.where(escalated, both, self.screener.probability(screener_raw))

    def actions(self, probability: Float64) -> NDArray[np.int64]:
        """Positions in ACTIONS, int64 [rows], for calibrated probabilities float64 [rows]."""
        return (probability >= self.review_from).astype(np.int64) + (probability >= self.decline_from)

    def check(self, origin: str) -> None:
        """Raise BundleError if the numbers contradict each other. `origin`: the file name in the message."""
        escalation, combined = self.escalation, self.combined
        sound: Mapping[str, bool] = {
            "escalation.budget must lie in [0, 1]": 0.0 <= escalation.budget <= 1.0,
            "escalation.threshold and escalation.centre must be finite": math.isfinite(escalation.threshold)
            and math.isfinite(escalation.centre),
            "calibration slopes must be positive, and calibrations of finite numbers": all(
                0.0 < calibration.slope < math.inf and math.isfinite(calibration.intercept)
                for calibration in (self.screener, self.deep)
            ),
            "the combination must be of numbers, and not fall with the deep score": math.isfinite(combined.screener)
            and math.isfinite(combined.intercept)
            and 0.0 <= combined.deep < math.inf,
            "thresholds must satisfy 0 ≤ review_from ≤ decline_from": 0.0 <= self.review_from <= self.decline_from,
        }
        for rule, is_met in sound.items():
            if not is_met:
                raise BundleError(f"{origin}: {rule}; train the bundle again")


def uncertainty(raw: Float64, centre: float) -> Float64:
    """The escalation scores float64 [rows] of the rule `uncertainty`, from the screener's raw scores float64 [rows]."""
    return np.asarray(-np.abs(raw - centre), np.float64)
