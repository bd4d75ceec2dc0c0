"""The rule for events ahead of their record's own time, compiled by numba: the only rule that needs the record."""

from __future__ import annotations

import numpy as np

from cascade.columns import INT64_MAX, Bool, Int64
from cascade.compilation import kernel


@kernel
def is_ahead(event_time_ms: int, appended_ms: int, tolerance_ms: int) -> bool:
    """Whether `too_far_ahead` holds for a row."""
    return appended_ms >= 0 and event_time_ms > min(appended_ms, INT64_MAX - tolerance_ms) + tolerance_ms


@kernel
def too_far_ahead(event_times_ms: Int64, appended_ms: Int64, tolerance_ms: int) -> Bool:
    """Which rows have an event time more than `tolerance_ms` after their append time, bool [rows].

    `event_times_ms`, `appended_ms`: int64 [rows], ms since the epoch; a negative append time is unknown, and passes.
    Such rows are rejected (RejectReason.FUTURE_EVENT): windows end at a key's newest event, so events older than the
    longest window before it are dropped, and the true transactions of the card and the terminal would be late, or not
    stored at all, until the clock reaches that time. An event up to the feature file's `lateness` ahead takes nothing
    from the window of a later row.
    """
    found = np.zeros(len(event_times_ms), np.bool_)
    for row in range(len(event_times_ms)):
        found[row] = is_ahead(event_times_ms[row], appended_ms[row], tolerance_ms)
    return found


def warm_up_ahead() -> None:
    """Compiles the kernel ahead of the first message with such a time."""
    none = np.zeros(0, np.int64)
    too_far_ahead(none, none, 0)
