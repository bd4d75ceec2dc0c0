"""Rebuilds the state of assigned partitions from a snapshot and the log, while the other partitions go on.

An assigned partition is paused until its part of the newest fitting snapshot is restored, a slice in each turn of the
loop. Then its log is read from the snapshot's offset on: records below the committed offset are folded, without a
decision. At the committed offset the partition goes live. A rebalance may happen at any time: a lost partition is
dropped in any phase, an assigned one begins in the same way.

At a start, when no partition is live, all go live together, so that the first decisions see all of a terminal's
transactions. Later, a partition that is being rebuilt is hidden from the features of the others until it goes live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from cascade.errors import StateError
from cascade.features import FeatureEngine
from cascade.ledger import Ledger
from cascade.protocols import Clock
from streaming.health_state import HealthState
from streaming.kafka import ConsumerClient, Partition
from streaming.pipeline.duplicates import FirstDecisions
from streaming.pipeline.offsets import NOTHING_DECIDED, Decided
from streaming.worker.history import History
from streaming.worker.labels import LabelFollower
from streaming.worker.partitions import OwnedPartition, Phase
from streaming.worker.snapshots import Snapshot, SnapshotStore

log = structlog.get_logger()
# Keys restored in a turn of the loop: a few milliseconds, in which the other partitions wait.
SLICE_SLOTS = 4_096


@dataclass(slots=True)
class _Restoring:
    """A snapshot that is being restored for these partitions; `next`: the first slot of the next slice."""

    name: str
    snapshot: Snapshot
    partitions: list[OwnedPartition]
    next: int = 0


@dataclass(eq=False)
class Recovery:
    """Has the assigned partitions and rebuilds their state; for one thread, the consumer's callbacks included.

    history: what the state covers. shares: whether other workers' summaries count for the partitions that this worker
    does not own.
    """

    _consumer: ConsumerClient
    _labels: LabelFollower
    _features: FeatureEngine
    _first_decisions: FirstDecisions
    _snapshots: SnapshotStore | None
    _ledger: Ledger
    _health: HealthState
    _clock: Clock
    _on_live: Callable[[OwnedPartition], None]
    _history: History
    _shares: bool
    owned: dict[Partition, OwnedPartition] = field(default_factory=dict, init=False)
    _candidates: dict[Partition, list[str]] = field(default_factory=dict, init=False)
    _restoring: _Restoring | None = field(default=None, init=False)

    @property
    def live(self) -> list[OwnedPartition]:
        """The partitions whose records are decided."""
        return [owned for owned in self.owned.values() if owned.phase is Phase.LIVE]

    @property
    def done(self) -> bool:
        """Whether every assigned partition is live."""
        for owned in self.owned.values():  # noqa: SIM110  # each turn: a generator would take twice as long
            if owned.phase is not Phase.LIVE:
                return False
        return True

    @property
    def restoring(self) -> bool:
        """Whether a snapshot is being restored."""
        return self._restoring is not None

    def gain(self, partitions: Sequence[Partition]) -> None:
        """Adds assigned partitions; raises StateError if the log has lost records and the operator must decide."""
        committed = self._consumer.committed(partitions)
        beginnings = self._consumer.beginning_offsets(partitions)
        self._consumer.pause(partitions)
        for partition in partitions:
            decided = Decided.from_commit(*committed[partition]) if partition in committed else NOTHING_DECIDED
            beginning = beginnings[partition]
            if 0 < decided.until < beginning:
                raise StateError(
                    f"the log of {partition[0]}-{partition[1]} begins at offset {beginning}, after the committed offset"
                    f" {decided.until}: the records between were deleted before they were decided. To go on without"
                    f" them, commit offset {beginning} for the group; then raise the topic's retention"
                )
            self.owned[partition] = OwnedPartition(partition, decided, beginning, self._clock.monotonic())
            if self.live:
                self._features.hide(partition[1])
            else:
                self._features.show(partition[1])
        self._find_snapshots([self.owned[partition] for partition in partitions])
        ids = [partition_id for _, partition_id in partitions]
        log.info(
            "partitions assigned", partitions=ids, committed=[self.owned[partition].until for partition in partitions]
        )
        self._health.waiting("state", "rebuilding")

    def lose(self, partitions: Sequence[Partition]) -> None:
        """Drops partitions and their state."""
        for partition in partitions:
            if self.owned.pop(partition, None) is None:
                continue
            self._candidates.pop(partition, None)
            self._features.forget(partition[1])
            if self._shares:
                # from now on its next owner's summaries count
                self._features.hide(partition[1])
            else:
                self._features.show(partition[1])
            self._first_decisions.forget(partition[1])
        if self._restoring is not None:
            self._restoring.partitions = [
                owned for owned in self._restoring.partitions if self.owned.get(owned.partition) is owned
            ]
        # those that are left may all be live, and then no turn would show it
        self._show_progress()

    def advance(self) -> None:
        """Does a turn's work for the partitions that are not live."""
        if self.done:
            return
        if self._restoring is not None:
            self._restore_slice(self._restoring)
        else:
            self._choose()
        self._follow_replays()
        self._show_progress()

    def _choose(self) -> None:
        """Starts the next partition with its best snapshot, shared by all that have the same, else with the log."""
        waiting = [owned for owned in self.owned.values() if owned.phase is Phase.RESTORING]
        if not waiting:
            return
        names = self._candidates.get(waiting[0].partition, [])
        snapshot = None
        if names and self._snapshots is not None:
            name = names[0]
            snapshot = self._snapshots.load(name)
            sharing = [owned for owned in waiting if self._candidates.get(owned.partition, [""])[:1] == [name]]
            if snapshot is None:
                self._find_snapshots(sharing)
                return
        if snapshot is None:
            # Rewind the labels: those already folded lie outside the windows of the log's first records.
            self._labels.rewind()
            self._replay(waiting[0])
            return
        offsets = {owned.partition_id: snapshot.transactions[owned.partition] for owned in sharing}
        log.info("restoring a snapshot", file=name, partitions=list(offsets), offsets=list(offsets.values()))
        self._restoring = _Restoring(name, snapshot, sharing)

    def _restore_slice(self, work: _Restoring) -> None:
        partition_ids = [owned.partition_id for owned in work.partitions]
        try:
            # with the frauds, and to the end even if the partitions were lost meanwhile: the labels are read on from
            # the snapshot's label offsets
            following = self._features.absorb(
                work.snapshot.arrays, partition_ids, labels=True, first=work.next, count=SLICE_SLOTS
            )
            if following is None and partition_ids:
                # without decisions that were not committed: their records may have been decided again since
                committed = {
                    part.partition_id: work.snapshot.committed.get(part.partition, 0) for part in work.partitions
                }
                arrays = self._first_decisions.without_later(work.snapshot.arrays, committed)
                self._first_decisions.absorb(arrays, partition_ids)
                self._history.absorb(work.snapshot.arrays)
        except StateError as error:
            self._give_up(work, error)
            return
        if following is not None:
            work.next = following
            return
        self._restoring = None
        self._labels.go_back(work.snapshot.labels)
        for owned in work.partitions:
            owned.next = work.snapshot.transactions[owned.partition]
            self._replay(owned)

    def _give_up(self, work: _Restoring, error: StateError) -> None:
        """Falls back to the previous snapshot, or the log, because this one does not fit."""
        if self._snapshots is not None:
            self._snapshots.distrust(work.name, str(error))
        self._restoring = None
        if self._labels.positions:
            # some of the frauds that it has restored may have been retracted since
            self._labels.go_back(work.snapshot.labels)
        for owned in work.partitions:
            self._features.forget(owned.partition_id)
            self._first_decisions.forget(owned.partition_id)
        self._find_snapshots(work.partitions)

    def _find_snapshots(self, partitions: Sequence[OwnedPartition]) -> None:
        """Looks up the snapshots that fit these partitions; raises StateError as SnapshotStore.candidates does."""
        if self._snapshots is None:
            return
        beginnings = self._consumer.beginning_offsets([owned.partition for owned in partitions])
        # a group that has committed nothing begins with the log's first record, as the snapshot of a warm-up ends there
        until = {owned.partition: owned.until or beginnings[owned.partition] for owned in partitions}
        beginnings = beginnings | self._labels.beginnings()
        self._candidates |= self._snapshots.candidates(until, beginnings)

    def _replay(self, owned: OwnedPartition) -> None:
        self._consumer.seek(owned.partition, owned.next)
        if owned.next >= owned.until:
            # it stays paused: a fetch begun now would have to end before the one that counts
            owned.phase = Phase.REBUILT
        else:
            owned.phase = Phase.REPLAYING
            self._consumer.resume([owned.partition])

    def _follow_replays(self) -> None:
        """Lets partitions go live that have reached their committed offset."""
        for owned in self.owned.values():
            if owned.phase is not Phase.REPLAYING:
                continue
            if owned.next < owned.until <= self._consumer.position(owned.partition):
                # the last records before it are control records, which no fetch returns
                owned.next = owned.until
            if owned.next >= owned.until:
                owned.phase = Phase.REBUILT
                self._consumer.pause([owned.partition])
                self._consumer.seek(owned.partition, owned.next)
        rebuilt = [owned for owned in self.owned.values() if owned.phase is Phase.REBUILT]
        others = any(owned.phase in (Phase.RESTORING, Phase.REPLAYING) for owned in self.owned.values())
        if not self.live and others:
            return
        for owned in rebuilt:
            self._go_live(owned)

    def _go_live(self, owned: OwnedPartition) -> None:
        owned.phase = Phase.LIVE
        self._features.show(owned.partition_id)
        seconds = self._clock.monotonic() - owned.assigned_s
        self._ledger.record_recovery(seconds)
        log.info("partition live", partition=owned.partition_id, committed=owned.until, seconds=round(seconds, 2))
        self._on_live(owned)

    def _show_progress(self) -> None:
        left = [
            f"{owned.partition_id}: {owned.next:,} of {owned.until:,}"
            if owned.phase is Phase.REPLAYING
            else f"{owned.partition_id}: {owned.phase.value}"
            for owned in self.owned.values()
            if owned.phase is not Phase.LIVE
        ]
        if left:
            self._health.waiting("state", f"rebuilding, partition {'; '.join(left)}")
        else:
            self._health.ok("state")
