"""The transactional producer on kafka-python 3: records and offsets are committed together or not at all.

kafka-python waits without a limit for a coordinator that does not answer. This producer calls kafka-python's
transaction manager directly, with a limit on each wait. It corrects two more faults:

- After a record's delivery timed out, kafka-python can still commit the transaction. This producer waits for the
  delivery reports of all records before it sends offsets and commit.
- A fenced kafka-python producer asks for a new epoch (KIP-360), and with brokers before 2.7 it so fences its own
  successor. This producer never does: every error is final, and a new producer must be made.
"""

from __future__ import annotations

from typing import Any

from kafka import TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError
from kafka.structs import OffsetAndMetadata

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import limits
from streaming.kafka.kafka_errors import fenced_error, is_fenced
from streaming.kafka.kafka_producer import KafkaPythonProducer
from streaming.kafka.protocol import GroupMember, Offsets
from streaming.kafka.transactions import TransactionalProducer
from streaming.kafka.unsent_requests import retry_unsent_requests

# The coordinator completes a transaction after its answer, and answers the next one with "retry" until then:
# kafka-python's default of 100 ms would delay many transactions.
RETRY_BACKOFF_MS = 10


class KafkaPythonTransactionalProducer(TransactionalProducer, KafkaPythonProducer):
    """TransactionalProducerClient on kafka-python."""

    def __init__(self, kafka: KafkaSettings, transactional_id: str) -> None:
        settings = {
            "transactional_id": transactional_id,
            "transaction_timeout_ms": limits.TRANSACTION_TIMEOUT_MS,
            "retry_backoff_ms": RETRY_BACKOFF_MS,
        }
        super().__init__(kafka, settings)
        self._manager = self._producer._transaction_manager
        self._manager._supports_epoch_bump = lambda: False
        retry_unsent_requests(self._producer._sender._client)
        self._take_up(
            transactional_id, lambda: self._wait(self._manager.initialize_transactions(), limits.INIT_TIMEOUT_S)
        )

    def _prepare_commit(self, offsets: Offsets, member: GroupMember, timeout_s: float) -> None:
        if offsets:
            self._wait(self._manager.send_offsets_to_transaction(_vendor_offsets(offsets), _member(member)), timeout_s)
        self._commit_result = self._manager.begin_commit()

    def _finish_commit(self, timeout_s: float) -> None:
        self._wait(self._commit_result, timeout_s)

    def _abort_transaction(self, timeout_s: float) -> None:
        self._wait(self._manager.begin_abort(), timeout_s)
        # kafka-python starts a flush at each commit or abort, never ends it, and does not linger during a flush
        accumulator = self._producer._accumulator
        while accumulator.flush_in_progress():
            accumulator._flushes_in_progress.decrement()
        self._undelivered.clear()

    def _fenced(self, error: BrokerError) -> BrokerError | None:
        return super()._fenced(error) or (fenced_error(self._servers) if is_fenced(self._manager.last_error) else None)

    def _wait(self, result: Any, timeout_s: float) -> None:
        self._producer._sender.wakeup()
        if not result.wait(timeout_ms=timeout_s * 1_000):
            raise KafkaTimeoutError(f"no answer within {timeout_s:.3g} s")


def _vendor_offsets(offsets: Offsets) -> dict[TopicPartition, OffsetAndMetadata]:
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
