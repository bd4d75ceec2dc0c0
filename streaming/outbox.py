"""The way out: decisions and dead letters to the broker, and the offsets that say which records have theirs.

With at-least-once delivery a record counts as decided when the broker keeps its decision, and offsets are committed
now and then. With exactly-once delivery decisions, dead letters and offsets are one transaction: all show at once, or
none does. There, any failure ends the session: what the open transaction held is decided again by the next one, from
the committed offsets on, and the broker shows nobody the first attempt.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import structlog

from cascade.columns import Float64, Int64
from cascade.errors import BrokerError, TransactionAbortedError
from cascade.ledger import Path
from cascade.protocols import Clock
from streaming.clients import (
    ConsumerClient,
    Delivery,
    Headers,
    Partition,
    ProducerClient,
    TransactionalProducerClient,
)
from streaming.decisions import Places
from streaming.health import HealthState

log = structlog.get_logger()
# While the member joins, its commit may meet a broker that is a generation ahead, and the session would be over. A join
# waits for the members' heartbeats, two seconds apart; the broker gives a transaction ten.
JOIN_PATIENCE_S = 4.0
# Commits of offsets that are refused for so long will not be taken by this member any more.
REFUSED_S_MAX = 30.0
Offsets = Mapping[Partition, tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Sent:
    """Decisions (or a dead letter) on their way: `offsets` of their records by partition, and what the ledger is told.

    `start_ms` float64: from when each one's latency counts, ms since the epoch. `path` is empty for a dead letter.
    `places`: where each one's transaction lies, in the same order; None for a dead letter.
    """

    offsets: dict[Partition, Int64]
    start_ms: Float64
    path: Path | Literal[""]
    cause: str | None
    places: Places | None = None


class Outbox(Protocol):
    """Sends records and commits offsets; one thread uses it."""

    def send(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers, sent: Sent) -> None:
        """Send one record."""
        ...

    def send_many(self, topic: str, keys: Sequence[bytes], values: Sequence[bytes], sent: Sent) -> None:
        """Send records of one topic, in order."""
        ...

    @property
    def pending(self) -> int:
        """What was sent and is not known to be kept, in calls."""
        ...

    @property
    def committed(self) -> Offsets:
        """What was committed last, of partitions for which anything was."""
        ...

    def advance(self, force: bool = False) -> None:
        """Hear of what is kept, and commit where it is time, or with `force` now; raises BrokerError."""
        ...

    def forget(self, partitions: Iterable[Partition]) -> None:
        """The partitions are another's: nothing is committed for them any more; raises BrokerError where it must."""
        ...


class AtLeastOnceOutbox:
    """An idempotent producer, and offsets that follow what it has delivered.

    `progress` gives what each partition's commit would say now, `decided` is told of records whose decision is kept,
    `kept` of everything that is.
    """

    def __init__(
        self,
        producer: ProducerClient,
        consumer: ConsumerClient,
        health: HealthState,
        clock: Clock,
        interval_s: float,
        progress: Callable[[], Offsets],
        decided: Callable[[Sent], None],
        kept: Callable[[Sent], None],
    ) -> None:
        self._producer, self._consumer, self._health, self._clock = producer, consumer, health, clock
        self._interval_s = interval_s
        self._progress, self._decided, self._kept = progress, decided, kept
        self._waiting: deque[tuple[Delivery, Sent]] = deque()
        self._committed: dict[Partition, tuple[int, str]] = {}
        self._due_s = clock.monotonic() + interval_s
        self._refused_since_s: float | None = None

    def send(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers, sent: Sent) -> None:
        """See Outbox."""
        self._waiting.append((self._producer.send(topic, key, value, headers), sent))

    def send_many(self, topic: str, keys: Sequence[bytes], values: Sequence[bytes], sent: Sent) -> None:
        """See Outbox."""
        self._waiting.append((self._producer.send_many(topic, keys, values), sent))

    @property
    def pending(self) -> int:
        """See Outbox."""
        return len(self._waiting)

    @property
    def committed(self) -> Offsets:
        """See Outbox."""
        return self._committed

    def advance(self, force: bool = False) -> None:
        """See Outbox; a commit that fails is tried again at the next interval, for `REFUSED_S_MAX`."""
        while self._waiting and self._waiting[0][0].done():
            _, sent = self._waiting.popleft()
            self._decided(sent)
            self._kept(sent)
        now_s = self._clock.monotonic()
        if not force and now_s < self._due_s:
            return
        self._due_s = now_s + self._interval_s
        fresh = {one: what for one, what in self._progress().items() if what != self._committed.get(one)}
        if not fresh:
            return
        try:
            self._consumer.commit(fresh)
        except BrokerError as error:
            log.warning("commit failed", error=str(error))
            self._health.waiting("broker", str(error))
            if self._refused_since_s is None:
                self._refused_since_s = now_s
            if self._clock.monotonic() - self._refused_since_s > REFUSED_S_MAX:
                raise
            return
        self._refused_since_s = None
        self._committed.update(fresh)
        self._health.ok("broker")

    def forget(self, partitions: Iterable[Partition]) -> None:
        """See Outbox."""
        for partition in partitions:
            self._committed.pop(partition, None)
            for _, sent in self._waiting:
                sent.offsets.pop(partition, None)


class ExactlyOnceOutbox:
    """A transactional producer; a transaction begins with the first record and is committed `interval_s` later.

    `progress`, `decided` and `kept` as for AtLeastOnceOutbox; `decided` is told within the commit, just before it, so
    that `progress` counts what the transaction holds.
    """

    def __init__(
        self,
        producer: TransactionalProducerClient,
        consumer: ConsumerClient,
        health: HealthState,
        clock: Clock,
        interval_s: float,
        progress: Callable[[], Offsets],
        decided: Callable[[Sent], None],
        kept: Callable[[Sent], None],
    ) -> None:
        self._producer, self._consumer, self._health, self._clock = producer, consumer, health, clock
        self._interval_s = interval_s
        self._progress, self._decided, self._kept = progress, decided, kept
        self._held: list[Sent] = []
        self._committed: dict[Partition, tuple[int, str]] = {}
        self._due_s = 0.0
        self._failure: BrokerError | None = None

    def send(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers, sent: Sent) -> None:
        """See Outbox."""
        with self._final():
            self._begin()
            self._producer.send(topic, key, value, headers)
        self._held.append(sent)

    def send_many(self, topic: str, keys: Sequence[bytes], values: Sequence[bytes], sent: Sent) -> None:
        """See Outbox."""
        with self._final():
            self._begin()
            self._producer.send_many(topic, keys, values)
        self._held.append(sent)

    @property
    def pending(self) -> int:
        """See Outbox."""
        return len(self._held)

    @property
    def committed(self) -> Offsets:
        """See Outbox."""
        return self._committed

    def advance(self, force: bool = False) -> None:
        """See Outbox; a commit that fails ends the session."""
        now_s = self._clock.monotonic()
        if not self._held or not (force or now_s >= self._due_s):
            return
        member = self._consumer.member()
        if not (force or member.settled or now_s >= self._due_s + JOIN_PATIENCE_S):
            return
        with self._final():
            for sent in self._held:
                self._decided(sent)
            fresh = {one: what for one, what in self._progress().items() if what != self._committed.get(one)}
            self._producer.commit(fresh, member)
        held, self._held = self._held, []
        self._committed.update(fresh)
        for sent in held:
            self._kept(sent)
        self._health.ok("broker")

    def forget(self, partitions: Iterable[Partition]) -> None:
        """See Outbox; an open transaction may hold decisions of those partitions, so it is undone, and the session."""
        gone = list(partitions)
        for partition in gone:
            self._committed.pop(partition, None)
        if self._held:
            self._producer.abort()
            numbers = ", ".join(str(number) for _, number in gone)
            raise TransactionAbortedError(f"partitions {numbers} were lost with decisions in an open transaction")

    def _begin(self) -> None:
        if not self._held:
            self._producer.begin()
            self._due_s = self._clock.monotonic() + self._interval_s

    @contextlib.contextmanager
    def _final(self) -> Iterator[None]:
        """What fails within is the end: raised again at each later try, so that nothing is counted or sent twice.

        The end of a session still revokes partitions, and so asks for what is held to be committed.
        """
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except BrokerError as error:
            self._failure = error
            raise
