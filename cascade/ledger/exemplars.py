"""Exemplars: a recent decision for each bucket of the exported latency histograms."""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

import numpy as np

from cascade.columns import Array, Int64
from cascade.decision_ids import decision_id
from cascade.ledger.buckets import BUCKETS_S, EXEMPLAR, NO_TOPIC

EXEMPLAR_LABEL: Final = "decision_id"
# OpenMetrics 1.0, "Exemplars": the labels of an exemplar have at most 128 characters. The ids of a topic with a very
# long name do not fit, and there are no exemplars for them.
ID_CHARACTERS_MAX: Final = 128 - len(EXEMPLAR_LABEL)


class DecidedRecords(Protocol):
    """The records of decisions, in their order; both arrays int64 [rows], contiguous."""

    @property
    def topic(self) -> str:
        """Name of the topic."""
        ...

    @property
    def partition_ids(self) -> Int64:
        """Kafka's number of each record's partition."""
        ...

    @property
    def offsets(self) -> Int64:
        """Offset of each record."""
        ...


class LatencyExemplar(NamedTuple):
    """Decision `decision_id` took `latency_s` seconds. `at_s`: when it was recorded, seconds since the epoch."""

    decision_id: str
    latency_s: float
    at_s: float


class Exemplars:
    """The last recorded decision in each bucket, by path. Not thread-safe: the Ledger has a lock.

    `table` (EXEMPLAR [paths, exported buckets + 1]): a kernel writes it, with the numbers that `number_of` gives to
    topics. The text of a decision id is made when the exemplars are read, because most are replaced unread.

    paths: their number.
    """

    def __init__(self, paths: int) -> None:
        self.table: Array = np.zeros((paths, len(BUCKETS_S) + 1), EXEMPLAR)
        self.table["topic"] = NO_TOPIC
        # as many as a worker reads
        self._topics: dict[str, int] = {}

    def number_of(self, topic: str) -> int:
        """The number of a topic in `table`."""
        return self._topics.setdefault(topic, len(self._topics))

    def of(self, path: int) -> list[LatencyExemplar | None]:
        """The exemplars of BUCKETS_S and of the bucket beyond the last; None for a bucket without a decision.

        path: its position in the table.
        """
        topics = list(self._topics)
        return [
            None if topic == NO_TOPIC else _exemplar(decision_id(topics[topic], partition_id, offset), latency_s, at_s)
            for latency_s, at_s, topic, partition_id, offset in self.table[path].tolist()
        ]


def _exemplar(decision_id: str, latency_s: float, at_s: float) -> LatencyExemplar | None:
    return LatencyExemplar(decision_id, latency_s, at_s) if len(decision_id) <= ID_CHARACTERS_MAX else None
