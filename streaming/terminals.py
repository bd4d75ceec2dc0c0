"""Terminals across workers: each worker tells what its partitions saw of a terminal, and counts what the others saw.

Cards are partitioned, terminals are not. For every terminal, partition and stretch of event time (`terminals.bucket_s`)
there is one record in a compacted topic: how many transactions, their sums, the newest one's time. It holds totals, not
changes, so it may be told again at any time, after a crash say, and the newest one counts. What a worker's own
partitions saw is in its state exactly, and their records are passed over.

What others saw is known `terminals.interval_s` later, and leaves a window a bucket at a time.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from cascade.columns import ColumnBatch, Int64
from cascade.config import Config
from cascade.errors import BrokerError
from cascade.features import FeatureEngine
from cascade.features.summaries import decode, encode
from cascade.protocols import Clock
from cascade.schema import key_codes
from streaming.clients import ConsumerClient, Partition
from streaming.outbox import Outbox, Sent

ROWS_MAX = 10_000
FOLLOW_INTERVAL_S = 0.05
CATCH_UP_TIMEOUT_S = 60.0
POLL_S = 0.02
# Of one batch of records: the sender's queue is shared with the decisions.
PUBLISH_ROWS_MAX = 10_000


class TerminalExchange:
    """Publishes summaries of what was noted, and follows those of the others; one thread uses it."""

    def __init__(
        self, config: Config, features: FeatureEngine, consumer: ConsumerClient, outbox: Outbox, clock: Clock
    ) -> None:
        self._topic = config.kafka.topics.summaries
        self._interval_s, self._bucket_ms = config.terminals.interval_s, config.terminals.bucket_s * 1_000
        self._features, self._consumer, self._outbox, self._clock = features, consumer, outbox, clock
        self._event_time = features.schema.roles.event_time
        self._changed: dict[str, list[Int64]] = {key: [] for key in features.shared_keys}
        self._publish_due_s = clock.monotonic() + self._interval_s
        self._follow_due_s = 0.0
        self._partitions: list[Partition] = consumer.partitions_for(self._topic)
        consumer.assign(self._partitions)
        self.rejected = 0
        self._read_to_end()

    def note(self, batch: ColumnBatch, sources: Int64) -> None:
        """Rows were folded: their keys have changed; `sources` int64 [rows]: numbers of their partitions."""
        buckets = batch[self._event_time] // self._bucket_ms * self._bucket_ms
        for key, changed in self._changed.items():
            changed.append(np.unique(np.column_stack([key_codes(batch[key]), sources, buckets]), axis=0))

    def advance(self, live: Collection[int]) -> None:
        """Publish and follow where it is time; `live` as for `publish`."""
        now_s = self._clock.monotonic()
        if now_s >= self._follow_due_s:
            self._follow_due_s = now_s + FOLLOW_INTERVAL_S
            self._read(0.0)
        if now_s >= self._publish_due_s:
            self.publish(live)

    def drop(self, sources: Collection[int]) -> None:
        """The partitions are another's to tell of: our totals of them are gone."""
        for changed in self._changed.values():
            changed[:] = [rows[~np.isin(rows[:, 1], list(sources))] for rows in changed]

    def publish(self, live: Collection[int]) -> None:
        """Tell the totals of all that has changed since the last time, of partitions that are `live`.

        What is being rebuilt has partial totals; it is told when it is whole.
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
                codes, sources, buckets = np.ascontiguousarray(rows[start : start + PUBLISH_ROWS_MAX].T)
                summaries = self._features.summarise(key, codes, sources, buckets, self._bucket_ms)
                keys, values = encode(field, summaries)
                if keys:
                    self._outbox.send_many(self._topic, keys, values, Sent({}, np.zeros(0), "", None))

    def _read_to_end(self) -> None:
        ends = self._consumer.end_offsets(self._partitions)
        give_up_s = self._clock.monotonic() + CATCH_UP_TIMEOUT_S
        while any(self._consumer.position(partition) < end for partition, end in ends.items()):
            self._read(POLL_S)
            if self._clock.monotonic() > give_up_s:
                raise BrokerError(
                    f"the topic {self._topic} has records that did not come within {CATCH_UP_TIMEOUT_S:.0f} s"
                )

    def _read(self, timeout_s: float) -> None:
        for fetched in self._consumer.poll(timeout_s, ROWS_MAX):
            found, rejected = decode(fetched.keys, fetched.values, self._features.shared_values)
            self.rejected += rejected
            for key, summaries in zip(self._features.shared_keys, found, strict=True):
                self._features.fold_summaries(key, summaries)
