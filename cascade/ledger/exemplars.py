"""Exemplars: for each bucket of the exported latencies, a recent decision that fell into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from cascade.columns import Float64, Int64
from cascade.ledger.counters import PATHS
from cascade.ledger.sla import Path

# Seconds, from a stage's tens of microseconds to a deadline missed by far; 5 ms and 20 ms are default objectives.
BUCKETS_S: Final = (
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 10.0,
)  # fmt: skip
_LIMITS_S: Final = np.array(BUCKETS_S)
_NO_ROW: Final = np.full(len(BUCKETS_S) + 1, -1)
EXEMPLAR_LABEL: Final = "decision_id"
# OpenMetrics 1.0, "Exemplars": the labels of one have at most 128 characters. Ids of topics with very long names do
# not fit, and then there are no exemplars.
ID_CHARACTERS_MAX: Final = 128 - len(EXEMPLAR_LABEL)

Ids = Callable[[Int64], list[str]]


class LatencyExemplar(NamedTuple):
    """Decision `decision_id` took `latency_s` seconds; told at `at_s`, seconds since the epoch."""

    decision_id: str
    latency_s: float
    at_s: float


class Exemplars:
    """The last decision of each batch in each bucket, by path: as many as there are buckets, and no more.

    One thread records; any may read.

    >>> exemplars = Exemplars()
    >>> exemplars.record("screened", np.array([0.003, 0.004, 0.3]), lambda rows: [f"t-0-{row}" for row in rows], 1.0)
    >>> [one.decision_id for one in exemplars.of("screened") if one is not None]
    ['t-0-1', 't-0-2']
    """

    def __init__(self) -> None:
        self._held: dict[Path, list[LatencyExemplar | None]] = {path: [None] * (len(BUCKETS_S) + 1) for path in PATHS}

    def record(self, path: Path, latency_s: Float64, ids: Ids, at_s: float) -> None:
        """Decisions of a batch, seconds from append to decision float64 [rows]; `ids` names some of its rows."""
        # of rows in the same bucket the last one stays
        last = _NO_ROW.copy()
        last[_LIMITS_S.searchsorted(latency_s)] = np.arange(len(latency_s))
        (buckets,) = (last >= 0).nonzero()
        rows = last[buckets]
        held = self._held[path]
        for bucket, latency, name in zip(buckets.tolist(), latency_s[rows].tolist(), ids(rows), strict=True):
            if len(name) <= ID_CHARACTERS_MAX:
                held[bucket] = LatencyExemplar(name, latency, at_s)

    def of(self, path: Path) -> list[LatencyExemplar | None]:
        """One for each of BUCKETS_S and one beyond the last; None where no decision fell into it yet."""
        return list(self._held[path])
