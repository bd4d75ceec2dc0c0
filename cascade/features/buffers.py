"""Features and sequences of one micro-batch after another in the same memory: none is asked for on the way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cascade.columns import Float32


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """`features` float32 [rows, width] in the order of `FeatureEngine.names`; `sequence` float32
    [rows, length, sequence width]: steps from oldest to the row itself, in front zero rows where there are fewer.
    """

    features: Float32
    sequence: Float32


class FeatureBuffers:
    """Room for the rows of a micro-batch; it grows to the largest that came, and is never given back."""

    def __init__(self, width: int, sequence_shape: tuple[int, int]) -> None:
        self._width, self._sequence_shape = width, sequence_shape
        self._all = self._made(0)

    def make_room(self, rows: int) -> None:
        """For batches of up to so many rows; written to, so that the memory is there before the first of them."""
        if rows > len(self._all.features):
            self._all = self._made(rows)

    def of(self, rows: int) -> FeatureBatch:
        """Arrays for so many rows, over those that were given before; they hold what was last written there."""
        self.make_room(rows)
        return FeatureBatch(self._all.features[:rows], self._all.sequence[:rows])

    def _made(self, rows: int) -> FeatureBatch:
        features: Float32 = np.empty((rows, self._width), np.float32)
        sequence: Float32 = np.empty((rows, *self._sequence_shape), np.float32)
        features.fill(0.0)
        sequence.fill(0.0)
        return FeatureBatch(features, sequence)
