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
from typing import NamedTuple

import structlog

from cascade.errors import BrokerError, TransactionAbortedError
from cascade.protocols import Clock
from streaming.health_state import HealthState
from streaming.kafka import (
    ConsumerClient,
    Delivery,
    Headers,
    Partition,
    ProducerClient,
    TransactionalProducerClient,
)
from streaming.kafka.limits import COMMIT_TIMEOUT_S
from streaming.pipeline.send import Sender, Sent

log = structlog.get_logger()
# A commit during a join may reach a broker that is a generation ahead, which ends the session: such a commit is delayed
# by at most this long. A join takes about one heartbeat interval (2 s); a transaction may take 10 s.
JOIN_WAIT_S_MAX, JOIN_PAUSE_S = 4.0, 0.02
# After failing for this long, commits of offsets are not expected to succeed for this member.
COMMIT_FAILURE_S_MAX = 30.0
Offsets = Mapping[Partition, tuple[int, str]]


class Acknowledged(NamedTuple):
    """An event: what was sent counts as decided.

    `at_s`: when the broker acknowledged it, seconds since the epoch; None if that is the commit that follows.
    """

    sent: Sent
    at_s: float | None


@dataclass(eq=False)
class Outbox(Sender, ABC):
    """Sends records and commits offsets; one thread uses it.

    The loop calls `collect`, counts what it returns as decided, and then calls `commit`.

    consumer: of the session. health: shows the broker's state. clock: of the worker. interval_s: between two commits.

    `committed`: the last committed offset and metadata, by partition; absent if nothing was committed.
    """

    _consumer: ConsumerClient
    _health: HealthState
    _clock: Clock
    _interval_s: float
    committed: dict[Partition, tuple[int, str]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._due_s = self._clock.monotonic() + self._interval_s

    @property
    @abstractmethod
    def pending(self) -> int:
        """Calls of `send` and `send_many` that the broker has not acknowledged."""

    @abstractmethod
    def due_s(self, quiet: bool) -> float:
        """When the next commit is due, by the monotonic clock; infinite if nothing was sent since the last one.

        quiet: no other record waits to be decided.
        """

    @abstractmethod
    def collect(self, force: bool = False, quiet: bool = False) -> list[Acknowledged]:
        """Returns what counts as decided from now on; raises BrokerError if a delivery failed.

        force: a commit is due now. quiet: see `due_s`.
        """

    @abstractmethod
    def commit(self, progress: Callable[[], Offsets], force: bool = False) -> None:
        """Commits the offsets if a commit is due; raises BrokerError.

        progress: returns the offset and metadata to commit, by partition.
        """

    @abstractmethod
    def forget(self, partitions: Sequence[Partition]) -> None:
        """Stops committing for partitions that this worker lost; raises BrokerError if the session cannot go on."""

    def _changed(self, progress: Callable[[], Offsets]) -> dict[Partition, tuple[int, str]]:
        return {
            partition: offset for partition, offset in progress().items() if offset != self.committed.get(partition)
        }


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

    def collect(self, force: bool = False, quiet: bool = False) -> list[Acknowledged]:
        """See Outbox; returns what the broker has acknowledged."""
        del force, quiet
        events: list[Acknowledged] = []
        try:
            while self._unacknowledged and self._unacknowledged[0][0].done():
                delivery, sent = self._unacknowledged.popleft()
                events.append(Acknowledged(sent, delivery.done_s))
        except BrokerError:
            # the failure comes again; what was acknowledged before it counts
            if not events:
                raise
        return events

    def commit(self, progress: Callable[[], Offsets], force: bool = False) -> None:
        """See Outbox; a failed commit is retried at each interval, for COMMIT_FAILURE_S_MAX."""
        now_s = self._clock.monotonic()
        if not force and now_s < self._due_s:
            return
        self._due_s = now_s + self._interval_s
        fresh = self._changed(progress)
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

    It ends sooner, after `seconds_min`, if no other record waits to be decided: readers see its decisions with the
    commit. `collect` returns the records of the transaction that `commit` commits next, and so `progress` includes
    them.
    """

    _producer: TransactionalProducerClient
    _seconds_min: float
    _in_transaction: list[Sent] = field(default_factory=list, init=False)
    _committing: bool = field(default=False, init=False)
    _failure: BrokerError | None = field(default=None, init=False)
    _began_s: float = field(default=0.0, init=False)
    # during a join: when the group is asked again
    _again_s: float = field(default=0.0, init=False)

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
        due_s = min(self._due_s, self._began_s + self._seconds_min) if quiet else self._due_s
        return max(due_s, self._again_s)

    def collect(self, force: bool = False, quiet: bool = False) -> list[Acknowledged]:
        """See Outbox; returns nothing unless a commit is due. The time of the events is that of the commit."""
        now_s = self._clock.monotonic()
        if not self._in_transaction or not (force or now_s >= self.due_s(quiet)):
            return []
        # first, so that the commit follows at once what the group is asked
        with self._first_error_latched():
            self._producer.flush(COMMIT_TIMEOUT_S)
        self._committing = force or now_s >= self._due_s + JOIN_WAIT_S_MAX or self._consumer.settled()
        if not self._committing:
            self._again_s = now_s + JOIN_PAUSE_S
            return []
        return [Acknowledged(sent, None) for sent in self._in_transaction]

    def commit(self, progress: Callable[[], Offsets], force: bool = False) -> None:
        """See Outbox; a failed commit ends the session."""
        del force
        if not self._committing:
            return
        self._committing = False
        member = self._consumer.member()
        with self._first_error_latched():
            fresh = self._changed(progress)
            self._producer.commit(fresh, member)
        self._in_transaction = []
        self.committed.update(fresh)
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
