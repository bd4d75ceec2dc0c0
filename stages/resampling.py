"""Standard errors by a bootstrap over days and cards, for figures that are no mean: approximate.

Transactions depend on each other through their card and through their day. We resample cards, blocks of days, and the
cells of a card on a day, each with replacement, and join the three variances: V(days) + V(cards) − V(cells), which
counts the cells once. It is never below the larger of the first two.

Sources: Cameron, Gelbach, Miller, "Robust Inference With Multiway Clustering", 2011, for the three variances; Politis,
Romano, "A circular block-resampling procedure for stationary data", 1992, for blocks of days.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np

from cascade.columns import Bool, Float64, Int64

# A week, so that the rhythm of the week and campaigns of some days stay together.
BLOCK_DAYS: Final = 7
# Fewer blocks give no variance: a short span has shorter blocks.
BLOCKS_MIN: Final = 4
# figures float64 [figures] from the weight of each row, float64 [rows]
Figures = Callable[[Float64], Float64]


@dataclass(frozen=True, slots=True)
class Ranking:
    """The rows of a score in descending order, for the average precision of any weights.

    order: int64 [rows]. last: positions within `order` of the last row of each score, int64 [scores]. fraud: float64
    [rows], in that order.
    """

    order: Int64
    last: Int64
    fraud: Float64

    @classmethod
    def of(cls, score: Float64, fraud: Bool) -> Ranking:
        """Ranks the rows down to the lowest fraud, since genuine rows below it change nothing."""
        lowest = score[fraud].min() if fraud.any() else np.inf
        rows = np.flatnonzero(score >= lowest)
        order = rows[np.argsort(-score[rows], kind="stable")]
        ranked = score[order]
        last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], len(ranked) > 0))
        return cls(order, last, fraud[order].astype(np.float64))

    def average_precision(self, weight: Float64) -> float:
        """Area under the precision-recall curve, in steps as scikit-learn computes it; 0 without frauds.

        `weight` float64 [rows of the data].
        """
        weights = weight[self.order]
        found = np.cumsum(weights * self.fraud)[self.last]
        named = np.cumsum(weights)[self.last]
        if not len(found) or found[-1] <= 0.0:
            return 0.0
        precision = np.divide(found, named, out=np.zeros_like(found), where=named > 0.0)
        return float((np.diff(found, prepend=0.0) * precision).sum() / found[-1])


def standard_errors(figures: Figures, day: Int64, card: Int64, replicates: int, seed: int) -> tuple[Float64, int]:
    """(standard error of each figure float64 [figures], degrees of freedom).

    - `day`, `card` int64 [rows]: days since the epoch, and a number that identifies the card.
    - `replicates`: of each of the three bootstraps.
    """
    rng = np.random.default_rng(seed)
    first = int(day.min())
    days = int(day.max()) - first + 1
    block = max(1, min(BLOCK_DAYS, days // BLOCKS_MIN))
    cards, card_number = np.unique(card, return_inverse=True)
    cells, cell = np.unique(card_number * np.int64(days) + (day - first), return_inverse=True)

    def variance(draw: Callable[[], Float64], unit: Int64) -> Float64:
        drawn = np.array([figures(draw()[unit]) for _ in range(replicates)])
        return np.asarray(drawn.var(axis=0, ddof=1), np.float64)

    by_day = variance(lambda: _blocks(rng, days, block), day - first)
    by_card = variance(lambda: _counts(rng, len(cards)), card_number)
    by_cell = variance(lambda: _counts(rng, len(cells)), cell)
    joined = np.maximum(by_day + by_card - by_cell, np.maximum(by_day, by_card))
    return np.sqrt(joined), max(days // block - 1, 1)


def quantile_t(confidence: float, freedom: int) -> float:
    """Student's t quantile, by its expansion around the normal one (Abramowitz, Stegun, 26.7.5)."""
    z = NormalDist().inv_cdf(confidence)
    first = (z**3 + z) / 4.0
    second = (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / 96.0
    third = (3.0 * z**7 + 19.0 * z**5 + 17.0 * z**3 - 15.0 * z) / 384.0
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _counts(rng: np.random.Generator, units: int) -> Float64:
    """How often each unit is drawn, with replacement, float64 [units]."""
    return np.bincount(rng.integers(units, size=units), minlength=units).astype(np.float64)


def _blocks(rng: np.random.Generator, days: int, block: int) -> Float64:
    """How often each day is drawn, in blocks of consecutive days that go around the end, float64 [days]."""
    starts = rng.integers(days, size=math.ceil(days / block))
    drawn = (starts[:, np.newaxis] + np.arange(block)) % days
    return np.bincount(drawn.ravel(), minlength=days).astype(np.float64)
