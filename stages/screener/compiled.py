"""The screener, compiled: a LightGBM model scored by QuickScorer, many rows abreast, or by walking its trees.

It gives what LightGBM's `predict(raw_score=True)` gives for float32 rows. Rows are not left early, although most cannot
reach the escalation threshold any more after half of the trees: their scores are published with their decisions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cascade.columns import Array, Float32, Float64
from stages.screener.forest import read_forest
from stages.screener.kernels import ALIGNMENT_BYTES, GROUP, LANES, quickscore, walk
from stages.screener.layouts import mask_dtype, mask_tables, walk_tables

LEAVES_MAX_MASKED = 64
# The masks of a block of trees stay in the first cache beside what they are compared with.
BLOCK_BYTES = 16_384
# A vector of rows costs what walking so many does.
ROWS_WALKED_MAX = 6


class CompiledScreener:
    """Scores batches without LightGBM; one thread uses it."""

    def __init__(self, model_text: bytes) -> None:
        """`model_text`: LightGBM's text format. Raises UnsupportedForestError where LightGBM has to score it."""
        forest = read_forest(model_text)
        columns = forest.columns
        self.width = forest.width
        self._columns = (columns.feature, columns.kind, columns.set_start, columns.set_words, columns.sets)
        self._compared = _aligned((max(len(columns), 1), LANES), np.dtype(np.float32))
        nodes = walk_tables(forest, GROUP)
        self._nodes = (nodes.column, nodes.threshold, nodes.child, nodes.value, nodes.root, nodes.depth)
        self._of_one_row: Float32 = np.zeros((len(self._compared), 1), np.float32)
        self._masked: tuple[Any, ...] | None = None
        if 1 < forest.leaves_max <= LEAVES_MAX_MASKED:
            mask = mask_dtype(forest)
            trees_per_block = BLOCK_BYTES // (LANES * mask.itemsize)
            tables = mask_tables(forest, trees_per_block)
            self._masked = (
                tables.block, tables.tree_block, tables.column, tables.start, tables.threshold, tables.tree,
                tables.ruled_out, tables.value, self._compared, _aligned((trees_per_block, LANES), mask),
                _aligned((LANES,), np.dtype(np.float64)),
            )  # fmt: skip
        self.method = "walk" if self._masked is None else "quickscorer"

    def warm_up(self) -> None:
        """See Screener; few rows and many are kernels of their own."""
        for rows in (1, LANES):
            self.score(np.zeros((rows, self.width), np.float32))

    def score(self, features: Float32) -> Float64:
        """Log-odds float64 [rows] of features float32 [rows, width]."""
        # any other layout would be compiled when it first comes
        features = np.ascontiguousarray(features)
        rows = len(features)
        scores: Float64 = np.empty(rows)
        masked_rows = 0
        if self._masked is not None:
            rest = rows % LANES
            masked_rows = rows if rest > ROWS_WALKED_MAX else rows - rest
            if masked_rows:
                quickscore(features[:masked_rows], *self._columns, *self._masked, scores[:masked_rows])
        if masked_rows < rows:
            walk(features[masked_rows:], *self._columns, *self._nodes, self._of_one_row, scores[masked_rows:])
        return scores


def _aligned(shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
    """Zeros at an address that vectors may be read from."""
    size = int(np.prod(shape)) * kind.itemsize
    octets: Array = np.zeros(size + ALIGNMENT_BYTES, np.uint8)
    first = -octets.ctypes.data % ALIGNMENT_BYTES
    return octets[first : first + size].view(kind).reshape(shape)
