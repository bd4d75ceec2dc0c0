"""Layouts of one GPU: against go-nvml's tables, and against every placement of every instance."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import msgspec
import pytest

from cascade.errors import DataError, LocalPartError
from cascade.mig.gpus import COMPUTE_SLICES, GPUS, MEMORY_SLICES, Gpu, find_gpu
from cascade.mig.placement import (
    counts_of,
    free_memory_slices,
    layouts,
    parse_counts,
    place,
    stranded_sms,
    why_not,
)
from tests.kube.build import built

A100 = find_gpu("a100-40gb")
# What the program `layout` (tests/kube/programs/nvml) answered for every multiset of profiles that fits.
RECORDED = Path(__file__).parent / "data" / "a100_layouts.txt"

gpus = pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))


def multisets(gpu: Gpu, beyond: int = 0) -> Iterator[dict[str, int]]:
    """All counts of the profiles up to `beyond` more than the table's maxima, without that of no instance."""
    ranges = (range(profile.count_max + beyond + 1) for profile in gpu.profiles)
    for counts in product(*ranges):
        if any(counts):
            yield {profile.name: count for profile, count in zip(gpu.profiles, counts, strict=True) if count}


def text_of(counts: dict[str, int]) -> str:
    return ",".join(f"{name}={count}" for name, count in counts.items())


def our_answer(counts: dict[str, int]) -> str:
    layout = place(A100, counts)
    return "does not fit" if layout is None else f"fits, {A100.sms - stranded_sms(A100, layout)} SMs"


def test_every_multiset_on_an_a100_gets_the_answer_that_go_nvml_gave() -> None:
    recorded = dict(line.split(" -> ") for line in RECORDED.read_text().splitlines())
    ours = {text_of(counts): our_answer(counts) for counts in multisets(A100)}
    assert len(ours) == 1_919
    assert {text: answer for text, answer in ours.items() if answer != "does not fit"} == recorded


def test_go_nvml_still_gives_the_recorded_answers() -> None:
    try:
        program = built("nvml") / "layout"
    except LocalPartError as error:
        pytest.skip(str(error))
    texts = [text_of(counts) for counts in multisets(A100)]
    done = subprocess.run([program, "a100", *texts], capture_output=True, text=True, check=True, timeout=60)
    answers = [line for line in done.stdout.splitlines() if " -> " in line]
    assert len(answers) == len(texts)
    assert [line for line in answers if line.endswith("SMs")] == RECORDED.read_text().splitlines()


@gpus
def test_a_layout_has_its_instances_at_their_start_slots_without_overlap(gpu: Gpu) -> None:
    for layout in layouts(gpu):
        taken = [slot for placement in layout for slot in range(placement.start, placement.end)]
        assert len(set(taken)) == len(taken)
        assert set(taken) | set(free_memory_slices(layout)) == set(range(MEMORY_SLICES))
        assert all(placement.start in placement.profile.starts for placement in layout)
        assert sum(placement.profile.compute_slices for placement in layout) <= COMPUTE_SLICES
        assert 0 <= stranded_sms(gpu, layout) < gpu.sms


@gpus
def test_layouts_has_each_multiset_that_fits_once(gpu: Gpu) -> None:
    found = [counts_of(layout) for layout in layouts(gpu)]
    fitting = [counts for counts in multisets(gpu) if place(gpu, counts)]
    assert len(found) == len(fitting) == 77
    assert all(counts in found for counts in fitting)


@gpus
def test_what_does_not_fit_has_a_reason_and_only_that(gpu: Gpu) -> None:
    for counts in multisets(gpu, beyond=1):
        assert (why_not(gpu, counts) is None) == (place(gpu, counts) is not None)


def test_all_gpus_of_the_table_have_the_geometry_of_the_a100() -> None:
    def geometry(gpu: Gpu) -> list[tuple[object, ...]]:
        return [(p.compute_slices, p.memory_slices, p.starts, p.count_max) for p in gpu.profiles]

    assert all(geometry(gpu) == geometry(A100) for gpu in GPUS.values())


@gpus
def test_a_profile_keeps_to_the_gpu_and_its_name_has_its_sizes(gpu: Gpu) -> None:
    for profile in gpu.profiles:
        assert profile.name == f"{profile.compute_slices}g.{profile.memory_gb}gb"
        assert all(start + profile.memory_slices <= MEMORY_SLICES for start in profile.starts)
        assert profile.count_max * profile.sms <= gpu.sms
        assert profile.count_max * profile.memory_gb <= gpu.memory_gb + MEMORY_SLICES  # names are rounded up
    assert 0 < gpu.idle_w < gpu.power_w_max
    assert gpu.sources
    assert gpu.assumptions


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("4g.20gb=2", "at most 1 of this profile"),
        ("4g.20gb=1,2g.10gb=2", "= 8 compute slices, and a GPU has 7"),
        ("3g.20gb=2,1g.5gb=1", "2 × 4 (3g.20gb) + 1 × 1 (1g.5gb) = 9 memory slices, and a GPU has 8"),
        ("7g.40gb=1,1g.5gb=1", "= 8 compute slices, and a GPU has 7"),
    ],
)
def test_the_reason_names_the_limit(text: str, reason: str) -> None:
    assert reason in (why_not(A100, parse_counts(A100, text)) or "")


def test_start_slots_alone_can_be_in_the_way() -> None:
    # no GPU of the table has such profiles: there the sums of slices decide
    one, two = A100.profile("1g.5gb"), A100.profile("2g.10gb")
    both_low = tuple(msgspec.structs.replace(profile, starts=(0,)) for profile in (one, two))
    gpu = msgspec.structs.replace(A100, profiles=both_low)
    assert place(gpu, {"1g.5gb": 1, "2g.10gb": 1}) is None
    reason = why_not(gpu, {"1g.5gb": 1, "2g.10gb": 1})
    assert reason == "the start slots leave no room: 1g.5gb at 0, 2g.10gb at 0 of the 8 memory slices"


def test_a_partial_layout_leaves_room_for_4g() -> None:
    # at 0, where it would fit as well, the 3g would be in the way of the 4g for good
    layout = place(A100, {"3g.20gb": 1})
    assert layout is not None
    assert free_memory_slices(layout) == (0, 1, 2, 3)


def test_seven_slices_leave_ten_sms_of_an_a100_and_twenty_of_an_h100() -> None:
    h100 = find_gpu("h100-80gb")
    for gpu, profile, stranded in ((A100, "1g.5gb", 10), (h100, "1g.10gb", 20)):
        layout = place(gpu, {profile: 7})
        assert layout is not None
        assert stranded_sms(gpu, layout) == stranded
        assert free_memory_slices(layout) == (7,)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1g.5gb", "must be PROFILE=COUNT"),
        ("1g.5gb=0", "must be PROFILE=COUNT"),
        ("1g.5gb=-1", "must be PROFILE=COUNT"),
        ("1g.5gb=²", "must be PROFILE=COUNT"),
        ("1g.5gb=99999", "from 1 to 7,000"),
        ("", "must be PROFILE=COUNT"),
        ("1g.5gb=1,1g.5gb=2", "occurs twice"),
        ("1g.10gb+me=1", "use one of 1g.5gb"),
    ],
)
def test_a_malformed_layout_is_an_error_with_its_text(text: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        parse_counts(A100, text)


def test_an_unknown_gpu_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="GPU v100: not in the table; use one of a100-40gb, a100-80gb"):
        find_gpu("v100")
