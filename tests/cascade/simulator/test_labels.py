"""Labels: what is reported, wrongly or never, and when."""

from pathlib import Path

import numpy as np
import pytest

import cascade
from cascade.schema import load_schema
from cascade.simulator import Simulation, SimulatorSettings
from cascade.simulator.labels import FALSE_REPORTS_PER_FRAUD, UNREPORTED_SHARE, report

DAY_MS = 86_400_000


def test_a_known_share_of_frauds_is_never_reported_and_a_few_others_are() -> None:
    fraud = np.arange(1_000_000) % 100 == 0
    reported, _ = report(np.random.default_rng(1), SimulatorSettings(fraud_share=0.01), fraud)
    assert 1 - reported[fraud].mean() == pytest.approx(UNREPORTED_SHARE, rel=0.15)
    assert reported[~fraud].sum() / fraud.sum() == pytest.approx(FALSE_REPORTS_PER_FRAUD, rel=0.25)


def test_without_frauds_nothing_is_reported() -> None:
    reported, delay_ms = report(
        np.random.default_rng(1), SimulatorSettings(fraud_share=0.0), np.zeros(50_000, np.bool_)
    )
    assert not reported.any()
    assert (delay_ms == -1).all()


def test_reports_come_within_the_delay_of_the_schema_or_never(simulation: Simulation) -> None:
    schema = load_schema(Path(cascade.__file__).parent / "schemas" / "simulator.toml")
    label = simulation.frame["fraud"].to_numpy() == 1
    delay_ms = simulation.report_delay_ms
    assert (delay_ms[~label] == -1).all()
    assert delay_ms[label].min() >= 0
    assert delay_ms[label].max() <= schema.label.delay_ms
    assert 2.4 * DAY_MS < np.median(delay_ms[label]) < 3.0 * DAY_MS
