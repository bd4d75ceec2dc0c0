"""The frame: reproducible, inside its schema, with drift, daily cycles and every pattern of fraud."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import cascade
from cascade.columns import ColumnBatch
from cascade.schema import Schema, load_schema, out_of_limits
from cascade.simulator import (
    CATEGORIES,
    COUNTRIES,
    ENTRY_MODES,
    PATTERNS,
    SimulatorSettings,
    simulate,
    simulate_with_states,
)

SCHEMAS = Path(cascade.__file__).parent / "schemas"
SETTINGS = SimulatorSettings(cards=800, terminals=1_500, days=150, seed=7)


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return simulate(SETTINGS)


@pytest.fixture(scope="module")
def schema() -> Schema:
    return load_schema(SCHEMAS / "simulator.toml")


def test_equal_seeds_give_equal_frames_and_other_seeds_others(frame: pl.DataFrame) -> None:
    assert frame.equals(simulate(SETTINGS))
    assert not frame.equals(simulate(replace(SETTINGS, seed=8)))


def test_every_row_is_inside_the_limits_of_the_schema(frame: pl.DataFrame, schema: Schema) -> None:
    assert set(schema.fields) | {schema.label.field, "fraud_pattern"} == set(frame.columns)
    for name, values in (("entry_mode", ENTRY_MODES), ("category", CATEGORIES), ("country", COUNTRIES)):
        assert schema.fields[name].values == values
        assert set(frame[name].unique()) == set(values)
    columns = {
        name: (frame[name].to_physical() if field.type == "timestamp" else frame[name]).to_numpy()
        for name, field in schema.fields.items()
        if field.type != "category"
    }
    numeric = {name: field for name, field in schema.fields.items() if field.type != "category"}
    assert out_of_limits(numeric, ColumnBatch(columns, frame.height)) == {}
    assert frame.null_count().sum_horizontal().item() == 0
    assert frame.schema["event_time"] == pl.Datetime("ms", "UTC")


def test_rows_are_sorted_ids_are_unique_and_amounts_have_two_decimals(frame: pl.DataFrame) -> None:
    assert frame.equals(frame.sort("event_time", "transaction_id"))
    assert frame["transaction_id"].n_unique() == frame.height
    amount = frame["amount"].to_numpy()
    assert np.array_equal(np.round(amount, 2), amount)
    assert amount.min() >= 0.5


def test_all_transactions_fall_into_the_asked_days(frame: pl.DataFrame) -> None:
    days = frame["event_time"].dt.date().unique().sort()
    assert days.to_list() == [SETTINGS.start + timedelta(days=day) for day in range(SETTINGS.days)]


@pytest.mark.parametrize("share", [0.0, 0.005, 0.02])
def test_fraud_share_is_the_asked_one(share: float) -> None:
    frame = simulate(SimulatorSettings(cards=500, terminals=1_000, days=100, seed=3, fraud_share=share))
    assert frame["fraud"].mean() == pytest.approx(share, rel=0.1)


def test_every_pattern_is_present_and_most_frauds_are_reported(frame: pl.DataFrame) -> None:
    assert set(frame["fraud_pattern"].unique()) == set(PATTERNS)
    truth, label = frame["fraud_pattern"] != "none", frame["fraud"] == 1
    assert 0.92 < label.filter(truth).mean() < 0.99  # type: ignore[operator]
    assert 0 < label.filter(~truth).sum() < 0.05 * label.sum()


def test_the_hidden_states_leave_the_frame_as_it_is(frame: pl.DataFrame) -> None:
    simulation = simulate_with_states(SETTINGS)
    assert simulation.frame.equals(frame)
    assert len(simulation.rows.card) == len(simulation.report_delay_ms) == frame.height
    assert np.array_equal(simulation.rows.card, frame["card_id"].to_numpy())
    assert np.array_equal(simulation.report_delay_ms >= 0, frame["fraud"].to_numpy() == 1)


def test_country_and_category_are_the_merchants(frame: pl.DataFrame) -> None:
    per_terminal = frame.group_by("terminal_id").agg(pl.n_unique("country", "category"))
    assert per_terminal["country"].max() == per_terminal["category"].max() == 1


def test_only_online_purchases_have_a_device_and_some_have_none(frame: pl.DataFrame) -> None:
    shop = frame.filter(pl.col("entry_mode") != "online")
    online = frame.filter(pl.col("entry_mode") == "online")
    assert (shop["device_id"] == 0).all()
    assert 0.6 < (online["device_id"] > 0).mean() < 0.9  # type: ignore[operator]


@pytest.mark.parametrize("column", ["amount", "hour", "weekday", "category", "country", "entry_mode", "has_device"])
def test_no_single_column_gives_a_pattern_away(frame: pl.DataFrame, column: str) -> None:
    columns = frame.select(
        "fraud_pattern",
        "category",
        "country",
        "entry_mode",
        amount=((pl.col("amount").rank("ordinal") - 1) * 200 / pl.len()).floor(),
        hour=pl.col("event_time").dt.hour(),
        weekday=pl.col("event_time").dt.weekday(),
        has_device=pl.col("device_id") > 0,
    )
    for pattern in PATTERNS[1:]:
        share = columns.group_by(column).agg((pl.col("fraud_pattern") == pattern).mean())["fraud_pattern"].max()
        assert share < 0.25, f"{column} shows {pattern}"  # type: ignore[operator]


def test_volume_is_near_the_asked_rate_and_days_are_busier_than_nights(frame: pl.DataFrame) -> None:
    expected = SETTINGS.cards * SETTINGS.days * SETTINGS.transactions_per_card_day
    assert frame.height == pytest.approx(expected, rel=0.15)
    hour = frame["event_time"].dt.hour()
    assert (hour.is_between(11, 20)).mean() > 5 * (hour.is_between(1, 5)).mean()  # type: ignore[operator]


def test_the_amount_alone_does_not_reveal_a_fraud(frame: pl.DataFrame) -> None:
    genuine = frame.filter(pl.col("fraud") == 0)["amount"].to_numpy()
    fraud = frame.filter(pl.col("fraud") == 1)["amount"].to_numpy()
    threshold = np.quantile(genuine, 0.99)
    assert (fraud > threshold).mean() < 0.5


def test_drift_raises_spending_and_the_online_share() -> None:
    volume = {"cards": 400, "terminals": 600, "days": 1_095, "transactions_per_card_day": 0.3, "fraud_share": 0.0}
    drift = {"spend_inflation_per_year": 0.1, "online_growth_per_year": 0.5}
    frame = simulate(SimulatorSettings(seed=5, **volume, **drift))  # type: ignore[arg-type]
    yearly = frame.group_by(pl.col("event_time").dt.year()).agg(
        pl.col("amount").log().mean().alias("level"), (pl.col("entry_mode") == "online").mean().alias("online")
    )
    first, last = yearly.sort("event_time").row(0, named=True), yearly.sort("event_time").row(2, named=True)
    assert last["level"] - first["level"] == pytest.approx(2 * np.log(1.1), abs=0.08)
    assert last["online"] > first["online"] + 0.1


def test_cards_leave_and_new_ones_enter() -> None:
    frame = simulate(SimulatorSettings(cards=400, terminals=600, days=365, seed=5, card_turnover_per_year=0.5))
    month = frame["event_time"].dt.month()
    early = set(frame.filter(month == 1)["card_id"])
    late = set(frame.filter(month == 12)["card_id"])
    assert len(late - early) > 0.2 * len(late)
    assert len(early - late) > 0.2 * len(early)


def test_progress_rises_to_the_end() -> None:
    shares: list[float] = []
    simulate(SimulatorSettings(cards=20, terminals=20, days=2), shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_new_year_has_a_busier_december_and_more_journeys_in_summer() -> None:
    frame = simulate(SimulatorSettings(cards=600, terminals=900, days=365, seed=9, fraud_share=0.0))
    month = frame["event_time"].dt.month()
    days = frame["event_time"].dt.date()
    daily = {number: int((month == number).sum()) / days.filter(month == number).n_unique() for number in (11, 12)}
    assert daily[12] > 1.08 * daily[11]
    abroad = frame.filter(pl.col("entry_mode") != "online").with_columns(
        home=pl.col("country").mode().first().over("card_id"), month=pl.col("event_time").dt.month()
    )
    share = dict(abroad.group_by("month").agg((pl.col("country") != pl.col("home")).mean()).iter_rows())
    assert share[7] + share[8] > 1.3 * (share[3] + share[11])


def test_the_smallest_simulation_works() -> None:
    for seed in range(5):
        frame = simulate(SimulatorSettings(cards=10, terminals=20, days=1, seed=seed, transactions_per_card_day=0.05))
        assert frame["event_time"].is_sorted()
