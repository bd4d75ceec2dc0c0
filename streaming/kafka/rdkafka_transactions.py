"""The transactional producer on librdkafka."""

from __future__ import annotations

from confluent_kafka import KafkaError, KafkaException

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import limits
from streaming.kafka.protocol import GroupMember, Offsets
from streaming.kafka.rdkafka_calls import within
from streaming.kafka.rdkafka_producer import RdkafkaProducer
from streaming.kafka.rdkafka_settings import vendor_error
from streaming.kafka.transactions import TransactionalProducer, aborted_error

# The group refuses the offsets: it is at a later generation, or has expelled the member.
_REFUSED = (KafkaError.ILLEGAL_GENERATION, KafkaError.REBALANCE_IN_PROGRESS, KafkaError.UNKNOWN_MEMBER_ID)
# The first pause; each further one is longer.
RETRY_MS = 5


class RdkafkaTransactionalProducer(TransactionalProducer, RdkafkaProducer):
    """TransactionalProducerClient on librdkafka."""

    def __init__(self, kafka: KafkaSettings, transactional_id: str) -> None:
        settings = {
            "transactional.id": transactional_id,
            "transaction.timeout.ms": limits.TRANSACTION_TIMEOUT_MS,
            # a later delivery would be aborted anyway
            "delivery.timeout.ms": limits.TRANSACTION_TIMEOUT_MS,
            # when a transaction begins while the broker still ends the last one
            "retry.backoff.ms": RETRY_MS,
        }
        super().__init__(kafka, settings)
        self._take_up(transactional_id, lambda: within(limits.INIT_TIMEOUT_S, self._producer.init_transactions))

    def _prepare_commit(self, offsets: Offsets, member: GroupMember, timeout_s: float) -> bool:
        if not offsets:
            return True
        if member.vendor is None:
            return False
        try:
            within(timeout_s, self._producer.send_offsets_to_transaction, offsets, member.vendor)
        except KafkaException as error:
            cause = error.args[0]
            if cause.code() in _REFUSED and cause.txn_requires_abort():
                return False
            # a record that was not delivered is the reason of every later error
            self.refuse_after_failure()
            raise
        return True

    def _finish_commit(self, timeout_s: float) -> None:
        within(timeout_s, self._producer.commit_transaction)

    def _after_commit(self, error: BrokerError) -> BrokerError | None:
        cause = vendor_error(error)
        if cause is not None and cause.txn_requires_abort() and self._try_abort(limits.FAILURE_ABORT_TIMEOUT_S):
            return aborted_error(error)
        return super()._after_commit(error)

    def _abort_transaction(self, timeout_s: float) -> None:
        # the delivery reports of dropped records are no failures
        self._deliveries.drop(True)
        within(timeout_s, self._producer.abort_transaction, serve=self._producer.poll)
        self._deliveries.drop(False)
        # where the group refuses the offsets, librdkafka drops records before this call
        self._deliveries.forget_failure()
