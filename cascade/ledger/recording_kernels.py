"""The ledger's records of a micro-batch, compiled by numba: a call for all stages, and a call for the decisions.

They keep Python's lock: a call takes a few microseconds, and to take the lock again could take a thread switch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cascade.columns import Array, Float64, Int64
from cascade.compilation import kernel
from cascade.ledger.buckets import BUCKETS_S, FIRST_CODE, LARGEST_S, LOWEST_S, SHIFT

_LIMITS_S = np.array(BUCKETS_S)


@kernel
def _bucket(inside_s: float) -> Any:
    """The exponent of a double and the top bits of its fraction number its bucket."""
    return (np.float64(inside_s).view(np.int64) >> SHIFT) - FIRST_CODE


@kernel
def _add_each(histogram: Any, values_s: Float64) -> None:
    total_s, longest_s, clamped = 0.0, histogram.max_s, 0
    for value_s in values_s:
        inside_s = min(max(value_s, LOWEST_S), LARGEST_S)
        histogram.counts[_bucket(inside_s)] += 1
        total_s += inside_s
        longest_s = max(longest_s, inside_s)
        clamped += inside_s == LARGEST_S
    histogram.count += len(values_s)
    histogram.clamped += clamped
    histogram.sum_s += total_s
    histogram.max_s = longest_s


@kernel
def _add_equal(histogram: Any, value_s: float, count: int) -> None:
    inside_s = min(max(value_s, LOWEST_S), LARGEST_S)
    histogram.counts[_bucket(inside_s)] += count
    histogram.count += count
    histogram.sum_s += inside_s * count
    histogram.max_s = max(histogram.max_s, inside_s)
    if inside_s == LARGEST_S:
        histogram.clamped += count


@kernel
def _refuse_nan(values_s: Float64) -> None:
    for value_s in values_s:
        if math.isnan(value_s):
            raise ValueError("a latency is NaN")


@kernel
def add_durations(histograms: Array, index: int, values_s: Float64) -> None:
    """Adds durations in seconds, float64 [n], to a histogram of a table (HISTOGRAM [histograms]).

    Raises ValueError, and adds nothing, if there is a NaN.
    """
    _refuse_nan(values_s)
    _add_each(histograms[index], values_s)


@kernel
def add_equal_durations(histograms: Array, index: int, value_s: float, count: int) -> None:
    """Adds `count` equal durations in seconds. Raises ValueError for NaN or a negative count."""
    if math.isnan(value_s) or count < 0:
        raise ValueError("cannot record a latency of NaN, or a negative number of latencies")
    if count:
        _add_equal(histograms[index], value_s, count)


@kernel
def add_stages(
    histograms: Array,
    total_cpu_s: Float64,
    wall_s: Float64,
    cpu_share: float,
    rows: Int64,
    queue: int,
    queue_s: Float64,
) -> None:
    """Adds the stages of a micro-batch.

    histograms (HISTOGRAM [stages]), total_cpu_s (float64 [stages]): what is added to. wall_s (float64 [stages]), rows
    (int64 [stages]): of each stage; a stage without rows took no part. cpu_share: CPU time as a share of wall_s.
    queue: the number of the stage whose durations queue_s (float64 [n]) differ. Raises ValueError, and adds nothing, if
    `queue_s` has a NaN.
    """
    _refuse_nan(queue_s)
    for stage in range(len(rows)):
        if rows[stage]:
            _add_equal(histograms[stage], wall_s[stage], rows[stage])
            total_cpu_s[stage] += wall_s[stage] * cpu_share
    _add_each(histograms[queue], queue_s)


@kernel
def add_decisions(
    histograms: Array, path: int, latency_s: Float64, exemplars: Array, topic: int, partition_ids: Int64,
    offsets: Int64, at_s: float,
) -> None:  # fmt: skip
    """Adds the decisions of a batch on one path, and makes the last one in each exported bucket its exemplar.

    histograms (HISTOGRAM [paths]), exemplars (EXEMPLAR [paths, exported buckets + 1]): what is written. latency_s
    (float64 [rows]). topic, partition_ids, offsets (int64 [rows]): of the records; a negative topic: no exemplars.
    at_s: now, seconds since the epoch. Raises ValueError, and adds nothing, if there is a NaN, or if the records are
    fewer or more than the decisions.
    """
    _refuse_nan(latency_s)
    if topic >= 0 and (len(partition_ids) != len(latency_s) or len(offsets) != len(latency_s)):
        raise ValueError("decisions and records differ in number")
    _add_each(histograms[path], latency_s)
    if topic < 0:
        return
    bucket = 0
    for row in range(len(latency_s)):
        # neighbours are mostly in the same bucket or the next
        while bucket > 0 and latency_s[row] <= _LIMITS_S[bucket - 1]:
            bucket -= 1
        while bucket < len(_LIMITS_S) and latency_s[row] > _LIMITS_S[bucket]:
            bucket += 1
        exemplar = exemplars[path, bucket]
        exemplar.latency_s = latency_s[row]
        exemplar.at_s = at_s
        exemplar.topic = topic
        exemplar.partition_id = partition_ids[row]
        exemplar.offset = offsets[row]
