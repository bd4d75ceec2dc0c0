"""The transactional producer on kafka-python 3: records and offsets are committed together or not at all.

kafka-python waits without a limit for a coordinator that does not answer. This producer calls kafka-python's
transaction manager directly, with a limit on each wait. It corrects two more faults:

- After a record's delivery timed out, kafka-python can still commit the transaction. This producer waits for the
  delivery reports of all records before it sends offsets and commit.
- A fenced kafka-python producer asks for a new epoch (KIP-360), and with brokers before 2.7 it so fences its own
  successor. This producer never does: every error is final, and a new producer must be made.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from kafka import TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError
from kafka.structs import OffsetAndMetadata

from cascade.config import KafkaSettings
from cascade.errors import BrokerError, CommitUnknownError, TransactionAbortedError
from streaming.clients.kafka_errors import fenced_error, is_fenced, translated, worded
from streaming.clients.kafka_producer import UNDELIVERED_MAX, KafkaPythonProducer
from streaming.clients.protocol import GroupMember, Partition
from streaming.clients.unsent_requests import retry_unsent_requests

# The open transaction of a killed worker without a successor delays read_committed readers this long, and then until
# the coordinator's next check (every 10 s by default). A shorter timeout would abort the longest configurable
# transaction (10 s).
TRANSACTION_TIMEOUT_MS = 15_000
# An earlier open transaction is aborted first; a coordinator that moves to another node needs some 10 s.
INIT_TIMEOUT_S = 30.0
# For deliveries and offsets, and again for the commit; the transaction cannot take longer than its timeout.
COMMIT_TIMEOUT_S = TRANSACTION_TIMEOUT_MS / 1_000
ABORT_TIMEOUT_S = 5.0
# The abort after a failure only spares readers a wait: otherwise the next producer or the timeout aborts.
FAILURE_ABORT_TIMEOUT_S = 2.0
# The coordinator completes a transaction after its answer, and answers the next one with "retry" until then:
# kafka-python's default of 100 ms would delay many transactions.
RETRY_BACKOFF_MS = 10


class KafkaPythonTransactionalProducer(KafkaPythonProducer):
    """TransactionalProducerClient on kafka-python."""

    def __init__(
        self,
        kafka: KafkaSettings,
        transactional_id: str,
        undelivered_max: int = UNDELIVERED_MAX,
        bootstrap_timeout_s: float = 30.0,
    ) -> None:
        settings = {
            "transactional_id": transactional_id,
            "transaction_timeout_ms": TRANSACTION_TIMEOUT_MS,
            "retry_backoff_ms": RETRY_BACKOFF_MS,
        }
        super().__init__(kafka, undelivered_max, bootstrap_timeout_s, settings)
        self._open = False
        self._manager = self._producer._transaction_manager
        self._manager._supports_epoch_bump = lambda: False
        retry_unsent_requests(self._producer._sender._client)
        try:
            with translated(f"taking up the transactional id {transactional_id}", self._servers):
                self._wait(self._manager.initialize_transactions(), INIT_TIMEOUT_S)
        except BaseException:
            self._abandon()
            raise

    def begin(self) -> None:
        """See TransactionalProducerClient."""
        self._refuse_after_failure()
        with self._ended_by_errors("beginning a transaction"):
            self._manager.begin_transaction()
        self._open = True

    def commit(self, offsets: Mapping[Partition, tuple[int, str]], member: GroupMember) -> None:
        """See TransactionalProducerClient."""
        self._refuse_after_failure()
        deadline_s = time.monotonic() + COMMIT_TIMEOUT_S
        with self._ended_by_errors("delivering the records of a transaction"):
            self._producer.flush(timeout=COMMIT_TIMEOUT_S)
        self._reap()
        self._refuse_after_failure()
        with self._ended_by_errors("adding offsets to a transaction"):
            if offsets:
                sent = self._manager.send_offsets_to_transaction(_vendor_offsets(offsets), _member(member))
                self._wait(sent, max(deadline_s - time.monotonic(), 0.0))
            ended = self._manager.begin_commit()
        try:
            self._wait(ended, COMMIT_TIMEOUT_S)
        except KafkaError as error:
            self._failure = self._fenced(error) or CommitUnknownError(
                f"Kafka at {self._servers}: the transaction may or may not be committed: {worded(error)}"
            )
            # a repeated commit could commit a later transaction
            self._abandon()
            raise self._failure from error
        self._open = False

    def abort(self) -> None:
        """See TransactionalProducerClient; does nothing after a failure."""
        if self._failure is not None or not self._open:
            return
        try:
            with translated("aborting a transaction", self._servers):
                self._abort_transaction(ABORT_TIMEOUT_S)
        except BrokerError as error:
            self._failure = error
            self._abandon()
            raise
        self._undelivered.clear()

    def close(self, timeout_s: float) -> None:
        """Aborts an open transaction and releases all resources; does not raise an earlier failure again."""
        if self._open and self._failure is None:
            with contextlib.suppress(KafkaError):
                self._abort_transaction(min(timeout_s, ABORT_TIMEOUT_S))
        self._abandon()

    def _abort_transaction(self, timeout_s: float) -> None:
        self._open = False
        self._wait(self._manager.begin_abort(), timeout_s)
        # kafka-python starts a flush at each commit or abort, never ends it, and does not linger during a flush
        accumulator = self._producer._accumulator
        while accumulator.flush_in_progress():
            accumulator._flushes_in_progress.decrement()

    def _wait(self, result: Any, timeout_s: float) -> None:
        self._producer._sender.wakeup()
        if not result.wait(timeout_ms=timeout_s * 1_000):
            raise KafkaTimeoutError(f"no answer within {timeout_s:.3g} s")

    def _sending(self, topic: str) -> contextlib.AbstractContextManager[None]:
        return self._ended_by_errors(f"sending to {topic}")

    @contextlib.contextmanager
    def _ended_by_errors(self, action: str) -> Iterator[None]:
        """Ends this producer at an error, before the commit was sent."""
        try:
            with translated(action, self._servers):
                yield
        except BrokerError as error:
            self._failure = self._aborted(error, action)
            raise self._failure from error

    def _not_delivered(self, error: BaseException) -> BrokerError:
        return self._aborted(error, "a record was not delivered")

    def _aborted(self, error: BaseException, action: str) -> BrokerError:
        """Aborts the transaction, ends kafka-python's thread, and returns the error."""
        fenced = self._fenced(error)
        if fenced is None and self._open:
            with contextlib.suppress(KafkaError):
                self._abort_transaction(FAILURE_ABORT_TIMEOUT_S)
        self._abandon()
        text = str(error) if isinstance(error, BrokerError) else f"Kafka at {self._servers}: {action}: {worded(error)}"
        return fenced or TransactionAbortedError(f"{text}; the transaction is aborted")

    def _fenced(self, error: BaseException) -> BrokerError | None:
        if is_fenced(error) or is_fenced(error.__cause__) or is_fenced(self._manager.last_error):
            return fenced_error(self._servers)
        return None


def _vendor_offsets(offsets: Mapping[Partition, tuple[int, str]]) -> dict[TopicPartition, OffsetAndMetadata]:
    return {
        TopicPartition(*partition): OffsetAndMetadata(int(offset), metadata, -1)
        for partition, (offset, metadata) in offsets.items()
    }


def _member(member: GroupMember) -> Any:
    vendor: Any = member.vendor
    if vendor.generation_id < 0 or not vendor.member_id:
        # with other metadata the broker takes the client for a simple consumer and checks nothing
        raise KafkaError("the consumer is not a member of its group any more")
    return vendor
