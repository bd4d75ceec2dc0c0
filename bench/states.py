"""The state that workers left behind, held against a fold of the log without any interruption."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np

from bench.cluster import ends_of, read_topic
from cascade.bundle import Bundle
from cascade.columns import Array, ColumnBatch, Int64
from cascade.config import Config
from cascade.errors import CascadeError
from cascade.features import FeatureEngine
from cascade.protocols import SystemClock
from streaming.clients import FetchedBatch
from streaming.codecs import Codec, topic_codec
from streaming.codecs.rows import empty_batch
from streaming.files import FsspecFiles
from streaming.snapshots import SnapshotStore, fingerprint

# Fewer than a day of a partition: labels must not be told long before they are due, or they push out older ones.
CHUNK_ROWS = 200


class PartitionState(msgspec.Struct, frozen=True, kw_only=True):
    """One partition: what its newest snapshot holds against an uninterrupted fold of the log up to the same offsets.

    `offset`: where the snapshot stands, -1 where there is none; `end`: the log's end. `events_equal`: the digests of
    its transactions; `labels_equal`: of the frauds that its worker knows. `digest`: the fold's, the start of it.
    """

    partition: int
    offset: int
    end: int
    events_equal: bool
    labels_equal: bool
    digest: str

    @property
    def equal(self) -> bool:
        """Whether it is the state of the whole log, and the same as without an interruption."""
        return self.events_equal and self.labels_equal and self.offset == self.end


def compare_states(config: Config, bundle: Bundle) -> list[PartitionState]:
    """Each partition's newest snapshot against a fold of its log, in this process, from its beginning.

    Terminals must be visited by the cards of one partition only (`bench.cluster.apart`), labels be aligned exactly, and
    the limit on events a key be out of reach: else the state rightly depends on which partitions lie together, and on
    when a label came. Raises CascadeError where the limit is within reach, or a record cannot be read.
    """
    topic, label_topic = config.kafka.topics.transactions, config.kafka.topics.labels
    ends = ends_of(config, topic)
    places = {(topic, number): end for number, end in ends.items()}
    with ThreadPoolExecutor(1) as unused:
        files = FsspecFiles(config.state.snapshots)
        store = SnapshotStore(files, config.state.keep, fingerprint(bundle), "check", SystemClock(), unused.submit)
        names = store.candidates(places, {})
        snapshots = {name: store.load(name) for found in names.values() for name in found[:1]}
    newest = {number: snapshots[names[topic, number][0]] for number in ends if names[topic, number]}
    fold = _Fold(config, bundle)
    label_digests: dict[int, str] = {}
    states = []
    for number, end in ends.items():
        snapshot = newest.get(number)
        if snapshot is None:
            states.append(
                PartitionState(partition=number, offset=-1, end=end, events_equal=False, labels_equal=False, digest="")
            )
            continue
        left = FeatureEngine(bundle.spec, bundle.schema)
        left.import_state(snapshot.arrays)
        offset, until = snapshot.transactions[topic, number], snapshot.labels.get((label_topic, 0), 0)
        digest = fold.of_events(number, offset)
        if until not in label_digests:
            label_digests[until] = fold.of_labels(until)
        states.append(
            PartitionState(
                partition=number,
                offset=offset,
                end=end,
                events_equal=left.digest(number, fold.after_ms) == digest,
                labels_equal=left.digest_labels(fold.after_ms) == label_digests[until],
                digest=digest[:16],
            )
        )
    return states


class _Fold:
    """The log in memory, folded anew as asked; `after_ms`: older events are kept or not as other partitions have it."""

    def __init__(self, config: Config, bundle: Bundle) -> None:
        self._bundle = bundle
        schema, kafka = bundle.schema, config.kafka
        topics, bytes_max = kafka.topics, config.worker.message_bytes_max
        transactions = topic_codec(kafka, topics.transactions, schema.fields, bytes_max)
        self._transactions = _read(config, topics.transactions, transactions)
        fields = schema.label_fields()
        labels = _read(config, topics.labels, topic_codec(kafka, topics.labels, fields, bytes_max))
        # one partition, in order of time: as they were sent
        self._labels, self._label_offsets = labels.get(0, (empty_batch(fields), np.zeros(0, np.int64)))
        times = [batch[schema.roles.event_time] for batch, _ in self._transactions.values() if batch.rows]
        if not times:
            raise CascadeError("no transactions to compare states by")
        self.after_ms = int(max(one.max() for one in times)) - self._engine().horizon_ms
        self._check_limits()

    def of_events(self, partition: int, offset: int) -> str:
        """Digest of the partition's transactions below an offset, labels told when they were due."""
        batch, offsets = self._transactions[partition]
        engine, schema = self._engine(), self._bundle.schema
        below = batch.take(offsets < offset)
        times, told = below[schema.roles.event_time], 0
        due_ms = self._labels[schema.roles.event_time] + schema.label.delay_ms
        for start in range(0, below.rows, CHUNK_ROWS):
            rows = np.arange(start, min(start + CHUNK_ROWS, below.rows))
            until = int(np.searchsorted(due_ms, times[rows[-1]], side="right"))
            engine.update_labels(self._labels.take(np.arange(told, until)))
            engine.update(below.take(rows), np.full(len(rows), partition, np.int64))
            told = until
        return engine.digest(partition, self.after_ms)

    def of_labels(self, offset: int) -> str:
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
                raise CascadeError(f"a {field} has {most} events, its state keeps {limit}: states cannot be compared")


def _most_at_once(keys: Array, times_ms: Int64, horizon_ms: int) -> int:
    """The largest number of events that one key has within the horizon."""
    _, ranks = np.unique(keys, return_inverse=True)
    since_ms = times_ms - times_ms.min()
    codes = np.sort(ranks.astype(np.int64) * int(since_ms.max() + horizon_ms + 1) + since_ms)
    return int((np.arange(len(codes)) - np.searchsorted(codes, codes - horizon_ms)).max()) + 1


def _read(config: Config, topic: str, reader: Codec) -> dict[int, tuple[ColumnBatch, Int64]]:
    """Rows and offsets of each partition of a topic; raises CascadeError where a message cannot be read."""
    parts: dict[int, list[tuple[ColumnBatch, Int64]]] = {}

    def take(fetched: FetchedBatch) -> None:
        decoded = reader.decode(fetched.values)
        if decoded.rejects:
            raise CascadeError(f"{topic}-{fetched.partition}: {len(decoded.rejects)} messages cannot be read")
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
