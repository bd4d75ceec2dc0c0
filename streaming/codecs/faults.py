"""Faults of rows, and the removal of faulty rows."""

from __future__ import annotations

import numpy as np

from cascade.columns import Bool, ColumnBatch, Int64
from streaming.codecs.protocol import Decoded, Reject, RejectReason

DETAIL_CHARACTERS_MAX = 200

Fault = tuple[RejectReason, str]
# The first fault of each faulty row, by row.
Faults = dict[int, Fault]


def note(faults: Faults, mask: Bool, reason: RejectReason, detail: str) -> None:
    """Adds a fault to the rows of `mask` (bool, [rows]) that have none yet."""
    for row in np.flatnonzero(mask).tolist():
        faults.setdefault(row, (reason, detail))


def reject(index: int, fault: Fault) -> Reject:
    """Returns the reject of the message at `index`."""
    return Reject(index, fault[0], fault[1][:DETAIL_CHARACTERS_MAX])


def sift(batch: ColumnBatch, rows: Int64, faults: Faults, rejects: list[Reject]) -> Decoded:
    """Returns the rows without a fault; the others join `rejects`, by their index in the input (`rows`)."""
    if faults:
        rejects.extend(reject(int(rows[row]), fault) for row, fault in faults.items())
        good = np.ones(len(rows), np.bool_)
        good[list(faults)] = False
        batch, rows = batch.take(good), rows[good]
    rejects.sort(key=lambda reject: reject.index)
    return Decoded(batch, rows, rejects)


def size_fault(value: bytes | None, bytes_max: int) -> Fault:
    """Returns the fault of a message that is empty or larger than `bytes_max`."""
    if value:
        return RejectReason.OVERSIZED, f"{len(value)} bytes, at most {bytes_max}"
    return RejectReason.EMPTY, "no bytes" if value is not None else "a tombstone"
