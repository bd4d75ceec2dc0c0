"""The buckets of the latency histograms, and how a histogram and its exemplars lie in memory, for kernels to write."""

from __future__ import annotations

from typing import Final

import numpy as np

from cascade.columns import Float64

# With 2^6 buckets per octave, the middle of a bucket is within 1/128 (0.8 %) of each value in it.
_FRACTION_BITS: Final = 6
BUCKETS_PER_OCTAVE: Final = 1 << _FRACTION_BITS
# The bits of a double above these are the number of its bucket, plus FIRST_CODE.
SHIFT: Final = 52 - _FRACTION_BITS
LOWEST_EXPONENT: Final = -20
HIGHEST_EXPONENT: Final = 10
BUCKETS: Final = (HIGHEST_EXPONENT - LOWEST_EXPONENT) * BUCKETS_PER_OCTAVE

LOWEST_S: Final = 2.0**LOWEST_EXPONENT
HIGHEST_S: Final = 2.0**HIGHEST_EXPONENT
LARGEST_S: Final = float(np.nextafter(HIGHEST_S, 0.0))
FIRST_CODE: Final = int(np.float64(LOWEST_S).view(np.int64)) >> SHIFT

HISTOGRAM: Final = np.dtype(
    [
        ("counts", np.int64, BUCKETS),
        ("count", np.int64),
        ("clamped", np.int64),
        ("sum_s", np.float64),
        ("max_s", np.float64),
    ]
)

# The exported buckets: upper limits in seconds, from tens of microseconds for a stage to seconds for an outage. 5 ms
# and 20 ms are the default objectives.
BUCKETS_S: Final = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
# `topic`: a number that the reader knows; NO_TOPIC: the bucket has no exemplar.
EXEMPLAR: Final = np.dtype(
    [
        ("latency_s", np.float64),
        ("at_s", np.float64),
        ("topic", np.int64),
        ("partition_id", np.int64),
        ("offset", np.int64),
    ]
)
NO_TOPIC: Final = -1


def bounds() -> Float64:
    """The lower bounds of all buckets and the upper bound of the last, in seconds, float64 [buckets + 1]."""
    codes = np.arange(FIRST_CODE, FIRST_CODE + BUCKETS + 1, dtype=np.int64)
    return (codes << SHIFT).view(np.float64)
