"""Sends decisions and dead letters to the broker, and commits the offsets of the records that have theirs.

With at-least-once delivery a record counts as decided when the broker has acknowledged its decision; offsets are
committed at an interval. With exactly-once delivery, decisions, dead letters and offsets are one transaction: readers
see all of them or none. A transaction whose offsets the group refuses in a rebalance is sent again. Any other failure
ends the session. The next session decides its records again, from the committed offsets on, and no reader sees the
first attempt.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from streaming.pipeline.send import Sender, Sent

log = structlog.get_logger()
# The group refuses offsets from the moment at which it has a new generation until the member knows it: until an answer
# arrives that is under way, or the next poll reports the loss of the partitions. The pause doubles with each refusal.
REFUSED_PAUSE_S, REFUSED_S_MAX = 0.01, 5.0
# The records that an outbox keeps until their commit take about 300 bytes each. More end the transaction early.
ROWS_KEPT_MAX = 100_000
# Between two looks at the acknowledgements, whose own times count.
LOOK_EVERY_S = 0.1
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

    Where `looks`, the loop calls `collect`, counts what it returns as decided, and then calls `commit`.

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
    def looks(self, force: bool, quiet: bool) -> bool:
        """Whether it is time to look at the acknowledgements, or to commit. force, quiet: as for `collect`."""

    @abstractmethod
    def collect(self, force: bool = False, quiet: bool = False) -> list[Acknowledged]:
        """Returns what counts as decided from now on; raises BrokerError if a delivery failed.

        force: a commit is due now. quiet: see `due_s`.
        """

    @abstractmethod
    def commit(self, progress: Callable[[], Offsets], force: bool = False) -> bool:
        """Commits the offsets if a commit is due, and returns whether it did; raises BrokerError.

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
    _look_s: float = field(default=0.0, init=False)
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

    def looks(self, force: bool, quiet: bool) -> bool:
        """See Outbox."""
        del quiet
        now_s = self._clock.monotonic()
        if not force and now_s < self._look_s and now_s < self._due_s:
            return False
        self._look_s = now_s + LOOK_EVERY_S
        return True

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

    def commit(self, progress: Callable[[], Offsets], force: bool = False) -> bool:
        """See Outbox; a failed commit is retried at each interval, for COMMIT_FAILURE_S_MAX."""
        now_s = self._clock.monotonic()
        if not force and now_s < self._due_s:
            return False
        self._due_s = now_s + self._interval_s
        fresh = self._changed(progress)
        if not fresh:
            return False
        try:
            self._consumer.commit(fresh)
        except BrokerError as error:
            log.warning("commit failed", error=str(error))
            self._health.waiting("broker", str(error))
            if self._failing_since_s is None:
                self._failing_since_s = now_s
            if self._clock.monotonic() - self._failing_since_s > COMMIT_FAILURE_S_MAX:
                raise
            return False
        self._failing_since_s = None
        self.committed.update(fresh)
        self._health.ok("broker")
        return True

    def forget(self, partitions: Sequence[Partition]) -> None:
        """See Outbox."""
        for partition in partitions:
            self.committed.pop(partition, None)
            for _, sent in self._unacknowledged:
                sent.offsets.pop(partition, None)


class _Message(NamedTuple):
    """The arguments of `send_many`; with `headers` those of `send`, for a single record."""

    topic: str
    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    headers: Headers | None
    sent: Sent

    def without(self, partitions: Collection[Partition]) -> _Message | None:
        """Returns what is not about records of these partitions; None if nothing is left."""
        others = self.sent.others(partitions)
        if others.all():
            return self
        if not others.any():
            return None
        keys, values = (
            [text for text, other in zip(texts, others.tolist(), strict=True) if other]
            for texts in (self.keys, self.values)
        )
        return self._replace(keys=keys, values=values, sent=self.sent.part(others))


@dataclass(eq=False)
class ExactlyOnceOutbox(Outbox):
    """An Outbox on a transactional producer; a record is committed `interval_s` later at most.

    It is committed sooner if no other record waits to be decided, but not within `seconds_min` after the last commit:
    readers see decisions with the commit. For so long nothing is sent either, since the broker is still ending the last
    transaction, and lets a record of another one wait for longer. `collect` returns the records that `commit` commits
    next, and so `progress` includes them.

    The outbox keeps the records until they are committed. If the group refuses the offsets, because it rebalances, or
    if partitions are lost, the transaction is aborted, and the records of the partitions that this worker still owns
    are sent again, in the same order, in another transaction.
    """

    _producer: TransactionalProducerClient
    _seconds_min: float
    _messages: list[_Message] = field(default_factory=list, init=False)
    _rows: int = field(default=0, init=False)
    # how many of the messages are in the open transaction, if there is one
    _sent: int = field(default=0, init=False)
    _open: bool = field(default=False, init=False)
    _committing: bool = field(default=False, init=False)
    _failure: BrokerError | None = field(default=None, init=False)
    # when the last transaction was committed, and when the first message came after that
    _committed_s: float = field(default=-math.inf, init=False)
    _began_s: float = field(default=0.0, init=False)
    # since when the group refuses the offsets; when, and after what pause, it is asked again
    _refused_s: float | None = field(default=None, init=False)
    _again_s: float = field(default=0.0, init=False)
    _pause_s: float = field(default=REFUSED_PAUSE_S, init=False)

    def send(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers, sent: Sent) -> None:
        """See Outbox."""
        self._add(_Message(topic, [key], [value], headers, sent))

    def send_many(self, topic: str, keys: Sequence[bytes | None], values: Sequence[bytes | None], sent: Sent) -> None:
        """See Outbox."""
        self._add(_Message(topic, keys, values, None, sent))

    @property
    def pending(self) -> int:
        """See Outbox."""
        return len(self._messages)

    def due_s(self, quiet: bool) -> float:
        """See Outbox."""
        if not self._messages:
            return math.inf
        due_s = self._due_s
        if quiet or self._rows >= ROWS_KEPT_MAX:
            due_s = min(due_s, max(self._began_s, self._committed_s + self._seconds_min))
        return max(due_s, self._again_s)

    def looks(self, force: bool, quiet: bool) -> bool:
        """See Outbox."""
        return bool(self._messages) and (force or self._clock.monotonic() >= self.due_s(quiet))

    def collect(self, force: bool = False, quiet: bool = False) -> list[Acknowledged]:
        """See Outbox; returns nothing unless a commit is due. The time of the events is that of the commit."""
        self._committing = self.looks(force, quiet)
        return [Acknowledged(message.sent, None) for message in self._messages] if self._committing else []

    def commit(self, progress: Callable[[], Offsets], force: bool = False) -> bool:
        """See Outbox; a failed commit ends the session, and so do refusals for REFUSED_S_MAX."""
        del force
        if not self._committing:
            return False
        self._committing = False
        with self._first_error_latched():
            self._send_kept()
            member, fresh = self._consumer.member(), self._changed(progress)
            committed = self._producer.commit(fresh, member)
            self._open, self._sent = False, 0
            if not committed:
                self._refused()
                return False
        self._messages, self._rows = [], 0
        self._committed_s = self._clock.monotonic()
        self._refused_s, self._again_s, self._pause_s = None, 0.0, REFUSED_PAUSE_S
        self.committed.update(fresh)
        self._health.ok("broker")
        return True

    def forget(self, partitions: Sequence[Partition]) -> None:
        """See Outbox; aborts an open transaction that contains their decisions, and drops these."""
        for partition in partitions:
            self.committed.pop(partition, None)
        others = [message.without(partitions) for message in self._messages]
        sent = zip(others[: self._sent], self._messages, strict=False)
        if any(other is not message for other, message in sent):
            with self._first_error_latched():
                self._producer.abort()
            self._open, self._sent = False, 0
        self._messages = [message for message in others if message is not None]
        self._rows = sum(len(message.values) for message in self._messages)

    def _add(self, message: _Message) -> None:
        now_s = self._clock.monotonic()
        if not self._messages:
            self._began_s, self._due_s = now_s, now_s + self._interval_s
        self._messages.append(message)
        self._rows += len(message.values)
        with self._first_error_latched():
            if now_s >= max(self._committed_s + self._seconds_min, self._again_s):
                self._send_kept()

    def _send_kept(self) -> None:
        """Sends the messages that the open transaction does not have; begins one if none is open."""
        if not self._open:
            self._producer.begin()
            self._open = True
        for topic, keys, values, headers, _ in self._messages[self._sent :]:
            if headers is None:
                self._producer.send_many(topic, keys, values)
            else:
                self._producer.send(topic, keys[0], values[0], headers)
        self._sent = len(self._messages)

    def _refused(self) -> None:
        """Plans the next attempt; raises TransactionAbortedError if the group refuses for too long."""
        now_s = self._clock.monotonic()
        if self._refused_s is None:
            self._refused_s = now_s
        if now_s - self._refused_s > REFUSED_S_MAX or self._rows >= ROWS_KEPT_MAX:
            raise TransactionAbortedError(
                f"the group refuses the offsets of this member since {now_s - self._refused_s:.1f} s; the transaction"
                f" of {self._rows} records is aborted"
            )
        log.info("offsets refused during a rebalance: the transaction is sent again", records=self._rows)
        self._again_s = now_s + self._pause_s
        self._pause_s *= 2

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
