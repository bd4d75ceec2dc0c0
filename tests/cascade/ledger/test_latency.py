"""Latency histograms: quantiles within the stated error, and exact addition."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.errors import DataError
from cascade.ledger.buckets import HIGHEST_S, LOWEST_S, bounds
from cascade.ledger.latency import RELATIVE_ERROR_MAX, LatencyHistogram

QUANTILES = (0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 1.0)


def _filled(values: np.ndarray) -> LatencyHistogram:
    histogram = LatencyHistogram()
    histogram.record(values)
    return histogram


def _draw(shape: str, rng: np.random.Generator, count: int) -> np.ndarray:
    match shape:
        case "lognormal":
            return rng.lognormal(-6.0, 1.5, count)
        case "uniform":
            return rng.uniform(1e-4, 1e-1, count)
        case "bimodal":
            return np.where(rng.random(count) < 0.9, rng.normal(1e-3, 1e-4, count), rng.normal(2e-2, 1e-3, count))
        case _:
            return 1e-5 * (1.0 + rng.pareto(1.1, count))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["lognormal", "uniform", "bimodal", "pareto"]), st.integers(0, 2**32), st.integers(1, 5_000))
def test_quantiles_are_within_the_stated_error(shape: str, seed: int, count: int) -> None:
    values = np.clip(_draw(shape, np.random.default_rng(seed), count), LOWEST_S, HIGHEST_S * 0.999)
    histogram = _filled(values)
    assert RELATIVE_ERROR_MAX < 0.01
    for q in QUANTILES:
        exact = float(np.quantile(values, q, method="inverted_cdf"))
        assert histogram.quantile(q) == pytest.approx(exact, rel=RELATIVE_ERROR_MAX * 1.001)
    assert histogram.mean_s == pytest.approx(values.mean())
    assert histogram.max_s == values.max()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(1e-7, 2e3), max_size=50), st.lists(st.floats(1e-7, 2e3), max_size=50))
def test_merge_is_the_union(left: list[float], right: list[float]) -> None:
    merged = _filled(np.array(left))
    merged.merge(_filled(np.array(right)))
    union = _filled(np.array(left + right))
    assert merged.to_dict()["buckets"] == union.to_dict()["buckets"]
    assert (merged.count, merged.max_s, merged.clamped) == (union.count, union.max_s, union.clamped)
    assert merged.sum_s == pytest.approx(union.sum_s)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.0, 2e3), st.integers(1, 100))
def test_record_many_equals_recording_each_duration(value: float, count: int) -> None:
    many = LatencyHistogram()
    many.record_many(value, count)
    each = _filled(np.full(count, value))
    assert many.to_dict()["buckets"] == each.to_dict()["buckets"]
    assert (many.max_s, many.clamped) == (each.max_s, each.clamped)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(allow_nan=False, width=64) | st.floats(1e-7, 2e3), max_size=50))
def test_each_duration_is_in_the_bucket_that_contains_it(values: list[float]) -> None:
    inside = np.clip(np.array(values, np.float64), LOWEST_S, np.nextafter(HIGHEST_S, 0.0))
    expected = np.histogram(inside, bounds())[0]
    counted = {int(bucket): count for bucket, count in _filled(np.array(values)).to_dict()["buckets"].items()}
    assert counted == {bucket: count for bucket, count in enumerate(expected.tolist()) if count}


def test_a_histogram_survives_json() -> None:
    histogram = _filled(np.random.default_rng(1).lognormal(-6, 2, 10_000))
    again = LatencyHistogram.from_dict(json.loads(json.dumps(histogram.to_dict())))
    assert again.to_dict() == histogram.to_dict()
    assert again.count == histogram.count
    assert again.quantile(0.99) == histogram.quantile(0.99)


@pytest.mark.parametrize("damage", [{"buckets": {"-1": 2}}, {"buckets": 3}, {"sum_s": None}, {"lowest_exponent": -9}])
def test_a_damaged_record_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(DataError, match="latency histogram"):
        LatencyHistogram.from_dict({**_filled(np.array([0.1])).to_dict(), **damage})


def test_values_outside_the_range_count_as_its_ends() -> None:
    above, below = _filled(np.array([0.001, 5_000.0, math.inf])), _filled(np.array([-1.0, 0.0, 1e-9]))
    assert (above.clamped, above.max_s) == (2, pytest.approx(HIGHEST_S))
    assert math.isfinite(above.mean_s)
    assert (below.count, below.quantile(1.0)) == (3, pytest.approx(LOWEST_S, rel=0.01))


def test_nan_is_refused_and_does_not_change_the_histogram() -> None:
    histogram = _filled(np.array([0.001]))
    with pytest.raises(ValueError, match="NaN"):
        histogram.record(np.array([0.1, math.nan]))
    assert histogram.count == 1


def test_an_empty_histogram_has_no_quantiles() -> None:
    histogram = LatencyHistogram()
    histogram.record(np.array([]))
    assert math.isnan(histogram.quantile(0.5))
    assert math.isnan(histogram.mean_s)


def test_cumulative_counts_never_exceed_the_exact_ones() -> None:
    values = np.random.default_rng(2).lognormal(-6, 1, 20_000)
    limits = np.array([1e-9, 0.001, 0.005, 0.02, 1e9])
    counted = _filled(values).counts_up_to(limits)
    exact = np.array([(values <= limit).sum() for limit in limits])
    lower = np.array([(values <= limit * (1 - 2.1 * RELATIVE_ERROR_MAX)).sum() for limit in limits])
    assert (counted <= exact).all()
    assert (counted >= lower).all()
