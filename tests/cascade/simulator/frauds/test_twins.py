"""Each fraud has a genuine twin that windows over the card or terminal can hardly tell from it."""

import numpy as np
import polars as pl
import pytest

from cascade.simulator import Kind

TWINS = [
    (Kind.STOLEN_CARD, Kind.TRAVEL_DAY),
    (Kind.CARD_TESTING, Kind.BASKET),
    (Kind.CARD_TESTING, Kind.TRANSIT_DAY),
    (Kind.ACCOUNT_TAKEOVER, Kind.NEW_HOBBY),
    (Kind.ACCOUNT_TAKEOVER, Kind.NEW_PHONE),
    (Kind.MULE_RING, Kind.CONCERT),
]


def apart(first: pl.Series, second: pl.Series) -> float:
    """|2 AUC - 1| of a figure of two kinds: 0 if it does not tell them apart, 1 if it always does."""
    ranks = pl.concat([first, second]).rank().to_numpy()
    count = len(first)
    auc = (ranks[:count].sum() - count * (count + 1) / 2) / (count * len(second))
    return float(abs(2 * auc - 1))


def window_figures(runs: pl.DataFrame) -> dict[str, pl.Series]:
    """What windows see of whole campaigns."""
    whole = runs.filter(pl.col("size") > 1)
    amount, time = whole["amount"].list, whole["time"].list
    return {
        "count": whole["size"].cast(pl.Float64),
        "sum": amount.sum(),
        "mean": amount.mean(),
        "max": amount.max(),
        "min": amount.min(),
        "span": (time.last() - time.first()).cast(pl.Float64),
    }


@pytest.mark.parametrize(("fraud", "twin"), TWINS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("figure", ["count", "sum", "mean", "max", "min", "span"])
def test_windows_hardly_tell_a_fraud_from_its_twin(
    careful_runs: dict[Kind, pl.DataFrame], fraud: Kind, twin: Kind, figure: str
) -> None:
    first, second = window_figures(careful_runs[fraud])[figure], window_figures(careful_runs[twin])[figure]
    assert min(len(first), len(second)) > 40
    # one and a half standard errors of what chance does to samples of this size, beside a small real difference
    chance = 2 * np.sqrt((len(first) + len(second) + 1) / (12 * len(first) * len(second)))
    assert apart(first, second) < 0.12 + 1.5 * chance


@pytest.mark.parametrize(("fraud", "twin"), TWINS, ids=lambda kind: kind.name)
def test_there_are_at_least_as_many_twins_as_frauds(events: pl.DataFrame, fraud: Kind, twin: Kind) -> None:
    counts = dict(events["kind"].value_counts().iter_rows())
    family = [second for first, second in TWINS if first is fraud]
    # at the usual share of frauds, 0.7 %; here it is 1 %
    assert sum(counts[int(kind)] for kind in family) > 0.7 * 2 * counts[int(fraud)]
    assert counts[int(twin)] > 100


def test_careless_thieves_take_larger_amounts(
    runs: dict[Kind, pl.DataFrame], careful_runs: dict[Kind, pl.DataFrame]
) -> None:
    for kind in (Kind.STOLEN_CARD, Kind.CARD_TESTING, Kind.ACCOUNT_TAKEOVER):
        careless, careful = (made[kind]["amount"].list.mean().quantile(0.8) for made in (runs, careful_runs))
        assert careless is not None
        assert careful is not None
        assert careless > 1.8 * careful, kind.name
