"""Placements of MIG instances on one GPU.

An instance takes neighbouring memory slices of the GPU, and may begin only at the start slots of its profile. So a set
of profiles can be impossible although its SMs would be enough: two 3g fill the memory, and no 1g fits beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

from cascade.errors import DataError
from cascade.mig.gpus import COMPUTE_SLICES, MEMORY_SLICES, Gpu, Profile


class Placement(NamedTuple):
    """An instance of `profile` on the memory slices from `start` on."""

    profile: Profile
    start: int

    @property
    def end(self) -> int:
        """The memory slice after its last one."""
        return self.start + self.profile.memory_slices


# A larger demand is a mistake: it is more instances than a thousand GPUs have.
COUNT_MAX = 7_000
# Instances on one GPU, by start; they do not overlap.
Layout = tuple[Placement, ...]


def place(gpu: Gpu, counts: Mapping[str, int]) -> Layout | None:
    """A layout with so many instances of each profile, by name; None if there is none.

    Large profiles go first, and each at the highest start from which the others still fit. That leaves the low slices
    free, where 4g must start, so an instance that is added later has the best chance. Raises DataError for a profile
    that the GPU does not have.
    """
    wanted = {gpu.profile(name): count for name, count in counts.items() if count > 0}
    if _exceeded(gpu, counts) is not None:
        return None
    largest_first = sorted(wanted, key=lambda profile: (-profile.memory_slices, len(profile.starts)))
    instances = [profile for profile in largest_first for _ in range(wanted[profile])]
    found = next(_placed(instances, ()), None)
    return None if found is None else tuple(sorted(found, key=lambda placement: placement.start))


def _placed(instances: Sequence[Profile], before: Layout) -> Iterator[Layout]:
    """Every layout of these instances beside those placed before, with the highest starts first."""
    if not instances:
        yield before
        return
    profile, *others = instances
    taken = {memory_slice for placement in before for memory_slice in range(placement.start, placement.end)}
    for start in sorted(profile.starts, reverse=True):
        placement = Placement(profile, start)
        if taken.isdisjoint(range(start, placement.end)):
            yield from _placed(others, (*before, placement))


def why_not(gpu: Gpu, counts: Mapping[str, int]) -> str | None:
    """Which limit is in the way of these instances, in a sentence; None if they fit."""
    reason = _exceeded(gpu, counts)
    if reason is not None or place(gpu, counts) is not None:
        return reason
    starts = (
        f"{name} at {' or '.join(map(str, gpu.profile(name).starts))}" for name, count in counts.items() if count > 0
    )
    return f"the start slots leave no room: {', '.join(starts)} of the {MEMORY_SLICES} memory slices"


def _exceeded(gpu: Gpu, counts: Mapping[str, int]) -> str | None:
    """The first of these limits that the instances exceed: count of a profile, compute slices, memory slices."""
    wanted = {gpu.profile(name): count for name, count in counts.items() if count > 0}
    for profile, count in wanted.items():
        if count > profile.count_max:
            return f"{count} × {profile.name}: {gpu.key} has at most {profile.count_max} of this profile"
    for what, limit, sizes in (
        ("compute", COMPUTE_SLICES, {profile: profile.compute_slices for profile in wanted}),
        ("memory", MEMORY_SLICES, {profile: profile.memory_slices for profile in wanted}),
    ):
        needed = sum(count * sizes[profile] for profile, count in wanted.items())
        if needed > limit:
            parts = " + ".join(f"{count} × {sizes[profile]} ({profile.name})" for profile, count in wanted.items())
            return f"{parts} = {needed} {what} slices, and a GPU has {limit}"
    return None


@cache
def layouts(gpu: Gpu) -> tuple[Layout, ...]:
    """Every multiset of profiles that fits on the GPU, once, with one placement; also partial ones, not the empty one.

    Sorted by the count of the largest profile, then by that of the next.
    """
    profiles = gpu.profiles[::-1]
    multisets = product(*(range(profile.count_max + 1) for profile in profiles))
    named = ({profile.name: count for profile, count in zip(profiles, counts, strict=True)} for counts in multisets)
    return tuple(layout for counts in named if (layout := place(gpu, counts)))


def counts_of(layout: Layout) -> dict[str, int]:
    """The number of instances of each profile, by name, in the order of the layout."""
    counts: dict[str, int] = {}
    for placement in layout:
        counts[placement.profile.name] = counts.get(placement.profile.name, 0) + 1
    return counts


def stranded_sms(gpu: Gpu, layout: Layout) -> int:
    """SMs of the GPU that are in no instance: those that MIG takes, that profiles leave over, and of free slices."""
    return gpu.sms - sum(placement.profile.sms for placement in layout)


def free_memory_slices(layout: Layout) -> tuple[int, ...]:
    """The memory slices that are in no instance."""
    taken = {memory_slice for placement in layout for memory_slice in range(placement.start, placement.end)}
    return tuple(memory_slice for memory_slice in range(MEMORY_SLICES) if memory_slice not in taken)


def parse_counts(gpu: Gpu, text: str) -> dict[str, int]:
    """The counts by profile in a text like `1g.5gb=2,3g.20gb=1`.

    Raises DataError for another form, a profile that the GPU does not have or that occurs twice, and a count below 1.
    """
    counts: dict[str, int] = {}
    for part in text.split(","):
        name, separator, count = part.strip().partition("=")
        if not separator or not count.isdecimal() or not 1 <= int(count) <= COUNT_MAX:
            raise DataError(f"layout {text!r}: {part!r} must be PROFILE=COUNT with a count from 1 to {COUNT_MAX:,}")
        if name in counts:
            raise DataError(f"layout {text!r}: {name} occurs twice; give it once with the sum")
        counts[gpu.profile(name).name] = int(count)
    return counts
