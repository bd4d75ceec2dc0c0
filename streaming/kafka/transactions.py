"""What the transactional producers of both client libraries share: the order of the steps, and what ends them."""

from __future__ import annotations

import contextlib
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator

from cascade.errors import BrokerError, CommitUnknownError, ProducerFencedError, TransactionAbortedError
from streaming.kafka import limits
from streaming.kafka.producer import Producer
from streaming.kafka.protocol import GroupMember, Offsets


class TransactionalProducer(Producer):
    """The common part of a TransactionalProducerClient: every wait has a limit, every error says what is committed."""

    _open = False

    def begin(self) -> None:
        """See TransactionalProducerClient."""
        self._check_usable()
        with self._ended_by_errors("beginning a transaction"):
            self._producer.begin_transaction()
        self._open = True

    def commit(self, offsets: Offsets, member: GroupMember) -> bool:
        """See TransactionalProducerClient."""
        self._check_usable()
        give_up_s = time.monotonic() + limits.COMMIT_TIMEOUT_S
        # first: the records are delivered meanwhile
        with self._ended_by_errors("adding offsets to a transaction"):
            accepted = self._prepare_commit(offsets, member, limits.COMMIT_TIMEOUT_S)
        if not accepted:
            self.abort()
            return False
        with self._ended_by_errors("delivering the records of a transaction"):
            self._deliver(max(give_up_s - time.monotonic(), 0.1))
        self.refuse_after_failure()
        action = "committing"
        try:
            with self._translated(action):
                self._finish_commit(limits.COMMIT_TIMEOUT_S)
        except BrokerError as error:
            reason = str(error).removeprefix(f"Kafka at {self._servers}: {action}: ")
            self._failure = self._after_commit(error) or CommitUnknownError(
                f"Kafka at {self._servers}: the transaction may or may not be committed: {reason}"
            )
            # a repeated commit could commit a later transaction
            self._abandon()
            raise self._failure from error
        self._open = False
        return True

    def abort(self) -> None:
        """See TransactionalProducerClient; does nothing after a failure."""
        if self._failure is not None or not self._open:
            return
        try:
            self._abort_open(limits.ABORT_TIMEOUT_S)
        except BrokerError as error:
            self._failure = error
            self._abandon()
            raise

    def close(self, timeout_s: float) -> None:
        """Aborts an open transaction and releases all resources; does not raise an earlier failure again."""
        self._try_abort(min(timeout_s, limits.ABORT_TIMEOUT_S))
        self._abandon()

    @abstractmethod
    def _prepare_commit(self, offsets: Offsets, member: GroupMember, timeout_s: float) -> bool:
        """Adds the offsets, if there are any; returns False if the group refuses them.

        A transaction whose commit was prepared can still be aborted.
        """

    @abstractmethod
    def _finish_commit(self, timeout_s: float) -> None: ...

    @abstractmethod
    def _abort_transaction(self, timeout_s: float) -> None: ...

    def _after_commit(self, error: BrokerError) -> BrokerError | None:
        """The error to raise for one of `_finish_commit`; None where the outcome is unknown."""
        return self._fenced(error)

    def _fenced(self, error: BrokerError) -> BrokerError | None:
        return error if isinstance(error, ProducerFencedError) else None

    def _take_up(self, transactional_id: str, initialize: Callable[[], None]) -> None:
        try:
            with self._translated(f"taking up the transactional id {transactional_id}"):
                initialize()
        except BaseException:
            self._abandon()
            raise

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
        fenced = self._fenced(error)
        if fenced is None:
            self._try_abort(limits.FAILURE_ABORT_TIMEOUT_S)
        self._abandon()
        return fenced or aborted_error(error)

    def _abort_open(self, timeout_s: float) -> None:
        self._open = False
        with self._translated("aborting a transaction"):
            self._abort_transaction(timeout_s)

    def _try_abort(self, timeout_s: float) -> bool:
        """Aborts the open transaction, unless a failure has ended this producer; returns whether it was aborted."""
        if self._open and self._failure is None:
            with contextlib.suppress(BrokerError):
                self._abort_open(timeout_s)
                return True
        return False


def aborted_error(error: BrokerError) -> TransactionAbortedError:
    """The error of a transaction that another error ended before its commit was sent."""
    return TransactionAbortedError(f"{error}; the transaction is aborted")
