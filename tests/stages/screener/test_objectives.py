"""What a screener is trained for: the focal loss by numeric differences, and parameters that LightGBM takes."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from stages.screener.objectives import (
    FOCAL_GAMMA,
    HESSIAN_MIN,
    QUERY_ROWS,
    Objective,
    focal_loss,
    parameters,
    queries,
)

RAW = np.linspace(-8.0, 8.0, 161)


def loss(raw: np.ndarray, fraud: float) -> np.ndarray:
    """Equation 4 of Lin et al., written plainly."""
    q = 1.0 / (1.0 + np.exp(-raw if fraud else raw))
    return -((1.0 - q) ** FOCAL_GAMMA) * np.log(q)


@pytest.mark.parametrize("fraud", [0.0, 1.0])
def test_the_gradient_is_that_of_the_loss(fraud: float) -> None:
    gradient, _ = focal_loss(RAW, np.full(len(RAW), fraud))
    step = 1e-5
    numeric = (loss(RAW + step, fraud) - loss(RAW - step, fraud)) / (2 * step)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("fraud", [0.0, 1.0])
def test_the_second_derivative_is_that_of_the_loss_where_it_is_positive(fraud: float) -> None:
    _, hessian = focal_loss(RAW, np.full(len(RAW), fraud))
    step = 1e-5
    ahead, back = (focal_loss(RAW + shift, np.full(len(RAW), fraud))[0] for shift in (step, -step))
    numeric = (ahead - back) / (2 * step)
    np.testing.assert_allclose(hessian, np.maximum(numeric, HESSIAN_MIN), rtol=1e-4, atol=1e-7)
    assert (numeric < 0).any(), "rows that are far wrong have a negative one, which no tree can use"


def test_both_kinds_are_mirror_images() -> None:
    of_fraud, of_genuine = (focal_loss(raw, np.full(161, fraud)) for raw, fraud in ((RAW, 1.0), (-RAW, 0.0)))
    np.testing.assert_allclose(of_fraud[0], -of_genuine[0], atol=1e-12)
    np.testing.assert_allclose(of_fraud[1], of_genuine[1], atol=1e-12)


def test_rows_that_are_right_count_less_than_by_log_loss() -> None:
    gradient, _ = focal_loss(np.array([3.0]), np.array([1.0]))
    log_loss = -(1.0 - 1.0 / (1.0 + np.exp(-3.0)))
    assert abs(gradient[0]) < 0.05 * abs(log_loss)


@pytest.mark.parametrize("fraud", [0.0, 1.0])
def test_extreme_scores_have_finite_derivatives(fraud: float) -> None:
    for part in focal_loss(np.array([-700.0, -40.0, 40.0, 700.0]), np.full(4, fraud)):
        assert np.isfinite(part).all()


@pytest.mark.parametrize("rows", [0, 1, QUERY_ROWS - 1, QUERY_ROWS, QUERY_ROWS + 1, 3 * QUERY_ROWS + 7])
def test_queries_cover_all_rows_and_none_is_too_large(rows: int) -> None:
    sizes = queries(rows)
    assert sizes.sum() == rows
    assert ((sizes > 0) & (sizes <= min(QUERY_ROWS, 10_000))).all()


def test_each_objective_has_parameters() -> None:
    for objective in get_args(Objective):
        assert parameters(objective)["objective"]
