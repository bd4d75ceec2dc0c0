"""The policy: which transactions are escalated, and what is decided.

Raw scores (log-odds) of either model become calibrated probabilities of fraud; the probability and two thresholds
make the decision. All numbers come from validation data (see `stages.calibration`).
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
# Above and below every raw score; finite, since JSON knows no infinity.
RAW_MAX = sys.float_info.max


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Probability = 1 / (1 + exp(−(slope · raw + intercept))), slope > 0.

    Source: Platt, "Probabilistic Outputs for Support Vector Machines", 1999.
    """

    slope: float
    intercept: float

    def probability(self, raw: Float64) -> Float64:
        """Calibrated probabilities float64 [rows] of raw scores float64 [rows]."""
        return np.asarray(1.0 / (1.0 + np.exp(-(self.slope * raw + self.intercept))), np.float64)


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a decision costs, in the currency of the amounts.

    A fraud that is approved costs its amount; a genuine transaction that is declined costs `false_decline`; a review
    costs `review` and finds the truth.
    """

    review: float = 5.0
    false_decline: float = 25.0

    def of_decisions(self, actions: NDArray[np.int64], fraud: Bool, amount: Float64) -> Float64:
        """Cost of each decision; `actions` int64 [rows] are positions in ACTIONS."""
        approved, reviewed, declined = (actions == position for position in range(3))
        return (
            np.where(approved & fraud, amount, 0.0)
            + np.where(reviewed, self.review, 0.0)
            + np.where(declined & ~fraud, self.false_decline, 0.0)
        )


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Thresholds and calibrations of one bundle.

    `escalation_budget`: share of traffic that may be escalated. `escalation_threshold`, `escalation_ceiling`: raw
    screener scores from which and below which a transaction is escalated: it is suspicious, but not beyond doubt.
    `review_from`, `decline_from`: calibrated probabilities.
    """

    escalation_budget: float
    escalation_threshold: float
    escalation_ceiling: float
    screener: Calibration
    deep: Calibration
    review_from: float
    decline_from: float
    costs: Costs = Costs()

    def escalate(self, raw: Float64, raised: float = 0.0) -> Bool:
        """Mask of the rows whose raw screener score lies between the escalation threshold and the ceiling.

        `raised` (log-odds, ≥ 0) is added to the threshold while the deep model is overloaded; the ceiling stays, so
        that it is the least suspicious that are no longer sent. A threshold of −RAW_MAX (everything) does not rise.
        """
        return in_band(raw, self.escalation_threshold + raised, self.escalation_ceiling)

    def actions(self, probability: Float64) -> NDArray[np.int64]:
        """Positions in ACTIONS, int64 [rows], of calibrated probabilities float64 [rows]."""
        return (probability >= self.review_from).astype(np.int64) + (probability >= self.decline_from)

    def check(self, origin: str) -> None:
        """Raise BundleError where the numbers cannot be a policy."""
        sound: Mapping[str, bool] = {
            "escalation_budget must lie in [0, 1]": 0.0 <= self.escalation_budget <= 1.0,
            "escalation_threshold and escalation_ceiling must be numbers": math.isfinite(self.escalation_threshold)
            and math.isfinite(self.escalation_ceiling),
            "calibration slopes must be positive": self.screener.slope > 0.0 and self.deep.slope > 0.0,
            "thresholds must satisfy 0 ≤ review_from ≤ decline_from": 0.0 <= self.review_from <= self.decline_from,
        }
        for rule, holds in sound.items():
            if not holds:
                raise BundleError(f"{origin}: {rule}; train the bundle again")


def in_band(raw: Float64, threshold: float, ceiling: float) -> Bool:
    """Mask of the rows from `threshold` on and below `ceiling`."""
    inside: Bool = (raw >= threshold) & (raw < ceiling)
    return inside


def escalation_band(raw: Float64, budget: float, skip: float = 0.0) -> tuple[float, float]:
    """(threshold, ceiling): the raw scores from which and below which at most `budget` of the rows is escalated.

    `budget` and `skip` are shares of the rows; the `skip` with the highest scores lie at or above the ceiling, as do
    rows that tie with the last of them. Rows that tie with the threshold are counted as escalated, so ties never
    overrun the budget; with a budget below one row's share nothing is escalated.
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
    """(review_from, decline_from) with the least total cost on the given rows, exactly.

    Rows in order of probability: below `review_from` are approved, from `decline_from` on declined, between them
    reviewed. Prefix sums of the three costs give the best pair in one pass. Ties in probability stay together.
    """
    order = np.argsort(probability, kind="stable")
    ranked = probability[order]
    approve = np.concatenate([[0.0], np.cumsum(np.where(fraud, amount, 0.0)[order])])
    review = np.arange(len(order) + 1) * costs.review
    decline = np.concatenate([[0.0], np.cumsum(np.where(fraud, 0.0, costs.false_decline)[order])])
    # cut c: rows before c are below the threshold; a cut between equal probabilities is impossible
    possible = np.concatenate([[True], ranked[1:] != ranked[:-1], [True]])
    enter_review = np.where(possible, approve - review, np.inf)
    best_review = np.minimum.accumulate(enter_review)
    total = np.where(possible, best_review + review + (decline[-1] - decline), np.inf)
    decline_cut = int(np.argmin(total))
    review_cut = int(np.argmin(enter_review[: decline_cut + 1]))
    return _threshold_at(ranked, review_cut), _threshold_at(ranked, decline_cut)


def _threshold_at(ranked: Array, cut: int) -> float:
    """Midway between the rows on both sides of a cut, so that rounding does not move a row across."""
    if cut == 0:
        return 0.0
    if cut == len(ranked):
        return float(np.nextafter(1.0, 2.0))
    below, above = float(ranked[cut - 1]), float(ranked[cut])
    middle = below + (above - below) / 2.0
    # between neighbouring floats there is no middle
    return middle if middle > below else above
