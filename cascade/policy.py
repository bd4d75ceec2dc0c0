"""The policy determines which transactions are escalated, and what is decided.

It converts raw scores (log-odds) of either model to calibrated probabilities of fraud, and compares the probability
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

from cascade.columns import Array, Bool, Float64
from cascade.errors import BundleError

Action = Literal["approve", "review", "decline"]
ACTIONS: tuple[Action, ...] = ("approve", "review", "decline")
# Larger than every raw score; finite, since JSON has no infinity.
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


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Costs of decisions, in the currency of the amounts.

    An approved fraud costs its amount. A declined genuine transaction costs `false_decline`. A review costs `review`
    and always finds out whether the transaction is a fraud.
    """

    review: float = 5.0
    false_decline: float = 25.0

    def of_decisions(self, actions: NDArray[np.int64], fraud: Bool, amount: Float64) -> Float64:
        """Cost of each decision, float64 [rows]. `actions` int64 [rows]: positions in ACTIONS."""
        approved, reviewed, declined = (actions == position for position in range(3))
        return (
            np.where(approved & fraud, amount, 0.0)
            + np.where(reviewed, self.review, 0.0)
            + np.where(declined & ~fraud, self.false_decline, 0.0)
        )


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Thresholds and calibrations of a bundle.

    - `escalation_budget`: escalation rate for which the bundle is calibrated, and which the service holds.
    - `escalation_threshold`, `escalation_ceiling`: on the validation data the transactions whose raw screener score is
      at least the threshold and below the ceiling are the budget's share. The service begins with this threshold. At
      or above the ceiling the screener alone is certain enough.
    - `screener`, `deep`: calibrations of the two models.
    - `review_from`, `decline_from`: calibrated probabilities from which transactions are reviewed and declined.
    """

    escalation_budget: float
    escalation_threshold: float
    escalation_ceiling: float
    screener: Calibration
    deep: Calibration
    review_from: float
    decline_from: float
    costs: Costs = Costs()

    def escalate(self, raw: Float64) -> Bool:
        """Mask of the rows in the band, from raw screener scores float64 [rows]: what training escalates.

        The service begins with this band; then `EscalationBudget` moves the threshold, so that the budget holds.
        """
        return in_band(raw, self.escalation_threshold, self.escalation_ceiling)

    def escalation_scores(self, raw: Float64) -> Float64:
        """How much each row is worth escalating, float64 [rows], from raw screener scores float64 [rows].

        The raw score below the ceiling, −∞ from there on: such a row is never escalated.
        """
        return np.where(raw < self.escalation_ceiling, raw, -np.inf)

    def actions(self, probability: Float64) -> NDArray[np.int64]:
        """Positions in ACTIONS, int64 [rows], for calibrated probabilities float64 [rows]."""
        return (probability >= self.review_from).astype(np.int64) + (probability >= self.decline_from)

    def check(self, origin: str) -> None:
        """Raise BundleError if the numbers contradict each other. `origin`: the file name in the message."""
        sound: Mapping[str, bool] = {
            "escalation_budget must lie in [0, 1]": 0.0 <= self.escalation_budget <= 1.0,
            "escalation_threshold and escalation_ceiling must be numbers": math.isfinite(self.escalation_threshold)
            and math.isfinite(self.escalation_ceiling),
            "calibration slopes must be positive": self.screener.slope > 0.0 and self.deep.slope > 0.0,
            "thresholds must satisfy 0 ≤ review_from ≤ decline_from": 0.0 <= self.review_from <= self.decline_from,
        }
        for rule, is_met in sound.items():
            if not is_met:
                raise BundleError(f"{origin}: {rule}; train the bundle again")


def in_band(raw: Float64, threshold: float, ceiling: float) -> Bool:
    """Mask of the rows with threshold ≤ raw < ceiling."""
    inside: Bool = (raw >= threshold) & (raw < ceiling)
    return inside


def escalation_band(raw: Float64, budget: float, skip: float = 0.0) -> tuple[float, float]:
    """(threshold, ceiling) of the raw scores that escalate at most a share of `budget` of the rows.

    The share of `skip` with the highest scores is at or above the ceiling, together with the rows that tie with its
    last. Rows that tie with the threshold count as escalated, so that ties never exceed the budget. A budget below the
    share of a single row escalates nothing.
    """
    ordered = np.sort(raw)[::-1]
    skipped, allowed = int(skip * len(raw)), int(budget * len(raw))
    ceiling = float(ordered[skipped - 1]) if skipped else RAW_MAX
    below = ordered[ordered < ceiling]
    if allowed == 0:
        return RAW_MAX, ceiling
    if allowed >= len(below):
        return -RAW_MAX, ceiling
    threshold = float(below[allowed - 1])
    if below[allowed] == threshold:
        above = below[below > threshold]
        return (float(above[-1]) if len(above) else ceiling), ceiling
    return threshold, ceiling


def decision_thresholds(probability: Float64, fraud: Bool, amount: Float64, costs: Costs) -> tuple[float, float]:
    """(review_from, decline_from) with the exact minimum of the total cost on the given rows.

    In order of probability, rows below `review_from` are approved, rows from `decline_from` on are declined, and those
    between are reviewed. Prefix sums of the three costs give the best pair in one pass. Rows of equal probability get
    the same decision.

    - `probability` float64 [rows], `fraud` bool [rows].
    - `amount` float64 [rows], `costs`: in the same currency.
    """
    order = np.argsort(probability, kind="stable")
    ranked = probability[order]
    approve = np.concatenate([[0.0], np.cumsum(np.where(fraud, amount, 0.0)[order])])
    review = np.arange(len(order) + 1) * costs.review
    decline = np.concatenate([[0.0], np.cumsum(np.where(fraud, 0.0, costs.false_decline)[order])])
    # A cut c puts the rows before c below the threshold. No cut divides rows of equal probability.
    possible = np.concatenate([[True], ranked[1:] != ranked[:-1], [True]])
    enter_review = np.where(possible, approve - review, np.inf)
    best_review = np.minimum.accumulate(enter_review)
    total = np.where(possible, best_review + review + (decline[-1] - decline), np.inf)
    decline_cut = int(np.argmin(total))
    review_cut = int(np.argmin(enter_review[: decline_cut + 1]))
    return _threshold_at(ranked, review_cut), _threshold_at(ranked, decline_cut)


def _threshold_at(ranked: Array, cut: int) -> float:
    """The middle between the rows on both sides of a cut, so that rounding moves no row across it."""
    if cut == 0:
        return 0.0
    if cut == len(ranked):
        return float(np.nextafter(1.0, 2.0))
    below, above = float(ranked[cut - 1]), float(ranked[cut])
    middle = below + (above - below) / 2.0
    # neighbouring floats have no middle
    return middle if middle > below else above
