"""What a model costs in the service: the time of a row with the compiled kernel, on this machine."""

from __future__ import annotations

import time

import numpy as np

from cascade.columns import Float32
from stages.screener.compiled import CompiledScreener

# Other processes only ever lengthen a call, so the shortest of many is the call's own time.
CALLS = 200


def us_per_row(model_text: bytes, features: Float32, batch_rows: int) -> float:
    """Microseconds of a row: the shortest call of many, each with other rows.

    - `model_text`: LightGBM's text format; raises UnsupportedForestError if it cannot be compiled.
    - `features` float32 [rows, width]: rows of real data. `batch_rows`: rows of a call.
    """
    model = CompiledScreener(model_text)
    model.warm_up()
    batches = max(1, len(features) // batch_rows)
    shortest_s = np.inf
    for call in range(CALLS):
        first = call % batches * batch_rows
        batch = np.ascontiguousarray(features[first : first + batch_rows])
        started_s = time.perf_counter()
        model.score(batch)
        shortest_s = min(shortest_s, (time.perf_counter() - started_s) / len(batch))
    return 1e6 * float(shortest_s)
