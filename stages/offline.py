"""Computes features and scores of recorded data with the engine that the service uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cascade.columns import Array, Bool, ColumnBatch, Float32, Float64, Int64
from cascade.engine import Engine
from cascade.escalation_budget import EscalationBudget
from cascade.features import FeatureBatch, FeatureEngine
from cascade.frames import LabelledData
from cascade.policy import Policy
from cascade.progress import Progress
from cascade.protocols import DeepStage
from stages.sampling import chances

CHUNK_ROWS = 4_096


def fold(
    engine: FeatureEngine,
    data: LabelledData,
    with_sequences: Bool,
    progress: Progress,
    partition_ids: Int64 | None = None,
) -> Iterator[tuple[Int64, FeatureBatch]]:
    """Yield positions int64 and features of the rows of `data`, chunk by chunk; labels act when they are due.

    - `with_sequences` bool [rows]: the rows whose sequences may be asked for.
    - `partition_ids` int64 [rows]: the partition of each row; None: all are of partition 0.
    """
    schema = engine.schema
    times = data.batch[schema.roles.event_time]
    frauds = np.flatnonzero(data.fraud)
    due = times[frauds] + schema.label.delay_ms
    folded = 0
    for start in range(0, data.batch.rows, CHUNK_ROWS):
        rows = np.arange(start, min(start + CHUNK_ROWS, data.batch.rows))
        until = int(np.searchsorted(due, times[rows[-1]], side="right"))
        if until > folded:
            engine.update_labels(labels_of(data.take(frauds[folded:until]), schema.label.field))
            folded = until
        of_rows = None if partition_ids is None else partition_ids[rows]
        yield rows, engine.update(data.batch.take(rows), of_rows, wanted=with_sequences[rows])
        progress(float(rows[-1] + 1) / data.batch.rows)


def labels_of(data: LabelledData, label: str) -> ColumnBatch:
    """Rows as a batch of label messages. `label`: the name of the label field."""
    return ColumnBatch({**data.batch.columns, label: data.fraud}, data.batch.rows)


@dataclass(frozen=True, slots=True)
class Folded:
    """Features of selected rows.

    - `rows` int64 [rows]: positions in the data.
    - `features` float32 [rows, width].
    - `sequences` float32 [rows of `with_sequences`, length, width], by name.
    """

    rows: Int64
    features: Float32
    sequences: dict[str, Float32]


def fold_rows(
    engine: FeatureEngine,
    data: LabelledData,
    wanted: Bool,
    with_sequences: Bool,
    progress: Progress,
    directory: Path | None = None,
) -> Folded:
    """Fold all of `data`, and return the features of the `wanted` rows.

    - `wanted` bool [rows]: rows whose features are returned.
    - `with_sequences` bool [rows]: a subset of `wanted`, whose sequences are returned.
    - `directory`: there the sequences are files, mapped into memory; None: they are in memory.
    """
    positions, features, written = [], [], 0
    sequences = {
        name: _zeros((int(with_sequences.sum()), *shape), directory and directory / f"{name}.npy")
        for name, shape in engine.sequence_shapes.items()
    }
    for rows, computed in fold(engine, data, with_sequences, progress):
        chosen = wanted[rows]
        positions.append(rows[chosen])
        features.append(computed.features[chosen])
        count = int(with_sequences[rows].sum())
        for name, part in computed.sequences(with_sequences[rows]).items():
            sequences[name][written : written + count] = part
        written += count
    return Folded(np.concatenate(positions), np.concatenate(features), sequences)


def _zeros(shape: tuple[int, ...], path: Path | None) -> Float32:
    return np.zeros(shape, np.float32) if path is None else np.lib.format.open_memmap(path, "w+", np.float32, shape)


@dataclass(frozen=True, slots=True)
class DeepSample:
    """Which rows the deep model scores, where it is too slow for all of them.

    It scores the rows of the mask `always` bool [rows of the data], and others by `stages.sampling.chances`.
    """

    always: Bool
    share: float
    seed: int = 1

    def chances(self, rows: Int64, screened: Float64) -> Float64:
        """The probability of being scored, float64 [rows], of rows with these screened probabilities."""
        return np.where(self.always[rows], 1.0, chances(screened, self.share))


@dataclass(frozen=True, slots=True)
class OfflineScores:
    """Scores of the rows at the positions `rows` int64 [rows], in order of time; float64 [rows] each.

    - `screener_raw`, `deep_raw`: log-odds of both models.
    - `escalation`: escalation scores by the policy's rule.
    - `weight`: how many rows each stands for in figures of the deep model: 1, or the inverse of its chance in a sample.
      0: the deep model has not scored it, and `deep_raw` is NaN.
    """

    rows: Int64
    screener_raw: Float64
    deep_raw: Float64
    escalation: Float64
    weight: Float64

    def cascade(self, policy: Policy) -> tuple[Float64, Bool]:
        """The cascade's probabilities float64 [rows], and a mask of the rows that the escalation budget chooses."""
        escalated = EscalationBudget.of_policy(policy).choose(self.escalation)
        return policy.probability(self.screener_raw, self.deep_raw, escalated), escalated


def score_offline(
    engine: Engine,
    deep: DeepStage,
    data: LabelledData,
    wanted: Bool,
    progress: Progress,
    sample: DeepSample | None = None,
) -> OfflineScores:
    """Fold all of `data`, and score the rows of the mask `wanted` with both models.

    - `engine`: with an empty state.
    - `sample`: which of them the deep model scores; None: all.
    """
    positions, parts = [], []
    rng = np.random.default_rng(sample.seed if sample else None)
    for rows, computed in fold(engine.features, data, wanted, progress):
        chosen: Array = wanted[rows]
        if not chosen.any():
            continue
        screened = engine.score(computed)
        raw, own = screened.raw[chosen], np.flatnonzero(chosen)
        chance = sample.chances(rows[own], engine.policy.screener.probability(raw)) if sample else np.ones(len(own))
        drawn = rng.random(len(own)) < chance
        answer = np.full(len(own), np.nan)
        answer[drawn] = deep.submit(screened.deep_inputs(own[drawn]), timeout_s=600.0).result()
        positions.append(rows[own])
        parts.append(np.stack([raw, answer, screened.escalation_score[own], np.where(drawn, 1.0 / chance, 0.0)]))
    if not positions:
        return OfflineScores(np.zeros(0, np.int64), *np.zeros((4, 0)))
    return OfflineScores(np.concatenate(positions), *np.concatenate(parts, axis=1))
