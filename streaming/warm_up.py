"""Fills the state from labelled history before a service's first decision: `cascade warm-up`.

The history is folded by the service's feature engine, and written as a base snapshot: the state below the first record
of each partition. The service restores it like any snapshot, and decides every record of the topic. So the history
must end before the topic begins, and nothing may be decided yet; each other case is refused in one line.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass

import msgspec
import numpy as np

from cascade.bundle import Bundle
from cascade.columns import Array, Int64
from cascade.config import Config
from cascade.errors import BrokerError, DataError, SettingError, StateError
from cascade.features import FeatureEngine
from cascade.frames import LabelledData
from cascade.progress import Progress, StepProgress
from cascade.protocols import SystemClock
from stages.offline import CHUNK_ROWS, fold, labels_of
from streaming.codecs import topic_codec
from streaming.kafka import ConsumerClient, FetchedBatch, Partition, make_consumer
from streaming.kafka.partitioning import partition_of
from streaming.pipeline.decisions import message_keys
from streaming.pipeline.duplicates import FirstDecisions
from streaming.pipeline.privacy import CardHasher
from streaming.worker.files import FsspecFiles
from streaming.worker.history import History
from streaming.worker.snapshots import Positions, Snapshot, SnapshotStore, fingerprint

# A broker that returns no first record for this long, although there is one, does not work.
SILENCE_S_MAX = 30.0
# In the file name of the snapshot, where a worker's has the worker's name.
NAME = "warm-up"
_SETTINGS = "configuration"


class WarmedUp(msgspec.Struct, frozen=True):
    """What was written.

    `rows`, `frauds`: folded. `covered`: share of the longest window that the state covers. `forgotten`: keys for which
    the state had no room. `partitions`: of the topic. `megabytes`: of the state.
    """

    rows: int
    frauds: int
    covered: float
    forgotten: int
    partitions: int
    megabytes: float


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the service will begin: the first offsets of the topics of transactions and labels."""

    transactions: Positions
    labels: Positions


def warm_up(config: Config, bundle: Bundle, data: LabelledData, progress: StepProgress) -> WarmedUp:
    """Folds `data` and writes the base snapshot. Waits for no topic: they are there.

    Raises SettingError where the configuration has no place for snapshots or shares terminals, StateError where the
    group has decided something, snapshots are there already, or the history does not end before the topic begins,
    DataError for no rows, BrokerError.
    """
    _check(config, data)
    store = _store(config, bundle)
    with closing(make_consumer(config.kafka, config.kafka.group)) as consumer:
        place = _place(config, consumer, store)
        newest_ms = int(data.batch[bundle.schema.roles.event_time][-1])
        _check_first_records(config, bundle, consumer, place.transactions, newest_ms)
    engine = FeatureEngine(bundle.spec, bundle.schema)
    history = History(engine.horizon_ms)
    fold_history(engine, history, config, data, len(place.transactions), lambda share: progress("fold history", share))
    arrays = engine.export_state() | FirstDecisions(config.duplicates).export() | history.export()
    store.write(Snapshot(arrays, place.transactions, place.labels, place.transactions))
    progress("write snapshot", 1.0)
    return WarmedUp(
        rows=data.batch.rows,
        frauds=int(data.fraud.sum()),
        covered=history.covered,
        forgotten=sum(counts.evictions for counts in engine.statistics().values()),
        partitions=len(place.transactions),
        megabytes=round(engine.state_bytes() / 1e6, 1),
    )


def fold_history(
    engine: FeatureEngine,
    history: History,
    config: Config,
    data: LabelledData,
    partitions: int,
    progress: Progress,
) -> None:
    """Folds rows as the owner of all partitions would, each in the partition of its key, and the labels that are due.

    The labels of the last days, which are not due yet, follow at the end: each counts from its delay on, whether or not
    it comes once more from the topic.
    """
    roles, label = engine.schema.roles, engine.schema.label
    partition_ids = partitions_of(data.batch[roles.card], partitions)
    hasher = CardHasher.from_settings(config.privacy, os.environ)
    if hasher is not None:
        data = LabelledData(hasher.hashed(data.batch, roles.card), data.fraud)
    times_ms = data.batch[roles.event_time]
    for rows, _ in fold(engine, data, np.zeros(data.batch.rows, np.bool_), progress, partition_ids):
        history.folded(int(times_ms[rows[0]]), int(times_ms[rows[-1]]))
    later = np.flatnonzero((data.fraud == 1) & (times_ms + label.delay_ms > times_ms[-1]))
    engine.update_labels(labels_of(data.take(later), label.field))


def partitions_of(cards: Array, partitions: int) -> Int64:
    """The partition of each row, int64 [rows], by Kafka's default partitioner (murmur2) of the card as message key."""
    known, rows = np.unique(cards, return_inverse=True)
    numbers = np.array([partition_of(key, partitions) for key in message_keys(known)], np.int64)
    return np.asarray(numbers[rows], np.int64)


def _check(config: Config, data: LabelledData) -> None:
    if not config.state.snapshots:
        remedy = "set a directory or URL, from which the service restores the state"
        raise SettingError(_SETTINGS, "state.snapshots", "", "has no place for the state", remedy)
    if config.terminals.share:
        problem = "workers would not see each other's history of a terminal: summaries come from the topic alone"
        raise SettingError(_SETTINGS, "terminals.share", True, problem, "play the history into Kafka instead")
    if not data.batch.rows:
        raise DataError("the history has no rows; choose other days, or another file")


def _store(config: Config, bundle: Bundle) -> SnapshotStore:
    def at_once(write: Callable[[], None]) -> Future[None]:
        write()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    files = FsspecFiles(config.state.snapshots)
    return SnapshotStore(files, config.state.keep, fingerprint(bundle), NAME, SystemClock(), at_once)


def _place(config: Config, consumer: ConsumerClient, store: SnapshotStore) -> _Place:
    """The first offsets; raises StateError if something was decided, or snapshots are there."""
    topics = config.kafka.topics
    partitions, labels = consumer.partitions_for(topics.transactions), consumer.partitions_for(topics.labels)
    beginnings = consumer.beginning_offsets(partitions)
    for partition, (offset, metadata) in consumer.committed(partitions).items():
        if offset > beginnings[partition] or metadata:
            raise StateError(
                f"group {config.kafka.group} has decided {_text(partition)} up to offset {offset}, and history comes"
                " before the first decision; play it into Kafka, or set kafka.group to a new group and state.snapshots"
                " to a new place"
            )
    name = store.newest_of(partitions)
    if name is not None:
        raise StateError(
            f"{config.state.snapshots} has a snapshot of these partitions already, {name}: a service would choose"
            " between two histories; delete the snapshots, or set state.snapshots to a new place"
        )
    return _Place(beginnings, consumer.beginning_offsets(labels))


def _check_first_records(
    config: Config, bundle: Bundle, consumer: ConsumerClient, beginnings: Positions, newest_ms: int
) -> None:
    """Raises StateError if a partition's first readable record is not after the history, or another one's by its key.

    The service decides these records: a transaction that the history has too would count twice.
    """
    roles = bundle.schema.roles
    codec = topic_codec(
        config.kafka, config.kafka.topics.transactions, bundle.schema.fields, config.worker.message_bytes_max
    )
    for fetched in _first_fetches(consumer, beginnings):
        decoded = codec.decode(fetched.values)
        if not decoded.batch.rows:
            continue
        partition = (fetched.topic, fetched.partition)
        first_ms = int(decoded.batch[roles.event_time][0])
        if first_ms < newest_ms:
            raise StateError(
                f"the history ends at event time {newest_ms} ms, after the first record of {_text(partition)},"
                f" {first_ms} ms, which the service decides: it would count twice; cut the history with --to"
            )
        expected = int(partitions_of(decoded.batch[roles.card][:1], len(beginnings))[0])
        if expected != fetched.partition:
            raise StateError(
                f"offset {int(fetched.offsets[decoded.rows[0]])} of {_text(partition)} has a card that Kafka's default"
                f" partitioner (murmur2 of the card) sends to partition {expected}: the history of a card would be with"
                " another worker; use that partitioner, or play the history into Kafka"
            )


def _first_fetches(consumer: ConsumerClient, beginnings: Mapping[Partition, int]) -> list[FetchedBatch]:
    """The first fetch of each partition that has records."""
    ends = consumer.end_offsets(list(beginnings))
    left = {partition for partition, offset in beginnings.items() if ends[partition] > offset}
    consumer.assign(sorted(left))
    for partition in left:
        consumer.seek(partition, beginnings[partition])
    found, answered_s = [], time.monotonic()
    while left:
        for fetched in consumer.poll(0.1, CHUNK_ROWS):
            partition = (fetched.topic, fetched.partition)
            if partition in left:
                found.append(fetched)
                left.discard(partition)
                answered_s = time.monotonic()
        # a log of nothing but aborted records, or of control records, returns none
        left = {partition for partition in left if consumer.position(partition) < ends[partition]}
        if time.monotonic() - answered_s > SILENCE_S_MAX:
            raise BrokerError(f"{_text(min(left))}: the broker returned no records for {SILENCE_S_MAX:.0f} s; check it")
    return found


def _text(partition: Partition) -> str:
    return f"{partition[0]}-{partition[1]}"
