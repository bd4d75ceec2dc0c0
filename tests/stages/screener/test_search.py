"""The search for a screener: within its time a row, the smallest of the good ones, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from stages.metrics import recall_at
from stages.screener import search as search_module
from stages.screener.compiled import CompiledScreener
from stages.screener.cost import us_per_row
from stages.screener.search import SCREENER_PART, Candidate, Search, SearchSettings, tuning_part
from stages.screener.train import EarlyStop, ScreenerRows, ScreenerSettings, out_of_fold_scores, train_screener

ROWS = 8_000
NAMES = ("amount", "hour", "noise")
BUDGET = 0.02
QUICK = SearchSettings(
    us_per_row_max=1e6,
    trees_max=30,
    patience=8,
    leaves=(4, 15),
    learning_rates=(0.2,),
    fraud_weights=(3.0,),
    rows_per_leaf_min=20,
)


def rows_of(seed: int = 1) -> ScreenerRows:
    chance = np.random.default_rng(seed)
    features = chance.standard_normal((ROWS, len(NAMES))).astype(np.float32)
    log_odds = -3.5 + 1.5 * features[:, 0] + np.sin(3.0 * features[:, 1])
    probability = 1.0 / (1.0 + np.exp(-log_odds))
    fraud = (chance.random(ROWS) < probability).astype(np.int64)
    belief = np.where(chance.random(ROWS) < 0.5, probability, np.nan)
    return ScreenerRows(features, fraud, NAMES, belief=belief)


def searched(
    rows: ScreenerRows, seed: int = 1, progress: Callable[[float], None] = lambda _: None, **changes: Any
) -> Search:
    search = Search(msgspec.structs.replace(QUICK, **changes), BUDGET, seed, progress)
    search.try_sizes(rows)
    search.try_distilled(rows)
    return search


@pytest.fixture(scope="module")
def rows() -> ScreenerRows:
    return rows_of()


@pytest.fixture(scope="module")
def found(rows: ScreenerRows) -> Search:
    return searched(rows)


def test_each_candidate_that_the_settings_name_is_tried(found: Search) -> None:
    tried = [candidate.settings for candidate in found.tried]
    assert [(one.leaves, one.learning_rate) for one in tried[:2]] == [(4, 0.2), (15, 0.2)]
    assert tried[2].fraud_weight == 3.0
    assert [one.objective for one in tried[3:]] == ["focal", "lambdarank", "distilled"]
    assert all(one.rows_per_leaf_min == 20 and one.trees <= QUICK.trees_max for one in tried)


def test_what_is_not_asked_for_is_not_tried(rows: ScreenerRows) -> None:
    found = searched(rows, objectives=(), fraud_weights=(), leaves=(4,))
    assert [candidate.settings.objective for candidate in found.tried] == ["log-loss"]


@pytest.mark.parametrize("objective", ["log-loss", "focal", "lambdarank", "distilled"])
def test_every_objective_trains_ranks_and_compiles(rows: ScreenerRows, objective: str) -> None:
    settings = ScreenerSettings(objective=objective, trees=30, leaves=7, rows_per_leaf_min=20)  # type: ignore[arg-type]
    booster = train_screener(rows, settings, 1, lambda _: None)
    later = rows_of(2)
    wanted = booster.predict(later.features, raw_score=True)
    compiled = CompiledScreener(booster.model_to_string().encode())
    assert compiled.method == "quickscorer"
    np.testing.assert_allclose(compiled.score(later.features), wanted, atol=1e-9)
    assert average_precision_score(later.fraud, wanted) > 3 * later.fraud.mean()


def test_the_deep_models_opinion_is_learned_where_it_is_known(rows: ScreenerRows) -> None:
    settings = ScreenerSettings(objective="distilled", trees=10, leaves=4, rows_per_leaf_min=20)

    def raw(belief: np.ndarray | None) -> np.ndarray:
        taught = msgspec.structs.replace(rows, belief=belief)
        return train_screener(taught, settings, 1, lambda _: None).predict(rows.features, raw_score=True)

    unknown = np.full(ROWS, np.nan)
    np.testing.assert_array_equal(raw(unknown), raw(None))
    assert np.abs(raw(rows.belief) - raw(None)).max() > 1e-3


def test_figures_are_of_the_last_rows_on_which_no_candidate_learned(rows: ScreenerRows, found: Search) -> None:
    judged = tuning_part(rows.fraud, QUICK.tuning_share)
    assert (judged.start, judged.stop) == (6_400, ROWS)
    candidate = found.tried[0]
    booster = train_screener(rows.take(slice(0, 6_400)), candidate.settings, 1, lambda _: None)
    raw = booster.predict(rows.features[judged], raw_score=True)
    fraud = rows.fraud[judged] == 1
    assert candidate.average_precision == pytest.approx(average_precision_score(fraud, raw))
    assert candidate.recall_at_budget == recall_at(raw, fraud, BUDGET)
    assert candidate.merit == (candidate.average_precision + candidate.recall_at_budget) / 2


def candidate(merit: float, trees: int, leaves: int) -> Candidate:
    return Candidate(ScreenerSettings(trees=trees, leaves=leaves), 1.0, merit, merit)


def test_the_smallest_within_the_tolerance_is_chosen_by_leaves_and_not_by_time() -> None:
    search = Search(msgspec.structs.replace(QUICK, worse_share_max=0.01), BUDGET, 1, lambda _: None)
    search.tried = [
        candidate(0.600, 100, 31),
        candidate(0.595, 100, 15),
        msgspec.structs.replace(candidate(0.596, 50, 15), us_per_row=99.0),
        candidate(0.593, 10, 15),
    ]
    assert search.best.settings.size == 750
    search.tried.append(candidate(0.700, 300, 63))
    assert search.best.average_precision == 0.7


def test_a_candidate_slower_than_allowed_gets_fewer_trees(rows: ScreenerRows, monkeypatch: pytest.MonkeyPatch) -> None:
    # a clock of 0.1 µs a tree, so that the result is known
    def clock(text: bytes, features: np.ndarray, batch_rows: int) -> float:
        return 0.1 * text.count(b"\nTree=")

    monkeypatch.setattr(search_module, "us_per_row", clock)
    unbound, bound = (searched(rows, us_per_row_max=limit / SCREENER_PART, objectives=()) for limit in (1e6, 0.75))
    for free, short in zip(unbound.tried, bound.tried, strict=True):
        assert free.settings.trees > 7
        assert 6 <= short.settings.trees <= 7
        assert short.us_per_row == pytest.approx(0.1 * short.settings.trees)
        assert short.us_per_row <= 0.75
    # its figures are those of the trees that are left
    first = bound.tried[0]
    kept = train_screener(rows.take(slice(0, 6_400)), first.settings, 1, lambda _: None)
    raw = kept.predict(rows.features[6_400:], raw_score=True)
    assert first.average_precision == pytest.approx(average_precision_score(rows.fraud[6_400:], raw))


def test_a_limit_that_no_model_meets_leaves_a_single_tree(rows: ScreenerRows) -> None:
    found = searched(rows, us_per_row_max=1e-9, objectives=(), leaves=(4,))
    assert {one.settings.trees for one in found.tried} == {1}


def test_the_measured_time_is_that_of_the_compiled_kernel_and_grows_with_the_model(rows: ScreenerRows) -> None:
    def measured(trees: int, leaves: int) -> float:
        settings = ScreenerSettings(trees=trees, leaves=leaves, rows_per_leaf_min=5, l2=0.0)
        text = train_screener(rows, settings, 1, lambda _: None).model_to_string().encode()
        return us_per_row(text, rows.features, 256)

    small, large = measured(5, 8), measured(200, 31)
    assert 0.0 < small < large < 100.0


def test_the_same_seed_gives_the_same_choice(rows: ScreenerRows, found: Search) -> None:
    again = searched(rows)
    assert [one.settings for one in again.tried] == [one.settings for one in found.tried]
    assert [one.merit for one in again.tried] == [one.merit for one in found.tried]
    assert again.best.settings == found.best.settings
    assert [one.merit for one in searched(rows, seed=2).tried] != [one.merit for one in found.tried]


@pytest.mark.parametrize(("direction", "sign"), [("increasing", 1), ("decreasing", -1)])
def test_a_monotone_score_never_moves_the_other_way(rows: ScreenerRows, direction: str, sign: int) -> None:
    found = searched(rows, objectives=(), fraud_weights=(), leaves=(7,), monotone={"hour": direction})
    assert [one.settings.monotone for one in found.tried] == [{}, {"hour": direction}]
    booster = train_screener(rows, found.tried[1].settings, 1, lambda _: None)
    grid = np.zeros((200, 3), np.float32)
    grid[:, 1] = np.linspace(-3, 3, 200)
    for amount in (-1.0, 0.0, 1.0):
        grid[:, 0] = amount
        assert (sign * np.diff(booster.predict(grid, raw_score=True)) >= 0).all()
    free = train_screener(rows, found.tried[0].settings, 1, lambda _: None).predict(grid, raw_score=True)
    assert (sign * np.diff(free) < 0).any(), "without the constraint it does"


def test_early_stopping_ends_a_training_that_no_longer_gains(rows: ScreenerRows) -> None:
    noise = msgspec.structs.replace(rows, fraud=np.random.default_rng(3).permutation(rows.fraud))
    settings = ScreenerSettings(trees=200, leaves=31, rows_per_leaf_min=5, l2=0.0)
    booster = train_screener(
        noise.take(slice(0, 6_400)), settings, 1, lambda _: None, EarlyStop(noise.take(slice(6_400, ROWS)), 5)
    )
    assert booster.best_iteration < 100


def test_progress_rises_to_one_once_over_both_calls(rows: ScreenerRows) -> None:
    shares: list[float] = []
    searched(rows, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert shares.count(shares[-1]) <= 2


def test_no_row_is_scored_by_a_screener_that_learned_from_it(rows: ScreenerRows) -> None:
    settings = ScreenerSettings(trees=10, leaves=7, rows_per_leaf_min=20)
    scores = out_of_fold_scores(rows, settings, 1, 4, lambda _: None)
    # other labels in a block change the scores of all rows but its own
    changed = msgspec.structs.replace(rows, fraud=np.where(np.arange(ROWS) < ROWS // 4, 1 - rows.fraud, rows.fraud))
    again = out_of_fold_scores(changed, settings, 1, 4, lambda _: None)
    np.testing.assert_array_equal(again[: ROWS // 4], scores[: ROWS // 4])
    assert (again[ROWS // 4 :] != scores[ROWS // 4 :]).mean() > 0.9
