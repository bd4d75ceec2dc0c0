"""Shares of the families, and numbers of new devices."""

import numpy as np
import polars as pl
import pytest

from cascade.simulator import Kind, Simulation, SimulatorSettings, simulate_with_states
from cascade.simulator.frauds.mix import PATTERN_MIX, TWIN_MIX


def test_shares_add_up() -> None:
    assert sum(PATTERN_MIX.values()) == pytest.approx(1.0)
    assert set(PATTERN_MIX) | set(TWIN_MIX) | {Kind.PURCHASE, Kind.SUBSCRIPTION} == set(Kind)


def test_each_family_has_its_share(events: pl.DataFrame) -> None:
    counts = dict(events["kind"].value_counts().iter_rows())
    frauds = sum(counts[int(kind)] for kind in PATTERN_MIX)
    assert frauds / events.height == pytest.approx(0.01, rel=0.03)
    for kind, share in PATTERN_MIX.items():
        assert counts[int(kind)] == pytest.approx(share * frauds, rel=0.15), kind.name
    for kind, share in TWIN_MIX.items():
        assert counts[int(kind)] == pytest.approx(share * events.height, rel=0.05), kind.name


def test_twins_do_not_depend_on_the_frauds() -> None:
    settings = SimulatorSettings(cards=300, terminals=500, days=60, seed=4, fraud_share=0.0)
    kind = simulate_with_states(settings).rows.kind
    assert set(np.unique(kind)) == {Kind.PURCHASE, Kind.SUBSCRIPTION, *TWIN_MIX}


def test_a_new_device_belongs_to_one_campaign(simulation: Simulation) -> None:
    new = simulation.campaigns.device[simulation.campaigns.device > simulation.world.devices.count]
    assert len(new) > 100
    assert len(np.unique(new)) == len(new)


def test_new_devices_are_used_by_their_campaigns_only(simulation: Simulation) -> None:
    rows = simulation.rows
    kinds = np.unique(rows.kind[rows.device > simulation.world.devices.count])
    assert set(kinds) == {Kind.ACCOUNT_TAKEOVER, Kind.NEW_PHONE}
