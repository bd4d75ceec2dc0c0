"""Takeovers: a new device and other categories. Each twin has one of the two."""

import numpy as np
import polars as pl
import pytest

from cascade.simulator import CATEGORIES, Kind, Simulation


def seen_before(events: pl.DataFrame, kind: Kind) -> float:
    """Share of the campaigns whose device the card had used before."""
    online = events.filter(pl.col("device_id") > 0)
    first_use = (
        online.filter(pl.col("kind") < int(Kind.STOLEN_CARD))
        .group_by("card_id", "device_id")
        .agg(first=pl.col("time").min())
    )
    begins = online.filter(pl.col("kind") == int(kind)).group_by("card_id", "device_id").agg(time=pl.col("time").min())
    joined = begins.join(first_use, on=["card_id", "device_id"], how="left")
    return float((joined["first"] < joined["time"]).fill_null(value=False).mean())  # type: ignore[arg-type]


def favourite_share(simulation: Simulation, kind: Kind) -> float:
    """Share of the rows of a kind whose category is one of the card's favourites."""
    rows = simulation.rows.take(simulation.rows.kind == kind)
    category = simulation.world.terminals.category[rows.terminal]
    return float((simulation.world.cards.favourite[rows.card] == category[:, np.newaxis]).any(1).mean())


def test_takeovers_and_new_phones_use_devices_that_the_card_never_had(events: pl.DataFrame) -> None:
    assert seen_before(events, Kind.ACCOUNT_TAKEOVER) == 0.0
    assert seen_before(events, Kind.NEW_PHONE) == 0.0
    assert seen_before(events, Kind.NEW_HOBBY) > 0.6  # of the others, the device was too new to have been seen


def test_takeovers_and_hobbies_leave_the_habits_that_a_new_phone_follows(simulation: Simulation) -> None:
    assert favourite_share(simulation, Kind.ACCOUNT_TAKEOVER) < 0.02
    assert favourite_share(simulation, Kind.NEW_HOBBY) < 0.02
    assert favourite_share(simulation, Kind.NEW_PHONE) > 0.9


@pytest.mark.parametrize("kind", [Kind.ACCOUNT_TAKEOVER, Kind.NEW_HOBBY, Kind.NEW_PHONE], ids=lambda kind: kind.name)
def test_each_is_online_on_one_device_for_days(runs: dict[Kind, pl.DataFrame], kind: Kind) -> None:
    first = runs[kind].filter(pl.col("run") == 0)
    assert first["online"].list.all().all()
    assert (first["device_id"].list.n_unique() == 1).mean() > 0.97  # type: ignore[operator]
    assert (first["time"].list.last() - first["time"].list.first()).median() > 86_400_000  # type: ignore[operator]


def test_takeovers_use_no_more_than_two_categories_of_many(runs: dict[Kind, pl.DataFrame]) -> None:
    taken = runs[Kind.ACCOUNT_TAKEOVER].filter(pl.col("run") == 0)
    assert (taken["category"].list.n_unique() <= 2).mean() > 0.97  # type: ignore[operator]
    assert taken["category"].explode().n_unique() >= len(CATEGORIES) - 2
