"""The partitions that are ours: which records of each were taken and decided, and how far its state is rebuilt."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from streaming.clients import FetchedBatch, Partition
from streaming.offsets import Decided, OffsetTracker


class Phase(Enum):
    """Where a partition is on its way from assignment to decisions."""

    RESTORING = "restoring"  # its part of a snapshot is being taken in; nothing is fetched
    REPLAYING = "replaying"  # records that have their decision are folded again
    REBUILT = "rebuilt"  # waits for the other partitions of this start
    LIVE = "live"


@dataclass(frozen=True, slots=True)
class Accepted:
    """What of a fetch is taken: `batch`, None where nothing; `seek`: where to fetch next, None where it left off."""

    batch: FetchedBatch | None
    seek: int | None = None
    gap: bool = False


class OwnedPartition:
    """One partition from its assignment to its loss.

    `decided`: what had its decision at the assignment. `next`: the offset of the next record to take. `assigned_s`:
    of the monotonic clock.
    """

    def __init__(self, partition: Partition, decided: Decided, beginning: int, assigned_s: float) -> None:
        self.partition = partition
        self.decided = decided
        self.next = beginning
        self.assigned_s = assigned_s
        self.phase = Phase.RESTORING
        self.tracker = OffsetTracker()
        # an offset at which a fetch did not go on, and where it did
        self._suspect: tuple[int, int] | None = None

    @property
    def number(self) -> int:
        """Its number in the topic."""
        return self.partition[1]

    @property
    def until(self) -> int:
        """The committed offset: what lies below is replayed."""
        return self.decided.until

    @property
    def progress(self) -> Decided | None:
        """What a commit says; None where nothing was taken.

        What the last owner had decided further on, and we have not read yet, is said again: a commit replaces the one
        before it.
        """
        progress = self.tracker.progress
        if progress is None:
            return None
        later = self.decided.ahead[self.decided.ahead >= self.next]
        return Decided(progress.until, np.concatenate([progress.ahead, later])) if len(later) else progress

    def accept(self, fetched: FetchedBatch) -> Accepted:
        """The part of a fetch that comes next; moves `next` on.

        No offset is skipped: records before `next` (fetched for an earlier place) are dropped, and where a fetch does
        not go on at `next`, that place is fetched once more. Only if the log itself has no record there (control
        records of transactions take offsets, and so do compacted ones) is it passed. A replay ends at `until`, so
        that state and decisions change over there.
        """
        offsets = fetched.offsets
        start, stop = int(np.searchsorted(offsets, self.next)), len(offsets)
        if start == stop:
            return Accepted(None)
        first = int(offsets[start])
        gap = first > self.next
        if gap and self._suspect != (self.next, first):
            self._suspect = (self.next, first)
            return Accepted(None, self.next)
        self._suspect = None
        if self.phase is Phase.REPLAYING:
            stop = int(np.searchsorted(offsets, self.until))
        ends_replay = stop < len(offsets)
        batch = fetched.part(start, stop) if start < stop else None
        if batch is not None:
            self.next = int(batch.offsets[-1]) + 1
        if ends_replay:
            self.next = max(self.next, self.until)
        return Accepted(batch, self.next if ends_replay else None, gap)

    def take(self, offsets: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Records that were read; of those at or beyond `until` the tracker learns which are decided already."""
        taken = offsets[offsets >= self.until]
        self.tracker.taken(taken)
        self.tracker.decided(taken[self.decided.mask(taken)])
