"""What any screener finds: large amounts at night, and terminals at which most purchases are frauds for weeks."""

import numpy as np
import polars as pl

from cascade.simulator import Kind, Simulation
from cascade.simulator.frauds.plain import COMPROMISED_SHARE


def test_large_amounts_come_at_night_online_without_a_device(events: pl.DataFrame) -> None:
    large = events.filter(pl.col("kind") == int(Kind.LARGE_AMOUNT))
    assert (large["event_time"].dt.hour() < 6).all()
    assert large["online"].all()
    assert (large["device_id"] == 0).all()
    assert large["amount"].median() > 10 * events["amount"].median()  # type: ignore[operator]


def test_a_compromised_terminal_keeps_ordinary_amounts(events: pl.DataFrame) -> None:
    median = dict(events.group_by("kind").agg(pl.col("amount").median()).iter_rows())
    assert abs(np.log(median[int(Kind.COMPROMISED_TERMINAL)] / median[int(Kind.PURCHASE)])) < 0.4


def test_most_purchases_at_a_compromised_terminal_are_frauds_while_it_lasts(simulation: Simulation) -> None:
    rows = simulation.rows
    hit = simulation.campaigns.take(simulation.campaigns.kind == Kind.COMPROMISED_TERMINAL)
    shares = []
    for terminal, start, end in zip(hit.terminal, hit.start_ms, hit.end_ms, strict=True):
        within = (rows.terminal == terminal) & (rows.time_ms >= start) & (rows.time_ms < end)
        within &= np.isin(rows.kind, [Kind.PURCHASE, Kind.COMPROMISED_TERMINAL])
        shares.append((rows.kind[within] == Kind.COMPROMISED_TERMINAL).mean())
    assert len(shares) > 20
    assert COMPROMISED_SHARE[0] - 0.05 < np.median(shares) < COMPROMISED_SHARE[1]


def test_no_terminal_makes_up_the_pattern(events: pl.DataFrame) -> None:
    counts = events.filter(pl.col("kind") == int(Kind.COMPROMISED_TERMINAL))["terminal_id"].value_counts()["count"]
    assert counts.max() < 0.2 * counts.sum()  # type: ignore[operator]
