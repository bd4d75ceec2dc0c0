"""Latency histograms with fixed log-linear buckets; a call records a whole batch.

After HdrHistogram (Gil Tene, hdrhistogram.org). The exponent of a double and the top six bits of its fraction are the
number of its bucket, so that recording is a clip, a shift and a count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Self

import numpy as np

from cascade.columns import Float64, Int64
from cascade.errors import DataError

# With 2^6 buckets per octave, the middle of a bucket is within 1/128 (0.8 %) of each value in it.
_FRACTION_BITS: Final = 6
_BUCKETS_PER_OCTAVE: Final = 1 << _FRACTION_BITS
_SHIFT: Final = 52 - _FRACTION_BITS
_LOWEST_EXPONENT: Final = -20
_HIGHEST_EXPONENT: Final = 10
_BUCKETS: Final = (_HIGHEST_EXPONENT - _LOWEST_EXPONENT) * _BUCKETS_PER_OCTAVE

LOWEST_S: Final = 2.0**_LOWEST_EXPONENT
HIGHEST_S: Final = 2.0**_HIGHEST_EXPONENT
RELATIVE_ERROR_MAX: Final = 0.5 / _BUCKETS_PER_OCTAVE

_LARGEST: Final = float(np.nextafter(HIGHEST_S, 0.0))
_FIRST_CODE: Final = int(np.float64(LOWEST_S).view(np.int64)) >> _SHIFT


def _bounds() -> Float64:
    """The lower bounds of all buckets and the upper bound of the last, in seconds, float64 [buckets + 1]."""
    codes = np.arange(_FIRST_CODE, _FIRST_CODE + _BUCKETS + 1, dtype=np.int64)
    return (codes << _SHIFT).view(np.float64)


class LatencyHistogram:
    """Counts of durations from 1 µs to 1,000 s (2^-20 to 2^10 s), within 0.8 % of each value.

    Durations outside this range count as its nearest end, also in the mean and the maximum; `clamped` counts those
    above it. Not thread-safe: the Ledger has a lock.

    >>> histogram = LatencyHistogram()
    >>> histogram.record(np.array([0.001, 0.002, 0.003, 0.100]))
    >>> histogram.count, round(1_000 * histogram.quantile(0.5), 1), 1_000 * histogram.max_s
    (4, 2.0, 100.0)
    """

    __slots__ = ("_counts", "clamped", "count", "max_s", "sum_s")

    def __init__(self) -> None:
        self._counts: Int64 = np.zeros(_BUCKETS, np.int64)
        self.count = 0
        self.sum_s = 0.0
        self.max_s = 0.0
        self.clamped = 0

    @property
    def mean_s(self) -> float:
        """Arithmetic mean in seconds; NaN if the histogram is empty."""
        return self.sum_s / self.count if self.count else math.nan

    def record(self, values_s: Float64) -> None:
        """Adds durations in seconds, float64 [n]. Raises ValueError if there is a NaN."""
        if not len(values_s):
            return
        inside = np.clip(np.ascontiguousarray(values_s, np.float64), LOWEST_S, _LARGEST)
        total = float(inside.sum())
        if math.isnan(total):
            raise ValueError("a latency is NaN")
        longest = float(inside.max())
        self._counts += np.bincount((inside.view(np.int64) >> _SHIFT) - _FIRST_CODE, minlength=_BUCKETS)
        self.count += len(inside)
        self.sum_s += total
        self.max_s = max(self.max_s, longest)
        if longest == _LARGEST:
            self.clamped += int((inside == _LARGEST).sum())

    def record_many(self, value_s: float, count: int) -> None:
        """Adds `count` equal durations in seconds. Raises ValueError for NaN or a negative count."""
        if math.isnan(value_s) or count < 0:
            raise ValueError(f"cannot record {count} latencies of {value_s} s")
        if not count:
            return
        inside = min(max(value_s, LOWEST_S), _LARGEST)
        fraction, exponent = math.frexp(inside)
        octave = exponent - 1 - _LOWEST_EXPONENT
        self._counts[octave * _BUCKETS_PER_OCTAVE + int((2.0 * fraction - 1.0) * _BUCKETS_PER_OCTAVE)] += count
        self.count += count
        self.sum_s += inside * count
        self.max_s = max(self.max_s, inside)
        if inside == _LARGEST:
            self.clamped += count

    def merge(self, other: LatencyHistogram) -> None:
        """Adds the counts of `other`."""
        self._counts += other._counts
        self.count += other.count
        self.sum_s += other.sum_s
        self.max_s = max(self.max_s, other.max_s)
        self.clamped += other.clamped

    def since(self, earlier: LatencyHistogram) -> LatencyHistogram:
        """The counts since `earlier`, a copy of this histogram from an earlier time.

        The maximum is exact if it is a new maximum, else the upper bound of the highest bucket that has grown. Raises
        DataError if a count of `earlier` is higher than now.
        """
        grown = LatencyHistogram()
        grown._counts = self._counts - earlier._counts
        if (grown._counts < 0).any():
            raise DataError("latency histogram: the earlier one has higher counts than the later one")
        grown.count = self.count - earlier.count
        grown.clamped = self.clamped - earlier.clamped
        if grown.count:
            grown.sum_s = max(self.sum_s - earlier.sum_s, 0.0)
            highest = float(_bounds()[int(np.flatnonzero(grown._counts)[-1]) + 1])
            grown.max_s = self.max_s if self.max_s > earlier.max_s else min(highest, self.max_s)
        return grown

    def quantile(self, q: float) -> float:
        """The value in seconds that a share `q` of the durations does not exceed; NaN if the histogram is empty.

        It has rank ⌈q · count⌉ (numpy's `inverted_cdf`) and is within `RELATIVE_ERROR_MAX` of the exact value inside
        the range. Raises ValueError if `q` is outside 0..1.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"quantile {q} is outside 0..1")
        if not self.count:
            return math.nan
        rank = min(max(math.ceil(q * self.count), 1), self.count)
        bucket = int(np.searchsorted(np.cumsum(self._counts), rank))
        low, high = _bounds()[bucket : bucket + 2]
        return min(0.5 * float(low + high), self.max_s)

    def counts_up_to(self, limits_s: Float64) -> Int64:
        """The number of durations up to each limit in seconds, int64 [limits], without the bucket that a limit cuts."""
        whole = np.searchsorted(_bounds()[1:], limits_s, side="right")
        return np.append(np.int64(0), np.cumsum(self._counts))[whole]

    def to_dict(self) -> dict[str, Any]:
        """The totals, and the counts of the buckets that are not empty, in plain types for JSON."""
        filled = np.flatnonzero(self._counts)
        return {
            "buckets_per_octave": _BUCKETS_PER_OCTAVE,
            "lowest_exponent": _LOWEST_EXPONENT,
            "sum_s": self.sum_s,
            "max_s": self.max_s,
            "clamped": self.clamped,
            "buckets": {str(bucket): int(self._counts[bucket]) for bucket in filled},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` wrote; raises DataError for anything else, or for other buckets."""
        try:
            if (state["buckets_per_octave"], state["lowest_exponent"]) != (_BUCKETS_PER_OCTAVE, _LOWEST_EXPONENT):
                raise DataError("latency histogram: another release wrote it, with other buckets; use that release")
            histogram = cls()
            for bucket, count in state["buckets"].items():
                if not 0 <= int(bucket) < _BUCKETS or int(count) < 0:
                    raise DataError(f"latency histogram: bucket {bucket} has count {count}; the record is damaged")
                histogram._counts[int(bucket)] = int(count)
            histogram.count = int(histogram._counts.sum())
            histogram.sum_s, histogram.max_s = float(state["sum_s"]), float(state["max_s"])
            histogram.clamped = int(state["clamped"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"latency histogram: this release cannot read it ({error!r})") from error
        return histogram
