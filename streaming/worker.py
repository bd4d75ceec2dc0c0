"""The worker's loop: fetch, fold and screen, escalate, decide, produce, commit.

One thread runs it. Screened transactions are produced at once; escalated ones wait in `DeepCall`s, beside the loop,
until their answer or their deadline, whichever is first. An offset counts as decided when the broker has its decision,
and is committed when every earlier one is decided too.

State is a fold of the input: when partitions are assigned, it is built anew from the beginning of the log, and for
records below the committed offset nothing is emitted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
import structlog

from cascade.columns import Array, ColumnBatch, Float64, Int64
from cascade.config import Config
from cascade.engine import Engine
from cascade.errors import BrokerError, DeepStageError
from cascade.ledger import Ledger, StageClock
from cascade.policy import ACTIONS
from cascade.protocols import DeepStage
from cascade.schema import Schema
from streaming.breaker import CircuitBreaker
from streaming.clients import ConsumerClient, FetchedBatch, Partition, ProducerClient
from streaming.codecs import Codec, Reject
from streaming.dead_letters import dead_letter
from streaming.decisions import DecisionColumns, Stage, encode_decisions, message_keys
from streaming.health import HealthState
from streaming.in_flight import AcknowledgementQueue, DeepCall, Rows, Unacknowledged
from streaming.intake import Intake, take_in
from streaming.labels import LabelFollower
from streaming.offsets import NOTHING_DECIDED, Decided, OffsetTracker
from streaming.snapshots import Snapshot, SnapshotStore

log = structlog.get_logger()
# While something is awaited (an answer, an acknowledgement), polling for records may hold the loop no longer.
BUSY_POLL_S = 0.001
# A rebalance waits for us while we finish what we hold; more than this and the group may go on without us.
REVOKE_BUDGET_S = 5.0


class Worker:
    """Everything between the transactions topic and the decisions topic, for one bundle."""

    def __init__(
        self,
        config: Config,
        schema: Schema,
        bundle_version: str,
        engine: Engine,
        deep: DeepStage,
        codec: Codec,
        label_codec: Codec,
        consumer: ConsumerClient,
        label_consumer: ConsumerClient,
        producer: ProducerClient,
        ledger: Ledger,
        health: HealthState,
        snapshots: SnapshotStore | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._roles = schema.roles
        self._bundle_version = bundle_version
        self._engine = engine
        self._deep = deep
        self._codec = codec
        self._consumer = consumer
        self._producer = producer
        self._ledger = ledger
        self._health = health
        self._clock = clock
        self._stop = threading.Event()
        self._trackers: dict[Partition, OffsetTracker] = {}
        self._decided: dict[Partition, Decided] = {}
        self._committed: dict[Partition, tuple[int, str]] = {}
        self._calls: list[DeepCall] = []
        self._breaker = CircuitBreaker(config.breaker)
        self._produced = AcknowledgementQueue()
        self._paused = False
        self._rebuilding = False
        self._commit_due_s = 0.0
        self._snapshots = snapshots
        self._snapshot_due_s = time.monotonic() + config.state.interval_s
        # the next record of each partition that the state does not hold
        self._folded: dict[Partition, int] = {}
        self._recovery_s = 0.0
        self._copies: dict[str, Array] = {}
        # the next record that the loop will take, by partition; replaced as a whole, so other threads may read it
        self.positions: dict[Partition, int] = {}
        self._stage_clock = StageClock()
        self._labels = LabelFollower(
            label_consumer, config.kafka.topics.labels, label_codec, config.labels.alignment, self._fold_labels,
            self._reject,
        )  # fmt: skip

    # --- the loop -----------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the loop to drain, commit and return; safe from a signal handler or another thread."""
        self._stop.set()

    def run(self) -> None:
        """Work until `stop`; raises BrokerError where decisions cannot be kept."""
        self._consumer.subscribe(
            [self._config.kafka.topics.transactions], self._on_assigned, self._on_revoked, self._on_lost
        )
        self._health.waiting("partitions", "joining the group")
        while not self._stop.is_set():
            self._step()
        self._drain()

    def _step(self) -> None:
        settings = self._config.worker
        busy = bool(self._calls) or len(self._produced) > 0
        timeout_s = BUSY_POLL_S if busy else settings.poll_timeout_ms / 1e3
        fetched = self._consumer.poll(timeout_s, settings.batch_rows_max)
        self._health.progress()
        if fetched:
            self._handle([one for one in fetched if (one.topic, one.partition) in self._trackers])
        elif self._config.labels.alignment == "arrival":
            self._labels.catch_up()
        if self._rebuilding:
            self._tell_recovery()
        self._advance()

    def _advance(self) -> None:
        """Everything that time and other threads bring: answers, deadlines, acknowledgements, commits, room."""
        self._collect_answers()
        self._collect_acknowledgements()
        now_s = time.monotonic()
        if now_s >= self._commit_due_s:
            self._commit_due_s = now_s + self._config.worker.commit_interval_ms / 1e3
            self._commit()
            self.positions = {one: self._consumer.position(one) for one in self._trackers}
        if self._snapshots is not None and now_s >= self._snapshot_due_s and not self._rebuilding:
            self._take_snapshot(self._snapshots)
        in_flight, limit = self._in_flight(), self._config.worker.in_flight_max
        if not self._paused and in_flight >= limit:
            self._consumer.pause(self._trackers)
            self._paused = True
        elif self._paused and in_flight <= limit // 2:
            self._consumer.resume(self._trackers)
            self._paused = False

    def _in_flight(self) -> int:
        return sum(int(call.open.sum()) for call in self._calls)

    def _drain(self) -> None:
        """Finish what is held, within the drain budget, and commit it."""
        self._health.waiting("partitions", "draining")
        self._consumer.pause(self._trackers)
        self._paused = True
        if not self._finish(self._config.worker.drain_timeout_ms / 1e3):
            log.warning("drain ran out of time", undecided=self._in_flight(), unacknowledged=len(self._produced))
        self._commit()

    def _finish(self, budget_s: float) -> bool:
        """Wait until every transaction taken is decided and its decision kept; False where time runs out."""
        give_up_s = time.monotonic() + budget_s
        while self._calls or len(self._produced):
            if time.monotonic() > give_up_s:
                return False
            self._health.progress()
            self._collect_answers()
            self._collect_acknowledgements()
            time.sleep(BUSY_POLL_S)
        return True

    # --- a micro-batch ------------------------------------------------------------------------------------------

    def _handle(self, fetched: Sequence[FetchedBatch]) -> None:
        if not fetched:
            return
        with self._stage_clock:
            intake = take_in(fetched, self._codec, self._roles.event_time, self._decided)
        decode_s, decode_cpu_s = self._stage_clock.wall_s, self._stage_clock.cpu_s
        for one in fetched:
            partition = (one.topic, one.partition)
            decided, tracker = self._decided.get(partition, NOTHING_DECIDED), self._trackers[partition]
            taken = one.offsets[one.offsets >= decided.until]
            tracker.taken(taken)
            tracker.decided(taken[decided.mask(taken)])
        for rejected in intake.rejected:
            self._reject(rejected.fetched, rejected.rejects)
        self._ledger.count_labels(self._labels.catch_up())
        if intake.undecided.any():
            self._ledger.record_stage("decode", decode_s, decode_cpu_s, intake.batch.rows)
            self._screen(intake)
        elif intake.batch.rows:
            self._engine.fold(intake.batch)
        self._folded.update({(one.topic, one.partition): int(one.offsets[-1]) + 1 for one in fetched})

    def _screen(self, intake: Intake) -> None:
        now_ms = self._clock() * 1e3
        from_append = self._config.deadline.start == "append"
        # a broker's clock ahead of ours must not make a negative wait
        start_ms = np.minimum(intake.appended_ms, now_ms) if from_append else np.full(intake.batch.rows, now_ms)
        queue_ms = now_ms - start_ms
        screened = self._engine.screen(intake.batch)
        features, screener = self._engine.clocks.features, self._engine.clocks.screener
        self._ledger.record_queue(queue_ms[intake.undecided] / 1e3)
        self._ledger.record_stage("features", features.wall_s, features.cpu_s, intake.batch.rows)
        self._ledger.record_stage("screener", screener.wall_s, screener.cpu_s, intake.batch.rows)
        rows = Rows(
            intake.partitions, intake.source, intake.offsets, intake.batch, start_ms, queue_ms, screened.probability,
            features.wall_s * 1e3, screener.wall_s * 1e3,
        )  # fmt: skip
        escalated = np.flatnonzero(screened.escalate & intake.undecided)
        if len(escalated):
            # sent before the others are produced: the model works while the loop encodes
            deadline_ms = start_ms[escalated] + self._config.deadline.budget_ms
            timeout_s = (float(deadline_ms.max()) - self._clock() * 1e3) / 1e3
            if timeout_s <= 0:
                self._decide_by_screener(rows.take(escalated), "deadline", 0.0)
            elif self._breaker.allows():
                future = self._deep.submit(screened.deep_inputs(escalated), timeout_s)
                self._calls.append(DeepCall(rows.take(escalated), deadline_ms, future, time.monotonic()))
            else:
                self._decide_by_screener(rows.take(escalated), "breaker-open", 0.0)
        self._decide_by_screener(rows.take(np.flatnonzero(~screened.escalate & intake.undecided)), None, 0.0)

    def _collect_answers(self) -> None:
        now_ms = self._clock() * 1e3
        still_open = []
        for call in self._calls:
            waited_s = time.monotonic() - call.sent_s
            if call.future.done():
                self._answered(call, waited_s)
            expired = call.expire(now_ms)
            if len(expired):
                self._decide_by_screener(call.rows.take(expired), "deadline", waited_s * 1e3)
            if call.open.any():
                still_open.append(call)
            elif not call.future.done():
                # every row was decided without it: what it still brings is counted when it comes
                self._call_failed()
                self._await_late(call)
        self._calls = still_open

    def _call_failed(self) -> None:
        opened = self._breaker.opened
        self._breaker.failed()
        if self._breaker.opened > opened:
            log.warning("circuit breaker open: the screener decides alone", times=self._breaker.opened)
            self._health.waiting("deep model", "most calls fail: the screener decides alone (circuit breaker open)")

    def _await_late(self, call: DeepCall) -> None:
        def count(answer: Future[Float64]) -> None:
            if answer.exception() is None:
                self._ledger.count_late(len(call.rows))

        call.future.add_done_callback(count)

    def _answered(self, call: DeepCall, waited_s: float) -> None:
        late = len(call.rows) - int(call.open.sum())
        chosen = call.close()
        rows = call.rows.take(chosen)
        error = call.future.exception()
        if error is not None:
            self._call_failed()
            cause = error.cause if isinstance(error, DeepStageError) else "error"
            if cause != "deadline":
                log.warning("deep call failed", cause=cause, error=str(error), rows=len(call.rows))
                self._health.waiting("deep model", str(error))
            self._decide_by_screener(rows, cause, waited_s * 1e3)
            return
        self._breaker.succeeded()
        self._health.ok("deep model")
        self._ledger.count_late(late)
        self._ledger.add_deep_call(len(call.rows), waited_s)
        self._ledger.record_stage("deep", waited_s, 0.0, len(rows))
        probability = self._engine.policy.deep.probability(call.future.result()[chosen])
        self._publish(rows, "deep", probability, None, waited_s * 1e3)

    def _decide_by_screener(self, rows: Rows, cause: str | None, deep_ms: float) -> None:
        if len(rows):
            self._publish(rows, "screener", rows.screener_score, cause, deep_ms)

    # --- out ----------------------------------------------------------------------------------------------------

    def _publish(self, rows: Rows, stage: Stage, score: Float64, cause: str | None, deep_ms: float) -> None:
        with self._stage_clock:
            actions = self._engine.policy.actions(score)
        self._ledger.record_stage("decide", self._stage_clock.wall_s, self._stage_clock.cpu_s, len(rows))
        with self._stage_clock:
            keys, messages, offsets = self._encode(rows, stage, score, actions, cause, deep_ms)
            delivery = self._producer.send_many(self._config.kafka.topics.decisions, keys, messages)
        self._ledger.record_stage("produce", self._stage_clock.wall_s, self._stage_clock.cpu_s, len(rows))
        path = "degraded" if cause is not None else "escalated" if stage == "deep" else "screened"
        self._produced.add(Unacknowledged(delivery, offsets, rows.start_ms, path, cause))

    def _encode(
        self, rows: Rows, stage: Stage, score: Float64, actions: Array, cause: str | None, deep_ms: float
    ) -> tuple[list[bytes], list[bytes], dict[Partition, Int64]]:
        now_ms = self._clock() * 1e3
        keys: list[bytes] = []
        messages: list[bytes] = []
        offsets: dict[Partition, Int64] = {}
        for position in np.unique(rows.source):
            chosen = np.flatnonzero(rows.source == position)
            topic, partition = rows.partitions[position]
            count = len(chosen)
            columns = DecisionColumns(
                topic=topic,
                partition=partition,
                bundle=self._bundle_version,
                offsets=rows.offsets[chosen],
                transaction_ids=rows.batch[self._roles.transaction_id][chosen],
                decisions=[ACTIONS[action] for action in actions[chosen].tolist()],
                stages=[stage] * count,
                scores=score[chosen],
                screener_scores=rows.screener_score[chosen],
                degraded_causes=[cause] * count,
                event_times_ms=rows.batch[self._roles.event_time][chosen],
                decision_times_ms=np.full(count, int(now_ms)),
                queue_ms=rows.queue_ms[chosen],
                features_ms=np.full(count, rows.features_ms),
                screener_ms=np.full(count, rows.screener_ms),
                deep_ms=np.full(count, deep_ms),
                total_ms=now_ms - rows.start_ms[chosen],
            )
            messages += encode_decisions(self._config.kafka.codec, columns)
            keys += message_keys(rows.batch[self._roles.card][chosen])
            offsets[topic, partition] = columns.offsets
        return keys, messages, offsets

    def _reject(self, fetched: FetchedBatch, rejects: list[Reject]) -> None:
        now_ms = self._clock() * 1e3
        partition = (fetched.topic, fetched.partition)
        for reject in rejects:
            position = reject.index
            letter = dead_letter(
                reject, topic=fetched.topic, partition=fetched.partition, offset=int(fetched.offsets[position]),
                time_ms=int(now_ms), key=fetched.keys[position], value=fetched.values[position],
                headers=fetched.headers[position],
            )  # fmt: skip
            delivery = self._producer.send(
                self._config.kafka.topics.dead_letters, letter.key, letter.value, letter.headers
            )
            offsets = fetched.offsets[position : position + 1]
            self._produced.add(Unacknowledged(delivery, {partition: offsets}, np.zeros(0), "dead-letter", None))
            self._ledger.count_dead_letters(reject.reason.value, 1)

    def _collect_acknowledgements(self) -> None:
        for produced in self._produced.take_done():
            for partition, offsets in produced.offsets.items():
                tracker = self._trackers.get(partition)
                if tracker is not None:
                    tracker.decided(offsets)
            latency_s = np.maximum(self._clock() * 1e3 - produced.start_ms, 0.0) / 1e3
            if produced.path in ("screened", "escalated", "degraded"):
                self._ledger.record_decisions(produced.path, latency_s, produced.cause)  # type: ignore[arg-type]

    def _commit(self) -> None:
        """Commit each partition's decided prefix, with what is decided ahead of it, where either has moved."""
        progress = {partition: tracker.progress for partition, tracker in self._trackers.items()}
        ready = {partition: (one.until, one.metadata()) for partition, one in progress.items() if one is not None}
        if not len(self._produced):
            # labels are read anew at every start; this says which unreadable ones have their dead letter
            ready |= {partition: (offset, "") for partition, offset in self._labels.told_until.items()}
        ready = {partition: one for partition, one in ready.items() if one != self._committed.get(partition)}
        if not ready or not self._trackers:
            return
        try:
            self._consumer.commit(ready)
        except BrokerError as error:
            # decisions are kept, only their offsets are not: tried again at the next interval
            log.warning("commit failed", error=str(error))
            self._health.waiting("broker", str(error))
            return
        self._committed.update(ready)
        self._health.ok("broker")

    # --- state and partitions -----------------------------------------------------------------------------------

    def _fold_labels(self, labels: ColumnBatch) -> None:
        self._engine.fold_labels(labels)

    def _on_assigned(self, partitions: list[Partition]) -> None:
        """Build the state anew, from a snapshot or the beginning of the log, for every partition that is ours."""
        committed = self._consumer.committed(partitions)
        self._decided.update({one: Decided.from_commit(*what) for one, what in committed.items()})
        for partition in partitions:
            self._trackers[partition] = OffsetTracker()
        for partition, (offset, _) in self._consumer.committed(self._labels.partitions).items():
            self._labels.told_until[partition] = max(self._labels.told_until.get(partition, 0), offset)
        self._restore()
        self._paused = False
        self._rebuilding = any(decided.until > 0 for decided in self._decided.values())
        numbers = ", ".join(str(number) for _, number in partitions)
        log.info("partitions assigned", partitions=numbers, decided_until=self._until())
        if self._rebuilding:
            self._health.waiting("state", "rebuilding from the log")
        self._health.ok("partitions", numbers)

    def _on_revoked(self, partitions: list[Partition]) -> None:
        """Finish and commit what is held, then let go."""
        if not self._finish(REVOKE_BUDGET_S):
            log.warning("partitions revoked before all was decided", undecided=self._in_flight())
        self._commit()
        self._let_go(partitions)

    def _on_lost(self, partitions: list[Partition]) -> None:
        """The partitions are another's already: what is undecided will be decided there."""
        self._calls.clear()
        self._produced.clear()
        self._let_go(partitions)

    def _let_go(self, partitions: list[Partition]) -> None:
        for partition in partitions:
            self._trackers.pop(partition, None)
            self._decided.pop(partition, None)
            self._folded.pop(partition, None)
            self._committed.pop(partition, None)
        self._calls = [call for call in self._calls if all(one in self._trackers for one in call.rows.partitions)]
        self.positions = {}
        self._health.waiting("partitions", "none assigned")

    def _tell_recovery(self) -> None:
        left = [
            f"{number}: {self._consumer.position((topic, number)):,} of {decided.until:,}"
            for (topic, number), decided in self._decided.items()
            if (topic, number) in self._trackers and self._consumer.position((topic, number)) < decided.until
        ]
        if left:
            self._health.waiting("state", f"rebuilding from the log, partition {'; '.join(left)}")
        else:
            self._rebuilding = False
            self._health.ok("state")
            seconds = round(time.monotonic() - self._recovery_s, 2)
            log.info("state rebuilt", decided_until=self._until(), seconds=seconds)

    def _restore(self) -> None:
        """Put the state, and the places from which it is folded on, to a snapshot or to the beginning of the log."""
        self._recovery_s = time.monotonic()
        beginnings = self._consumer.beginning_offsets(self._trackers) | self._labels.beginnings()
        committed = {one: self._decided.get(one, NOTHING_DECIDED).until for one in self._trackers}
        snapshot = None if self._snapshots is None else self._snapshots.newest(committed, beginnings)
        if snapshot is None:
            self._engine.features.reset()
            self._folded = {one: beginnings[one] for one in self._trackers}
            self._labels.rewind()
        else:
            self._engine.features.import_state(snapshot.arrays)
            self._folded = dict(snapshot.transactions)
            self._labels.rewind(snapshot.labels)
            log.info("state loaded from a snapshot", offsets=list(snapshot.transactions.values()))
        for partition, offset in self._folded.items():
            self._consumer.seek(partition, offset)

    def _take_snapshot(self, snapshots: SnapshotStore) -> None:
        """Copy the state and hand it to the writer; the copy is the loop's only pause."""
        if not self._trackers or snapshots.busy:
            return
        features = self._engine.features
        if not features.exports_into(self._copies):
            # in the writer's thread: fresh memory costs many times the copy
            snapshots.prepare(self._make_room)
            return
        self._snapshot_due_s = time.monotonic() + self._config.state.interval_s
        arrays = features.export_state(self._copies)
        snapshots.save(Snapshot(arrays, dict(self._folded), dict(self._labels.positions)))

    def _make_room(self) -> None:
        self._copies = self._engine.features.export_buffers()

    def _until(self) -> list[int]:
        return [decided.until for decided in self._decided.values()]
