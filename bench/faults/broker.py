"""The simulated broker: topics, transactions, one consumer group. It serves requests at once; `network` delays them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from bench.faults.clock import EPOCH_S
from bench.faults.group import Group
from bench.faults.logs import PartitionLog, Record
from bench.faults.network import Network, Weather
from bench.faults.transactions import TransactionCoordinator
from bench.faults.world import NEVER_S, World
from streaming.clients import Headers, Partition

TICK_S = 0.1


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """Topics by name with their number of partitions, the topic that the group shares, and timeouts in seconds."""

    topics: Mapping[str, int]
    shared_topic: str
    session_timeout_s: float = 1.5
    rebalance_timeout_s: float = 6.0
    transaction_timeout_s: float = 3.0
    weather: Weather = field(default_factory=Weather)


class SimBroker:
    """Logs by partition, the group and the transactions, on a world's clock."""

    def __init__(self, world: World, settings: BrokerSettings) -> None:
        self.world = world
        self.network = Network(world, settings.weather)
        self.logs: dict[Partition, PartitionLog] = {
            (topic, number): PartitionLog() for topic, count in settings.topics.items() for number in range(count)
        }
        self.group = Group(
            world, self.partitions(settings.shared_topic), settings.session_timeout_s, settings.rebalance_timeout_s
        )
        self.transactions = TransactionCoordinator(world, settings.transaction_timeout_s, self._mark, self.group.commit)
        # until when a log lacked its beginning, as far as is known
        self.restored_s = -1.0
        self._asked = 0
        world.at(TICK_S, self._tick)

    @property
    def now_ms(self) -> int:
        """The broker's wall clock, ms since the epoch."""
        return int((EPOCH_S + self.world.now_s) * 1e3)

    def partitions(self, topic: str) -> list[Partition]:
        """A topic's partitions, ascending; none where it is missing."""
        return sorted(one for one in self.logs if one[0] == topic)

    def partition_of(self, topic: str, key: bytes | None) -> Partition:
        """Where a record of this key goes; without a key to the first."""
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
        """Append a record, as part of `transaction` (transactional id, epoch); raises ProducerFencedError."""
        place = self.partition_of(topic, key)
        producer = -1 if transaction is None else self.transactions.touch(*transaction, place)
        return self.logs[place].append(
            self.now_ms, key, value, headers, producer, transaction is not None, sender, sent_s
        )  # fmt: skip

    def cut(self, partition: Partition, offset: int) -> None:
        """Delete a log's records before `offset`."""
        self.logs[partition].beginning = offset
        self.restored_s = NEVER_S
        self.world.tell("broker", f"{partition} now begins at {offset}")

    def restore(self) -> None:
        """Bring back what was deleted."""
        if self.restored_s == NEVER_S:
            self.restored_s = self.world.now_s
            self.world.tell("broker", "all logs begin at 0 again")
        for log in self.logs.values():
            log.beginning = 0

    def next_asked(self) -> int:
        """A number for a commit, in the order of asking."""
        self._asked += 1
        return self._asked

    def each(self, partitions: Iterable[Partition], of: Callable[[PartitionLog], int]) -> dict[Partition, int]:
        """One number a partition."""
        return {one: of(self.logs[one]) for one in partitions}

    def _mark(self, partition: Partition, producer: int, kept: bool) -> None:
        self.logs[partition].mark(producer, kept, self.now_ms)

    def _tick(self) -> None:
        self.group.tick()
        self.transactions.tick()
        self.world.at(TICK_S, self._tick)
