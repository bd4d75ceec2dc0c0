"""The compiled screener: scores a LightGBM model with QuickScorer, many rows at once, or by walking its trees.

It equals LightGBM's `predict(raw_score=True)` for float32 rows. It evaluates all trees of every row, although most rows
cannot reach the escalation threshold any more after half of them, since every decision contains the score.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from cascade.columns import Array, Float32, Float64, Int64
from stages.screener.forest import read_forest
from stages.screener.kernels import ALIGNMENT_BYTES, GROUP, LANES, quickscore, walk
from stages.screener.layouts import MASK_DTYPES, category_masks, mask_dtype, mask_tables, walk_tables

LEAVES_MAX_MASKED = 64
# Size of the masks of a block of trees: they fit in the first-level cache together with the values of the columns.
BLOCK_BYTES = 16_384
# Size of the masks of all categories; with more of them the trees are walked.
CATEGORY_BYTES_MAX = 16 << 20
# A vector of rows takes the time of walking so many rows.
ROWS_WALKED_MAX = 6


class CompiledScreener:
    """Scores batches without LightGBM, for use by one thread."""

    def __init__(self, model_text: bytes) -> None:
        """`model_text`: LightGBM's text format. Raises UnsupportedForestError if only LightGBM can score the model."""
        forest = read_forest(model_text)
        columns = forest.columns
        self.width = forest.width
        nodes = walk_tables(forest, GROUP)
        compared_row: Float32 = np.zeros((max(len(columns), 1), 1), np.float32)
        self._walked = (
            columns.table,
            columns.sets,
            nodes.column,
            nodes.threshold,
            nodes.child,
            nodes.value,
            nodes.root,
            nodes.depth,
            compared_row,
        )
        self._masked: tuple[Array, ...] | None = None
        dtype = mask_dtype(forest)
        by_category_bytes = category_masks(forest) * dtype.itemsize
        if 1 < forest.leaves_max <= LEAVES_MAX_MASKED and by_category_bytes <= CATEGORY_BYTES_MAX:
            trees_per_block = BLOCK_BYTES // (LANES * dtype.itemsize)
            masks = mask_tables(forest, trees_per_block)
            leaves, sums = _aligned((trees_per_block, LANES), dtype), _aligned((LANES,), np.dtype(np.float64))
            tables = (getattr(masks, field.name) for field in fields(masks))
            compared = _aligned((max(len(masks.columns), 1), LANES), np.dtype(np.float32))
            categories: Int64 = np.zeros((len(masks.category_feature), LANES), np.int64)
            self._masked = (columns.sets, *tables, compared, leaves, sums, categories)
        self.method = "walk" if self._masked is None else "quickscorer"

    def warm_up(self) -> None:
        """See Screener. Few and many rows use different kernels."""
        for rows in (1, LANES):
            self.score(np.zeros((rows, self.width), np.float32))

    def compile_every_mask(self) -> None:
        """Compiles the kernel for the masks of all models, with few and with many leaves, for an installation."""
        if self._masked is None:
            return
        *tables, left_leaves, reachable, value, compared, leaves, sums, categories = self._masked
        none: Float32 = np.zeros((0, self.width), np.float32)
        for dtype in MASK_DTYPES:
            of_masks = (left_leaves.astype(dtype), reachable.astype(dtype), value, compared, leaves.astype(dtype))
            quickscore(none, *tables, *of_masks, sums, categories, np.empty(0))

    def score(self, features: Float32) -> Float64:
        """Log-odds float64 [rows] of features float32 [rows, width]."""
        # numba would compile the kernel again for another memory layout
        features = np.ascontiguousarray(features)
        rows = len(features)
        scores: Float64 = np.empty(rows)
        if self._masked is None or rows <= ROWS_WALKED_MAX:
            walk(features, *self._walked, scores)
            return scores
        rest = rows % LANES
        masked_rows = rows if rest > ROWS_WALKED_MAX else rows - rest
        quickscore(features[:masked_rows], *self._masked, scores[:masked_rows])
        if masked_rows < rows:
            walk(features[masked_rows:], *self._walked, scores[masked_rows:])
        return scores


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros at a multiple of ALIGNMENT_BYTES."""
    size = int(np.prod(shape)) * dtype.itemsize
    octets: Array = np.zeros(size + ALIGNMENT_BYTES, np.uint8)
    first = -octets.ctypes.data % ALIGNMENT_BYTES
    return octets[first : first + size].view(dtype).reshape(shape)
