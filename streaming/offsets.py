"""Which offsets are decided: the prefix that may be committed."""

from __future__ import annotations

from collections import deque

from cascade.columns import Int64


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
    def open(self) -> int:
        """Records taken that have no decision."""
        return len(self._waiting) - len(self._decided)
