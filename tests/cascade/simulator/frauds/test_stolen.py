"""Stolen cards go back and forth between two towns at rising amounts; travellers change the town once."""

import numpy as np
import polars as pl

from cascade.simulator import Kind


def changes(runs: pl.DataFrame) -> np.ndarray:
    """How often the country changes from one purchase to the next, as a share of the steps."""
    whole = runs.filter(pl.col("size") >= 5)
    switches = whole["country"].list.eval((pl.element() != pl.element().shift(1)).sum()).list.first()
    return (switches / (whole["size"] - 1)).to_numpy()


def rises(runs: pl.DataFrame) -> float:
    whole = runs.filter(pl.col("size") >= 5)
    up = whole["amount"].list.eval((pl.element().diff() > 0).mean()).list.first()
    return float(up.mean())  # type: ignore[arg-type]


def test_stolen_cards_are_in_two_countries_back_and_forth(runs: dict[Kind, pl.DataFrame]) -> None:
    stolen, travel = changes(runs[Kind.STOLEN_CARD]), changes(runs[Kind.TRAVEL_DAY])
    assert stolen.mean() > 0.8
    assert (stolen >= 0.5).mean() > 0.95
    assert (travel <= 0.25).mean() > 0.99


def test_both_have_the_same_number_of_countries(runs: dict[Kind, pl.DataFrame]) -> None:
    for kind in (Kind.STOLEN_CARD, Kind.TRAVEL_DAY):
        countries = runs[kind].filter(pl.col("run") == 0, pl.col("size") >= 5)["country"].list.n_unique()
        # three where a card had two campaigns in nine days
        assert (countries == 2).mean() > 0.97, kind.name  # type: ignore[operator]


def test_amounts_rise_with_stolen_cards_and_not_on_travels(runs: dict[Kind, pl.DataFrame]) -> None:
    assert rises(runs[Kind.STOLEN_CARD]) > 0.65
    assert abs(rises(runs[Kind.TRAVEL_DAY]) - 0.5) < 0.05


def test_both_are_bought_in_shops_within_a_day(runs: dict[Kind, pl.DataFrame]) -> None:
    for kind in (Kind.STOLEN_CARD, Kind.TRAVEL_DAY):
        whole = runs[kind].filter(pl.col("run") == 0)
        assert not whole["online"].list.any().any()
        assert (whole["time"].list.last() - whole["time"].list.first()).median() < 12 * 3_600_000  # type: ignore[operator]
