"""What must hold before a commit, before a snapshot is written, and after it is read; checked in production.

A check that fails means that the worker's own memory is wrong. What it would write then could lose transactions without
a trace, so it writes nothing: the session ends, and the next one resumes from what was committed before. The checks
look at offsets and shapes, never at each row: a commit takes microseconds longer, a snapshot a fraction of a
millisecond.
"""

from __future__ import annotations

from collections.abc import Mapping

from cascade.errors import CascadeError
from streaming.kafka import Partition
from streaming.pipeline.offsets import Decided
from streaming.worker.partitions import OwnedPartition, Phase
from streaming.worker.snapshots import Snapshot

_REMEDY = "nothing was written; report this with the log lines above"


class InvariantError(CascadeError):
    """A check of the worker's own memory failed: a defect of this software. The message names the offsets."""


def check_commit(owned: OwnedPartition, progress: Decided, committed: int | None) -> None:
    """Raises InvariantError unless `progress` may be committed for the partition.

    progress: the decided offsets. committed: the offset that this worker committed last, None if it committed none.

    The offset to commit is not below an earlier one, so that nothing is decided twice, and not above the next record to
    take, so that nothing is skipped. The offsets ahead are ascending, and begin above the prefix, which ends at an
    undecided record, or at the next record to take: an earlier owner of the partition may have decided it.
    """
    least = owned.until if committed is None else max(owned.until, committed)
    if progress.until < least:
        raise _broken(owned.partition, f"offset {progress.until} to commit is below {least}, which is committed")
    if progress.until > owned.next:
        raise _broken(owned.partition, f"offset {progress.until} to commit is above the next record, {owned.next}")
    ahead = progress.ahead
    if not len(ahead):
        return
    if ahead[0] < progress.until or ahead[0] == progress.until < owned.next:
        raise _broken(
            owned.partition, f"decided offset {ahead[0]} is ahead of the decided prefix, which ends at {progress.until}"
        )
    if (ahead[1:] <= ahead[:-1]).any():
        raise _broken(owned.partition, "the offsets decided ahead are not ascending")
    last = max(owned.next - 1, owned.decided.ahead.item(-1) if len(owned.decided.ahead) else 0)
    if ahead[-1] > last:
        raise _broken(owned.partition, f"decided offset {ahead[-1]} is above {last}, the last one that was read")


def check_snapshot(snapshot: Snapshot, owned: Mapping[Partition, OwnedPartition]) -> None:
    """Raises InvariantError unless the snapshot's offsets are those of the worker's partitions, `owned`.

    Each partition is live, and its offset is that of its next record: the state contains all records below, and no
    other. The committed offset is not above it.
    """
    if snapshot.transactions.keys() != owned.keys():
        raise InvariantError(f"a snapshot of {sorted(snapshot.transactions)}, with {sorted(owned)} assigned; {_REMEDY}")
    for partition, offset in snapshot.transactions.items():
        part = owned[partition]
        if part.phase is not Phase.LIVE:
            raise _broken(partition, f"a snapshot while the partition is {part.phase.value}")
        if offset != part.next:
            raise _broken(partition, f"a snapshot at offset {offset}, with {part.next} as the next record")
        if snapshot.committed.get(partition, 0) > offset:
            raise _broken(
                partition, f"a snapshot at offset {offset}, below the committed offset {snapshot.committed[partition]}"
            )


def _broken(partition: Partition, text: str) -> InvariantError:
    return InvariantError(f"{partition[0]}-{partition[1]}: {text}; {_REMEDY}")
