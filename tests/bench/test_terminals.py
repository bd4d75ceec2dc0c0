"""Terminals across workers: what sharing does to their features, on a small simulated stream."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import numpy as np
import pytest

from bench.cluster import simulated
from bench.terminals import card_partitions, compare, feature_errors, fold_partitioned, protocol_rows
from cascade.bundle import Bundle
from cascade.errors import CascadeError
from cascade.features import FeatureEngine
from cascade.frames import LabelledData
from cascade.protocols import DeepStage
from cascade.schema import key_codes
from stages.assembly import make_engine
from stages.metrics import quality
from stages.offline import Folded, fold_rows, score_offline

WORKERS = 4
HOUR_MS, DAY_MS = 3_600_000, 86_400_000


@pytest.fixture(scope="module")
def data(bundle: Bundle) -> LabelledData:
    data = simulated(bundle.schema, start=date(2025, 1, 1), cards=90, terminals=100, days=20, seed=3, fraud_share=0.03)
    # with more events, a single engine would evict some that several engines keep together
    assert np.unique(data.batch["terminal_id"], return_counts=True)[1].max() <= bundle.spec.limits.events_per_key_max
    return data


@pytest.fixture(scope="module")
def partition_ids(bundle: Bundle, data: LabelledData) -> np.ndarray:
    return card_partitions(data.batch[bundle.schema.roles.card], WORKERS)


@pytest.fixture(scope="module")
def late(bundle: Bundle, data: LabelledData) -> np.ndarray:
    """Mask of the last five days, when labels have arrived."""
    times = data.batch[bundle.schema.roles.event_time]
    return times >= times[-1] - 5 * DAY_MS


@pytest.fixture(scope="module")
def whole(bundle: Bundle, data: LabelledData, late: np.ndarray) -> Folded:
    return fold_rows(FeatureEngine(bundle.spec, bundle.schema), data, late, late, lambda _: None)


def terminal_columns(bundle: Bundle) -> list[int]:
    engine = FeatureEngine(bundle.spec, bundle.schema)
    return [column for column, name in enumerate(engine.names) if name.startswith("terminal_")]


# Functions that look at single rows, of which a worker has its own only (docs/features.md).
OWN_ROWS_ONLY = ("ratio_to_last", "rises")


def shared_columns(bundle: Bundle) -> list[int]:
    names = FeatureEngine(bundle.spec, bundle.schema).names
    return [column for column in terminal_columns(bundle) if not any(one in names[column] for one in OWN_ROWS_ONLY)]


def test_a_card_has_one_partition_and_all_partitions_have_cards(data: LabelledData, partition_ids: np.ndarray) -> None:
    cards = data.batch["card_id"]
    assert all(len(set(partition_ids[cards == card].tolist())) == 1 for card in np.unique(cards))
    assert set(partition_ids.tolist()) == set(range(WORKERS))


def test_one_worker_that_shares_equals_one_engine_to_the_bit(
    bundle: Bundle, data: LabelledData, late: np.ndarray, whole: Folded
) -> None:
    alone = np.zeros(data.batch.rows, np.int64)
    folded, volume = fold_partitioned(bundle, data, alone, late, HOUR_MS, HOUR_MS, lambda _: None)
    np.testing.assert_array_equal(folded.rows, whole.rows)
    np.testing.assert_array_equal(folded.features, whole.features)
    np.testing.assert_equal(folded.sequences, whole.sequences)
    assert volume.records > 1_000


def test_summaries_sent_at_once_in_the_finest_buckets_make_every_shared_feature_exact(
    bundle: Bundle, data: LabelledData, partition_ids: np.ndarray, late: np.ndarray, whole: Folded
) -> None:
    folded, _ = fold_partitioned(bundle, data, partition_ids, late, 1, 1, lambda _: None)
    names = FeatureEngine(bundle.spec, bundle.schema).names
    times = data.batch[bundle.schema.roles.event_time]
    # rows of the same millisecond do not see each other
    different_ms = ~np.isin(times, times[1:][np.diff(times) == 0])[folded.rows]
    assert different_ms.sum() > 500
    assert len(shared_columns(bundle)) > 15
    for column in shared_columns(bundle):
        found, expected = folded.features[different_ms, column], whole.features[different_ms, column]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6, err_msg=names[column])
    assert (whole.features[:, names.index("terminal_fraud_count_7d")] > 0).sum() > 50


def test_every_changed_key_and_bucket_is_sent_once_a_round(
    bundle: Bundle, data: LabelledData, partition_ids: np.ndarray, late: np.ndarray
) -> None:
    hours = data.batch["event_time"] // HOUR_MS
    expected = set(zip(data.batch["terminal_id"].tolist(), partition_ids.tolist(), hours.tolist(), strict=True))
    _, volume = fold_partitioned(bundle, data, partition_ids, late, HOUR_MS, HOUR_MS, lambda _: None)
    _, finer = fold_partitioned(bundle, data, partition_ids, late, HOUR_MS // 60, HOUR_MS, lambda _: None)
    assert volume.records == volume.lasting == finer.lasting == len(expected)
    assert volume.octets == volume.records * (20 + 17 + 24)
    assert volume.records < finer.records <= data.batch.rows


def test_the_comparison_shows_what_is_lost_apart_and_what_sharing_brings_back(
    bundle: Bundle, data: LabelledData, late: np.ndarray, deep: DeepStage
) -> None:
    judged = late.copy()
    judged[::2] = False
    ways, equal = compare(bundle, deep, data, late, judged, WORKERS, [HOUR_MS], HOUR_MS, lambda _, __: None)
    single, apart, shared = ways
    assert equal
    assert (single.workers, apart.workers, shared.workers) == (1, WORKERS, WORKERS)
    assert (single.errors, single.volume, apart.volume) == ((), None, None)
    assert shared.volume is not None
    assert len(shared.errors) == len(terminal_columns(bundle))
    apart_errors = {error.name: error for error in apart.errors}
    shared_errors = {error.name: error for error in shared.errors}
    for feature in ("terminal_count_7d", "terminal_count_30d", "terminal_fraud_rate_7d", "terminal_fraud_rate_30d"):
        assert apart_errors[feature].difference_mean > 10 * shared_errors[feature].difference_mean
    # of other workers' rows, only those of the last hour and of the bucket at the window's end are missing
    count = shared_errors["terminal_count_30d"]
    assert count.difference_max < 0.1 * count.reference_mean
    raw = score_offline(make_engine(bundle), deep, data, judged, lambda _: None)
    rows = data.take(raw.rows)
    day, card = rows.batch["event_time"] // DAY_MS, key_codes(rows.batch["card_id"])
    probability, _ = raw.cascade(bundle.policy)
    expected = quality(probability, rows.fraud == 1, day, card, bundle.policy.escalation.budget)
    assert expected.average_precision is not None
    assert single.cascade.average_precision == pytest.approx(expected.average_precision)
    assert single.cascade.auc == pytest.approx(expected.auc)
    assert single.screener != apart.screener


def test_the_error_of_a_feature_is_that_of_its_column() -> None:
    reference = np.array([[1.0, 10.0], [3.0, 10.0]], np.float32)
    first, second = feature_errors(["a", "b"], np.array([[1.0, 9.0], [5.0, 14.0]], np.float32), reference)
    assert (first.name, first.reference_mean, first.difference_mean, first.difference_max) == ("a", 2.0, 1.0, 2.0)
    assert (first.differing_share, second.differing_share, second.difference_mean) == (0.5, 1.0, 2.5)


def test_rows_are_judged_by_the_protocols_script(bundle: Bundle, data: LabelledData, tmp_path: Path) -> None:
    script = tmp_path / "protocol.py"
    script.write_text(
        "import datetime\nFIRST_TRAIN_DAY = datetime.date(2025, 1, 15)\n"
        "def test_rows(day, card, fraud, start):\n    return (day == start) & (fraud == 1) & (card != card[0])\n"
    )
    expected = (data.batch["event_time"] // DAY_MS == 20_103) & (data.fraud == 1)
    cards = data.batch["card_id"]
    np.testing.assert_array_equal(protocol_rows(script, data, bundle), expected & (cards != cards[0]))
    script.write_text("")
    with pytest.raises(CascadeError, match="test_rows"):
        protocol_rows(script, data, bundle)
