"""One simulation for all statistics, large enough for every family of frauds and twins."""

import polars as pl
import pytest

from cascade.simulator import Kind, Simulation, SimulatorSettings, simulate_with_states
from cascade.simulator.frauds import anchors

SETTINGS = SimulatorSettings(cards=4_000, terminals=6_000, days=150, seed=77, fraud_share=0.01)


@pytest.fixture(scope="session")
def simulation() -> Simulation:
    return simulate_with_states(SETTINGS)


@pytest.fixture(scope="session")
def events(simulation: Simulation) -> pl.DataFrame:
    """The frame with each row's kind, its time in ms, and whether it is online."""
    return with_kinds(simulation)


@pytest.fixture(scope="session")
def runs(events: pl.DataFrame) -> dict[Kind, pl.DataFrame]:
    """Of each kind with campaigns: a row per campaign, with lists of what its transactions have, in order of time."""
    return campaigns_of(events)


@pytest.fixture(scope="session")
def careful_runs() -> dict[Kind, pl.DataFrame]:
    """The same without the careless thieves, whom large amounts give away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anchors, "GREEDY_SHARE", 0.0)
        return campaigns_of(with_kinds(simulate_with_states(SETTINGS)))


def with_kinds(simulation: Simulation) -> pl.DataFrame:
    return simulation.frame.with_columns(
        kind=pl.Series(simulation.rows.kind),
        time=pl.col("event_time").to_physical(),
        online=pl.col("entry_mode") == "online",
    )


def campaigns_of(events: pl.DataFrame) -> dict[Kind, pl.DataFrame]:
    result = {}
    for kind in Kind:
        key, gap_ms = "card_id", 9 * 86_400_000
        if kind in (Kind.MULE_RING, Kind.CONCERT):
            key, gap_ms = "terminal_id", 8 * 3_600_000
        rows = events.filter(pl.col("kind") == int(kind))
        new = (pl.col("time").diff() > gap_ms).fill_null(value=False).cum_sum().over(key)
        names = ["time", "amount", "country", "category", "device_id", "card_id", "terminal_id", "online"]
        result[kind] = (
            rows.with_columns(key=pl.col(key), run=new)
            .group_by("key", "run", maintain_order=True)
            .agg(*names, size=pl.len())
        )
    return result
