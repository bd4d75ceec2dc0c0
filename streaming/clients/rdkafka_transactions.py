"""The transactional producer on librdkafka: every call has a time limit, every error says what is committed."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from cascade.config import KafkaSettings
from cascade.errors import BrokerError, CommitUnknownError, ProducerFencedError, TransactionAbortedError
from streaming.clients.protocol import GroupMember, Partition
from streaming.clients.rdkafka_producer import UNDELIVERED_MAX, RdkafkaProducer
from streaming.clients.rdkafka_settings import vendor_error, worded

# As for kafka-python, for the same reasons.
TRANSACTION_TIMEOUT_MS = 15_000
INIT_TIMEOUT_S = 30.0
COMMIT_TIMEOUT_S = TRANSACTION_TIMEOUT_MS / 1_000
ABORT_TIMEOUT_S, FAILURE_ABORT_TIMEOUT_S = 5.0, 2.0
# A call of librdkafka may exceed its own time limit by this much.
GRACE_S = 1.0


class RdkafkaTransactionalProducer(RdkafkaProducer):
    """TransactionalProducerClient on librdkafka."""

    def __init__(
        self,
        kafka: KafkaSettings,
        transactional_id: str,
        undelivered_max: int = UNDELIVERED_MAX,
        bootstrap_timeout_s: float = 30.0,
    ) -> None:
        settings = {
            "transactional.id": transactional_id,
            "transaction.timeout.ms": TRANSACTION_TIMEOUT_MS,
            # a later delivery would be aborted anyway
            "delivery.timeout.ms": TRANSACTION_TIMEOUT_MS,
        }
        self._open = False
        super().__init__(kafka, undelivered_max, bootstrap_timeout_s, settings)
        try:
            with self._translated(f"taking up the transactional id {transactional_id}"):
                _within(INIT_TIMEOUT_S, self._producer.init_transactions)
        except BaseException:
            self._abandon()
            raise

    def begin(self) -> None:
        """See TransactionalProducerClient."""
        self._check_usable()
        with self._ended_by_errors("beginning a transaction"):
            self._producer.begin_transaction()
        self._open = True

    def commit(self, offsets: Mapping[Partition, tuple[int, str]], member: GroupMember) -> None:
        """See TransactionalProducerClient."""
        self._check_usable()
        give_up_s = time.monotonic() + COMMIT_TIMEOUT_S
        with self._ended_by_errors("delivering the records of a transaction"):
            self._flush(COMMIT_TIMEOUT_S)
        self.refuse_after_failure()
        if offsets:
            wanted = [
                TopicPartition(*partition, int(offset), metadata) for partition, (offset, metadata) in offsets.items()
            ]
            with self._ended_by_errors("adding offsets to a transaction"):
                if member.vendor is None:
                    raise BrokerError(
                        f"Kafka at {self._servers}: committing: the consumer is not a member of its group any more"
                    )
                left_s = max(give_up_s - time.monotonic(), 0.1)
                _within(left_s, self._producer.send_offsets_to_transaction, wanted, member.vendor)
        try:
            with self._translated("committing"):
                _within(COMMIT_TIMEOUT_S, self._producer.commit_transaction)
        except BrokerError as error:
            self._failure = self._after_commit(error)
            # a repeated commit could commit a later transaction
            self._abandon()
            raise self._failure from error
        self._open = False

    def abort(self) -> None:
        """See TransactionalProducerClient; does nothing after a failure."""
        if self._failure is not None or not self._open:
            return
        try:
            with self._translated("aborting a transaction"):
                self._abort_transaction(ABORT_TIMEOUT_S)
        except BrokerError as error:
            self._failure = error
            self._abandon()
            raise

    def close(self, timeout_s: float) -> None:
        """Aborts an open transaction and releases all resources; does not raise an earlier failure again."""
        self._aborted(min(timeout_s, ABORT_TIMEOUT_S))
        self._abandon()

    def _abort_transaction(self, timeout_s: float) -> None:
        """Aborts the open transaction, and processes the delivery reports of its records."""
        self._open = False
        self.aborting = True
        _within(timeout_s, self._producer.abort_transaction)
        self.aborting = False

    def _aborted(self, timeout_s: float) -> bool:
        """Aborts the open transaction, if there is one; returns whether it was aborted."""
        if self._open and self._producer is not None:
            with contextlib.suppress(BrokerError), self._translated("aborting a transaction"):
                self._abort_transaction(timeout_s)
                return True
        return False

    def _after_commit(self, error: BrokerError) -> BrokerError:
        cause = vendor_error(error)
        if isinstance(error, ProducerFencedError):
            return error
        if cause is not None and cause.txn_requires_abort() and self._aborted(FAILURE_ABORT_TIMEOUT_S):
            return _aborted_error(error)
        text = worded(cause) if cause is not None else str(error)
        return CommitUnknownError(f"Kafka at {self._servers}: the transaction may or may not be committed: {text}")

    def _fatal(self) -> KafkaException | None:
        # after a fatal error every transactional call raises it
        try:
            self._producer.begin_transaction()
        except KafkaException as error:
            if error.args[0].fatal():
                return error.with_traceback(None)
        return None

    def _sending(self, topic: str) -> contextlib.AbstractContextManager[None]:
        return self._ended_by_errors(f"sending to {topic}")

    @contextlib.contextmanager
    def _ended_by_errors(self, action: str) -> Iterator[None]:
        """Ends this producer at an error, before the commit was sent."""
        try:
            with self._translated(action):
                yield
        except BrokerError as error:
            self._failure = self._failure or self._ended(error)
            raise self._failure from error

    def _ended(self, error: BrokerError) -> BrokerError:
        if isinstance(error, ProducerFencedError):
            self._abandon()
            return error
        self._aborted(FAILURE_ABORT_TIMEOUT_S)
        self._abandon()
        return _aborted_error(error)


def _aborted_error(error: BrokerError) -> TransactionAbortedError:
    return TransactionAbortedError(f"{error}; the transaction is aborted")


def _within(timeout_s: float, call: Callable[..., object], *arguments: object) -> None:
    """Runs a call, whose last argument is its time limit, in a thread; raises after the limit and GRACE_S.

    librdkafka has been seen to send offsets to the coordinator of a killed node for minutes, whatever the limit. The
    thread is then left alone.
    """
    outcome: list[BaseException | None] = []
    thread = threading.Thread(
        target=_make, args=(outcome, call, *arguments, timeout_s), name="cascade-transaction", daemon=True
    )
    # librdkafka ends with the last reference: the traceback of an error must not have one
    del call
    thread.start()
    thread.join(timeout_s + GRACE_S)
    if not outcome:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"no answer within {timeout_s:.3g} s"))
    if outcome[0] is not None:
        raise outcome[0]


def _make(outcome: list[BaseException | None], call: Callable[..., object], *arguments: object) -> None:
    try:
        call(*arguments)
    except BaseException as error:
        outcome.append(error.with_traceback(None))
    else:
        outcome.append(None)
