"""What decisions cost, and the thresholds that cost least.

The matrix has a cell for each action and truth. A cell has a fixed part and a share of the transaction's amount:

                 fraud                          genuine
    approve      the amount is lost             nothing
    review       a person looks at it           the same
    decline      nothing                        a customer is turned away
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from cascade.columns import Array, Bool, Float64

Action = Literal["approve", "review", "decline"]
ACTIONS: tuple[Action, ...] = ("approve", "review", "decline")
_NotNegative = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]


class Cell(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cost of a decision: `fixed`, in the currency of the amounts, + `share` · the transaction's amount."""

    fixed: _NotNegative = 0.0
    share: _NotNegative = 0.0


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cost matrix, and how many transactions can be reviewed.

    - `approve_fraud`, `review_fraud`, `review_genuine`, `decline_genuine`, …: the cells. The defaults: an approved
      fraud costs its amount, a review 5 and always finds the truth, a false decline 25.
    - `reviews_per_day_max`: no thresholds that send more transactions of a mean day to review; None: as many as pay.

    >>> costs = Costs(review_fraud=Cell(fixed=5.0, share=0.1))  # reviews that find nine of ten frauds
    >>> costs.of_actions(np.array([True, False]), np.array([100.0, 100.0]))
    array([[100.,  15.,   0.],
           [  0.,   5.,  25.]])
    """

    approve_fraud: Cell = Cell(share=1.0)
    approve_genuine: Cell = Cell()
    review_fraud: Cell = Cell(fixed=5.0)
    review_genuine: Cell = Cell(fixed=5.0)
    decline_fraud: Cell = Cell()
    decline_genuine: Cell = Cell(fixed=25.0)
    reviews_per_day_max: Annotated[float, msgspec.Meta(ge=0.0)] | None = None

    def of_actions(self, fraud: Bool, amount: Float64) -> Float64:
        """The cost of each action for each row, float64 [rows, actions].

        - `fraud` bool [rows]; `amount` float64 [rows], in the currency of the cells.
        """
        cells = (
            (self.approve_fraud, self.approve_genuine),
            (self.review_fraud, self.review_genuine),
            (self.decline_fraud, self.decline_genuine),
        )
        by_action = [
            np.where(fraud, bad.fixed + bad.share * amount, good.fixed + good.share * amount) for bad, good in cells
        ]
        return np.stack(by_action, axis=1)

    def of_decisions(self, actions: NDArray[np.int64], fraud: Bool, amount: Float64) -> Float64:
        """The cost of each decision, float64 [rows]. `actions` int64 [rows]: positions in ACTIONS."""
        cost: Float64 = np.take_along_axis(self.of_actions(fraud, amount), actions[:, np.newaxis], axis=1)[:, 0]
        return cost


def decision_thresholds(probability: Float64, cost: Float64, reviews_max: int | None = None) -> tuple[float, float]:
    """(review_from, decline_from) with the exact minimum of the total cost on the given rows.

    In order of probability, rows below `review_from` are approved, rows from `decline_from` on are declined, and those
    between are reviewed, at most `reviews_max` of them. Prefix sums of the three costs give the best pair in one pass.
    Rows of equal probability get the same decision.

    - `probability` float64 [rows].
    - `cost` float64 [rows, actions]: of `Costs.of_actions`.
    """
    order = np.argsort(probability, kind="stable")
    ranked = probability[order]
    approve, review, decline = (np.concatenate([[0.0], np.cumsum(cost[order, action])]) for action in range(3))
    # A cut c puts the rows before c below the threshold. No cut divides rows of equal probability.
    possible = np.concatenate([[True], ranked[1:] != ranked[:-1], [True]])
    enter_review = np.where(possible, approve - review, np.inf)
    best_cut = _least_within(enter_review, len(order) if reviews_max is None else reviews_max)
    total = np.where(possible, enter_review[best_cut] + review + (decline[-1] - decline), np.inf)
    decline_cut = int(np.argmin(total))
    return _threshold_at(ranked, int(best_cut[decline_cut])), _threshold_at(ranked, decline_cut)


def _least_within(values: Float64, reach: int) -> NDArray[np.int64]:
    """For each position the earliest position of the least value among it and the `reach` positions before it."""
    least = np.empty(len(values), np.int64)
    waiting: list[int] = []  # positions of ever greater values; the first is the least
    first = 0
    for position, value in enumerate(values.tolist()):
        while len(waiting) > first and values[waiting[-1]] > value:
            waiting.pop()
        waiting.append(position)
        if waiting[first] < position - reach:
            first += 1
        least[position] = waiting[first]
    return least


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
