"""Draws the rows that a deep model sees where it cannot see all: frauds, what the screener suspects, and few others."""

from __future__ import annotations

import numpy as np

from cascade.columns import Float32, Float64, Int64

# A row that the screener gives this probability of fraud or more is always drawn.
SURE_FROM = 0.02


def chances(screened: Float64, share: float) -> Float64:
    """The probability of being drawn, float64 [rows], of rows with these probabilities of fraud by the screener.

    It falls with the screened probability from 1 at SURE_FROM to `share`: what is plainly genuine teaches little, and
    what looks like a fraud and is none teaches most.
    """
    return np.clip(screened / SURE_FROM, share, 1.0)


def sample(fraud: Int64, screened: Float64, share: float, seed: int) -> tuple[Int64, Float32]:
    """Draws all frauds, and genuine rows by `chances`: positions int64 in order, and how many rows each stands for.

    - `fraud` int64 [rows]; `screened` float64 [rows]: the screener's probability of fraud.
    """
    chance = np.where(fraud == 1, 1.0, chances(screened, share))
    drawn = np.flatnonzero(np.random.default_rng(seed).random(len(fraud)) < chance)
    return drawn, (1.0 / chance[drawn]).astype(np.float32)
