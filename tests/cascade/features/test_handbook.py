"""On the Handbook's data the engine equals a computation by joins of data frames."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import cascade
from cascade.features import FeatureEngine, parse_spec
from cascade.frames import LabelledData, frame_to_batch
from cascade.schema import load_schema
from stages.offline import fold_rows

DATA = Path(cascade.__file__).parents[2] / "shared" / "data" / "handbook.parquet"
SPEC = b"""
version = 2
[limits]
keys_max = 20_000
[[window]]
key = "card"
functions = ["count"]
windows = ["7d"]
[[window]]
key = "card"
functions = ["mean", "std", "max", "ratio_to_mean"]
windows = ["30d"]
[[label_window]]
key = "terminal"
functions = ["fraud_count", "fraud_rate"]
windows = ["7d"]
[[sequence]]
key = "card"
length = 4
fields = ["card_count_7d"]
"""
DAY = pl.duration(days=1)

pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not here (the Handbook's data, see its README)")


@pytest.fixture(scope="module")
def rows() -> pl.DataFrame:
    """60 days of 100 cards and of 200 terminals, with row numbers."""
    return (
        pl.read_parquet(DATA)
        .filter(
            pl.col("TX_DATETIME") < datetime(2018, 5, 31), (pl.col("CUSTOMER_ID") < 100) | (pl.col("TERMINAL_ID") < 200)
        )
        .select(
            "TRANSACTION_ID",
            "TX_DATETIME",
            pl.col("CUSTOMER_ID", "TERMINAL_ID").cast(pl.Int64),
            "TX_AMOUNT",
            pl.col("TX_FRAUD").cast(pl.Int64),
        )
        .with_row_index("row")
    )


@pytest.fixture(scope="module")
def features(rows: pl.DataFrame) -> pl.DataFrame:
    """The engine's features."""
    schema = load_schema(Path(cascade.__file__).parent / "schemas" / "handbook.toml")
    engine = FeatureEngine(parse_spec(SPEC, "features.toml"), schema)
    data = LabelledData(frame_to_batch(rows, schema, str(DATA)), rows["TX_FRAUD"].to_numpy())
    everything = np.ones(rows.height, bool)
    found = fold_rows(engine, data, everything, ~everything, lambda _: None).features
    assert all(figures.evictions == 0 for figures in engine.statistics().values())
    return pl.DataFrame(found, schema=list(engine.names))


def pairs(rows: pl.DataFrame, key: str, oldest: pl.Expr, newest: pl.Expr) -> pl.DataFrame:
    """Each row with the rows of its key that came before it, or itself, with newest ≤ age < oldest."""
    age = pl.col("TX_DATETIME") - pl.col("TX_DATETIME_right")
    return rows.join(rows, on=key).filter(pl.col("row_right") <= pl.col("row"), age < oldest, age >= newest)


def test_card_windows(rows: pl.DataFrame, features: pl.DataFrame) -> None:
    week = pairs(rows, "CUSTOMER_ID", 7 * DAY, 0 * DAY).group_by("row").len("count").sort("row")
    assert features["card_count_7d"].to_list() == week["count"].to_list()
    month = pairs(rows, "CUSTOMER_ID", 30 * DAY, 0 * DAY)
    amount = pl.col("TX_AMOUNT_right")
    expected = (
        month.group_by("row")
        .agg(amount.mean().alias("mean"), amount.std(ddof=0).alias("std"), amount.max().alias("max"))
        .sort("row")
    )
    for name in ("mean", "std", "max"):
        np.testing.assert_allclose(features[f"card_amount_{name}_30d"], expected[name], rtol=3e-7, atol=1e-9)
    earlier = month.filter(pl.col("row_right") < pl.col("row")).group_by("row").agg(amount.mean().alias("mean"))
    ratio = rows.join(earlier, on="row", how="left", maintain_order="left").select(
        pl.when(pl.col("mean") > 0).then(pl.col("TX_AMOUNT") / pl.col("mean")).otherwise(1.0)
    )
    np.testing.assert_allclose(features["card_amount_ratio_to_mean_30d"], ratio.to_series(), rtol=3e-7)


def test_terminal_frauds(rows: pl.DataFrame, features: pl.DataFrame) -> None:
    labelled = (
        pairs(rows, "TERMINAL_ID", 14 * DAY, 7 * DAY)
        .group_by("row")
        .agg(pl.col("TX_FRAUD_right").sum().alias("frauds"), pl.len().alias("rows"))
    )
    expected = rows.join(labelled, on="row", how="left", maintain_order="left").fill_null(0)
    rate = (expected["frauds"] / expected["rows"]).fill_nan(0.0)
    assert rate.max() > 0.5, "the slice has compromised terminals"
    assert features["terminal_fraud_count_7d"].to_list() == expected["frauds"].to_list()
    assert features["terminal_fraud_rate_7d"].to_list() == rate.cast(pl.Float32).to_list()
