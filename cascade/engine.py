"""The engine computes features, screener scores and escalation scores of a micro-batch. Arrays in, arrays out.

It also prepares the deep model's inputs, and has the control that holds the escalation budget. The caller chooses the
rows to escalate with it, calls the deep model, waits for it and decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cascade.columns import Array, Bool, ColumnBatch, Float32, Float64, Int64
from cascade.escalation_budget import EscalationBudget
from cascade.features import FeatureBatch, FeatureEngine
from cascade.policy import Policy
from cascade.policy_kernels import judge, warm_up_policy
from cascade.protocols import DeepInputs, Screener


@dataclass(slots=True)
class Screened:
    """A micro-batch after the screener, a row per transaction.

    - `raw` float64 [rows]: the screener's log-odds.
    - `probability` float64 [rows]: the screener's calibrated probability of fraud.
    - `escalation_score` float64 [rows]: how much each row is worth escalating, by the policy's rule.
    - `computed`: features and sequences; valid until the engine's next batch, which overwrites them.
    """

    raw: Float64
    probability: Float64
    escalation_score: Float64
    computed: FeatureBatch

    def deep_inputs(self, rows: Array) -> DeepInputs:
        """The deep model's inputs for some rows (positions, or a mask bool [rows]), as copies.

        Ask before the engine's next call that changes its state; raises RuntimeError after that.
        """
        return deep_inputs(self.computed.features[rows], self.computed.sequences(rows), self.raw[rows])


class Engine:
    """Feature state, screener and policy of a bundle, and the control of its escalation; for use by one thread.

    `escalation`: outlives a reset of the features, so that a new session goes on with its bucket.
    """

    def __init__(
        self, features: FeatureEngine, screener: Screener, policy: Policy, gain_model: Screener | None = None
    ) -> None:
        """`gain_model`: the escalation scores by the rule `gain`; its last feature is the screener's raw score."""
        self.features = features
        self._gain_model = gain_model
        self.policy = policy
        self.escalation = EscalationBudget.of_policy(policy)
        self._screener = screener
        self._buffers = features.buffers()
        self._none: Bool = np.zeros(0, np.bool_)
        # what the gain model reads, in the same memory for each batch
        self._scored: Float32 = np.zeros((0, features.width + 1), np.float32)

    @property
    def screener_method(self) -> str:
        """The screener's `method`; see `Screener`."""
        return self._screener.method

    def warm_up(self, batch_rows_max: int = 0) -> None:
        """Compile the kernels and allocate memory for `batch_rows_max` rows, so that the first batch is not slow."""
        self._buffers.make_room(batch_rows_max)
        self.features.make_room(batch_rows_max)
        self._scored = _room(self._scored, batch_rows_max)
        self.features.warm_up()
        self._screener.warm_up()
        if self._gain_model is not None:
            self._gain_model.warm_up()
        warm_up_policy(self.policy)

    def fold(self, batch: ColumnBatch, partition_ids: Int64 | None = None) -> None:
        """Fold rows that need no decision into the state. `partition_ids`: as for `screen`."""
        if batch.rows > len(self._none):
            self._none = np.zeros(batch.rows, np.bool_)
        self.features.update(batch, partition_ids, self._buffers, self._none[: batch.rows])

    def fold_labels(self, labels: ColumnBatch) -> None:
        """Fold labels into the state."""
        self.features.update_labels(labels)

    def compute(self, batch: ColumnBatch, partition_ids: Int64 | None = None) -> FeatureBatch:
        """Fold rows into the state and return their features, which the next batch overwrites.

        - `partition_ids` int64 [rows]: the partition of each row; None: all rows are of partition 0.
        """
        return self.features.update(batch, partition_ids, self._buffers)

    def score(self, computed: FeatureBatch) -> Screened:
        """Score rows by their features."""
        return Screened(*self.scores(computed.features), computed)

    def scores(self, features: Float32) -> tuple[Float64, Float64, Float64]:
        """The screener's log-odds, its probabilities and the escalation scores, float64 [rows] each.

        `features` float32 [rows, width].
        """
        raw = self._screener.score(features)
        probability, escalation_score = judge(self.policy, raw)
        if self._gain_model is not None:
            self._scored = _room(self._scored, len(features))
            escalation_score = self._gain_model.score(_with_score(features, raw, self._scored[: len(features)]))
        return raw, probability, escalation_score

    def screen(self, batch: ColumnBatch, partition_ids: Int64 | None = None) -> Screened:
        """Fold rows into the state and score them: `compute` and `score`."""
        return self.score(self.compute(batch, partition_ids))


def deep_inputs(features: Float32, sequences: Mapping[str, Float32], screener_raw: Float64) -> DeepInputs:
    """Inputs of the deep model from features and sequences. The screener's raw scores become the last feature."""
    contiguous = {name: np.ascontiguousarray(sequence) for name, sequence in sequences.items()}
    columns: Float32 = np.empty((len(features), features.shape[1] + 1), np.float32)
    return DeepInputs(contiguous, _with_score(features, screener_raw, columns))


def _room(columns: Float32, rows: int) -> Float32:
    """An array of the same width for at least so many rows: this one, or a larger one."""
    return columns if rows <= len(columns) else np.zeros((rows, columns.shape[1]), np.float32)


def _with_score(features: Float32, screener_raw: Float64, columns: Float32) -> Float32:
    """Fills `columns` float32 [rows, width + 1]: the features, and the screener's raw score last. Returns it."""
    columns[:, :-1] = features
    columns[:, -1] = screener_raw
    return columns
