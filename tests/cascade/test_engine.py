"""The engine: scores do not depend on how a stream is cut, and each rule's escalation scores are what it says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import lightgbm
import msgspec
import numpy as np
import pytest

from bench.cluster import simulated
from cascade.bundle import Bundle
from cascade.columns import Float64
from cascade.engine import Engine, Screened, deep_inputs
from cascade.frames import LabelledData
from cascade.policy import uncertainty
from cascade.protocols import DeepStage
from stages.assembly import make_engine
from stages.offline import OfflineScores, labels_of, score_offline
from stages.screener.compiled import CompiledScreener

# ONNX Runtime may add in another order in a batch of another size; measured on log-odds
DEEP_DIFFERENCE_MAX = 1e-5


@pytest.fixture(scope="module")
def data(ruled: Bundle) -> LabelledData:
    # long enough for labels (seven days late) to act on windows of thirty days
    return simulated(ruled.schema, cards=120, terminals=60, days=20, seed=11, fraud_share=0.03)


# Every bundle has the models of both rules: here one uses each, whichever the shipped one has chosen.
@pytest.fixture(scope="module", params=["gain", "uncertainty"])
def ruled(request: pytest.FixtureRequest, bundle: Bundle) -> Bundle:
    changed = msgspec.structs.replace(
        bundle.policy.escalation, rule=request.param, budget=0.05, threshold=0.0, centre=-2.0
    )
    return replace(bundle, policy=msgspec.structs.replace(bundle.policy, escalation=changed))


@pytest.fixture(scope="module")
def offline(ruled: Bundle, data: LabelledData, deep: DeepStage) -> OfflineScores:
    return score_offline(make_engine(ruled), deep, data, np.ones(data.batch.rows, bool), lambda _: None)


def fold_labels_between(engine: Engine, data: LabelledData, start_ms: float, until_ms: float) -> None:
    """Fold the labels of frauds that are due after `start_ms` and by `until_ms`."""
    schema = engine.features.schema
    due = data.batch[schema.roles.event_time] + schema.label.delay_ms
    rows = np.flatnonzero((data.fraud == 1) & (due > start_ms) & (due <= until_ms))
    engine.fold_labels(labels_of(data.take(rows), schema.label.field))


def in_micro_batches(engine: Engine, data: LabelledData, sizes: Iterator[int]) -> Iterator[Screened]:
    times = data.batch[engine.features.schema.roles.event_time]
    start, folded_ms = 0, -np.inf
    while start < data.batch.rows:
        rows = np.arange(start, min(start + next(sizes), data.batch.rows))
        fold_labels_between(engine, data, folded_ms, float(times[rows[-1]]))
        folded_ms = float(times[rows[-1]])
        yield engine.screen(data.batch.take(rows))
        start = int(rows[-1]) + 1


def raw_of(screened: Iterable[Screened]) -> Float64:
    return np.concatenate([batch.raw for batch in screened])


@pytest.mark.parametrize("rows_max", [1, 3, 64, 1_000, 100_000])
def test_scores_do_not_depend_on_the_size_of_a_micro_batch(
    ruled: Bundle, data: LabelledData, deep: DeepStage, offline: OfflineScores, rows_max: int
) -> None:
    chance = np.random.default_rng(rows_max)
    raw, worth, escalate, answers = [], [], [], []
    sizes = iter(lambda: int(chance.integers(1, rows_max + 1)), None)
    engine = make_engine(ruled)
    for screened in in_micro_batches(engine, data, sizes):
        raw.append(screened.raw)
        worth.append(screened.escalation_score)
        escalate.append(engine.escalation.choose(screened.escalation_score, np.zeros(len(screened.raw), bool)))
        if escalate[-1].any():
            answers.append(deep.submit(screened.deep_inputs(escalate[-1]), 60).result())
    np.testing.assert_array_equal(np.concatenate(raw), offline.screener_raw)
    np.testing.assert_array_equal(np.concatenate(worth), offline.escalation)
    escalated = np.flatnonzero(np.concatenate(escalate))
    assert 5 < len(escalated) < data.batch.rows
    assert escalated.tolist() == np.flatnonzero(offline.cascade(ruled.policy)[1]).tolist()
    np.testing.assert_allclose(np.concatenate(answers), offline.deep_raw[escalated], atol=DEEP_DIFFERENCE_MAX, rtol=0)


def test_labels_that_come_before_their_transactions_change_no_score(
    ruled: Bundle, data: LabelledData, offline: OfflineScores
) -> None:
    # as after a replay of the log: all labels are there before the first transaction
    engine = make_engine(ruled)
    fold_labels_between(engine, data, -np.inf, np.inf)
    screened = [
        engine.screen(data.batch.take(np.arange(n, min(n + 500, data.batch.rows))))
        for n in range(0, data.batch.rows, 500)
    ]
    np.testing.assert_array_equal(raw_of(screened), offline.screener_raw)


def test_labels_that_arrive_twice_change_no_score(ruled: Bundle, data: LabelledData, offline: OfflineScores) -> None:
    engine = make_engine(ruled)
    half = data.batch.rows // 2
    raw_of(in_micro_batches(engine, data.take(np.arange(half)), iter(lambda: 500, None)))
    middle_ms = float(data.batch["event_time"][half - 1])
    fold_labels_between(engine, data, -np.inf, middle_ms)
    fold_labels_between(engine, data, middle_ms, np.inf)
    np.testing.assert_array_equal(
        engine.screen(data.batch.take(np.arange(half, data.batch.rows))).raw, offline.screener_raw[half:]
    )


def test_labels_act_on_the_scores_at_all(ruled: Bundle, data: LabelledData, offline: OfflineScores) -> None:
    unlabelled = make_engine(ruled).screen(data.batch).raw
    assert np.abs(unlabelled - offline.screener_raw).max() > 0.1, "the other tests would show nothing"


def test_folded_rows_are_remembered_like_scored_ones(ruled: Bundle, data: LabelledData, offline: OfflineScores) -> None:
    engine = make_engine(ruled)
    half = data.batch.rows // 2
    fold_labels_between(engine, data, -np.inf, np.inf)
    engine.fold(data.batch.take(np.arange(half)))
    rest = engine.screen(data.batch.take(np.arange(half, data.batch.rows)))
    np.testing.assert_array_equal(rest.raw, offline.screener_raw[half:])


def test_warming_up_leaves_no_trace(ruled: Bundle, data: LabelledData, offline: OfflineScores) -> None:
    engine = make_engine(ruled)
    engine.warm_up()
    np.testing.assert_array_equal(raw_of(in_micro_batches(engine, data, iter(lambda: 999, None))), offline.screener_raw)


def test_escalation_scores_are_those_of_the_rule(ruled: Bundle, data: LabelledData) -> None:
    screened = make_engine(ruled).screen(data.batch)
    with_score = np.column_stack([screened.computed.features, screened.raw.astype(np.float32)])
    by_gain = CompiledScreener(ruled.content["escalation.txt"]).score(with_score)
    by_uncertainty = uncertainty(screened.raw, ruled.policy.escalation.centre)
    expected, other = (by_gain, by_uncertainty) if ruled.policy.escalation.rule == "gain" else (by_uncertainty, by_gain)
    np.testing.assert_array_equal(screened.escalation_score, expected)
    assert (screened.escalation_score != other).mean() > 0.9, "the rules are told apart"
    by_lightgbm = lightgbm.Booster(model_str=ruled.content["escalation.txt"].decode()).predict(with_score)
    np.testing.assert_allclose(by_gain, by_lightgbm, atol=1e-9, rtol=0)


def test_probabilities_are_the_screeners_calibrated(ruled: Bundle, data: LabelledData) -> None:
    screened = make_engine(ruled).screen(data.batch)
    np.testing.assert_array_equal(screened.probability, ruled.policy.screener.probability(screened.raw))


def test_the_screeners_raw_score_is_the_last_column_of_the_deep_inputs() -> None:
    features = np.arange(6, dtype=np.float32).reshape(3, 2)
    sequences = {"card_sequence": np.arange(24, dtype=np.float32).reshape(3, 4, 2)}
    inputs = deep_inputs(features, sequences, np.array([-1.5, 0.25, 9.0]))
    assert inputs.features.tolist() == [[0, 1, -1.5], [2, 3, 0.25], [4, 5, 9]]
    np.testing.assert_equal(inputs.sequences, sequences)
    assert inputs.features.dtype == inputs.sequences["card_sequence"].dtype == np.float32
    assert len(inputs) == 3


@pytest.mark.parametrize("rows", [np.array([True, False, True]), np.array([0, 2])])
def test_deep_inputs_of_chosen_rows_belong_together(bundle: Bundle, data: LabelledData, rows: np.ndarray) -> None:
    screened = make_engine(bundle).screen(data.batch.take(np.arange(3)))
    inputs = screened.deep_inputs(rows)
    sequence = inputs.sequences["card_sequence"]
    amount = data.batch[bundle.schema.roles.amount][[0, 2]].astype(np.float32)
    np.testing.assert_array_equal(inputs.features[:, :-1], screened.computed.features[[0, 2]])
    np.testing.assert_array_equal(inputs.features[:, -1], screened.raw[[0, 2]].astype(np.float32))
    np.testing.assert_array_equal(sequence[:, -1, :3], np.column_stack([np.ones(2), np.zeros(2), amount]))
    assert inputs.features.flags.c_contiguous
    assert sequence.flags.c_contiguous


def test_rows_that_were_folded_only_have_no_sequences(bundle: Bundle, data: LabelledData) -> None:
    engine = make_engine(bundle)
    screened = engine.screen(data.batch.take(np.arange(3)))
    engine.fold(data.batch.take(np.arange(3, 6)))
    with pytest.raises(RuntimeError, match="ask for its sequences first"):
        screened.deep_inputs(np.array([0]))
