from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.metrics import card_precision, quality, recall_at


def plain_card_precision(score: list[float], fraud: list[bool], day: list[int], card: list[int], top: int) -> float:
    """The definition, card by card: see card_precision."""
    rows = list(zip(score, fraud, day, card, strict=True))
    found: set[int] = set()
    daily = []
    for today in sorted(set(day)):
        best: dict[int, float] = {}
        defrauded: set[int] = set()
        for row_score, row_fraud, row_day, row_card in rows:
            if row_day == today and row_card not in found:
                best[row_card] = max(best.get(row_card, -np.inf), row_score)
                if row_fraud:
                    defrauded.add(row_card)
        chosen = sorted(best, key=lambda row_card: -best[row_card])[:top]
        caught = [row_card for row_card in chosen if row_card in defrauded]
        daily.append(len(caught) / top)
        found.update(caught)
    return sum(daily) / len(daily)


@st.composite
def scored_days(draw: st.DrawFn) -> tuple[list[float], list[bool], list[int], list[int]]:
    rows = draw(st.integers(1, 60))
    # scores without ties: the order of equal cards is not defined
    score = draw(st.permutations(range(rows)))
    fraud = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    day = draw(st.lists(st.integers(17_000, 17_003), min_size=rows, max_size=rows))
    card = draw(st.lists(st.integers(-3, 8), min_size=rows, max_size=rows))
    return [float(row_score) for row_score in score], fraud, day, card


@settings(max_examples=200, deadline=None)
@given(scored_days(), st.integers(1, 6))
def test_card_precision_equals_the_plain_definition(
    data: tuple[list[float], list[bool], list[int], list[int]], top: int
) -> None:
    score, fraud, day, card = data
    computed = card_precision(np.array(score), np.array(fraud), np.array(day), np.array(card), top)
    assert computed == pytest.approx(plain_card_precision(score, fraud, day, card, top))


def test_a_day_with_few_cards_is_still_measured_by_the_whole_list() -> None:
    assert card_precision(np.array([0.5]), np.array([True]), np.array([1]), np.array([1])) == pytest.approx(0.01)


@pytest.mark.parametrize("fraud", [np.zeros(3, bool), np.ones(3, bool), np.zeros(0, bool)])
def test_quality_is_absent_not_wrong_where_there_is_one_class(fraud: np.ndarray) -> None:
    nothing = np.zeros(len(fraud))
    found = quality(nothing, fraud, nothing.astype(np.int64), nothing.astype(np.int64), 0.1)
    assert (found.auc, found.average_precision, found.card_precision_top100) == (None, None, None)


def test_quality_of_a_perfect_and_of_a_reversed_ranking() -> None:
    fraud = np.array([False, False, True, False])
    zeros = np.zeros(4, np.int64)
    best = quality(fraud.astype(float), fraud, zeros, np.arange(4), 0.25)
    worst = quality(-fraud.astype(float), fraud, zeros, np.arange(4), 0.25)
    assert (best.auc, best.average_precision, best.recall_at_budget) == (1.0, 1.0, 1.0)
    assert (worst.auc, worst.recall_at_budget) == (0.0, 0.0)
    assert worst.average_precision == pytest.approx(0.25)


@pytest.mark.parametrize(("share", "recall"), [(0.0, 0.0), (0.25, 0.5), (0.5, 0.5), (0.75, 1.0), (1.0, 1.0)])
def test_recall_looks_at_no_more_than_the_share(share: float, recall: float) -> None:
    fraud = np.array([True, False, True, False])
    assert recall_at(np.array([0.9, 0.7, 0.7, 0.7]), fraud, share) == recall
