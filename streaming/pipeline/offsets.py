"""Tracks which offsets are decided: the decided prefix, and the offsets ahead of it.

An escalated transaction delays the prefix, while hundreds of later ones are decided. The commit metadata lists these
offsets ahead of the prefix, so that a restart decides none of them again.
"""

from __future__ import annotations

import base64
import binascii
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from cascade.columns import Bool, Int64

# The brokers' default of offset.metadata.max.bytes.
METADATA_BYTES_MAX = 4_096
_FORMAT = "a1:"
_MORE = 0x80
# Beyond both limits the metadata is damaged: no worker has so many records in flight, no log such offsets.
AHEAD_MAX = 10_000_000
OFFSET_MAX = np.iinfo(np.int64).max


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
        self._waiting: deque[int] = deque()
        self._decided: set[int] = set()
        self._next: int | None = None

    def taken(self, offsets: Int64) -> None:
        """Adds records that were read: ascending offsets, beyond all earlier ones."""
        if len(offsets) == 0:
            return
        self._waiting.extend(offsets.tolist())
        self._next = int(offsets[-1]) + 1

    def decided(self, offsets: Int64) -> None:
        """Marks records as decided."""
        self._decided.update(offsets.tolist())
        while self._waiting and self._waiting[0] in self._decided:
            self._decided.remove(self._waiting.popleft())

    @property
    def committable(self) -> int | None:
        """The offset to commit, of the first record without a decision; None if nothing was taken."""
        return self._waiting[0] if self._waiting else self._next

    @property
    def progress(self) -> Decided | None:
        """The decided offsets to commit; None if nothing was taken."""
        until = self.committable
        return None if until is None else Decided(until, np.array(sorted(self._decided), np.int64))

    @property
    def open(self) -> int:
        """The number of records that were taken and are undecided."""
        return len(self._waiting) - len(self._decided)
