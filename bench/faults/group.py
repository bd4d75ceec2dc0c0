"""A consumer group's coordinator: members, generations, cooperative rebalances, committed offsets.

A rebalance waits until every member has joined again, or drops those that do not in time. The new assignment takes
nothing from a member that still owns it: what moves is first revoked by its owner, who then joins once more, and only
that second rebalance gives it to its new owner.

Source: KIP-429, "Kafka Consumer Incremental Rebalance Protocol"; static membership: KIP-345.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.faults.network import Link
from bench.faults.world import Life, World
from cascade.errors import BrokerError
from streaming.clients import Partition

Offsets = dict[Partition, tuple[int, str]]


@dataclass(slots=True, eq=False)
class Member:
    """One consumer in the group. `owned`: what it last said that it has; `assigned`: what it may have now.

    `link`: its connection, over which it heartbeats. `generation`: the one it knows of. `news`: an assignment that it
    has not taken yet.
    """

    number: int
    life: Life
    link: Link
    instance: str
    owned: set[Partition] = field(default_factory=set)
    assigned: set[Partition] = field(default_factory=set)
    generation: int = 0
    joined: bool = False
    news: bool = False
    fenced: bool = False
    seen_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit of one partition that was kept, for the oracle; `asked` as for `Group.commit`."""

    partition: Partition
    before: int
    offset: int
    metadata: str
    asked: int


class Group:
    """The coordinator of one group over the partitions of one topic."""

    def __init__(
        self, world: World, partitions: Sequence[Partition], session_timeout_s: float, rebalance_timeout_s: float
    ) -> None:
        self.offsets: Offsets = {}
        self.commits: list[Commit] = []
        self.generation = 0
        self.members: list[Member] = []
        self._world = world
        self._partitions = list(partitions)
        self._session_timeout_s, self._rebalance_timeout_s = session_timeout_s, rebalance_timeout_s
        self._joining_since_s: float | None = None
        self._number = 0
        self._shuffle = False

    @property
    def rebalancing(self) -> bool:
        """Whether members are asked to join anew."""
        return self._joining_since_s is not None

    def enter(self, life: Life, link: Link, instance: str) -> Member:
        """A new consumer comes; one with the `instance` of another takes its place, without a rebalance."""
        self._number += 1
        member = Member(self._number, life, link, instance, seen_s=self._world.now_s)
        other = next((one for one in self.members if instance and one.instance == instance), None)
        self.members.append(member)
        if other is None:
            self.rebalance()
            return member
        self.members.remove(other)
        other.fenced = True
        self._world.tell("group", f"{life.name} takes the place of {other.life.name}")
        member.assigned, member.generation, member.news = set(other.assigned), self.generation, True
        given = {partition for one in self.members for partition in one.assigned}
        # what the other had given up, or was about to, must still get a new owner
        if self.rebalancing or not other.generation or given != set(self._partitions):
            self.rebalance()
            member.news = False
        return member

    def join(self, member: Member, owned: set[Partition]) -> None:
        """A member joins the rebalance that is under way, with what it has."""
        member.owned = set(owned)
        member.joined = True
        member.news = False
        self._complete_if_all_joined()

    def leave(self, member: Member) -> None:
        """A member goes by itself."""
        if member in self.members:
            self.members.remove(member)
            self.rebalance()

    def rebalance(self, shuffle: bool = False) -> None:
        """Ask everyone to join anew; with `shuffle` the partitions are dealt out by chance."""
        self._shuffle = self._shuffle or shuffle
        if self._joining_since_s is None:
            self._joining_since_s = self._world.now_s
            for member in self.members:
                member.joined = False
        self._complete_if_all_joined()

    def tick(self) -> None:
        """Miss the members that do not heartbeat, and those that do not join in time."""
        now_s = self._world.now_s
        for member in list(self.members):
            if member.life.beats and not member.link.clogged:
                member.seen_s = now_s
            elif now_s - member.seen_s > self._session_timeout_s:
                self._drop(member, "does not heartbeat")
        if self._joining_since_s is not None and now_s - self._joining_since_s > self._rebalance_timeout_s:
            for member in [one for one in self.members if not one.joined]:
                self._drop(member, "did not join in time")
            self._complete_if_all_joined()

    def check(self, member: Member, generation: int) -> None:
        """Raise BrokerError where a commit is of an earlier generation or of none."""
        if member not in self.members or generation != self.generation:
            raise BrokerError(
                f"commit refused: generation {generation} of the group has passed, the group is at {self.generation}"
            )

    def commit(self, offsets: Mapping[Partition, tuple[int, str]], asked: int) -> None:
        """Keep offsets; `asked` numbers the requests of all members in the order in which they were sent."""
        for partition, (offset, metadata) in offsets.items():
            before = self.offsets.get(partition, (0, ""))[0]
            self.commits.append(Commit(partition, before, offset, metadata, asked))
            self.offsets[partition] = (offset, metadata)

    def newest(self, partition: Partition) -> tuple[int, str]:
        """What the last commit said that anyone has asked for, though an earlier one may have come after it."""
        asked = [one for one in self.commits if one.partition == partition]
        last = max(asked, key=lambda one: one.asked, default=None)
        return (0, "") if last is None else (last.offset, last.metadata)

    def _drop(self, member: Member, why: str) -> None:
        self._world.tell("group", f"{member.life.name} {why}: dropped")
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
            member.assigned = {one for one in target[member.number] if owners.get(one) is None or owners[one] is member}
            # the answer to the join reaches every member at once; what it does about it waits for its next poll
            member.generation = self.generation
            member.news = True
        self._world.tell(
            "group",
            f"generation {self.generation}: "
            + "; ".join(f"{one.life.name} {sorted(n for _, n in one.assigned)}" for one in self.members),
        )

    def _target(self) -> dict[int, list[Partition]]:
        """Who shall have what: as even as can be, and each keeps what it has as far as that allows."""
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
        for member in sorted(members, key=lambda one: -len(one.owned)):
            room = share + (1 if more > 0 else 0)
            kept = [one for one in sorted(member.owned) if one not in owned][:room]
            more -= 1 if len(kept) > share else 0
            owned |= set(kept)
            target[member.number] += kept
        for partition in partitions:
            if partition not in owned:
                least = min(members, key=lambda one: (len(target[one.number]), one.number))
                target[least.number].append(partition)
        return target
