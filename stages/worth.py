"""What a bundle's decisions are worth at each escalated share, on its own validation rows."""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
from msgspec.structs import replace

from cascade.columns import Float64
from cascade.policy import Policy
from stages.intervals import CONFIDENCE, Figure, with_intervals
from stages.report import held_out_actions
from stages.resampling import Ranking
from stages.validation import ValidationRows

# 0: the screener alone. 1: both models for every transaction.
SHARES: Final = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.05, 1.0)


class Way(msgspec.Struct, frozen=True):
    """A way to decide, and its figures on the validation rows.

    - `share`: escalated; None for deep-only, which decides by the deep model's score alone.
    - `average_precision`, `caught` (share of the frauds that are reviewed or declined) and `cost_per_thousand` (of
      decisions, in the currency of the amounts): with 95 % intervals.
    - `gain_on_screener`, `gain_on_deep`: by how much the decisions of 1,000 transactions cost less than the screener's
      and than deep-only's. The intervals hold for all shares at once, as the best of them is chosen by the same rows
      (Bonferroni).

    Thresholds of review and decline are the cheapest for the share, from other days than those that they decide. All
    intervals are by a bootstrap over days and cards: approximate.
    """

    share: float | None
    average_precision: Figure
    caught: Figure
    cost_per_thousand: Figure
    gain_on_screener: Figure
    gain_on_deep: Figure


def ways_to_decide(rows: ValidationRows, policy: Policy, seed: int) -> tuple[Way, ...]:
    """The ways at SHARES, then deep-only. The policy's calibrations, escalation rule and costs count."""
    shares = (*SHARES, None)
    probabilities = [_probability(rows, policy, share) for share in shares]
    rankings = [Ranking.of(probability, rows.fraud) for probability in probabilities]
    actions = [held_out_actions(rows, probability, policy) for probability in probabilities]
    costs = np.stack([policy.costs.of_decisions(chosen, rows.fraud, rows.amount) for chosen in actions])
    caught = np.stack([rows.fraud & (chosen > 0) for chosen in actions]).astype(np.float64)

    def figures(weight: Float64) -> Float64:
        cost = 1e3 * (costs @ weight) / weight.sum()
        found = caught @ weight / max(float(weight[rows.fraud].sum()), 1e-9)
        precision = np.array([ranking.average_precision(weight) for ranking in rankings])
        return np.stack([precision, found, cost, cost[0] - cost, cost[-1] - cost], axis=1).ravel()

    # the best of the shares is chosen by the same rows
    together = 1.0 - (1.0 - CONFIDENCE) / (len(SHARES) - 1)
    confidences = (CONFIDENCE, CONFIDENCE, CONFIDENCE, together, together)
    shown = with_intervals(figures, rows.day, rows.card, seed, confidences * len(shares))
    each = len(confidences)
    return tuple(Way(share, *shown[way * each : (way + 1) * each]) for way, share in enumerate(shares))


def _probability(rows: ValidationRows, policy: Policy, share: float | None) -> Float64:
    if share is None:
        return policy.deep.probability(rows.deep_raw)
    return rows.cascade(replace(policy, escalation=rows.at_budget(policy.escalation, share)))
