"""ConsumerClient on the simulated broker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from bench.faults.broker import SimBroker
from bench.faults.group import Group, Member
from bench.faults.logs import PartitionLog, Record
from bench.faults.network import Connection, Fate
from bench.faults.world import CALL_S, NEVER_S, Life
from cascade.errors import BrokerError
from streaming.kafka import FetchedBatch, GroupMember, Partition, PartitionsCallback


class SimConsumer:
    """A consumer of the broker's group, or outside any group.

    group: whether it is a member of the group.
    instance: as `kafka.instance`, the name of a static member.
    poll_s: least duration of a poll.

    `committed_reads`: the results of `committed`, for the oracle: time, partition, offset, metadata. `resume_s`: when
    the last poll would have ended, if it returned early to let another process continue.
    """

    def __init__(self, broker: SimBroker, life: Life, group: bool, instance: str = "", poll_s: float = CALL_S) -> None:
        self._broker, self._world, self._life = broker, broker.world, life
        self._connection = Connection(broker.network, life, "consumer" if group else "reader")
        self._group = broker.group if group else None
        self._instance, self._poll_s = instance, poll_s
        self._member: Member | None = None
        self._on_assigned: PartitionsCallback = _ignore
        self._on_revoked: PartitionsCallback = _ignore
        self._on_lost: PartitionsCallback = _ignore
        self._closed = False
        self._owned: set[Partition] = set()
        self._paused: set[Partition] = set()
        self._positions: dict[Partition, int] = {}
        # partitions whose fetches are delayed, and until when
        self._delayed_until_s: dict[Partition, float] = {}
        self._woken = False
        self._skipped: set[tuple[Partition, int]] = set()
        self.committed_reads: list[tuple[float, Partition, int, str]] = []
        self.resume_s = 0.0

    # --- partitions ---------------------------------------------------------------------------------------------

    def subscribe(
        self,
        topics: Sequence[str],
        on_assigned: PartitionsCallback,
        on_revoked: PartitionsCallback,
        on_lost: PartitionsCallback | None = None,
    ) -> None:
        """See ConsumerClient; the consumer gets the topic that the broker's group shares."""
        del topics
        self._life.fault_point("subscribe")
        self._on_assigned, self._on_revoked, self._on_lost = on_assigned, on_revoked, on_lost or on_revoked

    def assign(self, partitions: Sequence[Partition]) -> None:
        """See ConsumerClient."""
        self._positions = self.beginning_offsets(partitions)
        self._owned = set(partitions)

    def assignment(self) -> set[Partition]:
        """See ConsumerClient."""
        return set(self._owned)

    def joined(self) -> bool:
        """See ConsumerClient."""
        return self._member is not None and self._member.generation > 0 and not self._member.assignment_pending

    def pause(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient."""
        self._paused |= self._checked_owned(partitions, "pausing")

    def resume(self, partitions: Iterable[Partition]) -> None:
        """See ConsumerClient."""
        self._paused -= self._checked_owned(partitions, "resuming")

    def seek(self, partition: Partition, offset: int) -> None:
        """See ConsumerClient."""
        self._checked_owned([partition], "seeking")
        self._positions[partition] = offset

    def position(self, partition: Partition) -> int:
        """See ConsumerClient."""
        self._checked_owned([partition], "reading the position of")
        return self._positions[partition]

    @property
    def dropped(self) -> bool:
        """Whether the group has removed this member, which it may not have noticed yet."""
        return self._group is not None and self._member is not None and self._member not in self._group.members

    @property
    def replaying(self) -> bool:
        """Whether the position of a partition is below its committed offset."""
        offsets = self._broker.group.offsets
        return any(self._positions[partition] < offsets.get(partition, (0, ""))[0] for partition in self._owned)

    def _checked_owned(self, partitions: Iterable[Partition], action: str) -> set[Partition]:
        requested = set(partitions)
        unassigned = requested - self._owned
        if unassigned:
            raise BrokerError(f"{action} {sorted(unassigned)}: not assigned")
        return requested

    # --- records ------------------------------------------------------------------------------------------------

    def poll(self, timeout_s: float, rows_max: int) -> list[FetchedBatch]:
        """See ConsumerClient; returns early if another process waits to continue."""
        world = self._world
        self._life.fault_point("poll")
        if self._closed:
            raise BrokerError("polling: the consumer is closed")
        deadline_s = world.now_s + max(timeout_s, self._poll_s)
        world.wait(world.now_s + CALL_S)
        while True:
            self._life.check()
            if self._group is not None and self._coordination_due():
                self._coordinate(self._group)
            fetchable = [] if self._connection.clogged else self._fetchable()
            found = self._fetch(fetchable, rows_max)
            if found:
                world.wait(world.now_s + world.chance.random() * self._broker.network.faults.latency_s, alone=True)
                self._life.fault_point(f"{sum(map(len, found))} records")
                return found
            until_s = min(deadline_s, world.limit_s)
            if self._woken or world.now_s >= until_s:
                self._woken = False
                self.resume_s = deadline_s
                return []
            delayed_s = min((self._delayed_until_s.get(partition, 0.0) for partition in fetchable), default=NEVER_S)
            world.wait(max(min(until_s, delayed_s), world.now_s + CALL_S), partial(self._has_news, len(fetchable)))

    def wake(self) -> None:
        """See ConsumerClient."""
        self._woken = True

    def _has_news(self, fetchable: int) -> bool:
        """Whether `poll` has more to do than when `fetchable` partitions had records."""
        if self._life.dead or self._woken or self._coordination_due():
            return True
        return not self._connection.clogged and len(self._fetchable()) > fetchable

    def _fetchable(self) -> list[Partition]:
        logs, positions = self._broker.logs, self._positions
        return [
            partition
            for partition in sorted(self._owned - self._paused)
            if positions[partition] < max(logs[partition].stable_end, logs[partition].beginning)
        ]

    def _fetch(self, fetchable: list[Partition], rows_max: int) -> list[FetchedBatch]:
        world, faults = self._world, self._broker.network.faults
        ready = [partition for partition in fetchable if self._delayed_until_s.get(partition, 0.0) <= world.now_s]
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
            if len(fetchable) > 1 and world.happens(faults.fetch_delay_share):
                self._delayed_until_s[partition] = world.now_s + faults.fetch_delay_s * world.chance.random()
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
        """Whether this fetch omits its first records; no fetch omits records from the same offset again."""
        if self._group is None or len(records) < 2 or (partition, records[0].offset) in self._skipped:
            return False
        skips = self._world.happens(self._broker.network.faults.skipped_share)
        if skips:
            self._skipped.add((partition, records[0].offset))
        return skips

    # --- the group ----------------------------------------------------------------------------------------------

    def _coordination_due(self) -> bool:
        """Whether the consumer has to join the group, or to take a new assignment."""
        group, member = self._group, self._member
        if group is None or self._connection.clogged:
            return False
        if member is None or member not in group.members or member.assignment_pending:
            return True
        return group.rebalancing and not member.joined

    def _coordinate(self, group: Group) -> None:
        member = self._member
        if member is not None and member.fenced:
            raise BrokerError(f"fenced: another consumer of the instance {member.instance} has joined the group")
        if member is not None and member not in group.members:
            self._member = None
            lost = sorted(self._owned)
            if lost:
                self._world.fire("session-expired")
                self._life.fault_point(f"lost {_names(lost)}")
                self._on_lost(lost)
                self._release(lost)
        if self._member is None:
            self._member = group.add_member(self._life, self._connection, self._instance)
        member = self._member
        if group.rebalancing and not member.joined:
            group.join(member, self._owned)
        if member.assignment_pending:
            member.assignment_pending = False
            self._take_assignment(group, member)

    def _take_assignment(self, group: Group, member: Member) -> None:
        """Revoke the partitions that are no longer assigned, and join once more; take the newly assigned ones."""
        assigned = set(member.assigned)
        revoked = sorted(self._owned - assigned)
        if revoked:
            self._life.fault_point(f"revoked {_names(revoked)}")
            self._on_revoked(revoked)
            self._release(revoked)
            if member in group.members:
                group.rebalance()
        gained = sorted(assigned - self._owned)
        if gained and member in group.members:
            committed, beginnings = self.committed(gained), self.beginning_offsets(gained)
            self._owned |= set(gained)
            for partition in gained:
                self._positions[partition] = committed.get(partition, (beginnings[partition], ""))[0]
            self._life.fault_point(f"assigned {_names(gained)}")
            self._on_assigned(gained)

    def _release(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            self._owned.discard(partition)
            self._paused.discard(partition)
            self._positions.pop(partition, None)
            self._delayed_until_s.pop(partition, None)

    def committed(self, partitions: Iterable[Partition]) -> dict[Partition, tuple[int, str]]:
        """See ConsumerClient."""
        requested, broker, world = list(partitions), self._broker, self._world
        give_up_s = world.now_s + broker.network.faults.request_timeout_s

        def pending() -> bool:
            return any(map(broker.transactions.has_pending_offsets, requested))

        def fetch() -> dict[Partition, tuple[int, str]] | None:
            offsets = broker.group.offsets
            return None if pending() else {each: offsets[each] for each in requested if each in offsets}

        while (found := self._connection.call("fetch committed offsets", fetch)) is None:
            if not world.wait(give_up_s, lambda: not pending()):
                raise BrokerError("fetching committed offsets: a transaction with such offsets does not end")
        for partition in requested:
            self.committed_reads.append((world.now_s, partition, *found.get(partition, (0, ""))))
        return found

    def member(self) -> GroupMember:
        """See ConsumerClient."""
        if self._member is None:
            raise BrokerError("not a member of the group")
        return GroupMember((self._member, self._member.generation))

    def commit(self, offsets: Mapping[Partition, tuple[int, str]]) -> None:
        """See ConsumerClient."""
        group, member = self._group, self._member
        if group is None or member is None:
            raise BrokerError("committing: not a member of the group")
        offsets, generation, request_number = dict(offsets), member.generation, self._broker.next_request_number()

        def store() -> None:
            group.check(member, generation)
            group.commit(offsets, request_number)

        text = ", ".join(f"{topic}-{number}: {offset}" for (topic, number), (offset, _) in sorted(offsets.items()))
        self._connection.call(f"commit {text}", store, commit_fate(self._broker))

    # --- offsets of the logs ------------------------------------------------------------------------------------

    def beginning_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """See ConsumerClient."""
        return self._log_offsets("fetch beginning offsets", partitions, lambda log: log.beginning)

    def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """See ConsumerClient."""
        return self._log_offsets("fetch end offsets", partitions, lambda log: log.stable_end)

    def offsets_at(self, partitions: Iterable[Partition], time_ms: int) -> dict[Partition, int]:
        """See ConsumerClient."""
        return self._log_offsets("fetch offsets by time", partitions, lambda log: log.at_time(time_ms))

    def partitions_for(self, topic: str) -> list[Partition]:
        """See ConsumerClient."""
        found = self._broker.partitions(topic)
        if not found:
            raise BrokerError(f"no topic {topic}")
        return found

    def close(self) -> None:
        """See ConsumerClient; a static member does not leave the group: the process's next run replaces it."""
        if self._closed:
            return
        self._life.fault_point("close")
        self._closed = True
        group, member, owned = self._group, self._member, sorted(self._owned)
        try:
            if group is None or member is None:
                return
            is_member = member in group.members
            try:
                if owned:
                    (self._on_revoked if is_member else self._on_lost)(owned)
            finally:
                self._release(owned)
                if is_member and not self._instance:
                    self._connection.call("leave the group", lambda: group.leave(member))
        finally:
            self._connection.cut()

    def _log_offsets(
        self, name: str, partitions: Iterable[Partition], offset_of: Callable[[PartitionLog], int]
    ) -> dict[Partition, int]:
        requested, logs = list(partitions), self._broker.logs
        return self._connection.call(name, lambda: {each: offset_of(logs[each]) for each in requested})


def commit_fate(broker: SimBroker) -> Fate:
    """Draw the fate of the next commit."""
    world, faults = broker.world, broker.network.faults
    if world.happens(faults.commit_refused_share):
        return "refused"
    if world.happens(faults.commit_reply_lost_share):
        return "reply-lost"
    return "late" if world.happens(faults.commit_late_share) else "served"


def _batch(partition: Partition, records: Sequence[Record]) -> FetchedBatch:
    return FetchedBatch(
        topic=partition[0],
        partition=partition[1],
        offsets=np.array([record.offset for record in records], np.int64),
        timestamps_ms=np.array([record.time_ms for record in records], np.int64),
        keys=[record.key for record in records],
        values=[record.value for record in records],
        headers=[record.headers for record in records],
    )


def _ignore(partitions: list[Partition]) -> None:
    """The callback of a consumer without a group."""


def _names(partitions: Iterable[Partition]) -> str:
    return ", ".join(f"{topic}-{number}" for topic, number in partitions)
