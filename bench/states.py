"""Compares the state in the workers' last snapshots with an uninterrupted fold of the log."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np

from bench.cluster import end_offsets, read_topic
from cascade.bundle import Bundle
from cascade.columns import Array, ColumnBatch, Int64
from cascade.config import Config
from cascade.errors import CascadeError
from cascade.features import FeatureEngine
from cascade.protocols import SystemClock
from streaming.codecs import Codec, topic_codec
from streaming.codecs.rows import empty_batch
from streaming.kafka import FetchedBatch
from streaming.worker.files import FsspecFiles
from streaming.worker.snapshots import SnapshotStore, fingerprint

# Rows of a partition that are folded together, less than a day of them. Labels are folded before their chunk; if they
# came much too early, they would evict older labels.
CHUNK_ROWS = 200


class PartitionState(msgspec.Struct, frozen=True, kw_only=True):
    """A partition's newest snapshot, compared with an uninterrupted fold of the log up to the same offsets.

    `offset`: of the snapshot, -1 if there is none. `end`: of the log. `events_equal`, `labels_equal`: whether the
    digests of transactions and of labels are equal. `digest`: the first digits of the fold's digest of transactions.
    """

    partition: int
    offset: int = -1
    end: int
    events_equal: bool = False
    labels_equal: bool = False
    digest: str = ""

    @property
    def equal(self) -> bool:
        """Whether the snapshot covers the whole log and equals the fold."""
        return self.events_equal and self.labels_equal and self.offset == self.end


def compare_states(config: Config, bundle: Bundle) -> list[PartitionState]:
    """Compare each partition's newest snapshot with a fold of its log from the beginning, in this process.

    The state must not depend on which partitions a worker owns, nor on when a label arrives. So each terminal must
    belong to the cards of a single partition (`separate_terminals`), `labels.alignment` must be "exact", and no key may
    reach the limit of events. Raises CascadeError if a key may reach it, or if a message is unreadable.
    """
    topic, label_topic = config.kafka.topics.transactions, config.kafka.topics.labels
    ends = end_offsets(config, topic)
    positions = {(topic, number): end for number, end in ends.items()}
    with ThreadPoolExecutor(1) as unused:
        files = FsspecFiles(config.state.snapshots)
        store = SnapshotStore(files, config.state.keep, fingerprint(bundle), "check", SystemClock(), unused.submit)
        names = store.candidates(positions, {})
        snapshots = {name: store.load(name) for found in names.values() for name in found[:1]}
    newest = {number: snapshots[names[topic, number][0]] for number in ends if names[topic, number]}
    fold = _Fold(config, bundle)
    label_digests: dict[int, str] = {}
    states = []
    for number, end in ends.items():
        snapshot = newest.get(number)
        if snapshot is None:
            states.append(PartitionState(partition=number, end=end))
            continue
        restored = FeatureEngine(bundle.spec, bundle.schema)
        restored.import_state(snapshot.arrays)
        offset, label_offset = snapshot.transactions[topic, number], snapshot.labels.get((label_topic, 0), 0)
        digest = fold.digest_events(number, offset)
        if label_offset not in label_digests:
            label_digests[label_offset] = fold.digest_labels(label_offset)
        states.append(
            PartitionState(
                partition=number,
                offset=offset,
                end=end,
                events_equal=restored.digest(number, fold.after_ms) == digest,
                labels_equal=restored.digest_labels(fold.after_ms) == label_digests[label_offset],
                digest=digest[:16],
            )
        )
    return states


class _Fold:
    """Folds the log, which it has in memory. `after_ms`: digests leave out older events (ms since the epoch), since
    their eviction depends on the other partitions that a worker owns.
    """

    def __init__(self, config: Config, bundle: Bundle) -> None:
        self._bundle = bundle
        schema, kafka = bundle.schema, config.kafka
        topics, bytes_max = kafka.topics, config.worker.message_bytes_max
        transactions = topic_codec(kafka, topics.transactions, schema.fields, bytes_max)
        self._transactions = _read(config, topics.transactions, transactions)
        fields = schema.label_fields()
        labels = _read(config, topics.labels, topic_codec(kafka, topics.labels, fields, bytes_max))
        # the topic has one partition, in the order in which the labels were sent
        self._labels, self._label_offsets = labels.get(0, (empty_batch(fields), np.zeros(0, np.int64)))
        times = [batch[schema.roles.event_time] for batch, _ in self._transactions.values() if batch.rows]
        if not times:
            raise CascadeError("there are no transactions, so states cannot be compared")
        self.after_ms = int(max(part.max() for part in times)) - self._engine().horizon_ms
        self._check_limits()

    def digest_events(self, partition: int, offset: int) -> str:
        """Digest of the partition's transactions below an offset, with the labels folded when they were due."""
        batch, offsets = self._transactions[partition]
        engine, schema = self._engine(), self._bundle.schema
        below = batch.take(offsets < offset)
        times, labels_folded = below[schema.roles.event_time], 0
        due_ms = self._labels[schema.roles.event_time] + schema.label.delay_ms
        for start in range(0, below.rows, CHUNK_ROWS):
            rows = np.arange(start, min(start + CHUNK_ROWS, below.rows))
            until = int(np.searchsorted(due_ms, times[rows[-1]], side="right"))
            engine.update_labels(self._labels.take(np.arange(labels_folded, until)))
            engine.update(below.take(rows), np.full(len(rows), partition, np.int64))
            labels_folded = until
        return engine.digest(partition, self.after_ms)

    def digest_labels(self, offset: int) -> str:
        """Digest of the labels below an offset."""
        engine = self._engine()
        engine.update_labels(self._labels.take(self._label_offsets < offset))
        return engine.digest_labels(self.after_ms)

    def _engine(self) -> FeatureEngine:
        return FeatureEngine(self._bundle.spec, self._bundle.schema)

    def _check_limits(self) -> None:
        limit, roles = self._bundle.spec.limits.events_per_key_max, self._bundle.schema.roles
        batches = [batch for batch, _ in self._transactions.values()]
        times = np.concatenate([batch[roles.event_time] for batch in batches])
        for field in (roles.card, roles.terminal):
            keys = np.concatenate([batch[field] for batch in batches])
            most = _most_at_once(keys, times, self._engine().horizon_ms)
            if most > limit:
                raise CascadeError(f"a {field} has {most} events, over the limit of {limit}: states cannot be compared")


def _most_at_once(keys: Array, times_ms: Int64, horizon_ms: int) -> int:
    """The largest number of events of a key within the horizon."""
    _, ranks = np.unique(keys, return_inverse=True)
    since_ms = times_ms - times_ms.min()
    codes = np.sort(ranks.astype(np.int64) * int(since_ms.max() + horizon_ms + 1) + since_ms)
    return int((np.arange(len(codes)) - np.searchsorted(codes, codes - horizon_ms)).max()) + 1


def _read(config: Config, topic: str, reader: Codec) -> dict[int, tuple[ColumnBatch, Int64]]:
    """Rows and offsets of each partition of a topic; raises CascadeError if a message is unreadable."""
    parts: dict[int, list[tuple[ColumnBatch, Int64]]] = {}

    def take(fetched: FetchedBatch) -> None:
        decoded = reader.decode(fetched.values)
        if decoded.rejects:
            raise CascadeError(f"{topic}-{fetched.partition}: {len(decoded.rejects)} messages are unreadable")
        parts.setdefault(fetched.partition, []).append((decoded.batch, fetched.offsets))

    read_topic(config, topic, take)
    return {
        number: (
            ColumnBatch(
                {name: np.concatenate([batch[name] for batch, _ in found]) for name in found[0][0].columns},
                sum(batch.rows for batch, _ in found),
            ),
            np.concatenate([offsets for _, offsets in found]),
        )
        for number, found in parts.items()
    }
