"""The transactional producer on kafka-python 3: records and offsets are kept together or not at all.

The vendor waits without end for a coordinator that does not answer, so its transaction manager is driven directly here,
with a limit on each wait. Two more of its habits would break the promise:

- A record whose delivery timed out leaves the vendor's transaction fit to be committed. Here everything is delivered,
  and looked at, before offsets and commit are sent.
- A producer whose epoch is over asks for a new one (KIP-360), and with brokers before 2.7 so fences the successor that
  has fenced it. Here it never does: every error is final for the producer, and the next one begins anew.
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

# A worker that was killed, and has no successor, holds back the readers of its partitions for so long (and then until
# its coordinator next looks, every 10 s by default). Less would end the longest transaction that can be configured
# (10 s) before it is committed.
TRANSACTION_TIMEOUT_MS = 15_000
# What an earlier producer left open is aborted first; a coordinator that moves to another node needs some 10 s.
INIT_TIMEOUT_S = 30.0
# For the deliveries and the offsets, and again for the end; past the timeout of the transaction, waiting is in vain.
COMMIT_TIMEOUT_S = TRANSACTION_TIMEOUT_MS / 1_000
ABORT_TIMEOUT_S = 5.0
# Undoing what failed only spares readers a wait: the next producer, or the timeout, does it otherwise.
UNDO_TIMEOUT_S = 2.0
# The coordinator ends a transaction behind its answer, and puts off the next one until then: the vendor's 100 ms would
# be added to many a transaction.
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
        with self._final("beginning a transaction"):
            self._manager.begin_transaction()
        self._open = True

    def commit(self, offsets: Mapping[Partition, tuple[int, str]], member: GroupMember) -> None:
        """See TransactionalProducerClient."""
        self._refuse_after_failure()
        deadline_s = time.monotonic() + COMMIT_TIMEOUT_S
        with self._final("delivering the records of a transaction"):
            self._producer.flush(timeout=COMMIT_TIMEOUT_S)
        self._reap()
        self._refuse_after_failure()
        with self._final("adding offsets to a transaction"):
            if offsets:
                sent = self._manager.send_offsets_to_transaction(_vendor_offsets(offsets), _member(member))
                self._wait(sent, max(deadline_s - time.monotonic(), 0.0))
            ended = self._manager.begin_commit()
        try:
            self._wait(ended, COMMIT_TIMEOUT_S)
        except KafkaError as error:
            self._failure = self._fenced(error) or CommitUnknownError(
                f"Kafka at {self._servers}: it is not known whether the transaction was committed: {worded(error)}"
            )
            # a commit that is tried again could hit what comes after
            self._abandon()
            raise self._failure from error
        self._open = False

    def abort(self) -> None:
        """See TransactionalProducerClient; after a failure there is nothing left to undo."""
        if self._failure is not None or not self._open:
            return
        try:
            with translated("undoing a transaction", self._servers):
                self._undo(ABORT_TIMEOUT_S)
        except BrokerError as error:
            self._failure = error
            self._abandon()
            raise
        self._undelivered.clear()

    def close(self, timeout_s: float) -> None:
        """Undo what is open and release everything; a failure that was raised before is not raised again."""
        if self._open and self._failure is None:
            with contextlib.suppress(KafkaError):
                self._undo(min(timeout_s, ABORT_TIMEOUT_S))
        self._abandon()

    def _undo(self, timeout_s: float) -> None:
        self._open = False
        self._wait(self._manager.begin_abort(), timeout_s)
        # the vendor begins a flush at each end with records under way and ends none, and then never lingers again
        accumulator = self._producer._accumulator
        while accumulator.flush_in_progress():
            accumulator._flushes_in_progress.decrement()

    def _wait(self, result: Any, timeout_s: float) -> None:
        self._producer._sender.wakeup()
        if not result.wait(timeout_ms=timeout_s * 1_000):
            raise KafkaTimeoutError(f"no answer within {timeout_s:.3g} s")

    def _sending(self, topic: str) -> contextlib.AbstractContextManager[None]:
        return self._final(f"sending to {topic}")

    @contextlib.contextmanager
    def _final(self, action: str) -> Iterator[None]:
        """What is raised within ends this producer, before anything was committed."""
        try:
            with translated(action, self._servers):
                yield
        except BrokerError as error:
            self._failure = self._aborted(error, action)
            raise self._failure from error

    def _not_delivered(self, error: BaseException) -> BrokerError:
        return self._aborted(error, "a record was not delivered")

    def _aborted(self, error: BaseException, action: str) -> BrokerError:
        """Undo the transaction, end the vendor's thread, and say so."""
        fenced = self._fenced(error)
        if fenced is None and self._open:
            with contextlib.suppress(KafkaError):
                self._undo(UNDO_TIMEOUT_S)
        self._abandon()
        said = str(error) if isinstance(error, BrokerError) else f"Kafka at {self._servers}: {action}: {worded(error)}"
        return fenced or TransactionAbortedError(f"{said}; nothing of the transaction is kept")

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
        # the broker would take it for a client outside the group's protocol, and check nothing
        raise KafkaError("the consumer is not a member of its group any more")
    return vendor
