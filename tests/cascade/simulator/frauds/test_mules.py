"""Rings raise their amounts step by step; visitors of a concert pay them in any order. Both cards are unrelated."""

import numpy as np
import polars as pl

from cascade.simulator import Kind
from cascade.simulator.frauds.mules import STEP_LOG


def step_share(runs: pl.DataFrame) -> float:
    """Share of the steps from one amount to the next that are one step of a ring."""
    whole = runs.filter(pl.col("size") >= 10)
    steps = np.concatenate([np.diff(np.log(amounts)) for amounts in whole["amount"].to_list()])
    return float(((steps > 0.5 * STEP_LOG) & (steps < 1.5 * STEP_LOG)).mean())


def test_rings_rise_step_by_step_and_concerts_do_not(runs: dict[Kind, pl.DataFrame]) -> None:
    assert step_share(runs[Kind.MULE_RING]) > 0.7
    assert step_share(runs[Kind.CONCERT]) < 0.3


def test_the_cards_are_many_and_mostly_new_to_the_terminal(
    events: pl.DataFrame, runs: dict[Kind, pl.DataFrame]
) -> None:
    before = events.filter(pl.col("kind") == int(Kind.PURCHASE)).group_by("card_id", "terminal_id").agg(pl.len())
    for kind in (Kind.MULE_RING, Kind.CONCERT):
        whole = runs[kind].filter(pl.col("size") >= 10)
        assert (whole["card_id"].list.n_unique() / whole["size"]).mean() > 0.97  # type: ignore[operator]
        made = events.filter(pl.col("kind") == int(kind)).join(before, on=["card_id", "terminal_id"], how="left")
        assert made["len"].null_count() > 0.95 * made.height


def test_amounts_of_a_ring_are_nearly_equal(runs: dict[Kind, pl.DataFrame]) -> None:
    for kind in (Kind.MULE_RING, Kind.CONCERT):
        ratio = runs[kind]["amount"].list.max() / runs[kind]["amount"].list.min()
        assert ratio.max() < 2.0, kind.name  # type: ignore[operator]
