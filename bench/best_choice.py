"""The best possible choice within the bounds of an escalation budget, by one who knows all scores in advance."""

from __future__ import annotations

import numpy as np

from cascade.columns import Float64
from cascade.compilation import kernel

_IMPOSSIBLE = -1e300


@kernel
def best_value(scores: Float64, budget: float, capacity: float) -> float:
    """The greatest sum of chosen scores such that 0 ≤ budget · rows − chosen ≤ capacity after each row.

    These are the bounds of an EscalationBudget. Dynamic programming over the number of chosen rows, of which at most
    capacity + 2 are possible at a time.
    """
    places = int(capacity) + 3
    values = np.full(places, _IMPOSSIBLE)
    values[0] = 0.0
    first = 0
    for row in range(len(scores)):
        tokens = budget * (row + 1)
        least, most = max(int(np.ceil(tokens - capacity - 1e-9)), 0), int(np.floor(tokens + 1e-9))
        following = np.full(places, _IMPOSSIBLE)
        for chosen in range(least, most + 1):
            place = chosen - first
            value = _IMPOSSIBLE
            if 0 <= place < places:
                value = values[place]
            if 0 <= place - 1 < places:
                value = max(value, values[place - 1] + scores[row])
            following[chosen - least] = value
        values, first = following, least
    return float(values.max())
