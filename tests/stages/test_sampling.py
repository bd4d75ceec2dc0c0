"""The draw of rows for a deep model: which are certain, and that the others stand for all."""

from __future__ import annotations

import numpy as np
import pytest

from stages.sampling import SURE_FROM, chances, sample

ROWS = 200_000


def test_frauds_and_suspected_rows_are_certain_and_the_rest_stands_for_all_rows() -> None:
    rng = np.random.default_rng(1)
    screened = rng.beta(0.1, 8.0, ROWS)
    fraud = (rng.random(ROWS) < screened).astype(np.int64)
    drawn, weight = sample(fraud, screened, 0.05, seed=3)
    certain = (fraud == 1) | (screened >= SURE_FROM)
    assert np.isin(np.flatnonzero(certain), drawn).all()
    assert (weight[certain[drawn]] == 1.0).all()
    assert weight.max() == pytest.approx(20.0)
    assert (np.diff(drawn) > 0).all()
    # the weights stand for all rows, and for sums over any part of them
    assert weight.sum() == pytest.approx(ROWS, rel=0.02)
    low = screened < np.median(screened)
    assert weight[low[drawn]].sum() == pytest.approx(low.sum(), rel=0.03)
    assert len(drawn) < ROWS / 2


def test_the_chance_falls_with_the_screened_probability_to_the_share() -> None:
    found = chances(np.array([0.0, 0.25 * SURE_FROM, 0.5 * SURE_FROM, SURE_FROM, 1.0]), 0.25)
    assert found.tolist() == [0.25, 0.25, 0.5, 1.0, 1.0]


def test_a_share_of_one_draws_every_row_once() -> None:
    drawn, weight = sample(np.zeros(10, np.int64), np.zeros(10), 1.0, seed=1)
    assert drawn.tolist() == list(range(10))
    assert (weight == 1.0).all()
