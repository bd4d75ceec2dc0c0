"""Attribution on synthetic devices: Cascade's method conserves joules and misplaces fewer than the methods in use."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench.attribution import SCENARIOS, AttributionReport, attribution_errors, simulate
from cascade.cli import main
from cascade.ledger.slices import METHODS


@pytest.mark.parametrize("seed", range(1, 6))
def test_activity_by_size_conserves_joules_and_misplaces_fewer_than_the_methods_in_use(seed: int) -> None:
    errors = {(error.scenario, error.method): error for error in attribution_errors(seed)}
    for scenario in SCENARIOS:
        cascade, kepler, ceems = (errors[scenario.name, method] for method in METHODS)
        assert abs(cascade.missing_share) < 0.01
        assert cascade.wrong_share < 0.06
        assert cascade.wrong_share < kepler.wrong_share
        assert cascade.wrong_share < ceems.wrong_share


def test_the_command_writes_the_errors_as_json(tmp_path: Path) -> None:
    assert main(["bench", "attribution", "--json", str(tmp_path / "errors.json")]) == 0
    report = msgspec.json.decode((tmp_path / "errors.json").read_bytes(), type=AttributionReport)
    assert report.errors == attribution_errors(1)


def test_the_true_joules_add_up_to_what_the_device_drew() -> None:
    for scenario in SCENARIOS:
        windows, truth = simulate(scenario, 3)
        assert sum(truth.values()) == pytest.approx(sum(window.check_j or np.nan for window in windows))
