"""Card testing: tiny amounts first; baskets have them in any order, transit days in buses."""

import polars as pl

from cascade.simulator import Kind
from cascade.simulator.frauds.testing import LARGE, TINY

TINY_EUR = 8.0


def whole(runs: dict[Kind, pl.DataFrame], kind: Kind) -> pl.DataFrame:
    return runs[kind].filter(pl.col("size").is_between(TINY[0] + LARGE[0], TINY[1] + LARGE[1]))


def leading_tiny(runs: pl.DataFrame) -> float:
    """How often the first two amounts are tiny."""
    first, second = runs["amount"].list.get(0), runs["amount"].list.get(1)
    return float(((first < TINY_EUR) & (second < TINY_EUR)).mean())  # type: ignore[arg-type]


def test_testers_begin_with_tiny_amounts_and_buyers_rarely(runs: dict[Kind, pl.DataFrame]) -> None:
    assert leading_tiny(whole(runs, Kind.CARD_TESTING)) > 0.95
    assert leading_tiny(whole(runs, Kind.BASKET)) < 0.35


def test_tests_and_baskets_are_online_and_the_taps_of_a_transit_day_are_not(runs: dict[Kind, pl.DataFrame]) -> None:
    assert whole(runs, Kind.CARD_TESTING)["online"].list.all().all()
    assert whole(runs, Kind.BASKET)["online"].list.all().all()
    transit = whole(runs, Kind.TRANSIT_DAY)
    assert not transit["online"].list.get(0).any()
    assert (transit["category"].list.get(0) == "transit").all()
    assert transit["online"].list.last().all()


def test_everything_happens_within_the_hour(runs: dict[Kind, pl.DataFrame]) -> None:
    for kind in (Kind.CARD_TESTING, Kind.BASKET, Kind.TRANSIT_DAY):
        made = whole(runs, kind)
        assert (made["time"].list.last() - made["time"].list.first()).max() < 3_600_000  # type: ignore[operator]


def test_half_of_the_tests_copy_the_owners_device_and_the_others_have_none(runs: dict[Kind, pl.DataFrame]) -> None:
    for kind in (Kind.CARD_TESTING, Kind.BASKET):
        none = (whole(runs, kind)["device_id"].list.max() == 0).mean()
        assert 0.35 < none < 0.65, kind.name  # type: ignore[operator]
