"""The worker's loop: fetch, fold and screen, escalate, decide, send, commit.

One thread runs the loop, a `step` at a time. Screened transactions are decided at once; escalated ones wait in
`Escalations`, beside the loop, until their answer or their deadline. An offset counts as decided when the broker has
acknowledged its decision. The decided prefix is committed; the offsets decided ahead of it are in the commit metadata.

Between two steps the loop sleeps. It wakes for records, for answers of the deep model, for deadlines, and for commits
that are due. It does not wake for acknowledgements: a delivery knows when it was acknowledged. Under load it rests
first, so that the next step takes several records (`Pace`).

Clock, broker, model server and files come as arguments (`Parts`). If the broker is lost or refuses a decision, `step`
raises BrokerError, and the worker is finished: `streaming.worker.sessions` makes a new one, which resumes from the
committed offsets.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from cascade.columns import Array, ColumnBatch
from cascade.config import Config
from cascade.engine import Engine
from cascade.errors import BrokerError, StateError
from cascade.ledger import Ledger, Path
from cascade.protocols import Clock, DeepStage
from cascade.schema import Schema
from streaming.codecs import Codec, Reject
from streaming.health_state import HealthState
from streaming.kafka import (
    ConsumerClient,
    FetchedBatch,
    Partition,
    ProducerClient,
    TransactionalProducerClient,
)
from streaming.pipeline import table_kernels as kernels
from streaming.pipeline.decode import Decoder
from streaming.pipeline.duplicates import FirstDecisions
from streaming.pipeline.escalate import Escalations
from streaming.pipeline.privacy import CardHasher
from streaming.pipeline.repeats import Repeats
from streaming.pipeline.send import offsets_of, records_of
from streaming.pipeline.steps import Pipeline
from streaming.pipeline.table import Table
from streaming.pipeline.watch import RecallWatch
from streaming.worker.boundaries import InvariantError, check_commit, check_snapshot
from streaming.worker.history import History
from streaming.worker.labels import LabelFollower
from streaming.worker.outbox import Acknowledged, AtLeastOnceOutbox, ExactlyOnceOutbox, Outbox
from streaming.worker.pace import Pace
from streaming.worker.partitions import OwnedPartition, Phase
from streaming.worker.recovery import Recovery
from streaming.worker.snapshots import Snapshot, SnapshotStore
from streaming.worker.terminals import TerminalExchange

log = structlog.get_logger()
# Between two looks while partitions are drained, or replay the log.
PAUSE_S = 0.02
# With exactly-once delivery the commit metadata (4 kB) must list every decision ahead of the committed prefix, or a
# crash would decide it again. Each undecided record takes at most three bytes of it.
EXACTLY_ONCE_IN_FLIGHT_MAX = 1_000
# A backlog is not hurried: where deadlines count from the fetch, no more records are taken while the deep model would
# need this part of the time for a decision.
WAIT_PART = 0.5
# A cooperative rebalance takes two rounds, and only the second assigns what other workers revoke in the first. They
# notice the rebalance with a heartbeat (2 s) and revoke within `revoke_timeout_ms`; a worker that still has no
# partition after both is a spare.
SPARE_S_MIN = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What lies outside a worker and outlives its session.

    `snapshots`, `hasher`: None if not configured. `watch`: of the bundle's certificate, None without one. `chance`:
    random numbers in [0, 1), so that the pauses of several workers differ.
    """

    config: Config
    schema: Schema
    bundle_version: str
    engine: Engine
    deep: DeepStage
    codec: Codec
    label_codec: Codec
    ledger: Ledger
    health: HealthState
    snapshots: SnapshotStore | None
    clock: Clock
    hasher: CardHasher | None = None
    watch: RecallWatch | None = None
    chance: Callable[[], float] = random.SystemRandom().random


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts(Surroundings):
    """The collaborators of a worker: `streaming.worker.opening` connects it.

    `producer`: a TransactionalProducerClient if `config.delivery` is exactly-once. `open_consumer`: makes a consumer
    outside any group. `summary_consumer`: None if not configured.
    """

    consumer: ConsumerClient
    label_consumer: ConsumerClient
    producer: ProducerClient
    open_consumer: Callable[[], ConsumerClient]
    summary_consumer: ConsumerClient | None = None


class Worker:
    """Everything between the transactions topic and the decisions topic, for one bundle and one session."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        config, clock, ledger = parts.config, parts.clock, parts.ledger
        self._config, self._clock, self._ledger = config, clock, ledger
        self._engine, self._consumer, self._health = parts.engine, parts.consumer, parts.health
        self._roles = parts.schema.roles
        self._stop = threading.Event()
        self._lost = ""
        self._paused = self._spare = False
        # whether the last poll took all records that were there
        self._quiet = True
        self._pace = Pace()
        self._joined_s: float | None = None
        self._copies: dict[str, Array] = {}
        self._snapshot_due_s = clock.monotonic() + config.state.interval_s
        self._in_flight_max, self._rows_max = config.worker.in_flight_max, config.worker.batch_rows_max
        self._poll_s_max = config.worker.poll_timeout_ms / 1e3
        self._wait_s_max = WAIT_PART * config.deadline.budget_ms / 1e3 if config.deadline.start == "fetch" else math.inf
        self._labels_on_arrival = config.labels.alignment == "arrival"
        self._outbox = self._make_outbox()
        self._first_decisions = FirstDecisions(config.duplicates)
        self._labels = LabelFollower(
            parts.label_consumer, config.kafka.topics.labels, parts.label_codec, config.labels.alignment,
            self._fold_labels, self._reject, clock, parts.consumer,
        )  # fmt: skip
        features = parts.engine.features
        features.reset()
        if config.terminals.share:
            for _, number in parts.consumer.partitions_for(config.kafka.topics.transactions):
                features.hide(number)
        self._history = History(features.horizon_ms)
        self._recovery = Recovery(
            parts.consumer, self._labels, features, self._first_decisions, parts.snapshots, ledger,
            parts.health, clock, self._on_live, self._history, config.terminals.share,
        )  # fmt: skip
        self._terminals: TerminalExchange | None = None
        if parts.summary_consumer is not None:
            self._terminals = TerminalExchange(config, features, parts.summary_consumer, self._outbox, clock)
        self._pipeline = self._make_pipeline()

    def _make_pipeline(self) -> Pipeline:
        parts, config, policy = self._parts, self._config, self._engine.policy
        decoder = Decoder(
            parts.codec, self._roles.event_time, config.worker.ahead_ms_max, config.deadline.start == "append",
            parts.bundle_version,
        )  # fmt: skip
        repeats = Repeats(config, self._first_decisions, policy, self._recovery.owned, parts.open_consumer, parts.clock)
        escalations = Escalations(
            config, policy, parts.deep, self._roles.card, parts.ledger, parts.health, parts.clock, parts.chance,
            parts.consumer.wake,
        )  # fmt: skip
        return Pipeline(
            config, self._roles, parts.engine, decoder, self._first_decisions, repeats, escalations, self._outbox,
            parts.hasher, parts.ledger, parts.clock, self._note, parts.watch,
        )  # fmt: skip

    def _make_outbox(self) -> Outbox:
        parts, settings = self._parts, self._config.worker
        shared = (parts.consumer, parts.health, parts.clock)
        if self._config.delivery == "at-least-once":
            return AtLeastOnceOutbox(*shared, settings.commit_interval_ms / 1e3, parts.producer)
        self._in_flight_max = min(self._in_flight_max, EXACTLY_ONCE_IN_FLIGHT_MAX)
        producer: TransactionalProducerClient = parts.producer  # type: ignore[assignment]  # by configuration
        return ExactlyOnceOutbox(
            *shared, settings.transaction_interval_ms / 1e3, producer, settings.transaction_ms_min / 1e3
        )

    # --- the loop -----------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Rows that wait for a decision: at most `worker.in_flight_max`, and 1,000 with exactly-once delivery."""
        return self._pipeline.in_flight

    @property
    def positions(self) -> dict[Partition, int]:
        """The next offset to take, by partition; safe from another thread."""
        return {partition: owned.next for partition, owned in self._recovery.owned.copy().items()}

    def stop(self) -> None:
        """Makes the session drain the worker and end; safe from a signal handler or another thread."""
        self._stop.set()

    def lose(self, reason: str) -> None:
        """Makes the next `step` raise BrokerError with this reason; safe from another thread."""
        self._lost = reason

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def start(self) -> None:
        """Joins the group."""
        self._ledger.count_session()
        self._consumer.subscribe(
            [self._config.kafka.topics.transactions], self._on_assigned, self._on_revoked, self._on_lost
        )
        self._health.waiting("partitions", "joining the group")

    def step(self) -> None:
        """Polls once, processes the records, and does all work that is due; raises BrokerError."""
        if self._lost:
            raise BrokerError(self._lost)
        rebuilding = not self._recovery.done
        if rebuilding:
            self._recovery.advance()
            # before the first decisions, which it explains
            self._look_at_history()
        in_flight = self.in_flight
        if in_flight or self._paused:
            self._make_room(in_flight)
        rows_max = min(self._rows_max, max(self._in_flight_max - in_flight, 1))
        fetched = self._consumer.poll(self._sleep_s(rebuilding, in_flight), rows_max)
        self._health.progress()
        if not fetched:
            self._quiet = True
            if not self._spare and not self._recovery.owned:
                self._look_for_spare()
            self._follow_labels(False)
            self._advance()
            return
        began_s = self._clock.monotonic()
        accepted = [part for part in map(self._accept, fetched) if part is not None]
        self._follow_labels(len(accepted) > 0)
        if accepted:
            owned = self._recovery.owned
            self._pipeline.take(accepted, [owned[part.topic, part.partition].decided for part in accepted])
        self._quiet = sum(map(len, fetched)) < rows_max
        self._advance()
        # no rest where more records, or an answer of the model, may be there
        rest_s = self._pace.ended(began_s, self._clock.monotonic())
        if rest_s and self._quiet and not self.in_flight:
            self._clock.sleep(rest_s)

    def _follow_labels(self, before_records: bool) -> None:
        if before_records or self._labels_on_arrival:
            labels = self._labels.catch_up()
            if labels:
                self._ledger.count_labels(labels)

    def _sleep_s(self, rebuilding: bool, in_flight: int) -> float:
        """How long the next poll may wait for records. rebuilding: not all partitions are live."""
        if rebuilding and self._recovery.restoring:
            return 0.0
        longest_s = PAUSE_S if rebuilding else self._poll_s_max
        due_s = self._outbox.due_s(self._quiet)
        if self._terminals is not None and self._recovery.owned:
            due_s = min(due_s, self._terminals.due_s)
        if due_s < math.inf:
            longest_s = min(longest_s, due_s - self._clock.monotonic())
        if in_flight:
            longest_s = min(longest_s, self._pipeline.deadline_s - self._clock.time())
        return max(longest_s, 0.0)

    def _advance(self) -> None:
        """Processes answers, deadlines, delivery reports, commits and snapshots."""
        self._pipeline.answer()
        if self._terminals is not None and self._recovery.owned:
            self._terminals.advance(self._live_ids())
        self._look_at_history()
        self._settle()
        snapshots = self._parts.snapshots
        if snapshots is not None and self._clock.monotonic() >= self._snapshot_due_s:
            self._take_snapshot(snapshots)

    def _make_room(self, in_flight: int) -> None:
        """Pauses the live partitions at `in_flight_max` or `_wait_s_max`, and resumes them at half of it."""
        filled = in_flight / self._in_flight_max
        if self._wait_s_max < math.inf:
            filled = max(filled, self._pipeline.wait_s / self._wait_s_max)
        if not self._paused and filled >= 1.0:
            self._consumer.pause(owned.partition for owned in self._recovery.live)
            self._paused = True
        elif self._paused and filled <= 0.5:
            self._consumer.resume(owned.partition for owned in self._recovery.live)
            self._paused = False

    def drain(self) -> None:
        """Decides and commits the records in flight within `worker.drain_timeout_ms`, and writes a snapshot."""
        self._health.waiting("partitions", "draining")
        owned = list(self._recovery.owned)
        self._consumer.pause(owned)
        self._paused = True
        budget_s = self._config.worker.drain_timeout_ms / 1e3
        give_up_s = self._clock.monotonic() + budget_s
        if self._terminals is not None:
            self._terminals.publish(self._live_ids())
        if not self._finish(owned, budget_s):
            log.warning("drain timed out", undecided=self.in_flight, unacknowledged=self._outbox.pending)
        self._settle(force=True)
        snapshots = self._parts.snapshots
        if snapshots is not None and self._recovery.done and self._recovery.owned:
            self._take_last_snapshot(snapshots, give_up_s)

    def _take_last_snapshot(self, snapshots: SnapshotStore, give_up_s: float) -> None:
        """Writes the state until `give_up_s`, so that the next start folds nothing."""
        if snapshots.finish(max(give_up_s - self._clock.monotonic(), 0.0)):
            snapshots.save(self._snapshot(self._engine.features.export_state()))
            if snapshots.finish(max(give_up_s - self._clock.monotonic(), 0.0)):
                return
        log.warning("last snapshot not written: the drain timed out; the next start folds more of the log")

    def _finish(self, partitions: Sequence[Partition], budget_s: float) -> bool:
        """Waits until the records taken of these partitions are decided and acknowledged; False after `budget_s`."""
        give_up_s = self._clock.monotonic() + budget_s
        while True:
            self._health.progress()
            self._pipeline.answer()
            waiting = self._pipeline.waiting_of(partitions)
            self._settle(force=not waiting)
            if not waiting and not self._outbox.pending:
                return True
            if self._clock.monotonic() > give_up_s:
                return False
            self._clock.sleep(PAUSE_S)

    # --- a micro-batch ------------------------------------------------------------------------------------------

    def _accept(self, fetched: FetchedBatch) -> FetchedBatch | None:
        owned = self._recovery.owned.get((fetched.topic, fetched.partition))
        if owned is None or owned.phase in (Phase.RESTORING, Phase.REBUILT):
            return None  # fetched under an earlier assignment
        accepted = owned.accept(fetched)
        if accepted.seek is not None:
            self._consumer.seek(owned.partition, accepted.seek)
        if accepted.gap:
            self._ledger.count_offset_gap()
        if accepted.batch is not None:
            owned.take(accepted.batch.offsets)
        return accepted.batch

    def _reject(self, fetched: FetchedBatch, rejects: Sequence[Reject]) -> None:
        self._pipeline.reject(fetched, rejects)

    def _note(self, table: Table) -> None:
        times_ms = table.rows["event_time_ms"]
        self._history.folded(times_ms.item(0), times_ms.item(-1))
        if self._terminals is not None:
            self._terminals.note(table.batch, table.column("partition_id"))

    def _fold_labels(self, labels: ColumnBatch) -> None:
        hasher, watch = self._parts.hasher, self._parts.watch
        known = labels if hasher is None else hasher.hashed(labels, self._roles.card)
        self._engine.fold_labels(known)
        if watch is not None:
            watch.judge(known)

    # --- acknowledgements and commits ---------------------------------------------------------------------------

    def _settle(self, force: bool = False) -> None:
        """Counts acknowledged decisions as decided, and commits the offsets if that is due, or at once with `force`.

        With exactly-once delivery the ledger counts them when they are committed. If the group refuses the commit,
        their offsets stay marked: the next transaction contains both.
        """
        if not self._outbox.looks(force, self._quiet):
            return
        self._pipeline.report()
        events = self._outbox.collect(force, self._quiet)
        for partition, offsets in offsets_of([event.sent for event in events]).items():
            owned = self._recovery.owned.get(partition)
            if owned is not None:
                owned.tracker.decided(offsets)
        self._record([event for event in events if event.at_s is not None])
        if self._outbox.commit(self._progress, force):
            now_s = self._clock.time()
            self._record([Acknowledged(event.sent, now_s) for event in events if event.at_s is None])

    def _record(self, events: Sequence[Acknowledged]) -> None:
        """Counts acknowledged decisions in the ledger, those of a path together."""
        by_path: dict[tuple[Path, str | None], list[Acknowledged]] = {}
        for event in events:
            if event.sent.path:
                by_path.setdefault((event.sent.path, event.sent.cause), []).append(event)
        for (path, cause), found in by_path.items():
            decisions = [event.sent for event in found]
            counts = np.array([len(sent.start_ms) for sent in decisions])
            start_ms = np.concatenate([sent.start_ms for sent in decisions])
            latency_s = np.empty(len(start_ms))
            kernels.latencies(start_ms, np.array([event.at_s for event in found]), counts, latency_s)
            self._ledger.record_decisions(path, latency_s, cause, records_of(decisions))

    def _progress(self) -> dict[Partition, tuple[int, str]]:
        """The offset and metadata to commit now, by partition, those of the labels topic included."""
        offsets: dict[Partition, tuple[int, str]] = {}
        for partition, owned in self._recovery.owned.items():
            progress = owned.progress
            if progress is not None:
                check_commit(owned, progress, self._outbox.committed.get(partition, (None, ""))[0])
                offsets[partition] = (progress.until, progress.metadata())
        if self._config.delivery == "exactly-once" or not self._outbox.pending:
            offsets |= {partition: (offset, "") for partition, offset in self._labels.offsets_to_commit().items()}
        return offsets

    # --- partitions and state -----------------------------------------------------------------------------------

    def _on_assigned(self, partitions: list[Partition]) -> None:
        self._labels.own_dead_letters(_has_partition_0(self._recovery.owned.keys() | set(partitions)))
        self._recovery.gain(partitions)
        self._show_partitions()

    def _on_revoked(self, partitions: list[Partition]) -> None:
        """Decides and commits their records in flight, then forgets them."""
        owned = [partition for partition in partitions if partition in self._recovery.owned]
        if self._terminals is not None:
            self._terminals.publish(self._live_ids())
        if not self._finish(owned, self._config.worker.revoke_timeout_ms / 1e3):
            log.warning("partitions revoked with undecided records", undecided=self.in_flight)
            self._pipeline.drop(owned)
            self._settle(force=True)
        self._forget(owned)

    def _on_lost(self, partitions: list[Partition]) -> None:
        """Forgets them: their new owner decides the undecided records."""
        self._pipeline.drop(partitions)
        self._forget(partitions)

    def _forget(self, partitions: Sequence[Partition]) -> None:
        # the next owner of partition 0 sends the dead letters of the labels
        labels = self._labels.partitions if _has_partition_0(partitions) else []
        self._outbox.forget([*partitions, *labels])
        self._recovery.lose(partitions)
        if self._terminals is not None:
            self._terminals.drop([partition_id for _, partition_id in partitions])
        self._labels.own_dead_letters(_has_partition_0(self._recovery.owned))
        self._show_partitions()

    def _look_at_history(self) -> None:
        """Says how much of the longest window the state covers: in health, in the ledger, and where it turns cold."""
        history = self._history
        if not (self._recovery.owned and self._recovery.done and history.moved()):
            return
        self._health.ok("history", history.text)
        self._ledger.set_state_covered(history.covered)
        change = history.changed()
        if change is not None:
            log.warning(change) if history.text else log.info(change)

    def _live_ids(self) -> list[int]:
        return [owned.partition_id for owned in self._recovery.live]

    def _on_live(self, owned: OwnedPartition) -> None:
        if not self._paused:
            self._consumer.resume([owned.partition])

    def _show_partitions(self) -> None:
        partition_ids = sorted(partition_id for _, partition_id in self._recovery.owned)
        if partition_ids:
            self._health.ok("partitions", ", ".join(map(str, partition_ids)))
        else:
            self._health.waiting("partitions", "none assigned")
        self._spare, self._joined_s = False, None

    def _look_for_spare(self) -> None:
        """Reports a worker that the group leaves without partitions as ready: it takes over when another one ends."""
        if not self._consumer.joined():
            return
        now_s = self._clock.monotonic()
        if self._joined_s is None:
            self._joined_s = now_s
            self._health.waiting("partitions", "joined the group, none assigned yet")
        elif now_s - self._joined_s > SPARE_S_MIN + self._config.worker.revoke_timeout_ms / 1e3:
            self._spare = True
            self._health.ok("partitions", "spare: no partitions assigned")
            log.info("spare: no partitions assigned; takes over when another worker of the group ends")

    def _take_snapshot(self, snapshots: SnapshotStore) -> None:
        """Copies the state for the writer thread; the loop pauses only for the copy."""
        if not self._recovery.owned or not self._recovery.done or snapshots.busy:
            return
        features = self._engine.features
        if not features.export_fits(self._copies):
            # in the writer thread: allocating takes many times as long as copying
            snapshots.prepare(self._make_copies)
            return
        self._snapshot_due_s = self._clock.monotonic() + self._config.state.interval_s
        if self._terminals is not None:
            self._terminals.publish(self._live_ids())
        snapshots.save(self._snapshot(features.export_state(self._copies)))

    def _snapshot(self, state: dict[str, Array]) -> Snapshot:
        owned, committed = self._recovery.owned, self._outbox.committed
        first_decisions = self._first_decisions.export()
        snapshot = Snapshot(
            state | first_decisions | self._history.export(),
            self.positions,
            dict(self._labels.positions),
            {partition: committed.get(partition, (part.until, ""))[0] for partition, part in owned.items()},
        )
        check_snapshot(snapshot, owned)
        try:
            self._engine.features.check_export(state)
            self._first_decisions.check_export(first_decisions)
        except StateError as error:
            raise InvariantError(f"snapshot not written: {error}") from error
        return snapshot

    def _make_copies(self) -> None:
        self._copies = self._engine.features.export_buffers()


def _has_partition_0(partitions: Iterable[Partition]) -> bool:
    """Whether a worker with these partitions sends the labels topic's dead letters: the owner of partition 0 does."""
    return any(partition_id == 0 for _, partition_id in partitions)
