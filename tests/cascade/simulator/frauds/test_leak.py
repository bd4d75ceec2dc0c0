"""A leaked merchant shows across cards: its visitors have frauds elsewhere in the weeks after."""

import numpy as np
import polars as pl

from cascade.simulator import Kind, Simulation
from cascade.simulator.frauds.leak import DAYS, DELAY_DAYS, SOLD_SHARE


def test_victims_share_a_merchant_that_they_visited_before(simulation: Simulation, events: pl.DataFrame) -> None:
    sold = simulation.campaigns.take(simulation.campaigns.kind == Kind.LEAKED_MERCHANT)
    begins = pl.DataFrame({"card_id": sold.card, "begin": sold.start_ms})
    start_ms = simulation.world.settings.start_ms
    visits = (
        events.filter(pl.col("kind") == int(Kind.PURCHASE))
        .join(begins, on="card_id")
        .filter((pl.col("begin") + start_ms - pl.col("time")).is_between(0, 25 * 86_400_000))
        .group_by("terminal_id")
        .agg(victims=pl.col("card_id").n_unique())
    )
    visitors = (
        events.filter(pl.col("kind") == int(Kind.PURCHASE)).group_by("terminal_id").agg(pl.col("card_id").n_unique())
    )
    joined = visits.join(visitors, on="terminal_id").filter(pl.col("victims") >= 3)
    # of some merchants, many visitors are victims, although at most one card in 40 is one
    assert len(sold.card) < 0.025 * len(simulation.world.cards.home)
    assert (joined["victims"] / joined["card_id"] > 0.05).sum() >= 3


def test_frauds_come_weeks_after_online_as_a_guest(events: pl.DataFrame, simulation: Simulation) -> None:
    made = events.filter(pl.col("kind") == int(Kind.LEAKED_MERCHANT))
    assert made["online"].all()
    assert (made["device_id"] == 0).all()
    sold = simulation.campaigns.take(simulation.campaigns.kind == Kind.LEAKED_MERCHANT)
    length = (sold.end_ms - sold.start_ms) / 86_400_000
    assert np.all((length >= DAYS[0]) & (length <= DAYS[1]))
    assert DELAY_DAYS[0] > 0
    assert 0 < SOLD_SHARE < 1
