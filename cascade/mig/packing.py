"""Packing: the smallest number of GPUs that have room for a demand, and a layout for each of them.

Exact, by depth-first search over the layouts of one GPU. It tries only layouts to which no instance can be added: all
others are parts of them. A lower bound cuts the search: give each profile a weight; if no layout of one GPU weighs more
than m, a demand of weight w needs at least w / m GPUs. The largest bound over many weights is close to that of linear
programming, whose dual it is (Gilmore and Gomory, 1961).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import Final

import numpy as np

from cascade.columns import Float64
from cascade.errors import DataError
from cascade.mig.gpus import Gpu
from cascade.mig.placement import Layout, counts_of, layouts, place

# A larger demand is divided by its owner: one node has at most 16 GPUs.
GPUS_MAX: Final = 64
# Weights of 0 to 4 for each profile: the longest search for 1,500 random demands visits 213 demands. With 0 to 3 one of
# them does not end in a minute.
_WEIGHT_MAX: Final = 4
# Ends a search that would take minutes.
_FAILED_MAX: Final = 20_000
# Instances of each profile, from the largest profile to the smallest.
_Counts = tuple[int, ...]


def pack(gpu: Gpu, counts: Mapping[str, int]) -> tuple[Layout, ...]:
    """Layouts of the smallest number of GPUs that have room for all instances, by profile name.

    Raises DataError for a profile that the GPU does not have, and if more than GPUS_MAX GPUs are needed.
    """
    wanted = {gpu.profile(name).name: count for name, count in counts.items()}
    demand = tuple(wanted.get(profile.name, 0) for profile in gpu.profiles[::-1])
    failed: set[_Counts] = set()
    for gpus in range(_lower_bound(gpu, demand), GPUS_MAX + 1):
        found = _cover(gpu, demand, gpus, failed)
        if found is not None:
            return found
    raise DataError(f"the demand needs more than {GPUS_MAX} GPUs, the maximum of one search; divide it")


def _cover(gpu: Gpu, demand: _Counts, gpus: int, failed: set[_Counts]) -> tuple[Layout, ...] | None:
    """Layouts of at most `gpus` GPUs that have room for the demand; None if there are none.

    failed: (GPUs, *demand) that the search has shown to be impossible. Raises DataError if they are too many.
    """
    if len(failed) > _FAILED_MAX:
        raise DataError("the demand has too many packings to try them all; divide it")
    if not any(demand):
        return ()
    if _lower_bound(gpu, demand) > gpus or (gpus, *demand) in failed:
        return None
    largest = next(number for number, count in enumerate(demand) if count)
    parts = {tuple(map(min, full, demand)) for full in _full_layouts(gpu) if full[largest]}
    for part in sorted(parts, reverse=True, key=lambda part: (_memory_slices(gpu, part), part)):
        others = _cover(gpu, tuple(map(int.__sub__, demand, part)), gpus - 1, failed)
        if others is not None:
            return (_layout(gpu, part), *others)
    failed.add((gpus, *demand))
    return None


def _layout(gpu: Gpu, part: _Counts) -> Layout:
    layout = place(gpu, {profile.name: count for profile, count in zip(gpu.profiles[::-1], part, strict=True)})
    assert layout is not None, "a part of a layout fits"  # noqa: S101
    return layout


def _memory_slices(gpu: Gpu, part: _Counts) -> int:
    return sum(count * profile.memory_slices for count, profile in zip(part, gpu.profiles[::-1], strict=True))


@cache
def _full_layouts(gpu: Gpu) -> tuple[_Counts, ...]:
    """The counts of the layouts to which no instance can be added."""
    found = [tuple(counts_of(layout).get(profile.name, 0) for profile in gpu.profiles[::-1]) for layout in layouts(gpu)]
    return tuple(
        counts
        for counts in found
        if not any(other != counts and all(map(int.__ge__, other, counts)) for other in found)
    )


def _lower_bound(gpu: Gpu, demand: _Counts) -> int:
    """GPUs that the demand needs at least."""
    return math.ceil(float((_weights(gpu) @ np.array(demand, np.float64)).max()) - 1e-9)


@cache
def _weights(gpu: Gpu) -> Float64:
    """Weights of the profiles ([weightings, profiles]) with which no layout weighs more than 1."""
    weights = np.array(list(product(range(_WEIGHT_MAX + 1), repeat=len(gpu.profiles))), np.float64)[1:]
    heaviest = (weights @ np.array(_full_layouts(gpu), np.float64).T).max(axis=1)
    return np.unique(weights / heaviest[:, None], axis=0)
