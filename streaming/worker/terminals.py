"""Terminals across workers: each worker publishes summaries of the terminals in its partitions, and reads the others'.

Transactions are partitioned by card, so a terminal's transactions are in all partitions. A compacted topic has a record
for each terminal, partition and bucket of event time (`terminals.bucket_s`): the count of transactions, their sums and
the newest time. A summary is a total, not a change, so a worker may publish it again, after a crash for instance, and
the newest record counts. A worker ignores the records of its own partitions: its state has their transactions exactly.

Summaries arrive `terminals.interval_s` later, and leave a window a whole bucket at a time.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from cascade.columns import ColumnBatch, Int64
from cascade.config import Config
from cascade.features import FeatureEngine
from cascade.features.summaries import decode, encode
from cascade.protocols import Clock
from cascade.schema import key_codes
from streaming.kafka import ConsumerClient, Partition
from streaming.pipeline.send import Sender, Sent
from streaming.pipeline.table import Records
from streaming.worker.labels import CATCH_UP_TIMEOUT_S, read_to_end

ROWS_MAX = 10_000
FOLLOW_INTERVAL_S = 0.05
# Summaries and decisions share the producer's queue.
PUBLISH_ROWS_MAX = 10_000


class TerminalExchange:
    """Publishes summaries of changed terminals, and reads those of other workers; for one thread."""

    def __init__(
        self, config: Config, features: FeatureEngine, consumer: ConsumerClient, outbox: Sender, clock: Clock
    ) -> None:
        self._topic, self._transactions = config.kafka.topics.summaries, config.kafka.topics.transactions
        self._interval_s, self._bucket_ms = config.terminals.interval_s, config.terminals.bucket_s * 1_000
        self._features, self._consumer, self._outbox, self._clock = features, consumer, outbox, clock
        self._event_time = features.schema.roles.event_time
        self._changed: dict[str, list[Int64]] = {key: [] for key in features.shared_keys}
        self._publish_due_s = clock.monotonic() + self._interval_s
        self._follow_due_s = 0.0
        self._partitions: list[Partition] = consumer.partitions_for(self._topic)
        consumer.assign(self._partitions)
        self.rejected = 0
        late = f"topic {self._topic}: the broker did not return all records within {CATCH_UP_TIMEOUT_S:.0f} s"
        read_to_end(consumer, self._partitions, self._read, clock, f"{late}; check the broker")

    def note(self, batch: ColumnBatch, partition_ids: Int64) -> None:
        """Marks the terminals of folded rows as changed.

        batch: the rows. partition_ids: Kafka's partition numbers, int64 [rows].
        """
        buckets = batch[self._event_time] // self._bucket_ms * self._bucket_ms
        for key, changed in self._changed.items():
            changed.append(np.unique(np.column_stack([key_codes(batch[key]), partition_ids, buckets]), axis=0))

    @property
    def due_s(self) -> float:
        """When `advance` has something to do, by the monotonic clock."""
        return min(self._follow_due_s, self._publish_due_s)

    def advance(self, live: Collection[int]) -> None:
        """Publishes and reads at their intervals; `live` as for `publish`."""
        now_s = self._clock.monotonic()
        if now_s >= self._follow_due_s:
            self._follow_due_s = now_s + FOLLOW_INTERVAL_S
            self._read(0.0)
        if now_s >= self._publish_due_s:
            self.publish(live)

    def drop(self, partition_ids: Collection[int]) -> None:
        """Forgets the changes of partitions that this worker lost; their new owner publishes their totals."""
        for changed in self._changed.values():
            changed[:] = [rows[~np.isin(rows[:, 1], list(partition_ids))] for rows in changed]

    def publish(self, live: Collection[int]) -> None:
        """Publishes the totals of the terminals that have changed since the last call.

        live: ids of the partitions that are live. Others are being rebuilt and have partial totals; their changes wait.
        """
        self._publish_due_s = self._clock.monotonic() + self._interval_s
        for field, (key, changed) in enumerate(self._changed.items()):
            if not changed:
                continue
            rows = np.unique(np.concatenate(changed), axis=0)
            whole = np.isin(rows[:, 1], list(live))
            changed[:] = [rows[~whole]]
            rows = rows[whole]
            for start in range(0, len(rows), PUBLISH_ROWS_MAX):
                codes, partition_ids, buckets = np.ascontiguousarray(rows[start : start + PUBLISH_ROWS_MAX].T)
                summaries = self._features.summarise(key, codes, partition_ids, buckets, self._bucket_ms)
                keys, values = encode(field, summaries)
                if keys:
                    # no offsets: a summary decides nothing
                    about = Records(self._transactions, summaries.partition_ids, np.zeros(len(keys), np.int64))
                    self._outbox.send_many(self._topic, keys, values, Sent({}, np.zeros(0), "", None, about))

    def _read(self, timeout_s: float) -> int:
        count = 0
        for fetched in self._consumer.poll(timeout_s, ROWS_MAX):
            count += len(fetched)
            found, rejected = decode(fetched.keys, fetched.values, self._features.shared_values)
            self.rejected += rejected
            for key, summaries in zip(self._features.shared_keys, found, strict=True):
                self._features.fold_summaries(key, summaries)
        return count
