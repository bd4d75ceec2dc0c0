"""Sends decisions and dead letters to the broker, and commits the offsets of the records that have theirs.

With at-least-once delivery a record counts as decided when the broker has acknowledged its decision; offsets are
committed at an interval. With exactly-once delivery, decisions, dead letters and offsets are one transaction: readers
see all of them or none. Any failure of a transaction ends the session. The next session decides its records again,
from the committed offsets on, and no reader sees the first attempt.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import structlog

from cascade.columns import Float64, Int64
from cascade.errors import BrokerError, TransactionAbortedError
from cascade.ledger import Path
from cascade.protocols import Clock
from streaming.kafka import (
    ConsumerClient,
    Delivery,
    Headers,
    Partition,
    ProducerClient,
    TransactionalProducerClient,
)
from streaming.pipeline.table import Records
from streaming.service.health import HealthState

log = structlog.get_logger()
# A commit during a join may reach a broker that is a generation ahead, which ends the session: such a commit is delayed
# by at most this long. A join takes about one heartbeat interval (2 s); a transaction may take 10 s.
JOIN_WAIT_S_MAX = 4.0
# After failing for this long, commits of offsets are not expected to succeed for this member.
COMMIT_FAILURE_S_MAX = 30.0
# A transaction lasts at least this long. A commit costs the broker about as much as a hundred records, so that shorter
# transactions would make readers wait for it and not for the interval.
TRANSACTION_S_MIN = 0.005
Offsets = Mapping[Partition, tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Sent:
    """Decisions, or a dead letter, that were sent: `offsets` of their records by partition, and the ledger's figures.

    `start_ms` (float64 [decisions], ms since the epoch): when each decision's latency begins. `path`: empty for a dead
    letter. `records`: of the transactions, in the same order; None for a dead letter.
    """

    offsets: dict[Partition, Int64]
    start_ms: Float64
    path: Path | Literal[""]
    cause: str | None
    records: Records | None = None


@dataclass(eq=False)
class Outbox(ABC):
    """Sends records and commits offsets; one thread uses it.

    consumer: of the session. health: shows the broker's state. clock: monotonic seconds. interval_s: between two
    commits. progress: returns the offset and metadata to commit, by partition. on_decided: called with the records of a
    commit before `progress`. on_acknowledged: called with acknowledged or committed records, and with the time of it in
    seconds since the epoch, for the ledger.

    `committed`: the last committed offset and metadata, by partition; absent if nothing was committed.
    """

    _consumer: ConsumerClient
    _health: HealthState
    _clock: Clock
    _interval_s: float
    _progress: Callable[[], Offsets]
    _on_decided: Callable[[Sent], None]
    _on_acknowledged: Callable[[Sent, float], None]
    committed: dict[Partition, tuple[int, str]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._due_s = self._clock.monotonic() + self._interval_s

    @abstractmethod
    def send(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers, sent: Sent) -> None:
        """Sends one record."""

    @abstractmethod
    def send_many(self, topic: str, keys: Sequence[bytes | None], values: Sequence[bytes | None], sent: Sent) -> None:
        """Sends records of one topic, in order."""

    @property
    @abstractmethod
    def pending(self) -> int:
        """Calls of `send` and `send_many` that the broker has not acknowledged."""

    @abstractmethod
    def due_s(self, quiet: bool) -> float:
        """When `advance` has something to commit, by the monotonic clock; infinite if nothing was sent since.

        quiet: no other record waits to be decided.
        """

    @abstractmethod
    def advance(self, force: bool = False, quiet: bool = False) -> None:
        """Processes delivery reports, and commits at `due_s(quiet)`, or at once with `force`; raises BrokerError."""

    @abstractmethod
    def forget(self, partitions: Sequence[Partition]) -> None:
        """Stops committing for partitions that this worker lost; raises BrokerError if the session cannot go on."""

    def _changed_offsets(self) -> dict[Partition, tuple[int, str]]:
        progress = self._progress().items()
        return {partition: offset for partition, offset in progress if offset != self.committed.get(partition)}


@dataclass(eq=False)
class AtLeastOnceOutbox(Outbox):
    """An Outbox on an idempotent producer; offsets are committed after the decisions are acknowledged."""

    _producer: ProducerClient
    _unacknowledged: deque[tuple[Delivery, Sent]] = field(default_factory=deque, init=False)
    _failing_since_s: float | None = field(default=None, init=False)

    def send(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers, sent: Sent) -> None:
        """See Outbox."""
        self._unacknowledged.append((self._producer.send(topic, key, value, headers), sent))

    def send_many(self, topic: str, keys: Sequence[bytes | None], values: Sequence[bytes | None], sent: Sent) -> None:
        """See Outbox."""
        self._unacknowledged.append((self._producer.send_many(topic, keys, values), sent))

    @property
    def pending(self) -> int:
        """See Outbox."""
        return len(self._unacknowledged)

    def due_s(self, quiet: bool) -> float:
        """See Outbox; the interval alone decides."""
        del quiet
        return self._due_s if self._unacknowledged else math.inf

    def advance(self, force: bool = False, quiet: bool = False) -> None:
        """See Outbox; a failed commit is retried at each interval, for COMMIT_FAILURE_S_MAX."""
        del quiet
        while self._unacknowledged and self._unacknowledged[0][0].done():
            delivery, sent = self._unacknowledged.popleft()
            self._on_decided(sent)
            self._on_acknowledged(sent, delivery.done_s)
        now_s = self._clock.monotonic()
        if not force and now_s < self._due_s:
            return
        self._due_s = now_s + self._interval_s
        fresh = self._changed_offsets()
        if not fresh:
            return
        try:
            self._consumer.commit(fresh)
        except BrokerError as error:
            log.warning("commit failed", error=str(error))
            self._health.waiting("broker", str(error))
            if self._failing_since_s is None:
                self._failing_since_s = now_s
            if self._clock.monotonic() - self._failing_since_s > COMMIT_FAILURE_S_MAX:
                raise
            return
        self._failing_since_s = None
        self.committed.update(fresh)
        self._health.ok("broker")

    def forget(self, partitions: Sequence[Partition]) -> None:
        """See Outbox."""
        for partition in partitions:
            self.committed.pop(partition, None)
            for _, sent in self._unacknowledged:
                sent.offsets.pop(partition, None)


@dataclass(eq=False)
class ExactlyOnceOutbox(Outbox):
    """An Outbox on a transactional producer; a transaction begins with its first record and lasts at most `interval_s`.

    It ends sooner, after TRANSACTION_S_MIN, if no other record waits to be decided: readers see its decisions with the
    commit. `on_decided` is called within the commit, so that `progress` includes the transaction's records.
    """

    _producer: TransactionalProducerClient
    _in_transaction: list[Sent] = field(default_factory=list, init=False)
    _failure: BrokerError | None = field(default=None, init=False)
    _began_s: float = field(default=0.0, init=False)

    def send(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers, sent: Sent) -> None:
        """See Outbox."""
        with self._first_error_latched():
            self._begin()
            self._producer.send(topic, key, value, headers)
        self._in_transaction.append(sent)

    def send_many(self, topic: str, keys: Sequence[bytes | None], values: Sequence[bytes | None], sent: Sent) -> None:
        """See Outbox."""
        with self._first_error_latched():
            self._begin()
            self._producer.send_many(topic, keys, values)
        self._in_transaction.append(sent)

    @property
    def pending(self) -> int:
        """See Outbox."""
        return len(self._in_transaction)

    def due_s(self, quiet: bool) -> float:
        """See Outbox."""
        if not self._in_transaction:
            return math.inf
        return min(self._due_s, self._began_s + TRANSACTION_S_MIN) if quiet else self._due_s

    def advance(self, force: bool = False, quiet: bool = False) -> None:
        """See Outbox; a failed commit ends the session."""
        now_s = self._clock.monotonic()
        if not self._in_transaction or not (force or now_s >= self.due_s(quiet)):
            return
        member = self._consumer.member()
        if not (force or member.settled or now_s >= self._due_s + JOIN_WAIT_S_MAX):
            return
        with self._first_error_latched():
            for sent in self._in_transaction:
                self._on_decided(sent)
            fresh = self._changed_offsets()
            self._producer.commit(fresh, member)
        acknowledged, self._in_transaction = self._in_transaction, []
        self.committed.update(fresh)
        committed_s = self._clock.time()
        for sent in acknowledged:
            self._on_acknowledged(sent, committed_s)
        self._health.ok("broker")

    def forget(self, partitions: Sequence[Partition]) -> None:
        """See Outbox; aborts an open transaction, which may contain their decisions, and so ends the session."""
        for partition in partitions:
            self.committed.pop(partition, None)
        if self._in_transaction:
            self._producer.abort()
            ids = ", ".join(str(partition_id) for _, partition_id in partitions)
            raise TransactionAbortedError(f"partitions {ids} were lost with decisions in an open transaction")

    def _begin(self) -> None:
        if not self._in_transaction:
            self._producer.begin()
            self._began_s = self._clock.monotonic()
            self._due_s = self._began_s + self._interval_s

    @contextlib.contextmanager
    def _first_error_latched(self) -> Iterator[None]:
        """Latches the first BrokerError. Every later call re-raises it, so that no record is counted or sent twice.

        Such calls come: when the session ends, the consumer revokes its partitions, and the worker tries to commit.
        """
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except BrokerError as error:
            self._failure = error
            raise
