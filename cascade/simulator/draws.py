"""Random draws for many rows at once, and sums within groups of rows."""

from __future__ import annotations

import numpy as np

from cascade.columns import Float64, Int64


def cumulative(weights: Float64) -> Float64:
    """Cumulative probabilities along the last axis, which ends in 1."""
    total = np.cumsum(weights, axis=-1)
    total /= total[..., -1:]
    return total


def pick_columns(rng: np.random.Generator, probabilities: Float64, row: Int64) -> Int64:
    """A random column for each row number.

    - `probabilities` float64 [rows, columns]: cumulative, each row ends in 1.
    - `row` int64 [draws]: which row to draw from.
    """
    columns = probabilities.shape[1]
    flat = (probabilities + np.arange(len(probabilities))[:, np.newaxis]).ravel()
    found = np.searchsorted(flat, row + rng.random(len(row)), side="right") - row * columns
    column: Int64 = np.clip(found, 0, columns - 1)
    return column


def zipf_weights(choices: int) -> Float64:
    """Probabilities of positions 0 to `choices` - 1 by Zipf's law with exponent 1."""
    weights = np.reciprocal(np.arange(1, choices + 1, dtype=np.float64))
    probabilities: Float64 = weights / weights.sum()
    return probabilities


def zipf(rng: np.random.Generator, choices: int, count: int) -> Int64:
    """`count` random positions below `choices` by `zipf_weights`."""
    found = np.searchsorted(np.cumsum(zipf_weights(choices)), rng.random(count), side="right")
    return np.minimum(found, choices - 1)


def position_in_group(sizes: Int64) -> Int64:
    """0, 1, 2, … within consecutive groups of the given sizes."""
    ends = np.cumsum(sizes)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - sizes, sizes)


def running_within(values: Float64, sizes: Int64) -> Float64:
    """Cumulative sums within consecutive groups of the given sizes."""
    total = np.cumsum(values)
    before = np.cumsum(sizes) - sizes
    within: Float64 = total - np.repeat(np.append(0.0, total)[before], sizes)
    return within


def order_within(key: Float64 | Int64, sizes: Int64) -> Int64:
    """Positions that sort each of the consecutive groups by `key`."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return np.lexsort((key, group))


def times_within(rng: np.random.Generator, duration_ms: Float64, sizes: Int64, shape: float = 1.5) -> Int64:
    """Times since the start of each group, ms, ascending: gamma gaps of this shape, scaled to the duration.

    The last row of a group comes before the duration ends: a gap follows it too.
    """
    gaps = rng.gamma(shape, 1.0, int((sizes + 1).sum()))
    running = running_within(gaps, sizes + 1)
    last = np.repeat(np.cumsum(sizes + 1) - 1, sizes)
    kept = np.ones(len(gaps), np.bool_)
    kept[np.cumsum(sizes + 1) - 1] = False
    return (running[kept] / running[last] * np.repeat(duration_ms, sizes)).astype(np.int64)
