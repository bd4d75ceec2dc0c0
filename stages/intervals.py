"""Figures with their 95 % intervals, by the bootstrap over days and cards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from cascade.columns import Int64
from stages.resampling import Figures, quantile_t, standard_errors

CONFIDENCE: Final = 0.95
REPLICATES: Final = 60


class Figure(msgspec.Struct, frozen=True):
    """A figure, and its 95 % interval by a bootstrap over days and cards: approximate."""

    value: float
    low: float
    high: float

    @property
    def reach(self) -> float:
        """From the figure to either end."""
        return (self.high - self.low) / 2.0


def with_intervals(
    figures: Figures, day: Int64, card: Int64, seed: int, confidences: Sequence[float] | None = None
) -> list[Figure]:
    """The figures of all rows with their intervals.

    - `figures`: computes float64 [figures] from the weight of each row, float64 [rows].
    - `day`, `card` int64 [rows]: days since the epoch, and a number that identifies the card.
    - `confidences`: of each figure's interval; None: CONFIDENCE for all.
    """
    values = figures(np.ones(len(day)))
    errors, freedom = standard_errors(figures, day, card, REPLICATES, seed)
    reach = [quantile_t((1.0 + confidence) / 2.0, freedom) for confidence in confidences or (CONFIDENCE,) * len(values)]
    low, high = values - reach * errors, values + reach * errors
    return [Figure(*map(float, ends)) for ends in zip(values, low, high, strict=True)]
