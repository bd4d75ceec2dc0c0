"""The transactional producer on librdkafka."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from confluent_kafka import KafkaError, KafkaException

from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from streaming.kafka import limits
from streaming.kafka.protocol import GroupMember, Offsets
from streaming.kafka.rdkafka_producer import RdkafkaProducer
from streaming.kafka.rdkafka_settings import vendor_error
from streaming.kafka.transactions import TransactionalProducer, aborted_error

# The group refuses the offsets: it is at a later generation, or has expelled the member.
_REFUSED = (KafkaError.ILLEGAL_GENERATION, KafkaError.REBALANCE_IN_PROGRESS, KafkaError.UNKNOWN_MEMBER_ID)
# The first pause; each further one is longer.
RETRY_MS = 5
# While a call drops records, which it waits for, their events are dropped this often.
SERVE_S = 0.02
# A call of librdkafka may exceed its own time limit by this much.
GRACE_S = 1.0


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
        self._take_up(transactional_id, lambda: _within(limits.INIT_TIMEOUT_S, self._producer.init_transactions))

    def _prepare_commit(self, offsets: Offsets, member: GroupMember, timeout_s: float) -> bool:
        if not offsets:
            return True
        if member.vendor is None:
            return False
        try:
            _within(timeout_s, self._producer.send_offsets_to_transaction, offsets, member.vendor)
        except KafkaException as error:
            cause = error.args[0]
            if cause.code() in _REFUSED and cause.txn_requires_abort():
                return False
            # a record that was not delivered is the reason of every later error
            self.refuse_after_failure()
            raise
        return True

    def _finish_commit(self, timeout_s: float) -> None:
        _within(timeout_s, self._producer.commit_transaction)

    def _after_commit(self, error: BrokerError) -> BrokerError | None:
        cause = vendor_error(error)
        if cause is not None and cause.txn_requires_abort() and self._try_abort(limits.FAILURE_ABORT_TIMEOUT_S):
            return aborted_error(error)
        return super()._after_commit(error)

    def _abort_transaction(self, timeout_s: float) -> None:
        # the delivery reports of dropped records are no failures
        self._deliveries.drop(True)
        _within(timeout_s, self._producer.abort_transaction, serve=self._producer.poll)
        self._deliveries.drop(False)
        # where the group refuses the offsets, librdkafka drops records before this call
        self._deliveries.forget_failure()


def _within(
    timeout_s: float, call: Callable[..., object], *arguments: object, serve: Callable[[], object] | None = None
) -> None:
    """Runs a call, whose last argument is its time limit, in a thread; raises after the limit and GRACE_S.

    serve: called every SERVE_S meanwhile.

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
    give_up_s = time.monotonic() + timeout_s + GRACE_S
    while serve is not None and thread.is_alive() and time.monotonic() < give_up_s:
        serve()
        thread.join(SERVE_S)
    thread.join(max(give_up_s - time.monotonic(), 0.0))
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
