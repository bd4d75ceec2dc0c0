"""Genuine purchases: habits, opening hours, devices, subscriptions."""

import numpy as np
import polars as pl

from cascade.simulator import Kind, Simulation
from cascade.simulator.genuine import is_closed
from cascade.simulator.subscriptions import PERIOD_DAYS

DAY_MS = 86_400_000


def test_nobody_buys_where_it_is_closed(simulation: Simulation) -> None:
    rows, terminals = simulation.rows, simulation.world.terminals
    genuine = np.isin(rows.kind, [Kind.PURCHASE, Kind.COMPROMISED_TERMINAL])
    hour = rows.time_ms[genuine] % DAY_MS / 3_600_000
    at = rows.terminal[genuine]
    assert not is_closed(hour, terminals.open_h[at], terminals.close_h[at]).any()


def test_cards_return_to_merchants_and_keep_their_categories_online(events: pl.DataFrame) -> None:
    genuine = events.filter(pl.col("kind") == int(Kind.PURCHASE))
    visits = genuine.group_by("card_id", "terminal_id").agg(pl.len())
    assert visits.filter(pl.col("len") >= 3)["len"].sum() > 0.5 * genuine.height
    online = genuine.filter("online")
    counts = online.group_by("card_id", "category").agg(pl.len()).sort("len", descending=True)
    top = (
        counts.group_by("card_id")
        .agg(pl.col("len").head(2).sum(), total=pl.col("len").sum())
        .filter(pl.col("total") > 20)
    )
    assert (top["len"] / top["total"]).mean() > 0.8  # type: ignore[operator]


def test_merchants_change_over_months(events: pl.DataFrame) -> None:
    genuine = events.filter(pl.col("kind") == int(Kind.PURCHASE))
    month = genuine["event_time"].dt.month()
    pairs = {
        number: set(genuine.filter(month == number).select("card_id", "terminal_id").unique().iter_rows())
        for number in (1, 2, 5)
    }
    kept = {number: len(pairs[1] & pairs[number]) / len(pairs[number]) for number in (2, 5)}
    assert kept[5] < 0.95 * kept[2]


def test_subscriptions_are_the_same_amount_every_thirty_days(events: pl.DataFrame) -> None:
    charged = events.filter(pl.col("kind") == int(Kind.SUBSCRIPTION)).with_columns(
        gap=pl.col("time").diff().over("card_id", "terminal_id", "amount")
    )
    gap = charged["gap"].drop_nulls() / DAY_MS
    assert ((gap - PERIOD_DAYS).abs() < 0.02).mean() > 0.95  # type: ignore[operator]
    assert (charged["device_id"] == 0).all()
    assert charged["online"].all()
    assert 0.02 < charged.height / events.height < 0.05


def test_a_card_uses_few_devices_and_some_devices_belong_to_families(events: pl.DataFrame) -> None:
    genuine = events.filter(pl.col("kind") == int(Kind.PURCHASE), pl.col("device_id") > 0)
    per_card = genuine.group_by("card_id").agg(pl.n_unique("device_id"))["device_id"]
    per_device = genuine.group_by("device_id").agg(pl.n_unique("card_id"))["card_id"]
    assert 1.2 < per_card.mean() < 2.0  # type: ignore[operator]
    assert 0.03 < (per_device > 1).mean() < 0.2  # type: ignore[operator]


def test_device_numbers_do_not_tell_age(events: pl.DataFrame) -> None:
    first = events.filter(pl.col("device_id") > 0).group_by("device_id").agg(pl.col("time").min())
    correlation = np.corrcoef(first["device_id"].to_numpy(), first["time"].to_numpy())[0, 1]
    assert abs(correlation) < 0.05
