"""The assigned partitions: which records of each were taken and decided, and how far its state is rebuilt."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from streaming.kafka import FetchedBatch, Partition
from streaming.pipeline.offsets import Decided, OffsetTracker


class Phase(Enum):
    """The steps of a partition from its assignment to decisions."""

    RESTORING = "restoring"  # loads its part of a snapshot; nothing is fetched
    REPLAYING = "replaying"  # folds decided records again
    REBUILT = "rebuilt"  # waits for the other partitions of this start
    LIVE = "live"


@dataclass(slots=True)
class Accepted:
    """The part of a fetch to process: `batch`, or None. `seek`: the offset to seek to for the next fetch, or None."""

    batch: FetchedBatch | None
    seek: int | None = None
    gap: bool = False


class OwnedPartition:
    """A partition from its assignment to its loss.

    `decided`: the decided offsets at the assignment. `next`: the offset of the next record to take. `assigned_s`: time
    of the assignment, by the monotonic clock.
    """

    def __init__(self, partition: Partition, decided: Decided, beginning: int, assigned_s: float) -> None:
        self.partition = partition
        self.decided = decided
        self.next = beginning
        self.assigned_s = assigned_s
        self.phase = Phase.RESTORING
        self.tracker = OffsetTracker()
        self._all_undecided_from = decided.ahead.item(-1) + 1 if len(decided.ahead) else decided.until
        # the expected offset of a fetch that skipped it, and the first offset of that fetch
        self._suspect: tuple[int, int] | None = None

    @property
    def partition_id(self) -> int:
        """Kafka's number of the partition."""
        return self.partition[1]

    @property
    def until(self) -> int:
        """The committed offset; records below it are replayed."""
        return self.decided.until

    @property
    def progress(self) -> Decided | None:
        """The decided offsets to commit; None if nothing was taken.

        A commit replaces the previous one, so it must repeat the offsets that the previous owner decided and that we
        have not reached yet.
        """
        progress = self.tracker.progress
        if progress is None:
            return None
        later = self.decided.ahead[self.decided.ahead >= self.next]
        return Decided(progress.until, np.concatenate([progress.ahead, later])) if len(later) else progress

    def accept(self, fetched: FetchedBatch) -> Accepted:
        """Returns the part of a fetch to process, and advances `next`.

        No offset is skipped. Records before `next` (of an earlier position) are dropped. If a fetch begins after
        `next`, that offset is fetched once more; only if the log has no record there (control records of transactions
        and compacted records leave gaps) does the second fetch pass it. A replay ends exactly at `until`.
        """
        offsets = fetched.offsets
        if self.phase is Phase.LIVE and offsets.item(0) == self.next:
            # nearly always
            self._suspect = None
            self.next = offsets.item(-1) + 1
            return Accepted(fetched)
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
        """Adds records that were read, from `until` on, to the tracker, and marks those that are decided already."""
        if offsets.item(0) >= self._all_undecided_from:
            self.tracker.taken(offsets)
            return
        taken = offsets[offsets >= self.until]
        self.tracker.taken(taken)
        self.tracker.decided(taken[self.decided.mask(taken)])
