"""Latency histograms with fixed log-linear buckets; a call records a whole batch.

After HdrHistogram (Gil Tene, hdrhistogram.org). The exponent of a double and the top six bits of its fraction are the
number of its bucket, so that recording is a clip, a shift and a count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Self

import numpy as np

from cascade.columns import Array, Float64, Int64
from cascade.errors import DataError
from cascade.ledger.buckets import BUCKETS, BUCKETS_PER_OCTAVE, HISTOGRAM, LOWEST_EXPONENT, bounds

RELATIVE_ERROR_MAX: Final = 0.5 / BUCKETS_PER_OCTAVE
_SUMS: Final = ("counts", "count", "clamped", "sum_s")


class LatencyHistogram:
    """Counts of durations from 1 µs to 1,000 s (2^-20 to 2^10 s), within 0.8 % of each value.

    Durations outside this range count as its nearest end, also in the mean and the maximum; `clamped` counts those
    above it. Not thread-safe: the Ledger has a lock.

    table: HISTOGRAM [1], a part of a larger table into which kernels record; None for a histogram of its own.

    >>> histogram = LatencyHistogram()
    >>> histogram.record(np.array([0.001, 0.002, 0.003, 0.100]))
    >>> histogram.count, round(1_000 * histogram.quantile(0.5), 1), 1_000 * histogram.max_s
    (4, 2.0, 100.0)
    """

    __slots__ = ("_counts", "_table")

    def __init__(self, table: Array | None = None) -> None:
        self._table: Array = np.zeros(1, HISTOGRAM) if table is None else table
        self._counts: Int64 = self._table["counts"][0]

    @property
    def count(self) -> int:
        """Number of durations."""
        return int(self._table["count"][0])

    @property
    def clamped(self) -> int:
        """Number of durations above the range."""
        return int(self._table["clamped"][0])

    @property
    def sum_s(self) -> float:
        """Sum of the durations in seconds."""
        return float(self._table["sum_s"][0])

    @property
    def max_s(self) -> float:
        """The longest duration in seconds; 0 if the histogram is empty."""
        return float(self._table["max_s"][0])

    @property
    def mean_s(self) -> float:
        """Arithmetic mean in seconds; NaN if the histogram is empty."""
        return self.sum_s / self.count if self.count else math.nan

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self._table.nbytes

    # The kernels are imported by those who record: to load numba takes twice as long as to read and print a ledger.

    def record(self, values_s: Float64) -> None:
        """Adds durations in seconds, float64 [n]. Raises ValueError if there is a NaN."""
        from cascade.ledger.recording_kernels import add_durations

        add_durations(self._table, 0, np.ascontiguousarray(values_s, np.float64))

    def record_many(self, value_s: float, count: int) -> None:
        """Adds `count` equal durations in seconds. Raises ValueError for NaN or a negative count."""
        from cascade.ledger.recording_kernels import add_equal_durations

        add_equal_durations(self._table, 0, value_s, count)

    def merge(self, other: LatencyHistogram) -> None:
        """Adds the counts of `other`."""
        for name in _SUMS:
            self._table[name] += other._table[name]
        self._table["max_s"] = max(self.max_s, other.max_s)

    def since(self, earlier: LatencyHistogram) -> LatencyHistogram:
        """The counts since `earlier`, a copy of this histogram from an earlier time.

        The maximum is exact if it is a new maximum, else the upper bound of the highest bucket that has grown. Raises
        DataError if a count of `earlier` is higher than now.
        """
        grown = LatencyHistogram()
        for name in _SUMS:
            grown._table[name] = self._table[name] - earlier._table[name]
        if (grown._counts < 0).any():
            raise DataError("latency histogram: the earlier one has higher counts than the later one")
        if grown.count:
            grown._table["sum_s"] = max(grown.sum_s, 0.0)
            highest = float(bounds()[int(np.flatnonzero(grown._counts)[-1]) + 1])
            grown._table["max_s"] = self.max_s if self.max_s > earlier.max_s else min(highest, self.max_s)
        else:
            grown._table["sum_s"] = 0.0
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
        low, high = bounds()[bucket : bucket + 2]
        return min(0.5 * float(low + high), self.max_s)

    def counts_up_to(self, limits_s: Float64) -> Int64:
        """The number of durations up to each limit in seconds, int64 [limits], without the bucket that a limit cuts."""
        whole = np.searchsorted(bounds()[1:], limits_s, side="right")
        return np.append(np.int64(0), np.cumsum(self._counts))[whole]

    def to_dict(self) -> dict[str, Any]:
        """The totals, and the counts of the buckets that are not empty, in plain types for JSON."""
        filled = np.flatnonzero(self._counts)
        return {
            "buckets_per_octave": BUCKETS_PER_OCTAVE,
            "lowest_exponent": LOWEST_EXPONENT,
            "sum_s": self.sum_s,
            "max_s": self.max_s,
            "clamped": self.clamped,
            "buckets": {str(bucket): int(self._counts[bucket]) for bucket in filled},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` wrote; raises DataError for anything else, or for other buckets."""
        try:
            if (state["buckets_per_octave"], state["lowest_exponent"]) != (BUCKETS_PER_OCTAVE, LOWEST_EXPONENT):
                raise DataError("latency histogram: another release wrote it, with other buckets; use that release")
            histogram = cls()
            for bucket, count in state["buckets"].items():
                if not 0 <= int(bucket) < BUCKETS or int(count) < 0:
                    raise DataError(f"latency histogram: bucket {bucket} has count {count}; the record is damaged")
                histogram._counts[int(bucket)] = int(count)
            histogram._table["count"] = histogram._counts.sum()
            for name, number in (("sum_s", float), ("max_s", float), ("clamped", int)):
                histogram._table[name] = number(state[name])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"latency histogram: this release cannot read it ({error!r})") from error
        return histogram
