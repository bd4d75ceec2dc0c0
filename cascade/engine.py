"""The engine: one micro-batch through features, screener and policy. Arrays in, arrays out.

Screened rows are decided at once; for escalated rows it gives the deep model's inputs, and decides when the caller
brings the scores. Waiting, sockets and clocks belong to the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cascade.columns import Array, Bool, ColumnBatch, Float32, Float64, Int64
from cascade.features import FeatureEngine
from cascade.ledger.stage_clock import StageClock
from cascade.policy import Policy
from cascade.protocols import DeepInputs, Screener


@dataclass(frozen=True, slots=True)
class Screened:
    """A micro-batch after the screener, a row per transaction.

    `raw` float64: the screener's log-odds; `probability` float64: calibrated; `escalate` bool: rows for the deep
    model. `features` float32 [rows, width], `sequence` float32 [rows, length, sequence width]: the engine's own memory,
    which its next batch is written to.
    """

    raw: Float64
    probability: Float64
    escalate: Bool
    features: Float32
    sequence: Float32

    def deep_inputs(self, rows: Array) -> DeepInputs:
        """The deep model's inputs for some rows (positions or a mask), copied."""
        return deep_inputs(self.features[rows], self.sequence[rows], self.raw[rows])


@dataclass(slots=True)
class EngineClocks:
    """Wall and CPU seconds of the last batch, by stage."""

    features: StageClock = field(default_factory=StageClock)
    screener: StageClock = field(default_factory=StageClock)


class Engine:
    """State and models of one bundle; one thread uses it."""

    def __init__(self, features: FeatureEngine, screener: Screener, policy: Policy) -> None:
        self.features = features
        self.policy = policy
        self.clocks = EngineClocks()
        self._screener = screener
        self._buffers = features.buffers()

    @property
    def screener_method(self) -> str:
        """How the screener scores; see Screener."""
        return self._screener.method

    def warm_up(self, batch_rows_max: int = 0) -> None:
        """Compile the kernels, touch the models, and make room for micro-batches of up to so many rows.

        So the first transactions do not pay for it.
        """
        self._buffers.make_room(batch_rows_max)
        self.features.warm_up()
        self._screener.warm_up()

    def fold(self, batch: ColumnBatch, sources: Int64 | None = None) -> None:
        """Take rows into the state that need no decision any more; `sources` as for FeatureEngine.update."""
        with self.clocks.features:
            self.features.update(batch, sources, self._buffers)

    def fold_labels(self, labels: ColumnBatch) -> None:
        """Take labels into the state."""
        self.features.update_labels(labels)

    def screen(self, batch: ColumnBatch, sources: Int64 | None = None, raised: float = 0.0) -> Screened:
        """Take rows into the state and score them.

        `sources` as for FeatureEngine.update; `raised`: log-odds on top of the escalation threshold (Policy.escalate).
        """
        with self.clocks.features:
            computed = self.features.update(batch, sources, self._buffers)
        with self.clocks.screener:
            raw = self._screener.score(computed.features)
            probability = self.policy.screener.probability(raw)
            escalate = self.policy.escalate(raw, raised)
        return Screened(raw, probability, escalate, computed.features, computed.sequence)


def deep_inputs(features: Float32, sequence: Float32, screener_raw: Float64) -> DeepInputs:
    """The deep model's inputs: the screener's raw score is the last column of the features."""
    columns = np.column_stack([features, screener_raw.astype(np.float32)])
    return DeepInputs(np.ascontiguousarray(sequence), np.ascontiguousarray(columns))
