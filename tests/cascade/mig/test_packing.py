"""Packing over several GPUs, against a packer that puts one instance after the other into every slot."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.errors import DataError
from cascade.mig import packing
from cascade.mig.gpus import GPUS, Gpu, find_gpu
from cascade.mig.packing import GPUS_MAX, pack
from cascade.mig.placement import counts_of

A100 = find_gpu("a100-40gb")


def brute_force(gpu: Gpu, demand: dict[str, int]) -> int:
    """The smallest number of GPUs: all states (a bit for each taken memory slice, by GPU) after each instance."""
    instances = [name for name, count in demand.items() for _ in range(count)]
    gpus = 0
    while True:
        states = {(0,) * gpus}
        for name in instances:
            profile = gpu.profile(name)
            width = (1 << profile.memory_slices) - 1
            states = {
                tuple(sorted((*state[:number], state[number] | width << start, *state[number + 1 :])))
                for state in states
                for number in range(gpus)
                for start in profile.starts
                if not state[number] & width << start
            }
        if states:
            return gpus
        gpus += 1


@st.composite
def demands(draw: st.DrawFn) -> tuple[Gpu, dict[str, int]]:
    gpu = draw(st.sampled_from(list(GPUS.values())))
    names = draw(st.lists(st.sampled_from([profile.name for profile in gpu.profiles]), max_size=9))
    return gpu, dict(Counter(names))


@given(case=demands())
@settings(max_examples=150, deadline=None)
def test_no_packing_needs_fewer_gpus(case: tuple[Gpu, dict[str, int]]) -> None:
    gpu, demand = case
    packed = pack(gpu, demand)
    assert len(packed) == brute_force(gpu, demand)
    assert sum((Counter(counts_of(layout)) for layout in packed), Counter()) == Counter(demand)


@given(counts=st.lists(st.integers(0, 25), min_size=6, max_size=6))
@settings(max_examples=100, deadline=None)
def test_a_large_demand_is_packed_whole_and_not_below_its_memory(counts: list[int]) -> None:
    demand = {profile.name: count for profile, count in zip(A100.profiles, counts, strict=True)}
    memory_slices = sum(A100.profile(name).memory_slices * count for name, count in demand.items())
    try:
        packed = pack(A100, demand)
    except DataError:
        assert memory_slices > 7 * GPUS_MAX  # more GPUs than one search has
        return
    assert 8 * len(packed) >= memory_slices
    assert sum((Counter(counts_of(layout)) for layout in packed), Counter()) == +Counter(demand)


@pytest.mark.parametrize(
    ("demand", "gpus"),
    [
        ({"2g.10gb": 4, "3g.20gb": 2}, 2),  # 3g beside 2g + 2g, although 3g + 3g would fill the memory
        ({"1g.5gb": 4, "1g.10gb": 2, "4g.20gb": 2}, 2),
        ({"2g.10gb": 4, "3g.20gb": 2, "7g.40gb": 2}, 4),
    ],
)
def test_the_fullest_layout_first_would_need_a_gpu_more(demand: dict[str, int], gpus: int) -> None:
    assert len(pack(A100, demand)) == brute_force(A100, demand) == gpus


def test_seven_memory_slices_are_enough_for_seven_1g_and_not_for_eight() -> None:
    assert [len(pack(A100, {"1g.5gb": count})) for count in (0, 1, 7, 8, 14, 15)] == [0, 1, 1, 2, 2, 3]


def test_a_demand_beyond_the_limits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(pack(A100, {"7g.40gb": GPUS_MAX})) == GPUS_MAX
    with pytest.raises(DataError, match=f"more than {GPUS_MAX} GPUs"):
        pack(A100, {"7g.40gb": GPUS_MAX + 1})
    # two GPUs by the bound, and three by their geometry: the search has to fail on the way
    monkeypatch.setattr(packing, "_FAILED_MAX", -1)
    with pytest.raises(DataError, match="too many packings"):
        pack(A100, {"1g.5gb": 1})
