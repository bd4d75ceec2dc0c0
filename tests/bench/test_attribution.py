"""Attribution on synthetic devices: conservation, and fewer joules on wrong lines than by the ways in use."""

from __future__ import annotations

import numpy as np
import pytest

from bench.attribution import SCENARIOS, attribution_errors, simulate


@pytest.mark.parametrize("seed", range(1, 6))
def test_ours_conserves_and_misplaces_less_than_the_ways_in_use(seed: int) -> None:
    found = {(one.scenario, one.method): one for one in attribution_errors(seed)}
    for scenario in SCENARIOS:
        ours, kepler, ceems = (found[scenario.name, method] for method in ("activity-size", "activity", "occupied"))  # type: ignore[index]
        assert abs(ours.missing_share) < 0.01
        assert ours.wrong_share < 0.06
        assert ours.wrong_share < kepler.wrong_share
        assert ours.wrong_share < ceems.wrong_share


def test_the_truth_is_what_was_drawn() -> None:
    for scenario in SCENARIOS:
        windows, truth = simulate(scenario, 3)
        assert sum(truth.values()) == pytest.approx(sum(window.check_j or np.nan for window in windows))
