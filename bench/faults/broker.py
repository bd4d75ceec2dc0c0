"""The simulated broker: topics, transactions, one consumer group. It serves at once; `network` delays the requests."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.faults.clock import EPOCH_S
from bench.faults.group import Group
from bench.faults.logs import PartitionLog, Record
from bench.faults.network import Network, NetworkFaults
from bench.faults.transactions import TransactionCoordinator
from bench.faults.world import NEVER_S, World
from streaming.kafka import Headers, Partition

TICK_S = 0.1


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """`topics`: number of partitions by topic. `shared_topic`: the topic whose partitions the group shares."""

    topics: Mapping[str, int]
    shared_topic: str
    session_timeout_s: float = 1.5
    rebalance_timeout_s: float = 6.0
    transaction_timeout_s: float = 3.0
    faults: NetworkFaults = field(default_factory=NetworkFaults)


class SimBroker:
    """The logs by partition, the group and the transactions.

    `truncated_until_s`: the time until which some log lacked its first records; -1 if none ever did.
    """

    def __init__(self, world: World, settings: BrokerSettings) -> None:
        self.world = world
        self.network = Network(world, settings.faults)
        self.logs: dict[Partition, PartitionLog] = {
            (topic, partition_id): PartitionLog()
            for topic, count in settings.topics.items()
            for partition_id in range(count)
        }
        self.group = Group(
            world,
            self.partitions(settings.shared_topic),
            settings.session_timeout_s,
            settings.rebalance_timeout_s,
            settings.faults.latency_s,
        )
        self.transactions = TransactionCoordinator(
            world, settings.transaction_timeout_s, self._write_marker, self.group.commit
        )
        self.truncated_until_s = -1.0
        self._requests = 0
        world.at(TICK_S, self._tick)

    @property
    def now_ms(self) -> int:
        """The broker's wall clock, ms since the epoch."""
        return int((EPOCH_S + self.world.now_s) * 1e3)

    def partitions(self, topic: str) -> list[Partition]:
        """The partitions of a topic, ascending; none if the topic does not exist."""
        return sorted(partition for partition in self.logs if partition[0] == topic)

    def partition_of(self, topic: str, key: bytes | None) -> Partition:
        """The partition of a record with this key; the first one for a record without a key."""
        count = len(self.partitions(topic))
        return (topic, zlib.crc32(key) % count if key is not None and count else 0)

    def append(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        sender: str = "",
        sent_s: float = 0.0,
        transaction: tuple[str, int] | None = None,
    ) -> Record:
        """Append a record; raises ProducerFencedError.

        sender, sent_s: the session that sent the record, and when; for the oracle.
        transaction: transactional id and epoch of the transaction that the record belongs to.
        """
        partition = self.partition_of(topic, key)
        producer = -1 if transaction is None else self.transactions.add_partition(*transaction, partition)
        log = self.logs[partition]
        return log.append(self.now_ms, key, value, headers, producer, sender, sent_s)

    def delete_records(self, partition: Partition, offset: int) -> None:
        """Delete the records before `offset`."""
        self.logs[partition].beginning = offset
        self.truncated_until_s = NEVER_S
        self.world.log("broker", f"{partition} begins at {offset}")

    def restore_records(self) -> None:
        """Restore all deleted records."""
        if self.truncated_until_s == NEVER_S:
            self.truncated_until_s = self.world.now_s
            self.world.log("broker", "all logs begin at 0 again")
        for log in self.logs.values():
            log.beginning = 0

    def next_request_number(self) -> int:
        """Number a commit request, in the order in which clients send them."""
        self._requests += 1
        return self._requests

    def _write_marker(self, partition: Partition, producer: int, commit: bool) -> None:
        self.logs[partition].write_marker(producer, commit, self.now_ms)

    def _tick(self) -> None:
        self.group.tick()
        self.transactions.tick()
        self.world.at(TICK_S, self._tick)
