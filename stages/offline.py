"""Features and scores of recorded data: the same engine as online, folded over a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cascade.bundle import Bundle
from cascade.columns import Array, Bool, ColumnBatch, Float32, Float64, Int64
from cascade.engine import deep_inputs
from cascade.features import FeatureBatch, FeatureEngine
from cascade.frames import LabelledData
from cascade.policy import Policy
from cascade.protocols import DeepStage, Screener

Progress = Callable[[float], None]
CHUNK_ROWS = 4_096


def fold(engine: FeatureEngine, data: LabelledData, progress: Progress) -> Iterator[tuple[Int64, FeatureBatch]]:
    """Positions and features of `data`, chunk by chunk in its order, labels told when they are due."""
    schema = engine.schema
    times = data.batch[schema.roles.event_time]
    frauds = np.flatnonzero(data.fraud)
    due = times[frauds] + schema.label.delay_ms
    told = 0
    for start in range(0, data.batch.rows, CHUNK_ROWS):
        rows = np.arange(start, min(start + CHUNK_ROWS, data.batch.rows))
        until = int(np.searchsorted(due, times[rows[-1]], side="right"))
        if until > told:
            engine.update_labels(labels_of(data.take(frauds[told:until]), schema.label.field))
            told = until
        yield rows, engine.update(data.batch.take(rows))
        progress(float(rows[-1] + 1) / data.batch.rows)


def labels_of(data: LabelledData, label: str) -> ColumnBatch:
    """Rows as a batch of label messages."""
    return ColumnBatch({**data.batch.columns, label: data.fraud}, data.batch.rows)


@dataclass(frozen=True, slots=True)
class Folded:
    """Features of chosen rows: `rows` int64 positions, `features` float32, `sequence` float32 (of `with_sequence`)."""

    rows: Int64
    features: Float32
    sequence: Float32


def fold_rows(
    engine: FeatureEngine, data: LabelledData, wanted: Bool, with_sequence: Bool, progress: Progress
) -> Folded:
    """Fold all of `data`; keep features where `wanted`, sequences where `with_sequence` (a part of `wanted`)."""
    kept, features, sequences = [], [], []
    for rows, computed in fold(engine, data, progress):
        chosen = wanted[rows]
        kept.append(rows[chosen])
        features.append(computed.features[chosen])
        sequences.append(computed.sequence[with_sequence[rows]])
    return Folded(np.concatenate(kept), np.concatenate(features), np.concatenate(sequences))


@dataclass(frozen=True, slots=True)
class OfflineScores:
    """Log-odds of both models, float64 [rows], at the positions `rows` int64."""

    rows: Int64
    screener_raw: Float64
    deep_raw: Float64

    def cascade(self, policy: Policy) -> tuple[Float64, Bool]:
        """The cascade's probabilities, and which rows are escalated."""
        escalated = policy.escalate(self.screener_raw)
        probability = np.where(
            escalated, policy.deep.probability(self.deep_raw), policy.screener.probability(self.screener_raw)
        )
        return probability, escalated


def score_offline(
    bundle: Bundle, screener: Screener, deep: DeepStage, data: LabelledData, wanted: Bool, progress: Progress
) -> OfflineScores:
    """Score the `wanted` rows of `data` with both models, features taken over all of it."""
    engine = FeatureEngine(bundle.spec, bundle.schema)
    kept, screener_raw, deep_raw = [], [], []
    for rows, computed in fold(engine, data, progress):
        chosen: Array = wanted[rows]
        if not chosen.any():
            continue
        raw = screener.score(computed.features[chosen])
        inputs = deep_inputs(computed.features[chosen], computed.sequence[chosen], raw)
        kept.append(rows[chosen])
        screener_raw.append(raw)
        deep_raw.append(deep.submit(inputs, timeout_s=600.0).result())
    if not kept:
        return OfflineScores(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    return OfflineScores(np.concatenate(kept), np.concatenate(screener_raw), np.concatenate(deep_raw))
