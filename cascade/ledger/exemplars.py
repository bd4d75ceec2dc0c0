"""Exemplars: a recent decision for each bucket of the exported latency histograms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from cascade.columns import Float64, Int64
from cascade.ledger.counters import PATHS
from cascade.ledger.sla import Path

# Upper limits in seconds, from tens of microseconds for a stage to seconds for an outage. 5 ms and 20 ms are the
# default objectives.
BUCKETS_S: Final = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
_LIMITS_S: Final = np.array(BUCKETS_S)
_NO_ROW: Final = np.full(len(BUCKETS_S) + 1, -1)
EXEMPLAR_LABEL: Final = "decision_id"
# OpenMetrics 1.0, "Exemplars": the labels of an exemplar have at most 128 characters. The ids of a topic with a very
# long name do not fit, and there are no exemplars for them.
ID_CHARACTERS_MAX: Final = 128 - len(EXEMPLAR_LABEL)

Ids = Callable[[Int64], list[str]]


class LatencyExemplar(NamedTuple):
    """Decision `decision_id` took `latency_s` seconds. `at_s`: when it was recorded, seconds since the epoch."""

    decision_id: str
    latency_s: float
    at_s: float


class Exemplars:
    """The last recorded decision in each bucket, by path. One thread may record, any may read.

    >>> exemplars = Exemplars()
    >>> exemplars.record("screened", np.array([0.003, 0.004, 0.3]), lambda rows: [f"t-0-{row}" for row in rows], 1.0)
    >>> [exemplar.decision_id for exemplar in exemplars.of("screened") if exemplar is not None]
    ['t-0-1', 't-0-2']
    """

    def __init__(self) -> None:
        self._by_path: dict[Path, list[LatencyExemplar | None]] = {
            path: [None] * (len(BUCKETS_S) + 1) for path in PATHS
        }

    def record(self, path: Path, latency_s: Float64, ids: Ids, at_s: float) -> None:
        """Records the decisions of a batch.

        path: the path of all of them. latency_s: seconds from append to decision, float64 [rows].
        ids: returns the decision ids of rows int64 [n]. at_s: now, seconds since the epoch.
        """
        # the last row in a bucket replaces the others
        last = _NO_ROW.copy()
        last[_LIMITS_S.searchsorted(latency_s)] = np.arange(len(latency_s))
        (buckets,) = (last >= 0).nonzero()
        rows = last[buckets]
        exemplars = self._by_path[path]
        for bucket, latency, decision_id in zip(buckets.tolist(), latency_s[rows].tolist(), ids(rows), strict=True):
            if len(decision_id) <= ID_CHARACTERS_MAX:
                exemplars[bucket] = LatencyExemplar(decision_id, latency, at_s)

    def of(self, path: Path) -> list[LatencyExemplar | None]:
        """The exemplars of BUCKETS_S and of the bucket beyond the last; None for a bucket without a decision."""
        return list(self._by_path[path])
