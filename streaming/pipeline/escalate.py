"""Step 6, escalate: suspicious rows wait for the deep model, within deadlines, the circuit breaker and limits.

Each escalated row gets exactly one outcome: the deep model's answer in time, or the screener's score with the cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import structlog

from cascade.columns import Array, Bool, Float64, Int64
from cascade.config import Config
from cascade.errors import DeepStageError
from cascade.ledger import Ledger
from cascade.policy import Policy
from cascade.protocols import Clock, DeepInputs, DeepStage
from cascade.schema import key_codes
from streaming.health_state import HealthState
from streaming.kafka import Partition
from streaming.pipeline import table_kernels as kernels
from streaming.pipeline.breaker import CircuitBreaker
from streaming.pipeline.decisions import CAUSES, STAGES
from streaming.pipeline.deep_replicas import ready_count, replica_states, replicas_text
from streaming.pipeline.overload import OverloadControl
from streaming.pipeline.table import Table

log = structlog.get_logger()
LATE_CAUSES = ("deadline", "queue-full")
# Between two probes of an unavailable model, while no call is open.
PROBE_EVERY_S = 1.0
# Between two looks at the replicas of the model's server, for health and log.
REPLICAS_EVERY_S = 0.5
# Between two looks at all of it while no answer and no deadline comes: the loop turns a thousand times a second.
LOOK_EVERY_S = 0.02


class DeepCall:
    """A call to the deep model.

    `open` (bool, [rows]) marks the rows that have no decision yet. `screener_raw` (float64, [rows]): log-odds.
    `ahead`: how many rows had no decision when it was sent, its own included.
    """

    def __init__(
        self,
        table: Table,
        screener_raw: Float64,
        deadline_ms: Float64,
        future: Future[Float64],
        sent_s: float,
        ahead: int,
    ) -> None:
        self.table = table
        self.screener_raw = screener_raw
        self.deadline_ms = deadline_ms
        self.future = future
        self.sent_s = sent_s
        self.ahead = ahead
        self.open: Bool = np.ones(len(table), bool)
        self.next_deadline_ms = float(deadline_ms.min())

    @property
    def rows_open(self) -> int:
        """The number of rows that have no decision yet."""
        return int(np.count_nonzero(self.open))

    def expire(self, now_ms: float) -> Array:
        """Closes the rows whose deadline has passed, and returns their indexes."""
        if now_ms < self.next_deadline_ms:
            return np.zeros(0, np.int64)
        expired = np.flatnonzero(self.open & (self.deadline_ms <= now_ms))
        self.open[expired] = False
        left = self.deadline_ms[self.open]
        self.next_deadline_ms = float(left.min()) if len(left) else float("inf")
        return expired

    def drop(self, partitions: Collection[Partition]) -> None:
        """Closes the rows of these partitions, which this worker lost."""
        self.open &= ~self.table.belong_to(partitions)

    def close(self) -> Array:
        """Closes all open rows, and returns their indexes."""
        rows = np.flatnonzero(self.open)
        self.open[rows] = False
        return rows


def by_screener(table: Table, cause: str | None, deep_ms: float = 0.0) -> Table:
    """Fills the columns of the step for rows that the screener decides; returns the table."""
    kernels.by_screener(table.rows, np.arange(len(table)), CAUSES.index(cause or ""), deep_ms)
    return table


@dataclass(eq=False)
class Escalations:
    """The rows that wait for the deep model; for one thread.

    Its methods return tables of rows whose score is known, with the columns of the step filled; all rows of such a
    table have the same stage and cause.

    `wake`: called from any thread when an answer, or its failure, is there for `collect`.
    """

    _config: Config
    _policy: Policy
    _deep: DeepStage
    _card: str
    _ledger: Ledger
    _health: HealthState
    _clock: Clock
    _chance: Callable[[], float]
    _wake: Callable[[], None]

    def __post_init__(self) -> None:
        config, clock = self._config, self._clock
        self._breaker = CircuitBreaker(config.breaker, clock.monotonic, self._chance)
        self._overload = OverloadControl(config.overload, config.worker.in_flight_max, clock)
        self._calls: list[DeepCall] = []
        self._open_by_card: dict[int, int] = {}
        self._ended, self._ended_late = 0, 0
        self._late_counted = self._deep.late_answers
        self._probe: Future[Float64] | None = None
        self._probe_due_s = self._replicas_due_s = self._look_due_s = clock.monotonic()
        self._replicas_text, self._replicas_counted = "", (0, 0)
        self._answer_came = False
        self._s_per_row = 0.0

    @property
    def open(self) -> int:
        """The number of rows that wait."""
        return sum(call.rows_open for call in self._calls) if self._calls else 0

    @property
    def deadline_ms(self) -> float:
        """The earliest deadline of the rows that wait, ms since the epoch; infinite if none waits."""
        return min(call.next_deadline_ms for call in self._calls) if self._calls else math.inf

    @property
    def wait_s(self) -> float:
        """How long a row sent now would wait: until all others are answered, at the pace of the last answer.

        At least as long as the oldest call has waited. 0 if no row waits.
        """
        if not self._calls:
            return 0.0
        return max(self.open * self._s_per_row, self._clock.monotonic() - self._calls[0].sent_s)

    @property
    def budget_factor(self) -> float:
        """The part of the escalation budget that may be used now."""
        return self._overload.factor

    def waiting_of(self, partitions: Collection[Partition]) -> int:
        """The number of rows of these partitions that wait."""
        return sum(int((call.open & call.table.belong_to(partitions)).sum()) for call in self._calls)

    def send(self, table: Table, inputs: DeepInputs) -> list[Table]:
        """Sends rows to the deep model; returns those that are decided without it at once."""
        deadline_ms = table.rows["start_ms"] + self._config.deadline.budget_ms
        room = self._has_room(key_codes(table.batch[self._card]))
        refused = np.flatnonzero(~room)
        decided = [by_screener(table.take(refused), "queue-full")] if len(refused) else []
        if len(refused):
            table, deadline_ms = table.take(room), deadline_ms[room]
            inputs = inputs.take(room)
        if len(table):
            timeout_s = (float(deadline_ms.max()) - self._clock.time() * 1e3) / 1e3
            if timeout_s <= 0:
                decided.append(by_screener(table, "deadline"))
            elif self._breaker.allows():
                future = self._deep.submit(inputs, timeout_s)
                screener_raw = inputs.features[:, -1].astype(np.float64)
                sent_s, ahead = self._clock.monotonic(), self.open + len(table)
                self._calls.append(DeepCall(table, screener_raw, deadline_ms, future, sent_s, ahead))
                future.add_done_callback(self._note_answer)
                self._count_cards(table, 1)
            else:
                decided.append(by_screener(table, "breaker-open"))
        return self._noted(decided)

    def collect(self) -> list[Table]:
        """Returns the rows whose score is known since the last call: by answers, errors, deadlines."""
        now_s = self._clock.monotonic()
        if now_s < self._look_due_s and not self._ended and not self._due:
            return []
        self._look_due_s = now_s + LOOK_EVERY_S
        decided = self._collected()
        self._look_at_replicas(now_s)
        self._look_for_model(now_s)
        self._observe()
        return decided

    @property
    def _due(self) -> bool:
        """Whether an answer or a deadline has come."""
        return bool(self._calls) and (self._answer_came or self._clock.time() * 1e3 >= self.deadline_ms)

    def _note_answer(self, _: Future[Float64]) -> None:
        self._answer_came = True
        self._wake()

    def _collected(self) -> list[Table]:
        # before the look at the calls: an answer that comes meanwhile is found in the next turn
        self._answer_came = False
        now_ms = self._clock.time() * 1e3
        decided: list[Table] = []
        still_open = []
        for call in self._calls:
            waited_s = self._clock.monotonic() - call.sent_s
            if call.future.done():
                decided += self._answered(call, waited_s)
            expired = call.expire(now_ms)
            if len(expired):
                decided.append(by_screener(call.table.take(expired), "deadline", waited_s * 1e3))
            if call.open.any():
                still_open.append(call)
            elif not call.future.done():
                # all rows were decided without it; its answer will be counted as late
                self._call_failed("no answer before the deadline")
                self._count_when_late(call)
        self._calls = still_open
        for table in decided:
            self._count_cards(table, -1)
        return self._noted(decided)

    def drop(self, partitions: Collection[Partition]) -> None:
        """Drops the rows of partitions that this worker lost, without a decision."""
        for call in self._calls:
            before = call.open.copy()
            call.drop(partitions)
            self._count_cards(call.table.take(before & ~call.open), -1)
            if not call.open.any() and not call.future.done():
                self._count_when_late(call)
        self._calls = [call for call in self._calls if call.open.any()]

    def _noted(self, decided: list[Table]) -> list[Table]:
        for table in decided:
            cause = CAUSES[table.rows["cause"][0]]
            if cause != "breaker-open":
                self._ended += len(table)
            if cause in LATE_CAUSES:
                self._ended_late += len(table)
        return decided

    def _observe(self) -> None:
        if self._deep.late_answers != self._late_counted:
            self._ledger.count_late(self._deep.late_answers - self._late_counted)
            self._late_counted = self._deep.late_answers
        if self._deep.hedged:
            self._ledger.set_hedged(self._deep.hedged)
        self._overload.observe(self.open, self._ended, self._ended_late)
        self._ended = self._ended_late = 0
        change = self._overload.changed()
        if change is not None:
            log.warning(change)
            self._ledger.set_budget_factor(self._overload.factor)

    def _has_room(self, cards: Int64) -> Array:
        """Which rows may wait: at most `in_flight_card_max` of a card at the same time; bool [rows]."""
        limit = self._config.worker.in_flight_card_max
        coming: dict[int, int] = {}
        room = np.ones(len(cards), bool)
        for row, card in enumerate(cards.tolist()):
            count = self._open_by_card.get(card, 0) + coming.get(card, 0)
            if count >= limit:
                room[row] = False
            else:
                coming[card] = coming.get(card, 0) + 1
        return room

    def _count_cards(self, table: Table, change: int) -> None:
        for card in key_codes(table.batch[self._card]).tolist():
            count = self._open_by_card.get(card, 0) + change
            if count > 0:
                self._open_by_card[card] = count
            else:
                self._open_by_card.pop(card, None)

    def _answered(self, call: DeepCall, waited_s: float) -> list[Table]:
        late = len(call.table) - call.rows_open
        chosen = call.close()
        table = call.table.take(chosen)
        error = call.future.exception()
        if error is not None:
            self._call_failed(str(error))
            cause = error.cause if isinstance(error, DeepStageError) else "error"
            if cause != "deadline":
                log.warning("deep call failed", cause=cause, error=str(error), rows=len(call.table))
                self._health.waiting("deep model", str(error))
            return [by_screener(table, cause, waited_s * 1e3)] if len(table) else []
        self._model_answers()
        self._s_per_row = waited_s / call.ahead
        self._ledger.count_late(int(late > 0))
        self._ledger.add_deep_call(len(call.table), waited_s)
        self._ledger.record_stage("deep", waited_s, 0.0, len(table))
        rows = table.rows
        rows["score"] = self._policy.combined.probability(call.screener_raw[chosen], call.future.result()[chosen])
        rows["stage"], rows["cause"], rows["deep_ms"] = STAGES.index("deep"), 0, waited_s * 1e3
        return [table] if len(table) else []

    def _look_for_model(self, now_s: float) -> None:
        """Probes an unavailable model, since on a quiet stream no call may show its return for hours."""
        probe = self._probe
        if probe is not None:
            if probe.done():
                self._probe = None
                self._probe_due_s = now_s + PROBE_EVERY_S
                if (error := probe.exception()) is None:
                    self._model_answers()
                else:
                    self._call_failed(str(error))
            return
        due = now_s >= self._probe_due_s and not self._calls and self._health.waits("deep model")
        if due and self._breaker.allows():
            self._probe = self._deep.probe(self._config.deadline.budget_ms / 1e3)

    def _look_at_replicas(self, now_s: float) -> None:
        """Shows the replicas in health, and logs when another number of them is ready."""
        if now_s < self._replicas_due_s:
            return
        self._replicas_due_s = now_s + REPLICAS_EVERY_S
        states = replica_states(self._deep)
        if states is None or (text := replicas_text(states)) == self._replicas_text:
            return
        self._replicas_text, counted = text, (ready_count(states), len(states))
        if counted != self._replicas_counted:
            self._replicas_counted = counted
            log.info("deep model", replicas=text)
        if not ready_count(states):
            self._health.waiting("deep model", text)
        elif not self._health.waits("deep model"):
            self._health.ok("deep model", text)

    def _model_answers(self) -> None:
        self._breaker.succeeded()
        self._health.ok("deep model", self._replicas_text)

    def _call_failed(self, reason: str) -> None:
        opened = self._breaker.opened
        self._breaker.failed()
        if self._breaker.opened > opened:
            times = self._breaker.opened
            log.warning("circuit breaker open: the screener decides alone", last_failure=reason, times_opened=times)
            self._health.waiting("deep model", f"circuit breaker open, the screener decides alone; last: {reason}")

    def _count_when_late(self, call: DeepCall) -> None:
        def count(answer: Future[Float64]) -> None:
            if not answer.cancelled() and answer.exception() is None:
                self._ledger.count_late(1)

        call.future.add_done_callback(count)
