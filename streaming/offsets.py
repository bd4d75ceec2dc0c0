"""Which offsets are decided: the prefix that is committed, and those ahead of it, which travel in its metadata.

A transaction at the deep model holds the prefix back while hundreds behind it are decided. The commit's metadata names
those, so that a restart decides none of them again.
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

# What brokers take by default (offset.metadata.max.bytes).
METADATA_BYTES_MAX = 4_096
_FORMAT = "a1:"
_MORE = 0x80
# More than any worker holds comes of damaged metadata, as does an offset that no log reaches.
AHEAD_MAX = 10_000_000
OFFSET_MAX = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Decided:
    """The offsets of one partition that had their decision at the last commit.

    All below `until`, and those in `ahead`: int64, ascending, beyond it.

    >>> import numpy as np
    >>> decided = Decided.from_commit(7, Decided(7, np.array([8, 9, 12])).metadata())
    >>> decided.mask(np.arange(5, 14)).tolist()
    [True, True, False, True, True, False, False, True, False]
    >>> decided.held(np.arange(5, 14)).tolist()
    [False, False, True, False, False, True, True, False, False]
    """

    until: int = 0
    ahead: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def from_commit(cls, offset: int, metadata: str) -> Decided:
        """From a committed offset and its metadata; metadata of another writer says nothing and is passed over."""
        return cls(offset, _parse(offset, metadata))

    def mask(self, offsets: Int64) -> Bool:
        """Which of the offsets (ascending) are decided, bool [rows]."""
        below: Bool = offsets < self.until
        if not len(self.ahead) or not len(offsets) or offsets[0] > self.ahead[-1]:
            return below
        return below | np.isin(offsets, self.ahead)

    def held(self, offsets: Int64) -> Bool:
        """Which of the offsets (ascending) had no decision yet when some beyond them had theirs, bool [rows]."""
        if not len(self.ahead) or not len(offsets) or offsets[0] > self.ahead[-1]:
            return np.zeros(len(offsets), bool)
        below: Bool = offsets < self.ahead[-1]
        return below & ~self.mask(offsets)

    def metadata(self) -> str:
        """The offsets ahead as text of at most METADATA_BYTES_MAX bytes; those that find no room are left out.

        Lengths of runs from `until` on, undecided and decided by turns, each as a base-128 varint, in base64.
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
    """(first, last) of each stretch of consecutive offsets."""
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
    stretches = list(pairwise(edges))[1::2]
    if sum(end - first for first, end in stretches) > AHEAD_MAX or edges[-1] > OFFSET_MAX:
        return nothing
    return np.concatenate([nothing, *(np.arange(first, end) for first, end in stretches)])


class OffsetTracker:
    """Offsets of one partition between being taken and being decided.

    `taken` says which records were read, `decided` which of them have a decision that the broker keeps; `committable`
    is the offset before which every record is decided.

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
        """Records that were read, ascending, beyond all that were taken before."""
        if len(offsets) == 0:
            return
        self._waiting.extend(offsets.tolist())
        self._next = int(offsets[-1]) + 1

    def decided(self, offsets: Int64) -> None:
        """Records that have their decision."""
        self._decided.update(offsets.tolist())
        while self._waiting and self._waiting[0] in self._decided:
            self._decided.remove(self._waiting.popleft())

    @property
    def committable(self) -> int | None:
        """The offset to commit: of the first record without a decision; None where nothing was taken."""
        return self._waiting[0] if self._waiting else self._next

    @property
    def progress(self) -> Decided | None:
        """What a commit says; None where nothing was taken."""
        until = self.committable
        return None if until is None else Decided(until, np.array(sorted(self._decided), np.int64))

    @property
    def open(self) -> int:
        """Records taken that have no decision."""
        return len(self._waiting) - len(self._decided)
