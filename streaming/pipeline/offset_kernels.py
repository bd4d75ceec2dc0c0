"""Adds offsets, and marks them as decided, compiled by numba."""

from __future__ import annotations

import numpy as np

from cascade.columns import Bool, Int64
from cascade.compilation import kernel


@kernel
def append(offsets: Int64, known: Bool, end: int, taken: Int64) -> None:
    """Writes the records `taken` (int64) behind the first `end` ones, as undecided; for the rest see `mark`."""
    for offset in taken:
        offsets[end], known[end] = offset, False
        end += 1


@kernel
def mark(offsets: Int64, known: Bool, first: int, end: int, ahead: int, decided: Int64) -> tuple[int, int]:
    """Marks records as decided; returns `first` and `ahead` afterwards.

    offsets (int64, ascending between `first` and `end`), known (bool): the records, and which are decided. first: the
    position of the first undecided record. ahead: the number of decided records after it. decided (int64): offsets to
    mark; those that are not among the records, or marked already, change nothing.
    """
    guess = first
    for offset in decided:
        # decisions come in the order of the log, but for the escalated ones
        if guess >= end or offsets[guess] != offset:
            guess = first + np.searchsorted(offsets[first:end], offset)
            if guess >= end or offsets[guess] != offset:
                continue
        if not known[guess]:
            known[guess] = True
            ahead += 1
        guess += 1
    while first < end and known[first]:
        first += 1
        ahead -= 1
    return first, ahead


def warm_up_offsets() -> None:
    """Compiles the kernels ahead of the first record."""
    append(np.zeros(0, np.int64), np.zeros(0, np.bool_), 0, np.zeros(0, np.int64))
    mark(np.zeros(1, np.int64), np.zeros(1, np.bool_), 0, 0, 0, np.zeros(0, np.int64))
