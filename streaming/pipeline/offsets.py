"""Tracks which offsets are decided: the decided prefix, and the offsets ahead of it.

An escalated transaction delays the prefix, while hundreds of later ones are decided. The commit metadata lists these
offsets ahead of the prefix, so that a restart decides none of them again.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from cascade.columns import Bool, Int64
from streaming.pipeline import offset_kernels as kernels

# The brokers' default of offset.metadata.max.bytes.
METADATA_BYTES_MAX = 4_096
_FORMAT = "a1:"
_MORE = 0x80
# Beyond both limits the metadata is damaged: no worker has so many records in flight, no log such offsets.
AHEAD_MAX = 10_000_000
OFFSET_MAX = np.iinfo(np.int64).max
# Room for the records of a tracker at first.
_LENGTH_MIN = 256
# A tracker that is longer gives its memory back when all its records are decided.
_LENGTH_KEPT = 1 << 16


@dataclass(frozen=True, slots=True)
class Decided:
    """The decided offsets of a partition at the last commit: all below `until`, and `ahead` (int64, ascending).

    >>> import numpy as np
    >>> decided = Decided.from_commit(7, Decided(7, np.array([8, 9, 12])).metadata())
    >>> decided.mask(np.arange(5, 14)).tolist()
    [True, True, False, True, True, False, False, True, False]
    >>> decided.escalated(np.arange(5, 14)).tolist()
    [False, False, True, False, False, True, True, False, False]
    """

    until: int = 0
    ahead: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def from_commit(cls, offset: int, metadata: str) -> Decided:
        """Reads a committed offset and its metadata; ignores metadata that Cascade did not write."""
        return cls(offset, _parse(offset, metadata))

    def mask(self, offsets: Int64) -> Bool:
        """Which of the offsets (int64, ascending) are decided, bool [offsets]."""
        below: Bool = offsets < self.until
        if not len(self.ahead) or not len(offsets) or offsets[0] > self.ahead[-1]:
            return below
        return below | np.isin(offsets, self.ahead)

    def escalated(self, offsets: Int64) -> Bool:
        """Which of the offsets (ascending) were undecided while later ones were decided, bool [offsets].

        Only an escalation delays a record so.
        """
        if not len(self.ahead) or not len(offsets) or offsets[0] > self.ahead[-1]:
            return np.zeros(len(offsets), bool)
        below: Bool = offsets < self.ahead[-1]
        return below & ~self.mask(offsets)

    def metadata(self) -> str:
        """Returns `ahead` as text of at most METADATA_BYTES_MAX bytes, without the last ones if there are too many.

        Format: from `until` on, the lengths of undecided and decided runs in turn, as base-128 varints, in base64.
        """
        octets = bytearray()
        position = self.until
        for first, last in _runs(self.ahead):
            pair = _varint(first - position) + _varint(last + 1 - first)
            if len(_FORMAT) + (len(octets) + len(pair) + 2) // 3 * 4 > METADATA_BYTES_MAX:
                break
            octets += pair
            position = last + 1
        return _FORMAT + base64.b64encode(octets).decode() if octets else ""


NOTHING_DECIDED = Decided()


def _runs(offsets: Int64) -> Iterable[tuple[int, int]]:
    """(first, last) of each run of consecutive offsets."""
    if not len(offsets):
        return []
    breaks = np.flatnonzero(np.diff(offsets) != 1)
    firsts = offsets[np.concatenate([[0], breaks + 1])]
    lasts = offsets[np.concatenate([breaks, [len(offsets) - 1]])]
    return zip(firsts.tolist(), lasts.tolist(), strict=True)


def _varint(number: int) -> bytes:
    octets = bytearray()
    while number >= _MORE:
        octets.append(number % _MORE | _MORE)
        number //= _MORE
    octets.append(number)
    return bytes(octets)


def _parse(offset: int, metadata: str) -> Int64:
    nothing = np.zeros(0, np.int64)
    if not metadata.startswith(_FORMAT) or len(metadata) > METADATA_BYTES_MAX:
        return nothing
    try:
        octets = base64.b64decode(metadata[len(_FORMAT) :], validate=True)
    except (binascii.Error, ValueError):
        return nothing
    edges, number, shift = [offset], 0, 0
    for octet in octets:
        number |= (octet % _MORE) << shift
        shift += 7
        if octet < _MORE:
            edges.append(edges[-1] + number)
            number, shift = 0, 0
    runs = list(pairwise(edges))[1::2]
    if sum(end - first for first, end in runs) > AHEAD_MAX or edges[-1] > OFFSET_MAX:
        return nothing
    return np.concatenate([nothing, *(np.arange(first, end) for first, end in runs)])


class OffsetTracker:
    """The offsets of a partition that were taken and are not all decided.

    `taken` adds records that were read, `decided` marks those whose decision the broker has acknowledged. `committable`
    is the end of the decided prefix.

    >>> import numpy as np
    >>> tracker = OffsetTracker()
    >>> tracker.taken(np.array([4, 5, 6]))
    >>> tracker.decided(np.array([4, 6]))
    >>> tracker.committable, tracker.open
    (5, 1)
    """

    def __init__(self) -> None:
        # the offsets from the decided prefix on, ascending, between `_first` and `_end`, and which of them are decided
        self._offsets = np.zeros(_LENGTH_MIN, np.int64)
        self._known = np.zeros(_LENGTH_MIN, np.bool_)
        self._first = self._end = self._ahead = 0
        self._next: int | None = None

    def taken(self, offsets: Int64) -> None:
        """Adds records that were read: ascending offsets, beyond all earlier ones."""
        count = len(offsets)
        if count == 0:
            return
        if self._end + count > len(self._offsets):
            self._make_room(count)
        kernels.append(self._offsets, self._known, self._end, np.ascontiguousarray(offsets))
        self._end += count
        self._next = offsets.item(-1) + 1

    def decided(self, offsets: Int64) -> None:
        """Marks records as decided."""
        self._first, self._ahead = kernels.mark(
            self._offsets, self._known, self._first, self._end, self._ahead, np.ascontiguousarray(offsets)
        )
        if self._first == self._end:
            self._first = self._end = 0
            if len(self._offsets) > _LENGTH_KEPT:
                self._offsets, self._known = self._offsets[:_LENGTH_MIN].copy(), self._known[:_LENGTH_MIN].copy()

    @property
    def committable(self) -> int | None:
        """The offset to commit, of the first record without a decision; None if nothing was taken."""
        return int(self._offsets[self._first]) if self._first < self._end else self._next

    @property
    def progress(self) -> Decided | None:
        """The decided offsets to commit; None if nothing was taken."""
        until = self.committable
        if until is None:
            return None
        return Decided(until, self._offsets[self._first : self._end][self._known[self._first : self._end]])

    @property
    def open(self) -> int:
        """The number of records that were taken and are undecided."""
        return self._end - self._first - self._ahead

    @property
    def undecided(self) -> Int64:
        """The offsets of the records that were taken and are undecided, int64."""
        return self._offsets[self._first : self._end][~self._known[self._first : self._end]]

    def _make_room(self, count: int) -> None:
        """Moves the records to the front, of longer arrays if they are more than half full."""
        waiting = slice(self._first, self._end)
        length = len(self._offsets)
        while 2 * (self._end - self._first + count) > length:
            length *= 2
        offsets, known = np.zeros(length, np.int64), np.zeros(length, np.bool_)
        self._end -= self._first
        self._first = 0
        offsets[: self._end], known[: self._end] = self._offsets[waiting], self._known[waiting]
        self._offsets, self._known = offsets, known
