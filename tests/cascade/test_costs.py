"""The cost matrix, and thresholds: no pair of thresholds costs less."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.costs import ACTIONS, Cell, Costs, decision_thresholds

# sums of these are exact, so that costs can be compared with ==
twentieths = st.integers(0, 20).map(lambda number: number / 20)
quarters = st.integers(0, 8_000).map(lambda number: number / 4)
cells = st.builds(Cell, fixed=st.sampled_from((0.0, 0.25, 5.0, 25.0, 1e6)), share=st.sampled_from((0.0, 0.25, 1.0)))
matrices = st.one_of(
    st.builds(Costs, review_fraud=cells, review_genuine=cells, decline_genuine=cells),
    st.builds(Costs, **{name: cells for name in Costs.__struct_fields__ if name != "reviews_per_day_max"}),
)
Row = tuple[float, bool, float]


def decided(probability: np.ndarray, thresholds: tuple[float, float]) -> np.ndarray:
    review_from, decline_from = thresholds
    return np.where(probability >= decline_from, 2, np.where(probability >= review_from, 1, 0))


def total(thresholds: tuple[float, float], probability: np.ndarray, by_action: np.ndarray) -> float:
    actions = decided(probability, thresholds)
    return math.fsum(by_action[row, action] for row, action in enumerate(actions))


@settings(max_examples=300)
@given(
    rows=st.lists(st.tuples(twentieths, st.booleans(), quarters), max_size=12),
    costs=matrices,
    reviews_max=st.one_of(st.none(), st.integers(0, 12)),
)
def test_no_pair_of_thresholds_within_the_reviews_costs_less(
    rows: list[Row], costs: Costs, reviews_max: int | None
) -> None:
    probability, fraud, amount = (np.array([row[column] for row in rows]) for column in range(3))
    by_action = costs.of_actions(fraud.astype(bool), amount)
    found = decision_thresholds(probability, by_action, reviews_max)
    limit = len(rows) if reviews_max is None else reviews_max
    possible = [
        pair
        for pair in combinations_with_replacement([0.0, *np.unique(probability).tolist(), 2.0], 2)
        if (decided(probability, pair) == 1).sum() <= limit
    ]
    assert 0.0 <= found[0] <= found[1]
    assert (decided(probability, found) == 1).sum() <= limit
    assert total(found, probability, by_action) == min(total(pair, probability, by_action) for pair in possible)


@pytest.mark.parametrize("reviews_max", [None, 50, 400])
def test_the_minimum_is_found_among_thousands_of_rows_as_well(reviews_max: int | None) -> None:
    chance = np.random.default_rng(4)
    probability = np.round(chance.random(4_000) ** 4, 2)  # a hundred groups of ties
    fraud, amount = chance.random(4_000) < probability, np.round(chance.exponential(80.0, 4_000))
    by_action = Costs().of_actions(fraud, amount)
    found = decision_thresholds(probability, by_action, reviews_max)
    cuts = [0.0, *np.unique(probability).tolist(), 2.0]
    limit = 4_000 if reviews_max is None else reviews_max
    least = min(
        total(pair, probability, by_action)
        for pair in combinations_with_replacement(cuts, 2)
        if (decided(probability, pair) == 1).sum() <= limit
    )
    assert total(found, probability, by_action) == least
    reviews = (decided(probability, found) == 1).sum()
    assert reviews <= limit
    if reviews_max == 50:
        assert reviews > 0, "the limit binds, and does not forbid all reviews"


def test_rows_of_equal_probability_are_decided_alike() -> None:
    # apart, the fraud would be declined and the others approved
    probability = np.array([0.5, 0.5, 0.5])
    by_action = Costs(review_fraud=Cell(1e6), review_genuine=Cell(1e6)).of_actions(
        np.array([True, False, False]), np.array([40.0, 10.0, 10.0])
    )
    assert len(set(decided(probability, decision_thresholds(probability, by_action)).tolist())) == 1
    assert len(set(decided(probability, decision_thresholds(probability, by_action, reviews_max=1)).tolist())) == 1


def test_without_reviews_the_thresholds_are_one() -> None:
    chance = np.random.default_rng(1)
    probability = chance.random(500)
    by_action = Costs(review_fraud=Cell(), review_genuine=Cell()).of_actions(
        chance.random(500) < probability, np.full(500, 100.0)
    )
    low, high = decision_thresholds(probability, by_action)
    assert low < high, "reviews cost nothing here"
    low, high = decision_thresholds(probability, by_action, reviews_max=0)
    assert low == high


def test_thresholds_lie_midway_between_rows() -> None:
    probability, amount = np.array([0.1, 0.5, 0.9]), np.array([50.0, 6.0, 500.0])
    costs = Costs(review_fraud=Cell(7.0), review_genuine=Cell(7.0))
    for frauds, middle in (([False, True, True], 0.3), ([False, False, True], 0.7)):
        found = decision_thresholds(probability, costs.of_actions(np.array(frauds), amount))
        assert found == (pytest.approx(middle),) * 2


def test_a_threshold_separates_neighbouring_probabilities() -> None:
    below_one = np.nextafter(1.0, 0.0) - 2**-53
    for low in (below_one, below_one - 2**-53):
        probability = np.array([low, np.nextafter(low, 1.0)])
        by_action = Costs().of_actions(np.array([False, True]), np.array([10.0, 1e5]))
        _, decline_from = decision_thresholds(probability, by_action)
        assert (probability >= decline_from).tolist() == [False, True]


@pytest.mark.parametrize(
    ("costs", "by_action"),
    [
        (Costs(), [[80.0, 5.0, 0.0], [0.0, 5.0, 25.0]]),
        (Costs(approve_fraud=Cell(fixed=15.0, share=1.0)), [[95.0, 5.0, 0.0], [0.0, 5.0, 25.0]]),
        (Costs(approve_genuine=Cell(share=0.25)), [[80.0, 5.0, 0.0], [20.0, 5.0, 25.0]]),
        (Costs(review_fraud=Cell(5.0, 0.125)), [[80.0, 15.0, 0.0], [0.0, 5.0, 25.0]]),
        (Costs(review_genuine=Cell(6.0, 0.25)), [[80.0, 5.0, 0.0], [0.0, 26.0, 25.0]]),
        (Costs(decline_fraud=Cell(1.0, 0.5)), [[80.0, 5.0, 41.0], [0.0, 5.0, 25.0]]),
        (Costs(decline_genuine=Cell(3.0, 0.5)), [[80.0, 5.0, 0.0], [0.0, 5.0, 43.0]]),
    ],
)
def test_each_cell_is_the_cost_of_its_action_and_truth(costs: Costs, by_action: list[list[float]]) -> None:
    fraud, amount = np.array([True, False]), np.array([80.0, 80.0])
    assert costs.of_actions(fraud, amount).tolist() == by_action
    for action in range(len(ACTIONS)):
        chosen = costs.of_decisions(np.array([action, action]), fraud, amount)
        assert chosen.tolist() == [by_action[0][action], by_action[1][action]]


def test_each_decision_has_the_cost_of_its_own_row() -> None:
    cost = Costs().of_decisions(
        np.array([0, 0, 1, 1, 2, 2]), np.array([True, False] * 3), np.array([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    )
    assert cost.tolist() == [10.0, 0.0, 5.0, 5.0, 0.0, 25.0]


@pytest.mark.parametrize(
    "text",
    [
        '{"review_fraud": {"fixed": -1.0}}',
        '{"review_fraud": {"part": 0.1}}',
        '{"approve_frauds": {}}',
        '{"reviews_per_day_max": -5.0}',
        '{"decline_genuine": {"share": 1e10}}',
    ],
)
def test_costs_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=Costs)
