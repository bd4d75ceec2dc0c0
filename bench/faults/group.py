"""A consumer group's coordinator: members, generations, cooperative rebalances, committed offsets.

A rebalance waits until every member has joined again, and drops the members that do not join in time. The assignment
takes no partition from a member that still owns it: the owner first revokes it and joins once more, and only that
second rebalance assigns it to its new owner.

A member learns of a new generation with the answer to its join, which is under way for a moment: until then the group
refuses its commits.

Source: KIP-429, "Kafka Consumer Incremental Rebalance Protocol"; static membership: KIP-345.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from bench.faults.network import Connection
from bench.faults.world import Life, World
from cascade.errors import BrokerError
from streaming.kafka import Partition

Offsets = dict[Partition, tuple[int, str]]


@dataclass(slots=True, eq=False)
class Member:
    """One consumer in the group.

    `connection`: carries its heartbeats. `instance`: its group.instance.id, or "". `owned`: the partitions that it
    joined with. `assigned`: its partitions in the group's generation. `generation`: the last one that it knows.
    `assignment_pending`: it has not taken `assigned` yet. `seen_s`: time of its last heartbeat.
    """

    number: int
    life: Life
    connection: Connection
    instance: str
    owned: set[Partition] = field(default_factory=set)
    assigned: set[Partition] = field(default_factory=set)
    generation: int = 0
    joined: bool = False
    assignment_pending: bool = False
    fenced: bool = False
    seen_s: float = 0.0


class OffsetsRefused(BrokerError):
    """The group is at another generation than the member, or has dropped it."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit of one partition, for the oracle. `before`: the offset that it replaced."""

    partition: Partition
    before: int
    offset: int
    metadata: str
    request_number: int


class Group:
    """The coordinator of one group over the partitions of one topic."""

    def __init__(
        self,
        world: World,
        partitions: Sequence[Partition],
        session_timeout_s: float,
        rebalance_timeout_s: float,
        latency_s: float,
    ) -> None:
        self.offsets: Offsets = {}
        self.commits: list[Commit] = []
        self.generation = 0
        self.members: list[Member] = []
        self._world = world
        self._partitions = list(partitions)
        self._session_timeout_s, self._rebalance_timeout_s = session_timeout_s, rebalance_timeout_s
        self._latency_s = latency_s
        # a generator of its own, so that this delay does not change the other events of a seed
        self._chance = random.Random("answers to joins")
        self._joining_since_s: float | None = None
        self._number = 0
        self._shuffle = False

    @property
    def rebalancing(self) -> bool:
        """Whether a rebalance is in progress: members have to join again."""
        return self._joining_since_s is not None

    def add_member(self, life: Life, connection: Connection, instance: str) -> Member:
        """Add a consumer. A static member fences and replaces the one of the same `instance`, without a rebalance."""
        self._number += 1
        member = Member(self._number, life, connection, instance, seen_s=self._world.now_s)
        other = next((each for each in self.members if instance and each.instance == instance), None)
        self.members.append(member)
        if other is None:
            self.rebalance()
            return member
        self.members.remove(other)
        other.fenced = True
        self._world.log("group", f"{life.name} replaces {other.life.name}")
        member.assigned, member.generation, member.assignment_pending = set(other.assigned), self.generation, True
        assigned = {partition for each in self.members for partition in each.assigned}
        # partitions that the replaced member revoked, or was about to revoke, still need a new owner
        if self.rebalancing or not other.generation or assigned != set(self._partitions):
            self.rebalance()
            member.assignment_pending = False
        return member

    def join(self, member: Member, owned: set[Partition]) -> None:
        """Let a member join the rebalance in progress, with the partitions that it owns."""
        member.owned = set(owned)
        member.joined = True
        member.assignment_pending = False
        self._complete_if_all_joined()

    def leave(self, member: Member) -> None:
        """Remove a member that leaves the group."""
        if member in self.members:
            self.members.remove(member)
            self.rebalance()

    def rebalance(self, shuffle: bool = False) -> None:
        """Begin a rebalance. `shuffle`: it assigns the partitions at random."""
        self._shuffle = self._shuffle or shuffle
        if self._joining_since_s is None:
            self._joining_since_s = self._world.now_s
            for member in self.members:
                member.joined = False
        self._complete_if_all_joined()

    def tick(self) -> None:
        """Drop the members that miss their heartbeats, and those that do not join in time."""
        now_s = self._world.now_s
        for member in list(self.members):
            if member.life.heartbeats and not member.connection.clogged:
                member.seen_s = now_s
            elif now_s - member.seen_s > self._session_timeout_s:
                self._drop(member, "sends no heartbeats")
        if self._joining_since_s is not None and now_s - self._joining_since_s > self._rebalance_timeout_s:
            for member in [member for member in self.members if not member.joined]:
                self._drop(member, "did not join in time")
            self._complete_if_all_joined()

    def check(self, member: Member, generation: int) -> None:
        """Raise OffsetsRefused for a commit of a former member, or of another generation; BrokerError if fenced."""
        if member.fenced:
            raise BrokerError(f"commit refused: another consumer of the instance {member.instance} has joined")
        if member not in self.members or generation != self.generation:
            self._world.fire("offsets-refused")
            raise OffsetsRefused(
                f"commit refused: generation {generation} of the group has passed, the group is at {self.generation}"
            )

    def commit(self, offsets: Mapping[Partition, tuple[int, str]], request_number: int) -> None:
        """Commit offsets with their metadata.

        request_number: numbers the commit requests of all members in the order in which they were sent.
        """
        for partition, (offset, metadata) in offsets.items():
            before = self.offsets.get(partition, (0, ""))[0]
            self.commits.append(Commit(partition, before, offset, metadata, request_number))
            self.offsets[partition] = (offset, metadata)

    def last_requested(self, partition: Partition) -> tuple[int, str]:
        """Offset and metadata of the commit that was sent last, though one that was sent earlier may arrive later."""
        commits = (commit for commit in self.commits if commit.partition == partition)
        last = max(commits, key=lambda commit: commit.request_number, default=None)
        return (0, "") if last is None else (last.offset, last.metadata)

    def _drop(self, member: Member, why: str) -> None:
        self._world.log("group", f"{member.life.name} {why}: dropped")
        self.members.remove(member)
        self.rebalance()

    def _complete_if_all_joined(self) -> None:
        if self._joining_since_s is None or not all(member.joined for member in self.members):
            return
        self._joining_since_s = None
        self.generation += 1
        target = self._target()
        owners = {partition: member for member in self.members for partition in member.owned}
        for member in self.members:
            member.assigned = {
                partition for partition in target[member.number] if owners.get(partition, member) is member
            }
            self._world.at(self._latency_s * self._chance.random(), partial(self._answer, member, self.generation))
        assigned = (f"{each.life.name} {sorted(number for _, number in each.assigned)}" for each in self.members)
        self._world.log("group", f"generation {self.generation}: {'; '.join(assigned)}")

    def _answer(self, member: Member, generation: int) -> None:
        """Let the answer to a join reach the member, which acts on it in its next poll."""
        if generation == self.generation and member in self.members:
            member.generation = generation
            # the assignment of a member that has joined again is void
            member.assignment_pending = not (self.rebalancing and member.joined)

    def _target(self) -> dict[int, list[Partition]]:
        """The partitions of each member number: evenly spread; members keep what they own as far as that allows."""
        target: dict[int, list[Partition]] = {member.number: [] for member in self.members}
        if not self.members:
            return target
        partitions, members = list(self._partitions), list(self.members)
        if self._shuffle:
            self._world.chance.shuffle(partitions)
            self._world.chance.shuffle(members)
            self._shuffle = False
            for position, partition in enumerate(partitions):
                target[members[position % len(members)].number].append(partition)
            return target
        share, more = divmod(len(partitions), len(members))
        owned: set[Partition] = set()
        for member in sorted(members, key=lambda member: -len(member.owned)):
            room = share + (1 if more > 0 else 0)
            retained = [partition for partition in sorted(member.owned) if partition not in owned][:room]
            more -= 1 if len(retained) > share else 0
            owned |= set(retained)
            target[member.number] += retained
        for partition in partitions:
            if partition not in owned:
                least = min(members, key=lambda member: (len(target[member.number]), member.number))
                target[least.number].append(partition)
        return target
