"""What the average precision of a ranking gains if a single row moves to another score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cascade.columns import Bool, Float64, Int64


@dataclass(frozen=True, slots=True)
class GainTable:
    """What average precision gains at each place of a ranking: sums over its frauds, from which `gains` looks up.

    - `ascending` float64 [rows]: the scores in ascending order.
    - `precision`, `fraud_above`, `genuine_above` float64 [rows + 1]: at k, the precision of a fraud that would follow
      the k rows with the highest scores, and the sums over the frauds among these k rows of (1 − P) ÷ (N + 1) and of
      P ÷ N, where P is the precision at the fraud and N the weight of the rows down to it.
    """

    ascending: Float64
    precision: Float64
    fraud_above: Float64
    genuine_above: Float64

    @classmethod
    def of(cls, score: Float64, fraud: Bool, weight: Float64) -> GainTable:
        """The table of rows with `score` float64, `fraud` bool and `weight` float64 (above 0), each [rows]."""
        order = np.argsort(-score, kind="stable")
        count = np.cumsum(weight[order])
        hits = np.cumsum(np.where(fraud, weight, 0.0)[order])
        precision = hits / count
        of_frauds = np.where(fraud, weight, 0.0)[order]
        return cls(
            ascending=score[order][::-1],
            precision=np.concatenate([[1.0], (hits + 1.0) / (count + 1.0)]),
            fraud_above=np.concatenate([[0.0], np.cumsum(of_frauds * (1.0 - precision) / (count + 1.0))]),
            genuine_above=np.concatenate([[0.0], np.cumsum(of_frauds * precision / count)]),
        )

    def rows_above(self, score: Float64) -> Int64:
        """The number of rows of the ranking with a higher score than each of `score` float64 [n]; int64 [n]."""
        return len(self.ascending) - np.searchsorted(self.ascending, score, side="right")


def gains(table: GainTable, score: Float64, moved: Float64, fraud: Bool) -> Float64:
    """How many frauds' worth of average precision each row gains if it alone moves; float64 [rows].

    Divided by the number of frauds, this is the change of average precision to first order. A fraud that rises gets the
    precision of its new place, and every fraud that it passes has one more fraud above itself: (1 − P) ÷ (N + 1). A
    genuine row that falls leaves every fraud that it passes with one row fewer above itself: P ÷ N. The other
    directions lose as much. The formula is the derivative of average precision, Σ P(fraud) ÷ frauds, by the weight of
    one row.

    - `table`: of the ranking in which the row moves.
    - `score`, `moved` float64 [rows]: each row's present score and the one that it moves to.
    - `fraud` bool [rows].

    >>> score, fraud = np.array([0.9, 0.8, 0.1]), np.array([False, True, False])
    >>> table = GainTable.of(score, fraud, np.ones(3))
    >>> gains(table, score, np.array([0.5, 0.95, 0.1]), fraud)  # either move alone lifts the fraud to the top
    array([0.25, 0.5 , 0.  ])
    """
    before, after = table.rows_above(score), table.rows_above(moved)
    of_fraud = table.precision[after] - table.precision[before]
    of_fraud += table.fraud_above[before] - table.fraud_above[after]
    of_genuine = table.genuine_above[after] - table.genuine_above[before]
    return np.where(fraud, of_fraud, of_genuine)
