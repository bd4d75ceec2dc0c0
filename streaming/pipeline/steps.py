"""The path of a transaction, from a fetched record to a decision that is sent; the worker's loop drives it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cascade.columns import Int64
from cascade.config import Config
from cascade.engine import Engine
from cascade.ledger import Ledger, Path, StageLaps
from cascade.protocols import Clock
from cascade.schema import Roles
from streaming.codecs import Reject
from streaming.kafka import FetchedBatch, Partition
from streaming.pipeline import table_kernels as kernels
from streaming.pipeline.decode import Decoder
from streaming.pipeline.deduplicate import deduplicate
from streaming.pipeline.duplicates import FirstDecisions
from streaming.pipeline.encode import encode, encode_keys
from streaming.pipeline.escalate import Escalations
from streaming.pipeline.offsets import Decided
from streaming.pipeline.privacy import CardHasher
from streaming.pipeline.repeats import Repeats
from streaming.pipeline.screen import screen
from streaming.pipeline.send import Sender, path_of, send, send_dead_letter
from streaming.pipeline.table import Table
from streaming.pipeline.watch import RecallWatch

_NO_QUEUE = np.zeros(0)


@dataclass(eq=False)
class Pipeline:
    """Takes transactions through the steps from `decode` to `send`; for one thread.

    note: called with each table whose rows are folded, for the summaries that workers exchange. watch: remembers the
    decisions, for the certificate; None without one. The other arguments are the collaborators of the steps.
    """

    _config: Config
    _roles: Roles
    _engine: Engine
    _decoder: Decoder
    _first_decisions: FirstDecisions
    _repeats: Repeats
    _escalations: Escalations
    _outbox: Sender
    _hasher: CardHasher | None
    _ledger: Ledger
    _clock: Clock
    _note: Callable[[Table], None]
    _watch: RecallWatch | None
    _laps: StageLaps = field(default_factory=StageLaps, init=False)

    @property
    def in_flight(self) -> int:
        """Rows that wait for a decision."""
        return self._escalations.open + self._repeats.open

    @property
    def deadline_s(self) -> float:
        """The earliest deadline of the rows that wait, seconds since the epoch; infinite if none waits."""
        return self._escalations.deadline_ms / 1e3

    @property
    def wait_s(self) -> float:
        """How long a row sent to the deep model now would wait for its answer."""
        return self._escalations.wait_s

    def waiting_of(self, partitions: Collection[Partition]) -> int:
        """The number of rows of these partitions that wait for a decision."""
        return self._escalations.waiting_of(partitions) + self._repeats.waiting_of(partitions)

    def drop(self, partitions: Sequence[Partition]) -> None:
        """Drops the waiting rows of partitions that this worker lost."""
        self._escalations.drop(partitions)
        self._repeats.drop(partitions)

    def take(self, fetched: Sequence[FetchedBatch], decided: Sequence[Decided]) -> None:
        """Takes a micro-batch through all steps; escalated rows and repeats wait for `answer`.

        fetched: at least one record, at most one batch a partition. decided: for each of them, the records that have
        their decision.
        """
        now_ms = self._clock.time() * 1e3
        self._laps.begin()
        table, undecided, rejected = self._decoder.decode(fetched, decided, now_ms)
        if self._hasher is not None:
            table = replace(table, batch=self._hasher.hashed(table.batch, self._roles.card))
        count = len(table.rows)
        self._laps.end("decode", count)
        if count:
            table = deduplicate(table, self._first_decisions, self._repeats, self._roles)
            self._fold_or_screen(table, undecided)
        # dead letters last: decisions acknowledged ahead of a record then show that it was escalated
        for part in rejected:
            self.reject(part.fetched, part.rejects)

    def _fold_or_screen(self, table: Table, undecided: int) -> None:
        """Folds the rows of first occurrences, and decides the undecided ones, if there are any."""
        if not len(table.rows):
            return
        self._note(table)
        if undecided:
            self._screen(table)
        else:
            self._engine.fold(table.batch, table.column("partition_id"))

    def report(self) -> None:
        """Records in the ledger how long records have waited before any work on them, since the last call."""
        arrivals = self._decoder.arrivals()
        if arrivals is not None:
            self._ledger.record_arrival(*arrivals)

    def answer(self) -> None:
        """Decides the escalated rows and repeats whose answer, or whose deadline, has come."""
        for table in self._escalations.collect():
            self._decide_all(table)
        for table in self._repeats.collect():
            self._repeat(table)

    def reject(self, fetched: FetchedBatch, rejects: Sequence[Reject]) -> None:
        """Dead-letters messages of a fetch."""
        now_ms, topic = self._clock.time() * 1e3, self._config.kafka.topics.dead_letters
        for reject in rejects:
            send_dead_letter(fetched, reject, now_ms, self._hasher, topic, self._outbox)
            self._ledger.count_dead_letters(reject.reason.value, 1)

    def _screen(self, table: Table) -> None:
        """Screens rows, sends the suspicious ones to the deep model, and decides the others."""
        laps = self._laps
        screened, clear, escalated, queue_s = screen(table, self._engine, self._escalations.budget_factor, laps)
        refused: list[Table] = []
        if len(escalated):
            # sent before the others are decided, so that the model works meanwhile
            refused = self._escalations.send(table.take(escalated), screened.deep_inputs(escalated))
            laps.skip()
        if len(clear):
            self._decide(table, clear, "screened")
        self._ledger.record_batch(laps, queue_s)
        for part in refused:
            self._decide_all(part)

    def _decide(self, table: Table, chosen: Int64, path: Path) -> None:
        """Decides, encodes and sends the rows with these positions, which are all on the same path."""
        policy = self._engine.policy
        kernels.decide(table.rows, chosen, policy.review_from, policy.decline_from, self._clock.time() * 1e3)
        self._laps.end("decide", len(chosen))
        self._send(table, chosen, path)
        self._first_decisions.settle_rows(table, chosen)
        if self._watch is not None:
            self._watch.note(table, chosen)
        self._laps.end("produce", len(chosen))

    def _decide_all(self, table: Table) -> None:
        """Decides rows that have left their micro-batch."""
        every = np.arange(len(table))
        self._laps.begin()
        self._decide(table, every, path_of(table, every))
        self._ledger.record_batch(self._laps, _NO_QUEUE)

    def _repeat(self, table: Table) -> None:
        """Sends first decisions again, marked as duplicates."""
        table.rows["decided_ms"] = self._clock.time() * 1e3
        self._laps.begin()
        self._send(table, np.arange(len(table)), "duplicate")
        self._laps.end("produce", len(table))
        self._ledger.record_batch(self._laps, _NO_QUEUE)

    def _send(self, table: Table, chosen: Int64, path: Path) -> None:
        cards, hasher = table.batch[self._roles.card], self._hasher
        keys = encode_keys(cards, chosen) if hasher is None else hasher.text(cards[chosen])
        values = encode(self._config.kafka.codec, table, chosen, self._roles.transaction_id)
        send(table, chosen, path, keys, values, self._config.kafka.topics.decisions, self._outbox)
