"""Memory for the features and sequences of micro-batches, allocated once and reused for each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cascade.columns import Float32


@dataclass(slots=True)
class FeatureBatch:
    """Features and sequences of the rows of a micro-batch.

    `features` float32 [rows, width], in the order of `FeatureEngine.names`. `sequence` float32 [rows, length, sequence
    width]: the steps from the oldest to the row itself, with zeros in front where there are fewer.
    """

    features: Float32
    sequence: Float32


class FeatureBuffers:
    """Memory for the rows of a micro-batch. It grows to the largest batch, and does not shrink."""

    def __init__(self, width: int, sequence_shape: tuple[int, int]) -> None:
        self._width, self._sequence_shape = width, sequence_shape
        self._all = self._last = self._allocate(0)

    def make_room(self, rows: int) -> None:
        """Allocate memory for batches of up to `rows` rows, and write to it, so that the system assigns the pages."""
        if rows > len(self._all.features):
            self._all = self._last = self._allocate(rows)

    def of(self, rows: int) -> FeatureBatch:
        """Return arrays of `rows` rows, in the same memory at each call, with what the last batch left in it."""
        self.make_room(rows)
        if rows != len(self._last.features):
            self._last = FeatureBatch(self._all.features[:rows], self._all.sequence[:rows])
        return self._last

    def _allocate(self, rows: int) -> FeatureBatch:
        features: Float32 = np.empty((rows, self._width), np.float32)
        sequence: Float32 = np.empty((rows, *self._sequence_shape), np.float32)
        features.fill(0.0)
        sequence.fill(0.0)
        return FeatureBatch(features, sequence)
