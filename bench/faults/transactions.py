"""The transaction coordinator: producer ids and epochs, transactions from their first record to their markers.

A transaction ends in two steps, as on Kafka: the coordinator stores the decision; a little later each partition gets
its marker and the group its offsets. Until then the transaction is open for every reader.

Source: KIP-98, "Exactly Once Delivery and Transactional Messaging".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from bench.faults.world import World
from cascade.errors import BrokerError, ProducerFencedError
from streaming.kafka import Partition

Status = Literal["none", "open", "committing", "aborting"]
# The longest delay from the decision to the markers.
MARKER_S_MAX = 0.01


@dataclass(slots=True, eq=False)
class Transaction:
    """The state of one transactional id. `request_number`: see `Group.commit`."""

    transactional_id: str
    producer: int
    epoch: int = 0
    status: Status = "none"
    partitions: list[Partition] = field(default_factory=list)
    offsets: dict[Partition, tuple[int, str]] = field(default_factory=dict)
    request_number: int = 0
    began_s: float = 0.0


class TransactionCoordinator:
    """The transactional ids of a broker."""

    def __init__(
        self,
        world: World,
        timeout_s: float,
        write_marker: Callable[[Partition, int, bool], None],
        commit_offsets: Callable[[Mapping[Partition, tuple[int, str]], int], None],
    ) -> None:
        """Make a coordinator that aborts transactions older than `timeout_s`.

        write_marker: writes a marker; arguments: partition, producer id, whether to commit.
        commit_offsets: commits offsets in the group; see `Group.commit`.
        """
        self._world = world
        self._timeout_s = timeout_s
        self._write_marker, self._commit_offsets = write_marker, commit_offsets
        self._by_id: dict[str, Transaction] = {}

    def initialise(self, transactional_id: str) -> tuple[int, int]:
        """Returns producer id and epoch. Fences the previous producer of this id and aborts its open transaction."""
        transaction = self._by_id.get(transactional_id)
        if transaction is None:
            transaction = Transaction(transactional_id, len(self._by_id) + 1_000)
            self._by_id[transactional_id] = transaction
            return transaction.producer, transaction.epoch
        if transaction.status == "open":
            self._world.log("transactions", f"{transactional_id}: aborts the open transaction")
            self._end(transaction, False)
        self._finish(transaction)
        transaction.epoch += 1
        return transaction.producer, transaction.epoch

    def add_partition(self, transactional_id: str, epoch: int, partition: Partition) -> int:
        """Add the partition of the next record, and begin a transaction if none is open. Returns the producer id."""
        transaction = self._checked(transactional_id, epoch)
        self._begin(transaction)
        if partition not in transaction.partitions:
            transaction.partitions.append(partition)
        return transaction.producer

    def add_offsets(
        self, transactional_id: str, epoch: int, offsets: Mapping[Partition, tuple[int, str]], request_number: int
    ) -> None:
        """Add offsets, which the group gets when the transaction is committed."""
        transaction = self._checked(transactional_id, epoch)
        self._begin(transaction)
        transaction.offsets.update(offsets)
        transaction.request_number = request_number

    def end(self, transactional_id: str, epoch: int, commit: bool) -> None:
        """Commit or abort the open transaction: whichever transaction that is, as Kafka does within one epoch."""
        transaction = self._checked(transactional_id, epoch)
        status = transaction.status
        if status == "open":
            self._end(transaction, commit)
        elif status != ("committing" if commit else "aborting") and (commit or status != "none"):
            raise BrokerError(f"transaction {transactional_id} has nothing to end: invalid state {status}")

    def has_pending_offsets(self, partition: Partition) -> bool:
        """Whether a transaction that has not ended contains an offset of the partition."""
        return any(each.status != "none" and partition in each.offsets for each in self._by_id.values())

    def tick(self) -> None:
        """Abort transactions that are open for too long, and fence their producers."""
        for transaction in self._by_id.values():
            if transaction.status == "open" and self._world.now_s - transaction.began_s > self._timeout_s:
                self._world.fire("transaction-timeout")
                transaction.epoch += 1
                self._end(transaction, False)

    def _begin(self, transaction: Transaction) -> None:
        self._finish(transaction)
        if transaction.status == "none":
            transaction.status, transaction.began_s = "open", self._world.now_s

    def _checked(self, transactional_id: str, epoch: int) -> Transaction:
        transaction = self._by_id[transactional_id]
        if transaction.epoch != epoch:
            self._world.fire("producer-fenced")
            raise ProducerFencedError(
                f"producer {transactional_id} of epoch {epoch} is fenced: epoch {transaction.epoch} has begun"
            )
        return transaction

    def _end(self, transaction: Transaction, commit: bool) -> None:
        transaction.status = "committing" if commit else "aborting"
        began_s = transaction.began_s
        delay_s = self._world.chance.random() * MARKER_S_MAX

        def finish() -> None:
            if transaction.began_s == began_s:
                self._finish(transaction)

        self._world.at(delay_s, finish)

    def _finish(self, transaction: Transaction) -> None:
        """Write the markers of a transaction that is committing or aborting."""
        if transaction.status not in ("committing", "aborting"):
            return
        commit = transaction.status == "committing"
        for partition in transaction.partitions:
            self._write_marker(partition, transaction.producer, commit)
        if commit and transaction.offsets:
            self._commit_offsets(transaction.offsets, transaction.request_number)
        transaction.status, transaction.partitions, transaction.offsets = "none", [], {}
