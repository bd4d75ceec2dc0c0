"""The report of a bundle: its figures on the validation rows, each with its interval."""

from __future__ import annotations

from datetime import datetime

import msgspec
import numpy as np
from msgspec.structs import replace

from cascade.columns import Float64, Int64
from cascade.costs import decision_thresholds
from cascade.policy import Policy
from stages.calibration import reviews_max
from stages.curve import Curve, curve
from stages.intervals import Figure, with_intervals
from stages.metrics import Quality, quality
from stages.resampling import Ranking
from stages.screener.search import Candidate
from stages.validation import ValidationRows

# Parts of the days for costs: each part is decided by thresholds from the others.
COST_PARTS = 5


class Span(msgspec.Struct, frozen=True):
    """A part of the data: times of its first and last event (UTC), and its numbers of transactions and frauds."""

    first: datetime
    last: datetime
    transactions: int
    frauds: int


class ModelReport(msgspec.Struct, frozen=True):
    """How well a way to decide ranks frauds, and what its decisions are worth.

    - `average_precision`: as in `quality`, with its interval.
    - `caught`: share of the frauds that are reviewed or declined.
    - `false_alarms_per_thousand`: genuine transactions reviewed or declined, per 1,000 transactions.
    - `reviews_per_day`: transactions reviewed on a mean day.
    - `cost_per_thousand`: cost of the decisions per 1,000 transactions, in the currency of the amounts. Each of five
      parts of the days is decided by thresholds from the other four, so the figure is not flattered by the choice.
    """

    quality: Quality
    average_precision: Figure
    caught: Figure
    false_alarms_per_thousand: Figure
    reviews_per_day: Figure
    cost_per_thousand: Figure


class ScreenerReport(msgspec.Struct, frozen=True):
    """The search: the chosen candidate, and all that were tried, with their figures on the tuning rows.

    - `us_per_row`: the screener, and the escalation rule's model if it has one, with the compiled kernels, here.
    - `us_per_row_max`, `batch_rows`: the limit, and the rows of a call.
    """

    chosen: Candidate
    tried: tuple[Candidate, ...]
    us_per_row: float
    us_per_row_max: float
    batch_rows: int


class DeepReport(msgspec.Struct, frozen=True):
    """The deep model.

    - `parameters`: how many numbers were learned, or fixed by the data.
    - `us_per_row`: CPU time of a row in ONNX Runtime, one thread, by the rows of a call; here, without the network.
    - `onnx_difference_max`: largest difference of log-odds between PyTorch and ONNX Runtime, on a part of the rows.
    """

    size: str
    parameters: int
    us_per_row: dict[int, float]
    onnx_difference_max: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a report that follows from validation rows and a policy.

    - `escalation_share`: share of the rows that are escalated.
    - `precision_kept`, `caught_kept`: the cascade's average precision and caught frauds ÷ deep-only's.
    - `cost_per_thousand_approve_all`: the cost if all transactions were approved.
    """

    curve: Curve
    escalation_share: float
    cascade: ModelReport
    screener_only: ModelReport
    deep_only: ModelReport
    precision_kept: Figure
    caught_kept: Figure
    cost_per_thousand_approve_all: float

    def into(self, report: Report) -> Report:
        """A report with these figures in place of its own."""
        return replace(report, **{name: getattr(self, name) for name in self.__struct_fields__})


class Report(Figures, frozen=True, kw_only=True):
    """Inputs and results of a training run. All figures but those of the search are of the validation rows.

    - `note`: what makes the figures uncertain; empty if nothing does.
    - `features`: number of features.
    - `rule_average_precision`: of the cascade by each escalation rule, on training rows from which it did not learn;
      empty where they had too few frauds.
    - `versions`: versions of the libraries.
    """

    schema: str
    seed: int
    train: Span
    validation: Span
    note: str
    features: int
    screener: ScreenerReport
    rule: str
    rule_average_precision: dict[str, float]
    deep: DeepReport
    versions: dict[str, str]


def figures(rows: ValidationRows, policy: Policy, seed: int) -> Figures:
    """Computes the figures of a policy on validation rows."""
    ways = {
        "cascade": rows.cascade(policy),
        "screener_only": policy.screener.probability(rows.screener_raw),
        "deep_only": policy.deep.probability(rows.deep_raw),
    }
    rankings = [Ranking.of(probability, rows.fraud) for probability in ways.values()]
    actions = [policy.actions(probability) for probability in ways.values()]
    costs = [_honest_cost(rows, probability, policy) for probability in ways.values()]

    def of(weight: Float64) -> Float64:
        """The figures of each way in the order of ModelReport, then the first two of the cascade ÷ deep-only's."""
        frauds, total = weight[rows.fraud].sum(), weight.sum()
        values = np.array([
            (
                ranking.average_precision(weight),
                weight[(chosen > 0) & rows.fraud].sum() / max(frauds, 1e-9),
                1e3 * weight[(chosen > 0) & ~rows.fraud].sum() / total,
                weight[chosen == 1].sum() / total * len(rows) / rows.days,
                1e3 * (weight * cost).sum() / total,
            )
            for ranking, chosen, cost in zip(rankings, actions, costs, strict=True)
        ])  # fmt: skip
        kept = values[0, :2] / np.maximum(values[2, :2], 1e-9)
        return np.append(values, kept)

    *shown, precision_kept, caught_kept = with_intervals(of, rows.day, rows.card, seed)
    each = len(shown) // len(ways)
    models = {
        name: ModelReport(
            quality(probability, rows.fraud, rows.day, rows.card, policy.escalation.budget),
            *shown[way * each : (way + 1) * each],
        )
        for way, (name, probability) in enumerate(ways.items())
    }
    approved = policy.costs.of_actions(rows.fraud, rows.amount)[:, 0]
    return Figures(
        curve=curve(rows, policy, seed),
        escalation_share=float(rows.escalated(policy).mean()),
        **models,
        precision_kept=precision_kept,
        caught_kept=caught_kept,
        cost_per_thousand_approve_all=1e3 * float(approved.mean()),
    )


def _honest_cost(rows: ValidationRows, probability: Float64, policy: Policy) -> Float64:
    """The cost of each row's decision, float64 [rows], by thresholds that do not come from the row's own days.

    `probability` float64 [rows]: by the way to decide.
    """
    return policy.costs.of_decisions(held_out_actions(rows, probability, policy), rows.fraud, rows.amount)


def held_out_actions(rows: ValidationRows, probability: Float64, policy: Policy) -> Int64:
    """Positions in ACTIONS, int64 [rows], by the cheapest thresholds of the other parts of the days.

    probability: float64 [rows]. policy: its costs count, its thresholds do not.
    """
    by_action = policy.costs.of_actions(rows.fraud, rows.amount)
    # the rows of a single day are divided by their order
    place, places = (rows.day - rows.day[0], rows.days) if rows.days > 1 else (np.arange(len(rows)), len(rows))
    part = place * COST_PARTS // places
    action = np.empty(len(rows), np.int64)
    for number in range(COST_PARTS):
        own = part == number
        if not own.any():
            continue
        days = rows.days * int((~own).sum()) / len(rows)
        limit = reviews_max(policy.costs, days)
        review_from, decline_from = decision_thresholds(probability[~own], by_action[~own], limit)
        action[own] = replace(policy, review_from=review_from, decline_from=decline_from).actions(probability[own])
    return action
