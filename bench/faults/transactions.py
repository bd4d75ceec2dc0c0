"""The transaction coordinator: producer ids and epochs, transactions from their first record to their markers.

Ending a transaction has two steps, as on Kafka: the decision is kept, then each partition gets its marker, and the
group its offsets, a little later. Until then the transaction is under way for everyone who reads.

Source: KIP-98, "Exactly Once Delivery and Transactional Messaging".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from bench.faults.world import World
from cascade.errors import BrokerError, ProducerFencedError
from streaming.clients import Partition

Status = Literal["none", "open", "committing", "aborting"]
# A marker is written after at most this long.
MARKER_S_MAX = 0.01


@dataclass(slots=True, eq=False)
class Transaction:
    """What the coordinator knows of one transactional id. `left`: the partitions that have no marker yet."""

    transactional_id: str
    producer: int
    epoch: int = 0
    status: Status = "none"
    partitions: list[Partition] = field(default_factory=list)
    offsets: dict[Partition, tuple[int, str]] = field(default_factory=dict)
    asked: int = 0
    began_s: float = 0.0


class TransactionCoordinator:
    """All transactional ids of a broker; `mark` writes a marker, `keep` gives offsets to the group."""

    def __init__(
        self,
        world: World,
        timeout_s: float,
        mark: Callable[[Partition, int, bool], None],
        keep: Callable[[Mapping[Partition, tuple[int, str]], int], None],
    ) -> None:
        self._world = world
        self._timeout_s = timeout_s
        self._mark, self._keep = mark, keep
        self._by_id: dict[str, Transaction] = {}

    def initialise(self, transactional_id: str) -> tuple[int, int]:
        """(producer id, epoch): ends what an earlier producer of this id has begun, and fences it."""
        one = self._by_id.get(transactional_id)
        if one is None:
            one = Transaction(transactional_id, len(self._by_id) + 1_000)
            self._by_id[transactional_id] = one
            return one.producer, one.epoch
        if one.status == "open":
            self._world.tell("transactions", f"{transactional_id}: what was open is aborted")
            self._end(one, False)
        self._finish(one)
        one.epoch += 1
        return one.producer, one.epoch

    def touch(self, transactional_id: str, epoch: int, partition: Partition) -> int:
        """A record is about to be appended: (begin and) extend the transaction. Returns the producer id."""
        one = self._checked(transactional_id, epoch)
        self._begin(one)
        if partition not in one.partitions:
            one.partitions.append(partition)
        return one.producer

    def add_offsets(
        self,
        transactional_id: str,
        epoch: int,
        offsets: Mapping[Partition, tuple[int, str]],
        asked: int,
    ) -> None:
        """Offsets that become the group's when the transaction is committed."""
        one = self._checked(transactional_id, epoch)
        self._begin(one)
        one.offsets.update(offsets)
        one.asked = asked

    def end(self, transactional_id: str, epoch: int, commit: bool) -> None:
        """Commit or abort what is open now: whichever transaction that is, as Kafka does within one epoch."""
        one = self._checked(transactional_id, epoch)
        if one.status != "open":
            if one.status == ("committing" if commit else "aborting") or (one.status == "none" and not commit):
                return
            raise BrokerError(f"transaction {transactional_id} has nothing to end: invalid state {one.status}")
        self._end(one, commit)

    def holds(self, partition: Partition) -> bool:
        """Whether a transaction under way has an offset of the partition."""
        return any(one.status != "none" and partition in one.offsets for one in self._by_id.values())

    def tick(self) -> None:
        """Abort what has been open for too long; its producer is fenced by that."""
        for one in self._by_id.values():
            if one.status == "open" and self._world.now_s - one.began_s > self._timeout_s:
                self._world.fire("transaction-timeout")
                one.epoch += 1
                self._end(one, False)

    def _begin(self, one: Transaction) -> None:
        self._finish(one)
        if one.status == "none":
            one.status, one.began_s = "open", self._world.now_s

    def _checked(self, transactional_id: str, epoch: int) -> Transaction:
        one = self._by_id[transactional_id]
        if one.epoch != epoch:
            raise ProducerFencedError(
                f"producer {transactional_id} of epoch {epoch} is fenced: another has begun epoch {one.epoch}"
            )
        return one

    def _end(self, one: Transaction, commit: bool) -> None:
        one.status = "committing" if commit else "aborting"
        number = one.began_s
        delay_s = self._world.chance.random() * MARKER_S_MAX

        def finish() -> None:
            if one.began_s == number:
                self._finish(one)

        self._world.at(delay_s, finish)

    def _finish(self, one: Transaction) -> None:
        """Write the markers of a transaction that has been decided."""
        if one.status not in ("committing", "aborting"):
            return
        commit = one.status == "committing"
        for partition in one.partitions:
            self._mark(partition, one.producer, commit)
        if commit and one.offsets:
            self._keep(one.offsets, one.asked)
        one.status, one.partitions, one.offsets = "none", [], {}
