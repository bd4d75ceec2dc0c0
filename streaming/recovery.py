"""From an assignment to decisions: each partition's state, from a snapshot and the log, while the others go on.

A partition that is gained stands still until its part of the newest fitting snapshot is taken in, a slice a turn of
the loop. Then its log is read from the snapshot's offset on; records below the committed offset are folded and nothing
is emitted for them. When that offset is reached the partition goes live. Another rebalance may come at any time: what
is lost is dropped wherever it stood, what is gained begins in the same way.

At a start, when nothing is live yet, all partitions go live together, so that the first decisions see all of a
terminal. Later, a partition that is being rebuilt is hidden from the features of the others until it goes live.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from cascade.columns import Array
from cascade.errors import StateError
from cascade.features import FeatureEngine
from cascade.ledger import Ledger
from cascade.protocols import Clock
from streaming.clients import ConsumerClient, Partition
from streaming.duplicates import FirstDecisions
from streaming.health import HealthState
from streaming.labels import LabelFollower
from streaming.offsets import NOTHING_DECIDED, Decided
from streaming.partitions import OwnedPartition, Phase
from streaming.snapshots import Snapshot, SnapshotStore

log = structlog.get_logger()
# Keys that one turn of the loop takes from a snapshot: a few milliseconds, in which the other partitions wait.
SLICE_SLOTS = 4_096


@dataclass(slots=True)
class _Restoring:
    """A snapshot that is being taken in, for some partitions; `next` slot, 0 at first."""

    name: str
    snapshot: Snapshot
    partitions: list[OwnedPartition]
    next: int = 0


class Recovery:
    """Owns the partitions and brings them to life; one thread uses it, the consumer's callbacks included."""

    def __init__(
        self, consumer: ConsumerClient, labels: LabelFollower, features: FeatureEngine,
        first_decisions: FirstDecisions, snapshots: SnapshotStore | None, ledger: Ledger, health: HealthState,
        clock: Clock, on_live: Callable[[OwnedPartition], None], shares: bool,
    ) -> None:  # fmt: skip
        """`shares`: whether what other workers tell of partitions that are not ours counts."""
        self._consumer, self._labels, self._features = consumer, labels, features
        self._first_decisions = first_decisions
        self._snapshots = snapshots
        self._ledger, self._health, self._clock = ledger, health, clock
        self._on_live = on_live
        self._shares = shares
        self.owned: dict[Partition, OwnedPartition] = {}
        self._candidates: dict[Partition, list[str]] = {}
        self._restoring: _Restoring | None = None

    @property
    def live(self) -> list[OwnedPartition]:
        """The partitions whose records are decided."""
        return [one for one in self.owned.values() if one.phase is Phase.LIVE]

    @property
    def done(self) -> bool:
        """Whether every partition that is ours is live."""
        return all(one.phase is Phase.LIVE for one in self.owned.values())

    def gain(self, partitions: Sequence[Partition]) -> None:
        """Begin with partitions that were assigned; raises StateError where the operator must choose."""
        committed = self._consumer.committed(partitions)
        beginnings = self._consumer.beginning_offsets(partitions)
        self._consumer.pause(partitions)
        for partition in partitions:
            decided = Decided.from_commit(*committed[partition]) if partition in committed else NOTHING_DECIDED
            beginning = beginnings[partition]
            if 0 < decided.until < beginning:
                raise StateError(
                    f"the log of {partition[0]}-{partition[1]} begins at {beginning}, beyond the committed offset"
                    f" {decided.until}: what lies between was deleted before it was decided. Commit offset {beginning}"
                    " for the group to go on without it, and raise the topic's retention"
                )
            self.owned[partition] = OwnedPartition(partition, decided, beginning, self._clock.monotonic())
            if self.live:
                self._features.hide(partition[1])
            else:
                self._features.show(partition[1])
        self._look_for_snapshots([self.owned[one] for one in partitions])
        numbers = ", ".join(str(number) for _, number in partitions)
        log.info("partitions assigned", partitions=numbers, decided_until=[self.owned[p].until for p in partitions])
        self._health.waiting("state", "rebuilding")

    def lose(self, partitions: Sequence[Partition]) -> None:
        """Forget partitions and their state."""
        for partition in partitions:
            if self.owned.pop(partition, None) is None:
                continue
            self._candidates.pop(partition, None)
            self._features.forget(partition[1])
            if self._shares:
                # what its next owner tells of it counts from now on
                self._features.hide(partition[1])
            else:
                self._features.show(partition[1])
            self._first_decisions.forget(partition[1])
        if self._restoring is not None:
            self._restoring.partitions = [one for one in self._restoring.partitions if self._is_ours(one)]

    def advance(self) -> None:
        """One turn's work for the partitions that are not live."""
        if self.done:
            return
        if self._restoring is not None:
            self._restore_slice(self._restoring)
        else:
            self._choose()
        self._follow_replays()
        self._tell()

    def _is_ours(self, one: OwnedPartition) -> bool:
        return self.owned.get(one.partition) is one

    def _choose(self) -> None:
        """Begin with the snapshot that the next partition wants, for all that want the same; else with the log."""
        waiting = [one for one in self.owned.values() if one.phase is Phase.RESTORING]
        if not waiting:
            return
        names = self._candidates.get(waiting[0].partition, [])
        snapshot = None
        if names and self._snapshots is not None:
            name = names[0]
            snapshot = self._snapshots.load(name)
            sharing = [one for one in waiting if self._candidates.get(one.partition, [""])[:1] == [name]]
            if snapshot is None:
                self._look_for_snapshots(sharing)
                return
        if snapshot is None:
            # frauds that are too old for what was folded meanwhile are not for the first records of the log
            self._labels.rewind()
            self._replay(waiting[0])
            return
        log.info(
            "taking in a snapshot",
            partitions=[one.number for one in sharing],
            offsets=[snapshot.transactions[one.partition] for one in sharing],
        )
        self._restoring = _Restoring(name, snapshot, sharing)

    def _restore_slice(self, work: _Restoring) -> None:
        numbers = [one.number for one in work.partitions]
        try:
            # the frauds too, and to the end, even where the partitions were taken away meanwhile: labels are read on
            # from where the snapshot stands
            following = self._features.absorb(
                work.snapshot.arrays, numbers, labels=True, first=work.next, count=SLICE_SLOTS
            )
            if following is None and numbers:
                self._first_decisions.absorb(self._trusted(work.snapshot, work.partitions), numbers)
        except StateError as error:
            self._give_up(work, error)
            return
        if following is not None:
            work.next = following
            return
        self._restoring = None
        self._labels.go_back(work.snapshot.labels)
        for one in work.partitions:
            one.next = work.snapshot.transactions[one.partition]
            self._replay(one)

    def _trusted(self, snapshot: Snapshot, partitions: Sequence[OwnedPartition]) -> Mapping[str, Array]:
        """The snapshot's arrays, with decisions known only as far as they were committed when it was made.

        What was decided beyond may have been decided anew since, and otherwise.
        """
        committed = {one.number: snapshot.committed.get(one.partition, 0) for one in partitions}
        return self._first_decisions.without_later(snapshot.arrays, committed)

    def _give_up(self, work: _Restoring, error: StateError) -> None:
        """The snapshot does not fit: its partitions take the one before, or the log."""
        if self._snapshots is not None:
            self._snapshots.distrust(work.name, str(error))
        self._restoring = None
        if self._labels.positions:
            # what of its frauds was taken in already may have been taken back since
            self._labels.go_back(work.snapshot.labels)
        for one in work.partitions:
            self._features.forget(one.number)
            self._first_decisions.forget(one.number)
        self._look_for_snapshots(work.partitions)

    def _look_for_snapshots(self, partitions: Sequence[OwnedPartition]) -> None:
        """Ask which snapshots can serve partitions; raises StateError where the operator must choose."""
        if self._snapshots is None:
            return
        until = {one.partition: one.until for one in partitions}
        beginnings = self._consumer.beginning_offsets(until) | self._labels.beginnings()
        self._candidates |= self._snapshots.candidates(until, beginnings)

    def _replay(self, one: OwnedPartition) -> None:
        one.phase = Phase.REPLAYING
        self._consumer.seek(one.partition, one.next)
        self._consumer.resume([one.partition])

    def _follow_replays(self) -> None:
        """Find which partitions have reached what was committed, and let them go live."""
        for one in self.owned.values():
            if one.phase is not Phase.REPLAYING:
                continue
            if one.next < one.until <= self._consumer.position(one.partition):
                # the log's last records before it are control records, which no fetch shows
                one.next = one.until
            if one.next >= one.until:
                one.phase = Phase.REBUILT
                self._consumer.pause([one.partition])
                self._consumer.seek(one.partition, one.next)
        rebuilt = [one for one in self.owned.values() if one.phase is Phase.REBUILT]
        others = any(one.phase in (Phase.RESTORING, Phase.REPLAYING) for one in self.owned.values())
        if not self.live and others:
            return
        for one in rebuilt:
            self._go_live(one)

    def _go_live(self, one: OwnedPartition) -> None:
        one.phase = Phase.LIVE
        self._features.show(one.number)
        seconds = self._clock.monotonic() - one.assigned_s
        self._ledger.record_recovery(seconds)
        log.info("partition live", partition=one.number, decided_until=one.until, seconds=round(seconds, 2))
        self._on_live(one)

    def _tell(self) -> None:
        left = [
            f"{one.number}: {one.next:,} of {one.until:,}"
            if one.phase is Phase.REPLAYING
            else f"{one.number}: {one.phase.value}"
            for one in self.owned.values()
            if one.phase is not Phase.LIVE
        ]
        if left:
            self._health.waiting("state", f"rebuilding, partition {'; '.join(left)}")
        else:
            self._health.ok("state")
