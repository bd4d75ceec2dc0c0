"""How much of the longest window the state covers: says when a state is cold (a new one) or stale (after a gap).

A card that the state has not seen yet looks new, whatever its history: means, counts and ratios of its windows are
those of a few transactions. Scores are then not those that the policy was calibrated for. The share of the longest
window that the state covers says for how long this lasts, without a model of what is usual.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cascade.columns import Array
from cascade.errors import StateError

# A state that covers less is cold: a log line, a note in health.
COVERED_MIN = 0.9
# A pause in event time of more than this part of the longest window, and of more than a day, so that no night and no
# quiet Sunday counts, is a gap: what came before it says little about what comes after.
GAP_SHARE = 0.1
DAY_MS = 86_400_000
GAP_MS_MIN = DAY_MS
_NAME = "history"
# Below every event time.
_UNKNOWN = -(1 << 62)


class History:
    """The event times from which on a worker's state is complete; for one thread.

    reach_ms: how far back the longest window looks, `FeatureEngine.horizon_ms`; 0 where no feature looks back.

    >>> history = History(reach_ms=10 * 86_400_000)
    >>> history.folded(0, 86_400_000)
    >>> history.covered
    0.1
    """

    def __init__(self, reach_ms: int) -> None:
        self._reach_ms = reach_ms
        self._gap_ms = max(GAP_SHARE * reach_ms, GAP_MS_MIN)
        self._start_ms = self._newest_ms = _UNKNOWN
        self._assumed_ms = 0
        self._noted: int | None = None
        self._cold: bool | None = None

    @property
    def covered(self) -> float:
        """The share of the longest window that the state covers, 0 to 1."""
        if not self._reach_ms:
            return 1.0
        return min(max((self._newest_ms - self._start_ms) / self._reach_ms, 0.0), 1.0)

    @property
    def text(self) -> str:
        """A note while the state is cold; empty else."""
        covered = self.covered
        if covered >= COVERED_MIN:
            return ""
        return f"cold: the state covers {covered:.0%} of its longest window, {self._reach_ms / DAY_MS:.3g} days"

    def folded(self, first_ms: int, last_ms: int) -> None:
        """Notes the event times of the first and the last of the rows that were folded together."""
        if self._start_ms == _UNKNOWN:
            self._start_ms = self._newest_ms = first_ms - self._assumed_ms
        elif first_ms - self._newest_ms > self._gap_ms:
            self._start_ms = first_ms
        self._newest_ms = max(self._newest_ms, last_ms)

    def moved(self) -> bool:
        """Whether `covered` is another whole per cent than at the last call."""
        before, self._noted = self._noted, int(100 * self.covered)
        return self._noted != before

    def changed(self) -> str | None:
        """A line for the log where the state has become cold, or is no longer; else None. The first state is warm."""
        before, self._cold = self._cold, self.covered < COVERED_MIN
        if self._cold == bool(before):
            return None
        if self._cold:
            return f"{self.text}: cards look newer than they are, and scores are less certain, until it is warm"
        return "the state is warm: it covers its longest window"

    def export(self) -> dict[str, Array]:
        """The array of a snapshot: int64 [2], the start and the newest event time, ms."""
        return {_NAME: np.array([self._start_ms, self._newest_ms])}

    def absorb(self, arrays: Mapping[str, Array]) -> None:
        """Takes the history of a restored snapshot; of several, the least counts. Raises StateError for a wrong array.

        A snapshot of an earlier release has none: it counts as one that covers its longest window.
        """
        found = arrays.get(_NAME)
        if found is None:
            self._assumed_ms = self._reach_ms
            return
        if found.shape != (2,) or found.dtype != np.int64 or found[0] > found[1]:
            raise StateError(f"its history is not two event times in order: {found!r:.100}")
        start_ms, newest_ms = found.tolist()
        self._start_ms = max(self._start_ms, start_ms)
        self._newest_ms = max(self._newest_ms, newest_ms)
