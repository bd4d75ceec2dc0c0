"""Measuring by turns: what takes turns within a round slows down alike on a busy machine, so that ratios remain."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec
import numpy as np

from cascade.columns import Float64

Name = TypeVar("Name")


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """The median, the least and the largest value over the rounds."""

    median: float
    least: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float] | Float64) -> Spread:
        """The spread of at least one value."""
        return cls(median=float(np.median(values)), least=float(min(values)), largest=float(max(values)))


def seconds_of(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """The time that `work` takes by a clock, seconds."""
    started_s = clock()
    work()
    return clock() - started_s


def by_turns(measures: Mapping[Name, Callable[[], float]], rounds: int) -> dict[Name, Float64]:
    """What each measure returned in each round, float64 [rounds]; a first round fills the caches and does not count."""
    found = [[measure() for measure in measures.values()] for _ in range(rounds + 1)]
    return dict(zip(measures, np.array(found[1:]).T, strict=True))
