"""The simulator: reproducible, inside its schema, with drift, daily cycles and every pattern of fraud."""

from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import cascade
from cascade.columns import ColumnBatch
from cascade.errors import SettingError
from cascade.schema import Schema, load_schema, out_of_limits
from cascade.simulator import ENTRY_MODES, PATTERNS, SimulatorSettings, simulate

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
    assert schema.fields["entry_mode"].values == ENTRY_MODES
    assert frame["entry_mode"].is_in(ENTRY_MODES).all()
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


def test_every_pattern_is_present_and_only_frauds_have_one(frame: pl.DataFrame) -> None:
    assert set(frame["fraud_pattern"].unique()) == set(PATTERNS)
    assert ((frame["fraud_pattern"] != "none") == (frame["fraud"] == 1)).all()


def test_volume_is_near_the_asked_rate_and_days_are_busier_than_nights(frame: pl.DataFrame) -> None:
    expected = SETTINGS.cards * SETTINGS.days * SETTINGS.transactions_per_card_day
    assert frame.height == pytest.approx(expected, rel=0.15)
    hour = frame["event_time"].dt.hour()
    assert (hour.is_between(11, 20)).mean() > 5 * (hour.is_between(1, 5)).mean()  # type: ignore[operator]


def test_card_testing_is_small_amounts_and_then_a_large_one(frame: pl.DataFrame) -> None:
    tests = frame.filter(pl.col("fraud_pattern") == "card_testing")
    assert (tests["entry_mode"] == "online").all()
    assert tests["amount"].quantile(0.6) < 5.0  # type: ignore[operator]
    assert tests["amount"].quantile(0.95) > 50.0  # type: ignore[operator]


def test_stolen_cards_are_used_in_runs_of_rising_amounts(frame: pl.DataFrame) -> None:
    stolen = frame.filter(pl.col("fraud_pattern") == "stolen_card").with_columns(
        gap=pl.col("event_time").diff().over("card_id"),
        growth=pl.col("amount").log().diff().over("card_id"),
    )
    run = stolen.filter(pl.col("gap") < pl.duration(days=1))
    assert run.height > 0.6 * stolen.height
    assert run["growth"].mean() > 0.1  # type: ignore[operator]


def test_compromised_terminals_keep_ordinary_amounts(frame: pl.DataFrame) -> None:
    median = frame.group_by("fraud_pattern").agg(pl.col("amount").median()).rows_by_key("fraud_pattern", unique=True)
    assert median["compromised_terminal"] == pytest.approx(median["none"], rel=0.5)
    assert median["account_takeover"] > 2 * median["none"]


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


OUT_OF_RANGE: list[dict[str, object]] = [
    *({"cards": 0}, {"terminals": 3}, {"days": 0}, {"seed": -1}, {"fraud_share": 1.0}),
    *({"start": date(1999, 1, 1)}, {"transactions_per_card_day": float("nan")}),
]


@pytest.mark.parametrize("setting", OUT_OF_RANGE, ids=str)
def test_a_setting_out_of_range_is_named(setting: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        SimulatorSettings(**setting)  # type: ignore[arg-type]


def test_a_run_that_cannot_fit_in_memory_is_refused() -> None:
    with pytest.raises(SettingError, match="memory"):
        SimulatorSettings(cards=10_000_000, days=3_650)
