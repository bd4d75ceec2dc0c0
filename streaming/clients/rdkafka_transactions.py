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
ABORT_TIMEOUT_S, UNDO_TIMEOUT_S = 5.0, 2.0
# librdkafka is given so much more than the limit that it was told.
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
            # what was not delivered within the transaction's time is not kept
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
        with self._final("beginning a transaction"):
            self._producer.begin_transaction()
        self._open = True

    def commit(self, offsets: Mapping[Partition, tuple[int, str]], member: GroupMember) -> None:
        """See TransactionalProducerClient."""
        self._check_usable()
        give_up_s = time.monotonic() + COMMIT_TIMEOUT_S
        with self._final("delivering the records of a transaction"):
            self._flush(COMMIT_TIMEOUT_S)
        self.refuse_after_failure()
        if offsets:
            wanted = [
                TopicPartition(*partition, int(offset), metadata) for partition, (offset, metadata) in offsets.items()
            ]
            with self._final("adding offsets to a transaction"):
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
            # a commit that is tried again could hit what comes after
            self._abandon()
            raise self._failure from error
        self._open = False

    def abort(self) -> None:
        """See TransactionalProducerClient; after a failure there is nothing left to undo."""
        if self._failure is not None or not self._open:
            return
        try:
            with self._translated("undoing a transaction"):
                self._undo(ABORT_TIMEOUT_S)
        except BrokerError as error:
            self._failure = error
            self._abandon()
            raise

    def close(self, timeout_s: float) -> None:
        """Undo what is open and release everything; a failure that was raised before is not raised again."""
        self._undone(min(timeout_s, ABORT_TIMEOUT_S))
        self._abandon()

    def _undo(self, timeout_s: float) -> None:
        """Returns when the reports of what was undone are heard, too."""
        self._open = False
        self.undoing = True
        _within(timeout_s, self._producer.abort_transaction)
        self.undoing = False

    def _undone(self, timeout_s: float) -> bool:
        """Whether the transaction that was open could be undone."""
        if self._open and self._producer is not None:
            with contextlib.suppress(BrokerError), self._translated("undoing a transaction"):
                self._undo(timeout_s)
                return True
        return False

    def _after_commit(self, error: BrokerError) -> BrokerError:
        told = vendor_error(error)
        if isinstance(error, ProducerFencedError):
            return error
        if told is not None and told.txn_requires_abort() and self._undone(UNDO_TIMEOUT_S):
            return _nothing_kept(error)
        said = worded(told) if told is not None else str(error)
        return CommitUnknownError(
            f"Kafka at {self._servers}: it is not known whether the transaction was committed: {said}"
        )

    def _fatal(self) -> KafkaException | None:
        # after a fatal error every call for a transaction is refused with it
        try:
            self._producer.begin_transaction()
        except KafkaException as error:
            if error.args[0].fatal():
                return error.with_traceback(None)
        return None

    def _sending(self, topic: str) -> contextlib.AbstractContextManager[None]:
        return self._final(f"sending to {topic}")

    @contextlib.contextmanager
    def _final(self, action: str) -> Iterator[None]:
        """What is raised within ends this producer, before anything was committed."""
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
        self._undone(UNDO_TIMEOUT_S)
        self._abandon()
        return _nothing_kept(error)


def _nothing_kept(error: BrokerError) -> TransactionAbortedError:
    return TransactionAbortedError(f"{error}; nothing of the transaction is kept")


def _within(timeout_s: float, call: Callable[..., object], *arguments: object) -> None:
    """Make a call that takes a time limit last, and leave it alone in its thread where it does not keep it.

    Sending offsets to a coordinator whose node was killed has been seen to take minutes, whatever the limit.
    """
    outcome: list[BaseException | None] = []
    thread = threading.Thread(
        target=_make, args=(outcome, call, *arguments, timeout_s), name="cascade-transaction", daemon=True
    )
    # librdkafka ends with the last reference: an error that is kept must not hold one
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
