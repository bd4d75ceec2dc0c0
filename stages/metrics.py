"""Measures of ranking quality, as the field defines them."""

from __future__ import annotations

import msgspec
import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from cascade.columns import Bool, Float64, Int64


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """How well scores rank frauds. A measure is None if the rows are all frauds or all genuine.

    - `auc`: area under the ROC curve.
    - `average_precision`: area under the precision-recall curve.
    - `card_precision_top100`: see `card_precision`.
    - `recall_at_budget`: share of the frauds that are among the highest scores, as many as the budget allows.
    """

    auc: float | None
    average_precision: float | None
    card_precision_top100: float | None
    recall_at_budget: float | None


def quality(
    score: Float64, fraud: Bool, day: Int64, card: Int64, budget: float, weight: Float64 | None = None
) -> Quality:
    """Compute the quality of a ranking.

    - `score` float64 [rows], `fraud` bool [rows].
    - `day` int64 [rows]: days since the epoch.
    - `card` int64 [rows]: a number that identifies the card.
    - `budget`: share of the rows for `recall_at_budget`.
    - `weight` float64 [rows]: how many rows each stands for, if they are a sample. Then there is no card precision.
    """
    if not 0 < fraud.sum() < len(fraud):
        return Quality(auc=None, average_precision=None, card_precision_top100=None, recall_at_budget=None)
    return Quality(
        auc=float(roc_auc_score(fraud, score, sample_weight=weight)),
        average_precision=float(average_precision_score(fraud, score, sample_weight=weight)),
        card_precision_top100=card_precision(score, fraud, day, card) if weight is None else None,
        recall_at_budget=recall_at(score, fraud, budget, weight),
    )


def card_precision(score: Float64, fraud: Bool, day: Int64, card: Int64, top: int = 100) -> float:
    """Mean over days of the share of compromised cards among the `top` cards of the day, ranked by highest score.

    A compromised card that is found on one day no longer counts on later days. Arguments as for `quality`.
    Source: Le Borgne et al., "Reproducible Machine Learning for Credit Card Fraud Detection", chapter 4.3.
    """
    found: set[int] = set()
    daily = []
    for today in np.unique(day):
        rows = np.flatnonzero((day == today) & ~np.isin(card, np.fromiter(found, np.int64, len(found))))
        ranked = rows[np.argsort(-score[rows], kind="stable")]
        _, first = np.unique(card[ranked], return_index=True)
        chosen = card[ranked[np.sort(first)[:top]]]
        caught = set(chosen[np.isin(chosen, card[rows[fraud[rows]]])].tolist())
        daily.append(len(caught) / top)
        found |= caught
    return float(np.mean(daily))


def recall_at(score: Float64, fraud: Bool, share: float, weight: Float64 | None = None) -> float:
    """Share of the frauds that are within the `share` of the rows with the highest scores; earlier rows win ties."""
    order = np.argsort(-score, kind="stable")
    weights = np.ones(len(score)) if weight is None else weight[order]
    within = np.cumsum(weights) <= share * weights.sum() * (1 + 1e-12)
    return float((weights * fraud[order])[within].sum() / (weights * fraud[order]).sum())
