"""Latency histograms with fixed log-linear buckets, recorded a batch at a time.

After HdrHistogram (Gil Tene, hdrhistogram.org). The buckets are read off the bits of the double itself: its
exponent and the top six bits of its fraction are the bucket, so recording is a shift, a clip and a count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Self

import numpy as np

from cascade.columns import Float64, Int64
from cascade.errors import DataError

# 2^6 buckets an octave: the middle of a bucket is within 1/128 (0.8 %) of every value in it.
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
    """Lower bounds of all buckets and the upper bound of the last, in seconds."""
    codes = np.arange(_FIRST_CODE, _FIRST_CODE + _BUCKETS + 1, dtype=np.int64)
    return (codes << _SHIFT).view(np.float64)


class LatencyHistogram:
    """Counts of durations from 1 µs to 1,000 s (2^-20 to 2^10 s), within 0.8 % of each value.

    Shorter and negative ones count in the lowest bucket, longer ones in the highest, where `clamped` counts them; mean
    and maximum take them as the range's end. Not safe to share between threads: the Ledger holds the lock.

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
        """Arithmetic mean in seconds; NaN where nothing was recorded."""
        return self.sum_s / self.count if self.count else math.nan

    def record(self, values_s: Float64) -> None:
        """Add durations in seconds, float64 [n]; raises ValueError where one is NaN."""
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
        """Add `count` equal durations in seconds; raises ValueError for NaN or a negative count."""
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
        """Add all that `other` has counted."""
        self._counts += other._counts
        self.count += other.count
        self.sum_s += other.sum_s
        self.max_s = max(self.max_s, other.max_s)
        self.clamped += other.clamped

    def since(self, earlier: LatencyHistogram) -> LatencyHistogram:
        """What was counted after `earlier`, a copy of this histogram at an earlier time.

        The maximum is exact where it is a new one, else the end of the highest bucket that has grown. Raises DataError
        where `earlier` has counted what this one has not.
        """
        grown = LatencyHistogram()
        grown._counts = self._counts - earlier._counts
        if (grown._counts < 0).any():
            raise DataError("latency histogram: the earlier one has counts that the later one lacks")
        grown.count = self.count - earlier.count
        grown.clamped = self.clamped - earlier.clamped
        if grown.count:
            grown.sum_s = max(self.sum_s - earlier.sum_s, 0.0)
            highest = float(_bounds()[int(np.flatnonzero(grown._counts)[-1]) + 1])
            grown.max_s = self.max_s if self.max_s > earlier.max_s else min(highest, self.max_s)
        return grown

    def copy(self) -> LatencyHistogram:
        """An independent copy."""
        twin = LatencyHistogram()
        twin.merge(self)
        return twin

    def quantile(self, q: float) -> float:
        """The value in seconds that a share `q` of the durations does not exceed; NaN where nothing was recorded.

        Rank ⌈q · count⌉ (numpy's `inverted_cdf`), within `RELATIVE_ERROR_MAX` of the exact value inside the range.
        Raises ValueError where `q` is outside 0..1.
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
        """How many durations are at most each limit in seconds, int64 [limits]; a limit inside a bucket excludes it."""
        whole = np.searchsorted(_bounds()[1:], limits_s, side="right")
        return np.append(np.int64(0), np.cumsum(self._counts))[whole]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON: totals, and the buckets that are not empty by their number."""
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
        """The histogram that `to_dict` wrote; raises DataError where it was not, or has other buckets."""
        try:
            if (state["buckets_per_octave"], state["lowest_exponent"]) != (_BUCKETS_PER_OCTAVE, _LOWEST_EXPONENT):
                raise DataError(
                    "latency histogram: written with other buckets; merge it with the release that wrote it"
                )
            histogram = cls()
            for bucket, count in state["buckets"].items():
                if not 0 <= int(bucket) < _BUCKETS or int(count) < 0:
                    raise DataError(f"latency histogram: bucket {bucket} with count {count}; the record is damaged")
                histogram._counts[int(bucket)] = int(count)
            histogram.count = int(histogram._counts.sum())
            histogram.sum_s, histogram.max_s = float(state["sum_s"]), float(state["max_s"])
            histogram.clamped = int(state["clamped"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"latency histogram: not in the form of `to_dict` ({error!r})") from error
        return histogram
