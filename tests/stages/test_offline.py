from __future__ import annotations

import numpy as np
import pytest

from bench.cluster import simulated
from cascade.bundle import Bundle
from cascade.escalation_budget import EscalationBudget
from cascade.features import FeatureEngine
from cascade.frames import LabelledData
from cascade.policy import Calibration, Combination, Escalation, Policy
from cascade.protocols import DeepStage
from stages import offline
from stages.assembly import make_engine
from stages.offline import DeepSample, Folded, OfflineScores, fold_rows, labels_of, score_offline
from stages.sampling import SURE_FROM


@pytest.fixture(scope="module")
def data(bundle: Bundle) -> LabelledData:
    return simulated(bundle.schema, cards=120, terminals=60, days=20, seed=12, fraud_share=0.03)


def engine_of(bundle: Bundle) -> FeatureEngine:
    return FeatureEngine(bundle.spec, bundle.schema)


def everything(data: LabelledData) -> np.ndarray:
    return np.ones(data.batch.rows, bool)


def folded(bundle: Bundle, data: LabelledData) -> Folded:
    """All rows with their sequences."""
    return fold_rows(engine_of(bundle), data, everything(data), everything(data), lambda _: None)


@pytest.mark.parametrize("chunk_rows", [1, 7, 512])
def test_features_do_not_depend_on_the_chunks(
    bundle: Bundle, data: LabelledData, monkeypatch: pytest.MonkeyPatch, chunk_rows: int
) -> None:
    whole = folded(bundle, data)
    monkeypatch.setattr(offline, "CHUNK_ROWS", chunk_rows)
    chunked = folded(bundle, data)
    np.testing.assert_array_equal(chunked.rows, whole.rows)
    np.testing.assert_array_equal(chunked.features, whole.features)
    assert set(chunked.sequences) == set(engine_of(bundle).sequence_shapes)
    np.testing.assert_equal(chunked.sequences, whole.sequences)


def test_chosen_rows_have_the_features_of_the_whole_past(bundle: Bundle, data: LabelledData) -> None:
    wanted = np.zeros(data.batch.rows, bool)
    wanted[-200::2] = True
    with_sequences = wanted.copy()
    with_sequences[-100:] = False
    whole = folded(bundle, data)
    part = fold_rows(engine_of(bundle), data, wanted, with_sequences, lambda _: None)
    assert part.rows.tolist() == np.flatnonzero(wanted).tolist()
    np.testing.assert_array_equal(part.features, whole.features[wanted])
    for name, sequence in part.sequences.items():
        np.testing.assert_array_equal(sequence, whole.sequences[name][with_sequences])


def test_a_label_acts_from_its_delay_on_and_not_before(bundle: Bundle, data: LabelledData) -> None:
    clean = LabelledData(data.batch, np.zeros_like(data.fraud))
    touched = np.flatnonzero((folded(bundle, data).features != folded(bundle, clean).features).any(axis=1))
    times = data.batch["event_time"]
    first_fraud_ms = times[np.flatnonzero(data.fraud)[0]]
    assert len(touched) > 50
    assert times[touched].min() >= first_fraud_ms + bundle.schema.label.delay_ms


def test_scores_of_chosen_rows_equal_those_of_all(bundle: Bundle, data: LabelledData, deep: DeepStage) -> None:
    wanted = np.zeros(data.batch.rows, bool)
    wanted[1::3] = True
    whole = score_offline(make_engine(bundle), deep, data, everything(data), lambda _: None)
    part = score_offline(make_engine(bundle), deep, data, wanted, lambda _: None)
    assert part.rows.tolist() == np.flatnonzero(wanted).tolist()
    np.testing.assert_array_equal(part.screener_raw, whole.screener_raw[wanted])
    np.testing.assert_array_equal(part.escalation, whole.escalation[wanted])
    np.testing.assert_allclose(part.deep_raw, whole.deep_raw[wanted], atol=1e-5, rtol=0)


def test_the_deep_model_scores_single_rows_and_batches_alike(
    bundle: Bundle, data: LabelledData, deep: DeepStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = data.take(np.arange(300))
    batches = score_offline(make_engine(bundle), deep, some, everything(some), lambda _: None)
    monkeypatch.setattr(offline, "CHUNK_ROWS", 1)
    singles = score_offline(make_engine(bundle), deep, some, everything(some), lambda _: None)
    np.testing.assert_array_equal(singles.screener_raw, batches.screener_raw)
    np.testing.assert_array_equal(singles.escalation, batches.escalation)
    np.testing.assert_allclose(singles.deep_raw, batches.deep_raw, atol=1e-5, rtol=0)


def test_a_sample_has_the_rows_that_matter_and_stands_for_all(
    bundle: Bundle, data: LabelledData, deep: DeepStage
) -> None:
    whole = score_offline(make_engine(bundle), deep, data, everything(data), lambda _: None)
    assert (whole.weight == 1.0).all()
    sample = DeepSample(data.fraud == 1, 0.1)
    part = score_offline(make_engine(bundle), deep, data, everything(data), lambda _: None, sample)
    np.testing.assert_array_equal(part.screener_raw, whole.screener_raw)
    scored = part.weight > 0.0
    assert np.isnan(part.deep_raw[~scored]).all()
    np.testing.assert_allclose(part.deep_raw[scored], whole.deep_raw[scored], atol=1e-5, rtol=0)
    sure = sample.always | (bundle.policy.screener.probability(whole.screener_raw) >= SURE_FROM)
    assert (part.weight[sure] == 1.0).all()
    assert part.weight.max() == pytest.approx(10.0)
    assert scored.sum() < 0.5 * len(scored)
    # within four standard deviations of a sum of independent draws
    chances = sample.chances(whole.rows, bundle.policy.screener.probability(whole.screener_raw))
    deviation = np.sqrt(((1.0 - chances) / chances).sum())
    assert abs(part.weight.sum() - len(scored)) < 4 * deviation


def test_nothing_wanted_is_no_score(bundle: Bundle, data: LabelledData, deep: DeepStage) -> None:
    scores = score_offline(make_engine(bundle), deep, data, ~everything(data), lambda _: None)
    assert len(scores.rows) == len(scores.screener_raw) == len(scores.deep_raw) == len(scores.escalation) == 0


def test_progress_ends_at_one(bundle: Bundle, data: LabelledData) -> None:
    shares: list[float] = []
    fold_rows(engine_of(bundle), data, everything(data), ~everything(data), shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_cascade_takes_both_scores_of_escalated_rows_only() -> None:
    policy = Policy(
        Escalation(0.01, "gain", 2.0),
        Calibration(1.1, -0.2),
        Combination(0.3, 0.8, 0.1),
        Calibration(0.9, 0.0),
        0.2,
        0.8,
    )
    chance = np.random.default_rng(4)
    scores = OfflineScores(np.arange(30_000), *chance.standard_normal((3, 30_000)), np.ones(30_000))
    probability, escalated = scores.cascade(policy)
    np.testing.assert_array_equal(
        escalated, EscalationBudget.of_policy(policy).choose(scores.escalation, np.zeros(30_000, bool))
    )
    assert 280 <= escalated.sum() <= 300
    assert scores.escalation[escalated].mean() > 2.0
    combined = policy.combined.probability(scores.screener_raw, scores.deep_raw)
    np.testing.assert_array_equal(probability[escalated], combined[escalated])
    screened = policy.screener.probability(scores.screener_raw)
    np.testing.assert_array_equal(probability[~escalated], screened[~escalated])


def test_label_messages_have_all_fields_of_the_schema(bundle: Bundle, data: LabelledData) -> None:
    rows = data.take(np.flatnonzero(data.fraud)[:3])
    labels = labels_of(rows, bundle.schema.label.field)
    assert set(bundle.schema.label_fields()) <= set(labels.columns)
    assert labels["fraud"].tolist() == [1, 1, 1]
    assert labels.rows == 3
