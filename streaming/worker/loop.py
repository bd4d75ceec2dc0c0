"""The worker's loop: fetch, fold and screen, escalate, decide, send, commit.

One thread runs the loop, a `step` at a time. Screened transactions are decided at once; escalated ones wait in
`Escalations`, beside the loop, until their answer or their deadline. An offset counts as decided when the broker has
acknowledged its decision. The decided prefix is committed; the offsets decided ahead of it are in the commit metadata.

Between two steps the loop sleeps. It wakes for records, for answers of the deep model, for deadlines, and for commits
that are due. It does not wake for acknowledgements: a delivery knows when it was acknowledged.

Clock, broker, model server and files come as arguments (`Parts`). If the broker is lost or refuses a decision, `step`
raises BrokerError, and the worker is finished: `streaming.worker.sessions` makes a new one, which resumes from the
committed offsets.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import structlog

from cascade.columns import Array, ColumnBatch
from cascade.config import Config
from cascade.engine import Engine
from cascade.errors import BrokerError
from cascade.ledger import Ledger, StageLaps
from cascade.protocols import Clock, DeepStage
from cascade.schema import Schema
from streaming.codecs import Codec
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
from streaming.pipeline.publish import Publisher
from streaming.pipeline.repeats import Repeats
from streaming.pipeline.table import Table
from streaming.service.health import HealthState
from streaming.worker.labels import LabelFollower
from streaming.worker.outbox import AtLeastOnceOutbox, ExactlyOnceOutbox, Outbox, Sent
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
# A cooperative rebalance takes two rounds, and only the second assigns what other workers revoke in the first. They
# notice the rebalance with a heartbeat (2 s) and revoke within `revoke_timeout_ms`; a worker that still has no
# partition after both is a spare.
SPARE_S_MIN = 5.0


@dataclass(frozen=True, slots=True)
class Parts:
    """The collaborators of a worker.

    `producer`: a TransactionalProducerClient if `config.delivery` is exactly-once. `open_consumer`: makes a consumer
    outside any group. `snapshots`, `hasher`, `summary_consumer`: None if not configured. `chance`: random numbers in
    [0, 1), so that the pauses of several workers differ.
    """

    config: Config
    schema: Schema
    bundle_version: str
    engine: Engine
    deep: DeepStage
    codec: Codec
    label_codec: Codec
    consumer: ConsumerClient
    label_consumer: ConsumerClient
    producer: ProducerClient
    ledger: Ledger
    health: HealthState
    snapshots: SnapshotStore | None
    clock: Clock
    open_consumer: Callable[[], ConsumerClient]
    hasher: CardHasher | None = None
    summary_consumer: ConsumerClient | None = None
    chance: Callable[[], float] = random.SystemRandom().random


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
        self._laps = StageLaps()
        self._paused = self._spare = False
        # whether the last poll took all records that were there
        self._quiet = True
        self._joined_s: float | None = None
        self._copies: dict[str, Array] = {}
        self._snapshot_due_s = clock.monotonic() + config.state.interval_s
        self._in_flight_max = config.worker.in_flight_max
        # the next offset to take, by partition; replaced as a whole, so other threads may read it
        self.positions: dict[Partition, int] = {}
        self._outbox = self._make_outbox()
        self._decoder = Decoder(
            parts.codec, self._roles.event_time, config.worker.ahead_ms_max, config.deadline.start == "append",
            parts.bundle_version,
        )  # fmt: skip
        self._first_decisions = FirstDecisions(config.duplicates)
        self._publisher = Publisher(
            config, self._roles, parts.engine.policy, self._outbox, self._first_decisions, parts.hasher, ledger, clock
        )  # fmt: skip
        self._labels = LabelFollower(
            parts.label_consumer, config.kafka.topics.labels, parts.label_codec, config.labels.alignment,
            self._fold_labels, self._publisher.reject, clock, parts.consumer,
        )  # fmt: skip
        features = parts.engine.features
        features.reset()
        if config.terminals.share:
            for _, number in parts.consumer.partitions_for(config.kafka.topics.transactions):
                features.hide(number)
        self._recovery = Recovery(
            parts.consumer, self._labels, features, self._first_decisions, parts.snapshots, ledger,
            parts.health, clock, self._on_live, config.terminals.share,
        )  # fmt: skip
        self._escalations = Escalations(
            config, parts.engine.policy, parts.deep, self._roles.card, ledger, parts.health, clock, parts.chance,
            parts.consumer.wake,
        )  # fmt: skip
        self._repeats = Repeats(
            config, self._first_decisions, parts.engine.policy, self._recovery.owned, parts.open_consumer,
            self._publisher.repeat, clock,
        )  # fmt: skip
        self._terminals: TerminalExchange | None = None
        if parts.summary_consumer is not None:
            self._terminals = TerminalExchange(config, features, parts.summary_consumer, self._outbox, clock)

    def _make_outbox(self) -> Outbox:
        parts, settings = self._parts, self._config.worker
        shared = (parts.consumer, parts.health, parts.clock)
        callbacks = (self._progress, self._on_decided, self._on_acknowledged)
        if self._config.delivery == "at-least-once":
            return AtLeastOnceOutbox(*shared, settings.commit_interval_ms / 1e3, *callbacks, parts.producer)
        self._in_flight_max = min(self._in_flight_max, EXACTLY_ONCE_IN_FLIGHT_MAX)
        producer: TransactionalProducerClient = parts.producer  # type: ignore[assignment]  # by configuration
        return ExactlyOnceOutbox(*shared, settings.transaction_interval_ms / 1e3, *callbacks, producer)

    # --- the loop -----------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Rows that wait for a decision: at most `worker.in_flight_max`, and 1,000 with exactly-once delivery."""
        return self._escalations.open + self._repeats.open

    def stop(self) -> None:
        """Makes the loop drain, commit and return; safe from a signal handler or another thread."""
        self._stop.set()

    def lose(self, reason: str) -> None:
        """Makes the next `step` raise BrokerError with this reason; safe from another thread."""
        self._lost = reason

    def run(self) -> None:
        """Works until `stop`; raises the BrokerError that ends the session."""
        self.start()
        while not self._stop.is_set():
            self.step()
        self.drain()

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
        self._recovery.advance()
        in_flight = self.in_flight
        self._make_room(in_flight)
        rows_max = min(self._config.worker.batch_rows_max, max(self._in_flight_max - in_flight, 1))
        fetched = self._consumer.poll(self._sleep_s(), rows_max)
        self._health.progress()
        if not self._spare and not self._recovery.owned:
            self._look_for_spare()
        accepted = [part for part in map(self._accept, fetched) if part is not None]
        if accepted:
            self._handle(accepted)
        elif self._config.labels.alignment == "arrival":
            self._ledger.count_labels(self._labels.catch_up())
        self._quiet = sum(map(len, fetched)) < rows_max
        self._advance()

    def _sleep_s(self) -> float:
        """How long the next poll may wait for records."""
        if self._recovery.restoring:
            return 0.0
        longest_s = self._config.worker.poll_timeout_ms / 1e3 if self._recovery.done else PAUSE_S
        deadline_s = self._escalations.deadline_ms / 1e3 - self._clock.time()
        commit_s = self._outbox.due_s(self._quiet) - self._clock.monotonic()
        return max(min(longest_s, deadline_s, commit_s), 0.0)

    def _advance(self) -> None:
        """Processes answers, deadlines, delivery reports, commits and snapshots."""
        self._decide_known()
        if self._terminals is not None and self._recovery.owned:
            self._terminals.advance(self._live_ids())
        self._outbox.advance(quiet=self._quiet)
        self.positions = self._next_offsets()
        snapshots = self._parts.snapshots
        if snapshots is not None and self._clock.monotonic() >= self._snapshot_due_s:
            self._take_snapshot(snapshots)

    def _decide_known(self) -> None:
        """Decides the escalated and repeated rows whose outcome is known now."""
        for table in self._escalations.collect():
            self._publisher.decide_all(table)
        self._repeats.advance()

    def _make_room(self, in_flight: int) -> None:
        """Pauses the live partitions at `in_flight_max`, and resumes them at half of it."""
        if not self._paused and in_flight >= self._in_flight_max:
            self._consumer.pause(owned.partition for owned in self._recovery.live)
            self._paused = True
        elif self._paused and in_flight <= self._in_flight_max // 2:
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
        self._outbox.advance(force=True)
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
            self._decide_known()
            waiting = self._escalations.waiting_of(partitions) + self._repeats.waiting_of(partitions)
            self._outbox.advance(force=not waiting)
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

    def _compare_clocks(self, fetched: Sequence[FetchedBatch], now_ms: float) -> None:
        """Records in the ledger how long the newest record has waited, before any work on it."""
        newest_ms, early = -1, 0
        for batch in fetched:
            latest_ms, ahead = kernels.newest(batch.timestamps_ms, now_ms)
            newest_ms, early = max(newest_ms, latest_ms), early + ahead
        if newest_ms >= 0:  # else records without timestamps
            self._ledger.record_arrival((now_ms - newest_ms) / 1e3, early)

    def _handle(self, fetched: Sequence[FetchedBatch]) -> None:
        """Takes a micro-batch through the steps of `streaming.pipeline`, from `decode` on."""
        now_ms = self._clock.time() * 1e3
        self._compare_clocks(fetched, now_ms)
        self._laps.begin()
        decided = {partition: owned.decided for partition, owned in self._recovery.owned.items()}
        table, rejected = self._decoder.decode(fetched, decided, now_ms)
        if self._parts.hasher is not None:
            table = replace(table, batch=self._parts.hasher.hashed(table.batch, self._roles.card))
        self._laps.end("decode", len(table))
        self._ledger.count_labels(self._labels.catch_up())
        if len(table):
            self._screen(self._without_repeats(table))
        for part in rejected:
            self._publisher.reject(part.fetched, part.rejects)

    def _without_repeats(self, table: Table) -> Table:
        """Returns the rows that occur for the first time; repeats are answered with their first decision."""
        if not self._first_decisions.look_up(table, self._roles):
            return table
        repeated = table.rows["first"] >= 0
        self._repeats.add(table.take(repeated & table.rows["undecided"]))
        return table.take(~repeated)

    def _screen(self, table: Table) -> None:
        if not len(table):
            return
        rows, partition_ids = table.rows, table.column("partition_id")
        if self._terminals is not None:
            self._terminals.note(table.batch, partition_ids)
        if not rows["undecided"].any():
            self._engine.fold(table.batch, partition_ids)
            return
        # Records that the previous owner escalated stay escalated, even if their scores differ now, since the records
        # of other partitions came in another order: decided by the screener, they would follow later ones of a card.
        laps = self._laps
        laps.skip()
        computed = self._engine.compute(table.batch, partition_ids)
        laps.end("features", len(rows))
        screened = self._engine.score(computed, self._escalations.raised)
        laps.end("screener", len(rows))
        suspicious = kernels.mark_screened(
            rows, screened.probability, screened.escalate, laps.wall_ms("features"), laps.wall_ms("screener")
        )
        refused: list[Table] = []
        if suspicious:
            # sent before the others are decided, so that the model works while the loop encodes
            escalated = kernels.undecided(rows, True)
            refused = self._escalations.send(table.take(escalated), screened.deep_inputs(escalated))
        # Screened rows first, dead letters last: decisions acknowledged ahead of a record then show its escalation.
        clear = kernels.undecided(rows, False)
        kernels.by_screener(rows, clear, 0, 0.0)
        laps.skip()
        self._publisher.decide(table, clear, laps)
        self._ledger.record_batch(laps, rows["queue_ms"][rows["undecided"]] / 1e3)
        for part in refused:
            self._publisher.decide_all(part)

    def _fold_labels(self, labels: ColumnBatch) -> None:
        hasher = self._parts.hasher
        self._engine.fold_labels(labels if hasher is None else hasher.hashed(labels, self._roles.card))

    # --- callbacks of the outbox --------------------------------------------------------------------------------

    def _progress(self) -> dict[Partition, tuple[int, str]]:
        """The offset and metadata to commit now, by partition, those of the labels topic included."""
        offsets: dict[Partition, tuple[int, str]] = {}
        for partition, owned in self._recovery.owned.items():
            progress = owned.progress
            if progress is not None:
                offsets[partition] = (progress.until, progress.metadata())
        if self._config.delivery == "exactly-once" or not self._outbox.pending:
            offsets |= {partition: (offset, "") for partition, offset in self._labels.offsets_to_commit().items()}
        return offsets

    def _on_decided(self, sent: Sent) -> None:
        for partition, offsets in sent.offsets.items():
            owned = self._recovery.owned.get(partition)
            if owned is not None:
                owned.tracker.decided(offsets)

    def _on_acknowledged(self, sent: Sent, acknowledged_s: float) -> None:
        if sent.path:
            latency_s = np.maximum(acknowledged_s * 1e3 - sent.start_ms, 0.0) / 1e3
            self._ledger.record_decisions(sent.path, latency_s, sent.cause, sent.records)

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
            self._drop(owned)
            self._outbox.advance(force=True)
        self._forget(owned)

    def _on_lost(self, partitions: list[Partition]) -> None:
        """Forgets them: their new owner decides the undecided records."""
        self._drop(partitions)
        self._forget(partitions)

    def _drop(self, partitions: Sequence[Partition]) -> None:
        self._escalations.drop(partitions)
        self._repeats.drop(partitions)

    def _forget(self, partitions: Sequence[Partition]) -> None:
        self._outbox.forget(partitions)
        self._recovery.lose(partitions)
        if self._terminals is not None:
            self._terminals.drop([partition_id for _, partition_id in partitions])
        self._labels.own_dead_letters(_has_partition_0(self._recovery.owned))
        self.positions = self._next_offsets()
        self._show_partitions()

    def _next_offsets(self) -> dict[Partition, int]:
        return {partition: owned.next for partition, owned in self._recovery.owned.items()}

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
        return Snapshot(
            state | self._first_decisions.export(),
            self._next_offsets(),
            dict(self._labels.positions),
            {partition: committed.get(partition, (part.until, ""))[0] for partition, part in owned.items()},
        )

    def _make_copies(self) -> None:
        self._copies = self._engine.features.export_buffers()


def _has_partition_0(partitions: Iterable[Partition]) -> bool:
    """Whether a worker with these partitions sends the labels topic's dead letters: the owner of partition 0 does."""
    return any(partition_id == 0 for _, partition_id in partitions)
