"""The worker's loop: fetch, fold and screen, escalate, decide, send, commit.

One thread runs it, in turns of `step`. Screened transactions are decided at once; escalated ones wait in `Escalations`,
beside the loop, until their answer or their deadline, whichever is first. An offset counts as decided when the broker
keeps its decision, and is committed when every earlier one is decided too; what is decided ahead of that prefix travels
in the commit's metadata.

Everything outside comes as an argument (`Parts`): clock, broker, model server, files. Where the broker is lost or
refuses what was decided, `step` raises BrokerError, and the worker is finished: `streaming.sessions` makes another,
which goes on from what is committed.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from cascade.columns import Array, ColumnBatch
from cascade.config import Config
from cascade.engine import Engine
from cascade.errors import BrokerError
from cascade.ledger import Ledger, StageClock
from cascade.protocols import Clock, DeepStage
from cascade.schema import Schema
from streaming.clients import (
    ConsumerClient,
    FetchedBatch,
    Partition,
    ProducerClient,
    TransactionalProducerClient,
)
from streaming.codecs import Codec
from streaming.duplicates import FirstDecisions
from streaming.escalations import Escalations, by_screener
from streaming.health import HealthState
from streaming.in_flight import Rows
from streaming.intake import Intake, take_in
from streaming.labels import LabelFollower
from streaming.outbox import AtLeastOnceOutbox, ExactlyOnceOutbox, Outbox, Sent
from streaming.partitions import OwnedPartition, Phase
from streaming.privacy import CardHasher
from streaming.publisher import Publisher
from streaming.recovery import Recovery
from streaming.repeats import Repeats
from streaming.snapshots import Snapshot, SnapshotStore
from streaming.terminals import TerminalExchange

log = structlog.get_logger()
# While something is awaited (an answer, an acknowledgement), polling for records may hold the loop no longer.
BUSY_POLL_S = 0.001
# With exactly-once delivery every decision ahead of the committed prefix must be named in the commit's metadata (4 kB),
# or a crash would decide it again. Each undecided record costs at most three bytes there.
EXACTLY_ONCE_IN_FLIGHT_MAX = 1_000


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that a worker works with.

    `producer`: a TransactionalProducerClient where `config.delivery` is exactly-once. `open_consumer` makes a consumer
    outside any group. `snapshots`, `hasher`, `summary_consumer`: None where not configured. `chance`: numbers in
    [0, 1), for what must not happen to all workers at once.
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
        self._stage_clock = StageClock()
        self._paused = False
        self._copies: dict[str, Array] = {}
        self._snapshot_due_s = clock.monotonic() + config.state.interval_s
        self._in_flight_max = config.worker.in_flight_max
        # the next record that the loop will take, by partition; replaced as a whole, so other threads may read it
        self.positions: dict[Partition, int] = {}
        self._outbox = self._make_outbox()
        self._first_decisions = FirstDecisions(config.duplicates)
        self._publisher = Publisher(
            config, self._roles, parts.bundle_version, parts.engine.policy, self._outbox, self._first_decisions,
            parts.hasher, ledger, clock,
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
            config, parts.engine.policy, parts.deep, self._roles.card, ledger, parts.health, clock, parts.chance
        )
        self._repeats = Repeats(
            config, self._first_decisions, parts.engine.policy, self._recovery.owned, parts.open_consumer,
            self._publisher.repeat, clock,
        )  # fmt: skip
        self._terminals = (
            None
            if parts.summary_consumer is None
            else TerminalExchange(config, features, parts.summary_consumer, self._outbox, clock)
        )

    def _make_outbox(self) -> Outbox:
        parts, settings = self._parts, self._config.worker
        shared = (parts.consumer, parts.health, parts.clock)
        told = (self._progress, self._decided, self._kept)
        if self._config.delivery == "at-least-once":
            return AtLeastOnceOutbox(parts.producer, *shared, settings.commit_interval_ms / 1e3, *told)
        self._in_flight_max = min(self._in_flight_max, EXACTLY_ONCE_IN_FLIGHT_MAX)
        producer: TransactionalProducerClient = parts.producer  # type: ignore[assignment]  # by configuration
        return ExactlyOnceOutbox(producer, *shared, settings.transaction_interval_ms / 1e3, *told)

    # --- the loop -----------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Rows that wait for a decision; never more than `worker.in_flight_max`, 1,000 with exactly-once delivery."""
        return self._escalations.open + self._repeats.open

    def stop(self) -> None:
        """Ask the loop to drain, commit and return; safe from a signal handler or another thread."""
        self._stop.set()

    def lose(self, reason: str) -> None:
        """The broker is lost, as another thread has found: the next `step` raises BrokerError."""
        self._lost = reason

    def run(self) -> None:
        """Work until `stop`; raises BrokerError where the session is over."""
        self.start()
        while not self._stop.is_set():
            self.step()
        self.drain()

    def start(self) -> None:
        """Join the group."""
        self._ledger.count_session()
        self._consumer.subscribe(
            [self._config.kafka.topics.transactions], self._on_assigned, self._on_revoked, self._on_lost
        )
        self._health.waiting("partitions", "joining the group")

    def step(self) -> None:
        """One turn: take what is there, and do what is due."""
        settings = self._config.worker
        if self._lost:
            raise BrokerError(self._lost)
        self._recovery.advance()
        self._make_room()
        busy = self.in_flight > 0 or self._outbox.pending > 0 or not self._recovery.done
        timeout_s = BUSY_POLL_S if busy else settings.poll_timeout_ms / 1e3
        rows_max = min(settings.batch_rows_max, max(self._in_flight_max - self.in_flight, 1))
        fetched = self._consumer.poll(timeout_s, rows_max)
        self._health.progress()
        accepted = [part for part in map(self._accept, fetched) if part is not None]
        if accepted:
            self._compare_clocks(accepted)
            self._handle(accepted)
        elif self._config.labels.alignment == "arrival":
            self._ledger.count_labels(self._labels.catch_up())
        self._advance()

    def _advance(self) -> None:
        """Everything that time and other threads bring: answers, deadlines, acknowledgements, commits, snapshots."""
        for outcome in self._escalations.collect():
            self._publisher.decide(outcome)
        self._repeats.advance()
        if self._terminals is not None and self._recovery.owned:
            self._terminals.advance(self._live_numbers())
        self._outbox.advance()
        self.positions = {partition: one.next for partition, one in self._recovery.owned.items()}
        snapshots = self._parts.snapshots
        if snapshots is not None and self._clock.monotonic() >= self._snapshot_due_s:
            self._take_snapshot(snapshots)

    def _make_room(self) -> None:
        """Pause what is live where nothing more may wait, and resume it when half of the room is free."""
        in_flight = self.in_flight
        live = [one.partition for one in self._recovery.live]
        if not self._paused and in_flight >= self._in_flight_max:
            self._consumer.pause(live)
            self._paused = True
        elif self._paused and in_flight <= self._in_flight_max // 2:
            self._consumer.resume(live)
            self._paused = False

    def drain(self) -> None:
        """Finish what is held, within the drain budget, commit it, and leave a snapshot of it."""
        self._health.waiting("partitions", "draining")
        owned = list(self._recovery.owned)
        self._consumer.pause(owned)
        self._paused = True
        budget_s = self._config.worker.drain_timeout_ms / 1e3
        give_up_s = self._clock.monotonic() + budget_s
        if self._terminals is not None:
            self._terminals.publish(self._live_numbers())
        if not self._finish(owned, budget_s):
            log.warning("drain ran out of time", undecided=self.in_flight, unacknowledged=self._outbox.pending)
        self._outbox.advance(force=True)
        snapshots = self._parts.snapshots
        if snapshots is not None and self._recovery.done and self._recovery.owned:
            self._take_last_snapshot(snapshots, give_up_s)

    def _take_last_snapshot(self, snapshots: SnapshotStore, give_up_s: float) -> None:
        """Leave the state as it is now, so that the next start has nothing to fold; within what is left of the time."""
        if snapshots.finish(max(give_up_s - self._clock.monotonic(), 0.0)):
            snapshots.save(self._snapshot(self._engine.features.export_state()))
            if snapshots.finish(max(give_up_s - self._clock.monotonic(), 0.0)):
                return
        log.warning("no time was left to write the last snapshot: the next start folds a little more of the log")

    def _finish(self, partitions: Sequence[Partition], budget_s: float) -> bool:
        """Wait until what was taken of partitions is decided and its decisions kept; False where time runs out."""
        give_up_s = self._clock.monotonic() + budget_s
        while True:
            self._health.progress()
            for outcome in self._escalations.collect():
                self._publisher.decide(outcome)
            self._repeats.advance()
            waiting = self._escalations.waiting_of(partitions) + self._repeats.waiting_of(partitions)
            self._outbox.advance(force=not waiting)
            if not waiting and not self._outbox.pending:
                return True
            if self._clock.monotonic() > give_up_s:
                return False
            self._clock.sleep(BUSY_POLL_S)

    # --- a micro-batch ------------------------------------------------------------------------------------------

    def _accept(self, fetched: FetchedBatch) -> FetchedBatch | None:
        one = self._recovery.owned.get((fetched.topic, fetched.partition))
        if one is None or one.phase in (Phase.RESTORING, Phase.REBUILT):
            return None  # fetched under an earlier assignment
        accepted = one.accept(fetched)
        if accepted.seek is not None:
            self._consumer.seek(one.partition, accepted.seek)
        if accepted.gap:
            self._ledger.count_offset_gap()
        if accepted.batch is not None:
            one.take(accepted.batch.offsets)
        return accepted.batch

    def _compare_clocks(self, fetched: Sequence[FetchedBatch]) -> None:
        """Tell the ledger how long the newest record has waited, before anything is done with it."""
        now_ms = self._clock.time() * 1e3
        newest_ms = max((int(one.timestamps_ms.max()) for one in fetched if len(one.timestamps_ms)), default=-1)
        if newest_ms < 0:
            return  # without stamps
        early = 0
        if newest_ms > now_ms:
            early = sum(int(np.count_nonzero(one.timestamps_ms > now_ms)) for one in fetched)
        self._ledger.record_arrival((now_ms - newest_ms) / 1e3, early)

    def _handle(self, fetched: Sequence[FetchedBatch]) -> None:
        decided = {partition: one.decided for partition, one in self._recovery.owned.items()}
        with self._stage_clock:
            intake = take_in(
                fetched, self._parts.codec, self._roles.event_time, decided, self._config.worker.ahead_ms_max
            )
            if self._parts.hasher is not None:
                intake = intake.with_batch(self._parts.hasher.hashed(intake.batch, self._roles.card))
        decode_s, decode_cpu_s = self._stage_clock.wall_s, self._stage_clock.cpu_s
        self._ledger.count_labels(self._labels.catch_up())
        if intake.batch.rows:
            self._take(self._set_repeats_apart(intake), decode_s, decode_cpu_s)
        for rejected in intake.rejected:
            self._publisher.reject(rejected.fetched, rejected.rejects)

    def _take(self, intake: Intake, decode_s: float, decode_cpu_s: float) -> None:
        if self._terminals is not None:
            self._terminals.note(intake.batch, intake.numbers)
        if intake.undecided.any():
            self._ledger.record_stage("decode", decode_s, decode_cpu_s, intake.batch.rows)
            self._screen(intake)
        elif intake.batch.rows:
            self._engine.fold(intake.batch, intake.numbers)

    def _set_repeats_apart(self, intake: Intake) -> Intake:
        """The rows that come for the first time; those that came before get their first decision again."""
        appended_ms = intake.appended_ms.astype(np.int64)
        entries = self._first_decisions.look_up(intake.batch, self._roles, intake.numbers, intake.offsets, appended_ms)
        again = entries >= 0
        if not again.any():
            return intake
        chosen = np.flatnonzero(again & intake.undecided)
        start_ms, queue_ms = self._waited(intake)
        rows = Rows(
            intake.partitions, intake.source, intake.offsets, intake.batch, start_ms, queue_ms,
            np.zeros(intake.batch.rows), 0.0, 0.0,
        )  # fmt: skip
        self._repeats.add(rows.take(chosen), entries[chosen], appended_ms[chosen])
        return intake.take(~again)

    def _waited(self, intake: Intake) -> tuple[Array, Array]:
        """(start_ms, queue_ms) float64 [rows]: from when each row's deadline counts, and how long it has waited."""
        now_ms = self._clock.time() * 1e3
        from_append = self._config.deadline.start == "append"
        # a broker's clock ahead of ours must not make a negative wait; the ledger is told of it when the record comes
        start_ms = np.minimum(intake.appended_ms, now_ms) if from_append else np.full(intake.batch.rows, now_ms)
        return start_ms, now_ms - start_ms

    def _screen(self, intake: Intake) -> None:
        start_ms, queue_ms = self._waited(intake)
        screened = self._engine.screen(intake.batch, intake.numbers, self._escalations.raised)
        features, screener = self._engine.clocks.features, self._engine.clocks.screener
        self._ledger.record_queue(queue_ms[intake.undecided] / 1e3)
        self._ledger.record_stage("features", features.wall_s, features.cpu_s, intake.batch.rows)
        self._ledger.record_stage("screener", screener.wall_s, screener.cpu_s, intake.batch.rows)
        rows = Rows(
            intake.partitions, intake.source, intake.offsets, intake.batch, start_ms, queue_ms, screened.probability,
            features.wall_s * 1e3, screener.wall_s * 1e3,
        )  # fmt: skip
        # What a lost worker had escalated stays so, though its score may be another now (other partitions' records came
        # between otherwise): decided by the screener, it would show behind later ones of its card.
        escalate = screened.escalate | intake.held
        escalated = np.flatnonzero(escalate & intake.undecided)
        # sent before the others are decided: the model works while the loop encodes
        sent = self._escalations.send(rows.take(escalated), screened.deep_inputs(escalated)) if len(escalated) else []
        # These first, and dead letters last: what is acknowledged ahead of a record then tells that it was escalated.
        self._publisher.decide(by_screener(rows.take(np.flatnonzero(~escalate & intake.undecided)), None))
        for outcome in sent:
            self._publisher.decide(outcome)

    def _fold_labels(self, labels: ColumnBatch) -> None:
        hasher = self._parts.hasher
        self._engine.fold_labels(labels if hasher is None else hasher.hashed(labels, self._roles.card))

    # --- what the outbox asks and tells -------------------------------------------------------------------------

    def _progress(self) -> dict[Partition, tuple[int, str]]:
        """What each partition's commit would say now; labels: up to where unreadable ones have their dead letter."""
        said: dict[Partition, tuple[int, str]] = {}
        for partition, one in self._recovery.owned.items():
            progress = one.progress
            if progress is not None:
                said[partition] = (progress.until, progress.metadata())
        if self._config.delivery == "exactly-once" or not self._outbox.pending:
            said |= {partition: (offset, "") for partition, offset in self._labels.buried_until().items()}
        return said

    def _decided(self, sent: Sent) -> None:
        for partition, offsets in sent.offsets.items():
            one = self._recovery.owned.get(partition)
            if one is not None:
                one.tracker.decided(offsets)

    def _kept(self, sent: Sent) -> None:
        if sent.path:
            latency_s = np.maximum(self._clock.time() * 1e3 - sent.start_ms, 0.0) / 1e3
            ids = None if sent.places is None else sent.places.ids
            self._ledger.record_decisions(sent.path, latency_s, sent.cause, ids)

    # --- partitions and state -----------------------------------------------------------------------------------

    def _on_assigned(self, partitions: list[Partition]) -> None:
        self._labels.bury(any(number == 0 for _, number in self._recovery.owned.keys() | set(partitions)))
        self._recovery.gain(partitions)
        self._tell_partitions()

    def _on_revoked(self, partitions: list[Partition]) -> None:
        """Finish and commit what is held of them, then let go."""
        held = [one for one in partitions if one in self._recovery.owned]
        if self._terminals is not None:
            self._terminals.publish(self._live_numbers())
        if not self._finish(held, self._config.worker.revoke_timeout_ms / 1e3):
            log.warning("partitions revoked before all was decided", undecided=self.in_flight)
            self._drop(held)
            self._outbox.advance(force=True)
        self._let_go(held)

    def _on_lost(self, partitions: list[Partition]) -> None:
        """The partitions are another's already: what is undecided will be decided there."""
        self._drop(partitions)
        self._let_go(partitions)

    def _drop(self, partitions: Sequence[Partition]) -> None:
        self._escalations.drop(partitions)
        self._repeats.drop(partitions)

    def _let_go(self, partitions: Sequence[Partition]) -> None:
        self._outbox.forget(partitions)
        self._recovery.lose(partitions)
        if self._terminals is not None:
            self._terminals.drop([number for _, number in partitions])
        self._labels.bury(any(number == 0 for _, number in self._recovery.owned))
        self.positions = {partition: one.next for partition, one in self._recovery.owned.items()}
        self._tell_partitions()

    def _live_numbers(self) -> list[int]:
        return [one.number for one in self._recovery.live]

    def _on_live(self, one: OwnedPartition) -> None:
        if not self._paused:
            self._consumer.resume([one.partition])

    def _tell_partitions(self) -> None:
        numbers = sorted(number for _, number in self._recovery.owned)
        if numbers:
            self._health.ok("partitions", ", ".join(map(str, numbers)))
        else:
            self._health.waiting("partitions", "none assigned")

    def _take_snapshot(self, snapshots: SnapshotStore) -> None:
        """Copy the state and hand it to the writer; the copy is the loop's only pause."""
        if not self._recovery.owned or not self._recovery.done or snapshots.busy:
            return
        features = self._engine.features
        if not features.exports_into(self._copies):
            # in the writer's thread: fresh memory costs many times the copy
            snapshots.prepare(self._make_copies)
            return
        self._snapshot_due_s = self._clock.monotonic() + self._config.state.interval_s
        if self._terminals is not None:
            self._terminals.publish(self._live_numbers())
        snapshots.save(self._snapshot(features.export_state(self._copies)))

    def _snapshot(self, state: dict[str, Array]) -> Snapshot:
        owned, committed = self._recovery.owned, self._outbox.committed
        return Snapshot(
            state | self._first_decisions.export(),
            {partition: one.next for partition, one in owned.items()},
            dict(self._labels.positions),
            {partition: committed.get(partition, (one.until, ""))[0] for partition, one in owned.items()},
        )

    def _make_copies(self) -> None:
        self._copies = self._engine.features.export_buffers()
