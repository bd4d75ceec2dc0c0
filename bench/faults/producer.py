"""ProducerClient and TransactionalProducerClient on the simulated broker."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from bench.faults.broker import SimBroker
from bench.faults.consumer import Membership, commit_fate
from bench.faults.network import Link, RequestTimeout
from bench.faults.world import Life
from cascade.errors import BrokerError, CommitUnknownError, ProducerFencedError, TransactionAbortedError
from streaming.clients import Delivery, GroupMember, Headers, Partition

Told = Callable[[str, int], None]
_Entry = tuple[bytes | None, bytes | None, Headers]


class SimDelivery:
    """Some records on their way to the broker."""

    def __init__(self, producer: SimProducer, topic: str, records: int, give_up_s: float) -> None:
        self._producer = producer
        self._give_up_s = give_up_s
        self._told = False
        self.topic, self.records = topic, records
        self.kept = False
        self.error: BrokerError | None = None

    @property
    def settled(self) -> bool:
        """Whether the outcome is known."""
        if not self.kept and self.error is None and self._producer.now_s > self._give_up_s:
            self._producer.fail(self, BrokerError("a record was not delivered in time"))
        return self.kept or self.error is not None

    def done(self) -> bool:
        """See Delivery."""
        if self.settled and self.error is not None:
            raise self.error
        if self.kept and not self._told:
            self._told = True
            self._producer.delivered(self)
        return self.kept


class SimProducer:
    """An idempotent producer: what it sends arrives once and in order, or not at all.

    `session` names it in the records that it sends. `told` is called, with topic and number, when the caller learns
    that records are kept.
    """

    def __init__(self, broker: SimBroker, life: Life, session: str, told: Told) -> None:
        self._session, self._told = session, told
        self._broker, self._world, self._life = broker, broker.world, life
        self._link = Link(broker.network, life, "producer")
        self._waiting: deque[SimDelivery] = deque()
        self._failure: BrokerError | None = None
        self._transaction: tuple[str, int] | None = None
        # a batch did not arrive: the broker takes none after it, their numbers do not follow
        self._broken = False

    @property
    def now_s(self) -> float:
        """Seconds since the run began."""
        return self._world.now_s

    def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        timestamp_ms: int | None = None,
    ) -> Delivery:
        """See ProducerClient; the broker stamps all records."""
        del timestamp_ms
        return self._post(topic, [(key, value, headers)])

    def send_many(
        self,
        topic: str,
        keys: Sequence[bytes | None],
        values: Sequence[bytes | None],
        timestamps_ms: Sequence[int] | None = None,
    ) -> Delivery:
        """See ProducerClient; the broker stamps all records."""
        del timestamps_ms
        return self._post(topic, [(key, value, ()) for key, value in zip(keys, values, strict=True)])

    def undelivered(self) -> int:
        """See ProducerClient."""
        while self._waiting and self._waiting[0].settled:
            self._waiting.popleft()
        return sum(one.records for one in self._waiting)

    def flush(self, timeout_s: float) -> None:
        """See ProducerClient."""
        self._life.point("flush")
        self._world.wait(self.now_s + timeout_s, lambda: self._life.dead or all(one.settled for one in self._waiting))
        self._life.point("flushed")
        # looking at them finds those that were not delivered in time
        left = self.undelivered()
        self._raise_failure()
        if left:
            raise BrokerError("flushing: records are still on their way")

    def close(self, timeout_s: float) -> None:
        """See ProducerClient."""
        try:
            self.flush(timeout_s)
        finally:
            self._link.cut()

    def delivered(self, delivery: SimDelivery) -> None:
        """The caller has learnt that records are kept."""
        self._told(delivery.topic, delivery.records)

    def fail(self, delivery: SimDelivery, error: BrokerError) -> None:
        """Some records are not kept, or not known to be; nothing more may be sent."""
        if not delivery.kept and delivery.error is None:
            delivery.error = error
            self._failure = self._failure or error
            if isinstance(error, ProducerFencedError):
                self._world.fire("producer-fenced")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _post(self, topic: str, entries: list[_Entry]) -> SimDelivery:
        world, weather = self._world, self._broker.network.weather
        self._life.point(f"send {len(entries)} to {topic}")
        self._raise_failure()
        delivery = SimDelivery(self, topic, len(entries), self.now_s + weather.delivery_timeout_s)
        self._waiting.append(delivery)
        transaction, sent_s = self._transaction, self.now_s
        fails = world.happens(weather.undelivered_share)
        # the broker has some of them, and then is lost
        arriving = entries[: world.chance.randint(0, len(entries))] if fails else entries

        def arrive() -> None:
            if self._broken:
                return
            self._broken = fails
            try:
                for key, value, headers in arriving:
                    self._broker.append(topic, key, value, headers, self._session, sent_s, transaction)
            except BrokerError as error:
                self.fail(delivery, error)
                return
            world.at(weather.latency_s * world.chance.random(), answer)

        def answer() -> None:
            if fails:
                world.fire("delivery-failed")
                self.fail(delivery, BrokerError("a record was not delivered: no leader"))
            elif delivery.error is None:
                delivery.kept = True

        self._link.send(arrive)
        self._life.point("sent")
        return delivery


class SimTransactionalProducer(SimProducer):
    """A producer with transactions, of the client library that refuses the least: what it may be misused for, it does.

    After a commit of unknown outcome it would begin another transaction, which the late commit can hit.
    """

    def __init__(self, broker: SimBroker, life: Life, session: str, told: Told, transactional_id: str) -> None:
        super().__init__(broker, life, session, told)
        self._id = transactional_id
        try:
            _, epoch = self._link.call(
                f"initialise {transactional_id}", lambda: broker.transactions.initialise(transactional_id)
            )
        except BaseException:
            self._link.cut()
            raise
        self._ids = (transactional_id, epoch)
        self._open = False
        self._in_transaction: list[SimDelivery] = []

    def delivered(self, delivery: SimDelivery) -> None:
        """What is delivered is not kept before the commit."""

    def begin(self) -> None:
        """See TransactionalProducerClient."""
        self._life.point("begin")
        self._raise_failure()
        self._transaction, self._open = self._ids, True
        self._waiting.clear()
        self._in_transaction.clear()

    def commit(self, offsets: Mapping[Partition, tuple[int, str]], member: GroupMember) -> None:
        """See TransactionalProducerClient."""
        broker, transactions = self._broker, self._broker.transactions
        kept, asked = dict(offsets), broker.next_asked()
        membership: Membership = member.vendor  # type: ignore[assignment]  # ours

        def add() -> None:
            broker.group.check(membership.member, membership.generation)
            transactions.add_offsets(*self._ids, kept, asked)

        self._deliver()
        try:
            if kept:
                self._link.call("add offsets to the transaction", add)
        except ProducerFencedError:
            self._world.fire("producer-fenced")
            raise
        except BrokerError as error:
            raise self._undone(error) from error
        try:
            self._link.call(
                "commit the transaction", lambda: transactions.end(*self._ids, commit=True), commit_fate(broker)
            )
        except RequestTimeout as error:
            self._open = False
            raise CommitUnknownError(f"it is not known whether the transaction was committed: {error}") from error
        except ProducerFencedError:
            self._world.fire("producer-fenced")
            raise
        except BrokerError as error:
            raise self._undone(error) from error
        self._open = False
        for delivery in self._in_transaction:
            self._told(delivery.topic, delivery.records)

    def abort(self) -> None:
        """See TransactionalProducerClient."""
        if self._open and self._failure is None:
            self._open = False
            self._link.call("abort the transaction", lambda: self._broker.transactions.end(*self._ids, commit=False))
            self._waiting.clear()

    def close(self, timeout_s: float) -> None:
        """See TransactionalProducerClient."""
        del timeout_s
        self._life.point("close")
        try:
            self.abort()
        finally:
            self._link.cut()

    def _post(self, topic: str, entries: list[_Entry]) -> SimDelivery:
        delivery = super()._post(topic, entries)
        self._in_transaction.append(delivery)
        return delivery

    def _deliver(self) -> None:
        """Wait until the broker has every record of the transaction."""
        try:
            self.flush(self._broker.network.weather.delivery_timeout_s)
        except ProducerFencedError:
            raise
        except BrokerError as error:
            raise self._undone(error) from error

    def _undone(self, error: BrokerError) -> TransactionAbortedError:
        """Nothing will be kept: undo it where the broker listens, else the next producer or the timeout does."""
        self._failure = TransactionAbortedError(f"{error}; nothing of the transaction is kept")
        if self._open:
            self._open = False
            try:
                self._link.call("undo the transaction", lambda: self._broker.transactions.end(*self._ids, commit=False))
            except BrokerError:
                self._world.tell(self._life.name, "the transaction could not be undone")
        return self._failure
