"""ConsumerClient on the simulated broker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from bench.faults.broker import SimBroker
from bench.faults.group import Member
from bench.faults.logs import PartitionLog, Record
from bench.faults.network import Fate, Link
from bench.faults.world import CALL_S, NEVER_S, Life
from cascade.errors import BrokerError
from streaming.clients import FetchedBatch, GroupMember, Partition, PartitionsCallback


@dataclass(frozen=True, slots=True)
class Membership:
    """What a transaction carries of its group: who, and of which generation."""

    member: Member
    generation: int


class SimConsumer:
    """One consumer of the group (`group`: whether), or outside any; `instance` as for `kafka.instance`.

    `poll_s`: what a poll takes at least. `reads` keeps, for the oracle, what `committed` has said: when, of which
    partition, offset and metadata.
    """

    def __init__(self, broker: SimBroker, life: Life, group: bool, instance: str = "", poll_s: float = CALL_S) -> None:
        self._broker, self._world, self._life = broker, broker.world, life
        self._link = Link(broker.network, life, "consumer" if group else "reader")
        self._group = broker.group if group else None
        self._instance, self._poll_s = instance, poll_s
        self._member: Member | None = None
        self._callbacks: tuple[PartitionsCallback, PartitionsCallback, PartitionsCallback] | None = None
        self._closed = False
        self._owned: set[Partition] = set()
        self._paused: set[Partition] = set()
        self._positions: dict[Partition, int] = {}
        # until when a partition's fetches lag behind the others'
        self._held_until_s: dict[Partition, float] = {}
        self._skipped: set[tuple[Partition, int]] = set()
        self.reads: list[tuple[float, Partition, int, str]] = []
        # when the loop wanted to go on whose poll was cut short for another process
        self.resume_s = 0.0

    # --- partitions ---------------------------------------------------------------------------------------------

    def subscribe(
        self,
        topics: Sequence[str],
        on_assigned: PartitionsCallback,
        on_revoked: PartitionsCallback,
        on_lost: PartitionsCallback | None = None,
    ) -> None:
        """See ConsumerClient; the topic is the one that the broker's group shares."""
        del topics
        self._life.point("subscribe")
        self._callbacks = (on_assigned, on_revoked, on_lost or on_revoked)

    def assign(self, partitions: Sequence[Partition]) -> None:
        """See ConsumerClient."""
        self._positions = self.beginning_offsets(partitions)
        self._owned = set(partitions)

    def assignment(self) -> set[Partition]:
        """See ConsumerClient."""
        return set(self._owned)

    def pause(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient."""
        self._paused |= self._only_owned(partitions, "pausing")

    def resume(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient."""
        self._paused -= self._only_owned(partitions, "resuming")

    def seek(self, partition: Partition, offset: int) -> None:
        """See ConsumerClient."""
        self._only_owned([partition], "seeking")
        self._positions[partition] = offset

    def position(self, partition: Partition) -> int:
        """See ConsumerClient."""
        self._only_owned([partition], "asking for the position of")
        return self._positions[partition]

    @property
    def dropped(self) -> bool:
        """Whether the group went on without us, or another took our place, and we may not know it yet."""
        return self._group is not None and self._member is not None and self._member not in self._group.members

    @property
    def replaying(self) -> bool:
        """Whether records below the committed offset are still to be read."""
        committed = self._broker.group.offsets
        return any(self._positions[one] < committed.get(one, (0, ""))[0] for one in self._owned)

    def _only_owned(self, partitions: Iterable[Partition], action: str) -> set[Partition]:
        wanted = set(partitions)
        strange = wanted - self._owned
        if strange:
            raise BrokerError(f"{action} {sorted(strange)}: not assigned")
        return wanted

    # --- records ------------------------------------------------------------------------------------------------

    def poll(self, timeout_s: float, rows_max: int) -> list[FetchedBatch]:
        """See ConsumerClient; comes back early where another process waits to go on."""
        world = self._world
        self._life.point("poll")
        if self._closed:
            raise BrokerError("polling: the consumer is closed")
        deadline_s = world.now_s + max(timeout_s, self._poll_s)
        world.wait(world.now_s + CALL_S)
        while True:
            self._life.check()
            if self._group_wants_us():
                self._coordinate()
            fetchable = [] if self._link.clogged else self._fetchable()
            found = self._fetch(fetchable, rows_max)
            if found:
                world.wait(world.now_s + world.chance.random() * self._broker.network.weather.latency_s, alone=True)
                self._life.point(f"{sum(map(len, found))} records")
                return found
            until_s = min(deadline_s, world.limit_s)
            if world.now_s >= until_s:
                self.resume_s = deadline_s
                return []
            held_s = min((self._held_until_s.get(one, 0.0) for one in fetchable), default=NEVER_S)
            world.wait(max(min(until_s, held_s), world.now_s + CALL_S), partial(self._stirs, len(fetchable)))

    def _stirs(self, fetchable: int) -> bool:
        """Whether there is more to do for `poll` than when `fetchable` partitions had records."""
        if self._life.dead or self._group_wants_us():
            return True
        return not self._link.clogged and len(self._fetchable()) > fetchable

    def _fetchable(self) -> list[Partition]:
        logs, positions = self._broker.logs, self._positions
        return [
            one
            for one in sorted(self._owned)
            if one not in self._paused
            and (positions[one] < logs[one].stable_end or positions[one] < logs[one].beginning)
        ]

    def _fetch(self, fetchable: list[Partition], rows_max: int) -> list[FetchedBatch]:
        world, weather = self._world, self._broker.network.weather
        ready = [one for one in fetchable if self._held_until_s.get(one, 0.0) <= world.now_s]
        if len(ready) > 1:
            world.chance.shuffle(ready)
        found: list[FetchedBatch] = []
        for partition in ready:
            log, position = self._broker.logs[partition], self._positions[partition]
            if position < log.beginning:
                raise BrokerError(
                    f"fetching {partition[0]}-{partition[1]}: offset {position} is gone, the log begins at"
                    f" {log.beginning}"
                )
            if len(fetchable) > 1 and world.happens(weather.held_share):
                self._held_until_s[partition] = world.now_s + weather.held_s * world.chance.random()
                world.fire("reordered-partitions")
                continue
            records, self._positions[partition] = log.read(position, rows_max)
            if self._skips(partition, records):
                records = records[world.chance.randrange(1, len(records)) :]
                world.fire("records-skipped")
            if records:
                found.append(_batch(partition, records))
                rows_max -= len(records)
            if rows_max <= 0:
                break
        return found

    def _skips(self, partition: Partition, records: Sequence[Record]) -> bool:
        """Whether this fetch leaves out its first records; none is left out first twice, as in a gap of the log."""
        if self._group is None or len(records) < 2 or (partition, records[0].offset) in self._skipped:
            return False
        skips = self._world.happens(self._broker.network.weather.skipped_share)
        if skips:
            self._skipped.add((partition, records[0].offset))
        return skips

    # --- the group ----------------------------------------------------------------------------------------------

    def _group_wants_us(self) -> bool:
        group, member = self._group, self._member
        if group is None or self._callbacks is None or self._link.clogged:
            return False
        if member is None or member not in group.members or member.news:
            return True
        return group.rebalancing and not member.joined

    def _coordinate(self) -> None:
        group, member = self._group, self._member
        if group is None or self._callbacks is None:
            return
        if member is not None and member.fenced:
            raise BrokerError(f"another consumer of the instance {member.instance} has taken this one's place")
        if member is not None and member not in group.members:
            self._member = None
            lost = sorted(self._owned)
            if lost:
                self._world.fire("session-expired")
                self._life.point(f"lost {_numbers(lost)}")
                self._callbacks[2](lost)
                self._let_go(lost)
        if self._member is None:
            self._member = member = group.enter(self._life, self._link, self._instance)
        if member is not None and group.rebalancing and not member.joined:
            group.join(member, self._owned)
        if member is not None and member.news:
            member.news = False
            self._take_assignment(member)

    def _take_assignment(self, member: Member) -> None:
        """Give up what is no longer ours, then join once more; take what is."""
        group, callbacks = self._group, self._callbacks
        if group is None or callbacks is None:
            return
        assigned = set(member.assigned)
        revoked = sorted(self._owned - assigned)
        if revoked:
            self._life.point(f"revoked {_numbers(revoked)}")
            callbacks[1](revoked)
            self._let_go(revoked)
            if member in group.members:
                group.rebalance()
        gained = sorted(assigned - self._owned)
        if gained and member in group.members:
            committed, beginnings = self.committed(gained), self.beginning_offsets(gained)
            self._owned |= set(gained)
            for partition in gained:
                self._positions[partition] = committed.get(partition, (beginnings[partition], ""))[0]
            self._life.point(f"assigned {_numbers(gained)}")
            callbacks[0](gained)

    def _let_go(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            self._owned.discard(partition)
            self._paused.discard(partition)
            self._positions.pop(partition, None)
            self._held_until_s.pop(partition, None)

    def committed(self, partitions: Iterable[Partition]) -> dict[Partition, tuple[int, str]]:
        """See ConsumerClient."""
        wanted, broker, world = list(partitions), self._broker, self._world
        give_up_s = world.now_s + broker.network.weather.request_timeout_s

        def ask() -> dict[Partition, tuple[int, str]] | None:
            if any(map(broker.transactions.holds, wanted)):
                return None
            offsets = broker.group.offsets
            return {one: offsets[one] for one in wanted if one in offsets}

        while (found := self._link.call("ask what is committed", ask)) is None:
            if not world.wait(give_up_s, lambda: not any(map(broker.transactions.holds, wanted))):
                raise BrokerError("asking what is committed: a transaction that holds offsets does not end")
        for partition in wanted:
            self.reads.append((world.now_s, partition, *found.get(partition, (0, ""))))
        return found

    def member(self) -> GroupMember:
        """See ConsumerClient."""
        if self._member is None:
            raise BrokerError("not a member of the group")
        return GroupMember(Membership(self._member, self._member.generation))

    def commit(self, offsets: Mapping[Partition, tuple[int, str]]) -> None:
        """See ConsumerClient."""
        group, member = self._group, self._member
        if group is None or member is None:
            raise BrokerError("committing: not a member of the group")
        kept, generation, asked = dict(offsets), member.generation, self._broker.next_asked()

        def keep() -> None:
            group.check(member, generation)
            group.commit(kept, asked)

        self._link.call(f"commit {_offsets(kept)}", keep, commit_fate(self._broker))

    # --- what the log holds -------------------------------------------------------------------------------------

    def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """See ConsumerClient."""
        wanted = list(partitions)
        return self._link.call("ask for beginnings", lambda: self._broker.each(wanted, lambda log: log.beginning))

    def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """See ConsumerClient."""
        wanted = list(partitions)
        return self._link.call("ask for ends", lambda: self._broker.each(wanted, lambda log: log.stable_end))

    def offsets_at(self, partitions: Iterable[Partition], time_ms: int) -> dict[Partition, int]:
        """See ConsumerClient."""
        wanted = list(partitions)

        def at(log: PartitionLog) -> int:
            return log.at_time(time_ms)

        return self._link.call("ask for offsets of a time", lambda: self._broker.each(wanted, at))

    def partitions_for(self, topic: str) -> list[Partition]:
        """See ConsumerClient."""
        found = self._broker.partitions(topic)
        if not found:
            raise BrokerError(f"no topic {topic}")
        return found

    def close(self) -> None:
        """See ConsumerClient; a member with a name of its own does not leave: its next run takes its place."""
        if self._closed:
            return
        self._life.point("close")
        self._closed = True
        group, member, owned = self._group, self._member, sorted(self._owned)
        try:
            if group is None or member is None or self._callbacks is None:
                return
            ours = member in group.members
            try:
                if owned:
                    self._callbacks[1 if ours else 2](owned)
            finally:
                self._let_go(owned)
                if ours and not self._instance:
                    self._link.call("leave the group", lambda: group.leave(member))
        finally:
            self._link.cut()


def commit_fate(broker: SimBroker) -> Fate:
    """What becomes of the next commit."""
    world, weather = broker.world, broker.network.weather
    if world.happens(weather.refused_share):
        return "refused"
    if world.happens(weather.reply_lost_share):
        return "reply-lost"
    return "late" if world.happens(weather.late_share) else "served"


def _batch(partition: Partition, records: Sequence[Record]) -> FetchedBatch:
    return FetchedBatch(
        topic=partition[0],
        partition=partition[1],
        offsets=np.array([one.offset for one in records], np.int64),
        timestamps_ms=np.array([one.time_ms for one in records], np.int64),
        keys=[one.key for one in records],
        values=[one.value for one in records],
        headers=[one.headers for one in records],
    )


def _numbers(partitions: Iterable[Partition]) -> str:
    return ", ".join(f"{topic}-{number}" for topic, number in partitions)


def _offsets(offsets: Mapping[Partition, tuple[int, str]]) -> str:
    return ", ".join(f"{topic}-{number}: {offset}" for (topic, number), (offset, _) in sorted(offsets.items()))
