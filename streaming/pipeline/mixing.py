"""A hash of an integer, for the kernels that index tables by it."""

from __future__ import annotations

import numpy as np

from cascade.compilation import kernel


@kernel(inline="always")
def mixed(code: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    state = np.uint64(code)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64(state ^ (state >> np.uint64(31)))
