"""ProducerClient and TransactionalProducerClient on the simulated broker."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from bench.faults.broker import SimBroker
from bench.faults.clock import EPOCH_S
from bench.faults.consumer import commit_fate
from bench.faults.group import Member, OffsetsRefused
from bench.faults.network import Connection, RequestTimeout
from bench.faults.world import Life
from cascade.errors import BrokerError, CommitUnknownError, ProducerFencedError, TransactionAbortedError
from streaming.kafka import Delivery, GroupMember, Headers, Partition

OnAcknowledged = Callable[[str, int], None]
_Entry = tuple[bytes | None, bytes | None, Headers]


class SimDelivery:
    """A batch of records in flight."""

    def __init__(self, producer: SimProducer, topic: str, records: int, give_up_s: float) -> None:
        self._producer = producer
        self._give_up_s = give_up_s
        self._reported = False
        self.topic, self.records = topic, records
        self.acknowledged = False
        self.error: BrokerError | None = None
        # set with `acknowledged`, by the clock that the worker reads
        self.done_s = 0.0

    @property
    def settled(self) -> bool:
        """Whether the producer has the delivery report."""
        if not self.acknowledged and self.error is None and self._producer.now_s > self._give_up_s:
            self._producer.fail(self, BrokerError("a record was not delivered in time"))
        return self.acknowledged or self.error is not None

    def done(self) -> bool:
        """See Delivery."""
        if self.settled and self.error is not None:
            raise self.error
        if self.acknowledged and not self._reported:
            self._reported = True
            self._producer.delivered(self)
        return self.acknowledged


class SimProducer:
    """An idempotent producer: its records arrive once and in order, or not at all.

    session: becomes the `sender` of its records.
    on_acknowledged: called with topic and number of records when the caller gets their delivery report.
    """

    def __init__(self, broker: SimBroker, life: Life, session: str, on_acknowledged: OnAcknowledged) -> None:
        self._session, self._on_acknowledged = session, on_acknowledged
        self._broker, self._world, self._life = broker, broker.world, life
        self._connection = Connection(broker.network, life, "producer")
        self._waiting: deque[SimDelivery] = deque()
        self._failure: BrokerError | None = None
        self._transaction: tuple[str, int] | None = None
        # after a batch that did not arrive, the broker refuses the later ones: their sequence numbers do not follow
        self._sequence_broken = False

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
        return sum(delivery.records for delivery in self._waiting)

    def flush(self, timeout_s: float) -> None:
        """See ProducerClient."""

        def flushed() -> bool:
            return self._life.dead or all(delivery.settled for delivery in self._waiting)

        self._life.fault_point("flush")
        self._world.wait(self.now_s + timeout_s, flushed)
        self._life.fault_point("flushed")
        # before the failure is raised: this also fails what was not delivered in time
        undelivered = self.undelivered()
        self._raise_failure()
        if undelivered:
            raise BrokerError(f"flushing: {undelivered} records are in flight after {timeout_s:g} s")

    def close(self, timeout_s: float) -> None:
        """See ProducerClient."""
        try:
            self.flush(timeout_s)
        finally:
            self._connection.cut()

    def delivered(self, delivery: SimDelivery) -> None:
        """Report acknowledged records to the caller."""
        self._on_acknowledged(delivery.topic, delivery.records)

    def fail(self, delivery: SimDelivery, error: BrokerError) -> None:
        """Fail a delivery that was not acknowledged, and with it the producer: it sends no more."""
        if not delivery.acknowledged and delivery.error is None:
            delivery.error = error
            self._failure = self._failure or error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _post(self, topic: str, entries: list[_Entry]) -> SimDelivery:
        world, faults = self._world, self._broker.network.faults
        self._life.fault_point(f"send {len(entries)} to {topic}")
        self._raise_failure()
        delivery = SimDelivery(self, topic, len(entries), self.now_s + faults.delivery_timeout_s)
        self._waiting.append(delivery)
        transaction, sent_s = self._transaction, self.now_s
        fails = world.happens(faults.undelivered_share)
        # a batch that fails arrives in part
        arriving = entries[: world.chance.randint(0, len(entries))] if fails else entries

        def arrive() -> None:
            if self._sequence_broken:
                return
            self._sequence_broken = fails
            try:
                for key, value, headers in arriving:
                    self._broker.append(topic, key, value, headers, self._session, sent_s, transaction)
            except BrokerError as error:
                self.fail(delivery, error)
                return
            world.at(faults.latency_s * world.chance.random(), answer)

        def answer() -> None:
            if fails:
                world.fire("delivery-failed")
                self.fail(delivery, BrokerError("a record was not delivered: no leader"))
            elif delivery.error is None:
                delivery.acknowledged, delivery.done_s = True, EPOCH_S + self.now_s

        self._connection.send(arrive)
        self._life.fault_point("sent")
        return delivery


class SimTransactionalProducer(SimProducer):
    """A transactional producer that refuses no misuse, as the most lenient client library.

    After a commit with an unknown outcome it begins another transaction, which the late commit may then end.
    """

    def __init__(
        self, broker: SimBroker, life: Life, session: str, on_acknowledged: OnAcknowledged, transactional_id: str
    ) -> None:
        super().__init__(broker, life, session, on_acknowledged)
        self._id = transactional_id
        try:
            _, epoch = self._connection.call(
                f"initialise {transactional_id}", lambda: broker.transactions.initialise(transactional_id)
            )
        except BaseException:
            self._connection.cut()
            raise
        self._ids = (transactional_id, epoch)
        self._open = False
        self._in_transaction: list[SimDelivery] = []

    def delivered(self, delivery: SimDelivery) -> None:
        """Report nothing: `commit` reports the records."""

    def begin(self) -> None:
        """See TransactionalProducerClient."""
        self._life.fault_point("begin")
        self._raise_failure()
        self._transaction, self._open = self._ids, True
        self._waiting.clear()
        self._in_transaction.clear()

    def commit(self, offsets: Mapping[Partition, tuple[int, str]], member: GroupMember) -> bool:
        """See TransactionalProducerClient."""
        broker = self._broker
        offsets, request_number = dict(offsets), broker.next_request_number()
        group_member, generation = cast(tuple[Member, int], member.vendor)  # of SimConsumer.member

        def add() -> None:
            broker.group.check(group_member, generation)
            broker.transactions.add_offsets(*self._ids, offsets, request_number)

        try:
            if offsets:
                self._connection.call("add offsets to the transaction", add)
            self.flush(broker.network.faults.delivery_timeout_s)
            self._commit_on_broker()
        except OffsetsRefused:
            self.abort()
            return False
        except (ProducerFencedError, CommitUnknownError):
            raise
        except BrokerError as error:
            raise self._aborted(error) from error
        self._open = False
        for delivery in self._in_transaction:
            self._on_acknowledged(delivery.topic, delivery.records)
        return True

    def abort(self) -> None:
        """See TransactionalProducerClient."""
        if self._open and self._failure is None:
            self._open = False
            self._abort_on_broker()
            self._waiting.clear()

    def close(self, timeout_s: float) -> None:
        """See TransactionalProducerClient."""
        del timeout_s
        self._life.fault_point("close")
        try:
            self.abort()
        finally:
            self._connection.cut()

    def _commit_on_broker(self) -> None:
        broker = self._broker
        try:
            self._connection.call(
                "commit the transaction", lambda: broker.transactions.end(*self._ids, commit=True), commit_fate(broker)
            )
        except RequestTimeout as error:
            self._open = False
            raise CommitUnknownError(f"the outcome of the commit is unknown: {error}") from error

    def _abort_on_broker(self) -> None:
        self._connection.call("abort the transaction", lambda: self._broker.transactions.end(*self._ids, commit=False))

    def _post(self, topic: str, entries: list[_Entry]) -> SimDelivery:
        delivery = super()._post(topic, entries)
        self._in_transaction.append(delivery)
        return delivery

    def _aborted(self, error: BrokerError) -> TransactionAbortedError:
        """Abort after an error; if the broker does not answer, the next producer or the timeout aborts it."""
        self._failure = TransactionAbortedError(f"{error}; the transaction is aborted")
        if self._open:
            self._open = False
            try:
                self._abort_on_broker()
            except BrokerError:
                self._world.log(self._life.name, "cannot abort the transaction")
        return self._failure
