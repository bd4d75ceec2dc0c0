"""Memory for the features of micro-batches, allocated once and reused for each."""

from __future__ import annotations

import numpy as np

from cascade.columns import Float32


class FeatureBuffers:
    """Memory for the rows of a micro-batch. It grows to the largest batch, and does not shrink."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._all = self._last = self._allocate(0)

    def make_room(self, rows: int) -> None:
        """Allocate memory for batches of up to `rows` rows, and write to it, so that the system assigns the pages."""
        if rows > len(self._all):
            self._all = self._last = self._allocate(rows)

    def of(self, rows: int) -> Float32:
        """Return features float32 [rows, width], in the same memory at each call, as the last batch left them."""
        self.make_room(rows)
        if rows != len(self._last):
            self._last = self._all[:rows]
        return self._last

    def _allocate(self, rows: int) -> Float32:
        features: Float32 = np.empty((rows, self._width), np.float32)
        features.fill(0.0)
        return features
