"""The benchmark of the escalation budget: its reference is the best choice there is, and the control comes near it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bench.best_choice import best_value
from bench.escalation import extremes, score_streams, stream_result


@pytest.mark.parametrize("seed", range(20))
def test_the_reference_is_the_best_of_all_choices_within_the_bounds(seed: int) -> None:
    chance = np.random.default_rng(seed)
    rows, budget, capacity = 11, float(chance.choice([0.25, 0.4, 0.7])), 2.0
    scores = chance.exponential(1.0, rows)
    tokens = budget * np.arange(1, rows + 1)
    values = []
    for choice in itertools.product((0, 1), repeat=rows):
        level = tokens - np.cumsum(choice)
        if level.min() >= -1e-9 and level.max() <= capacity + 1e-9:
            values.append(float(scores @ np.array(choice)))
    assert best_value(scores, budget, capacity) == pytest.approx(max(values))


@pytest.mark.parametrize(
    ("stream", "least"),
    [
        ("stationary", 0.97), ("heavy tail", 0.96), ("day's curve", 0.93), ("campaigns", 0.93), ("bursts", 0.90),
        ("two drifts", 0.96), ("slow drift", 0.96), ("cold state", 0.96), ("whole numbers", 0.97),
    ],
)  # fmt: skip
def test_the_control_keeps_nearly_the_value_of_the_best_choice(stream: str, least: float) -> None:
    result = stream_result(stream, score_streams(120_000, 5)[stream], 0.01)
    assert least < result.kept <= 1.0
    assert 0.9 <= result.least <= 1.0 <= result.most <= 1.1


def test_a_fixed_threshold_does_not_hold_the_budget() -> None:
    result = stream_result("two drifts", score_streams(120_000, 5)["two drifts"], 0.01)
    assert result.fixed_most > 5.0


def test_extremes_are_those_of_any_window() -> None:
    escalate = np.zeros(30_000, bool)
    escalate[15_000:15_150] = True
    assert extremes(escalate, 0.01) == (0.0, 1.5)
