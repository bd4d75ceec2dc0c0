"""DCGM's series as windows: what is repeated counts once, what is missing or impossible is named and never 0."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import pytest

from cascade.ledger.slices import EMPTY, STRANDED, attribute_window
from cascade.mig.dcgm import WatchedGpu, watched_gpus
from cascade.mig.gpus import find_gpu
from cascade.mig.prometheus import Sample, Series

ENERGY, POWER = "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "DCGM_FI_DEV_POWER_USAGE"
ENGINE, SMS = "DCGM_FI_PROF_GR_ENGINE_ACTIVE", "DCGM_FI_PROF_SM_ACTIVE"
TIMES = (0.0, 15.0, 30.0, 45.0, 60.0)
NAN = math.nan


def series(name: str, values: Sequence[float], instance: str = "", profile: str = "", **labels: str) -> Series:
    about = {"UUID": "GPU-1", "gpu": "0", "modelName": "NVIDIA A100-SXM4-40GB", "instance": "node:9400"}
    slice_labels = {"GPU_I_ID": instance, "GPU_I_PROFILE": profile} if instance else {}
    return Series(name, {**about, **slice_labels, **labels}, tuple(map(Sample, TIMES, values)))


def gpu_series(
    slices: Mapping[tuple[str, str, str], Sequence[float]],
    energy_mj: Sequence[float] = (0, 2.4e6, 4.8e6, 7.2e6, 9.6e6),
    power_w: Sequence[float] = (160, 160, 160, 160, 160),
) -> list[Series]:
    """As dcgm-exporter has them: energy and power with each instance, by (instance, profile, pod) of the activities."""
    found = []
    for (instance, profile, pod), activity in slices.items():
        for name, values in ((ENERGY, energy_mj), (POWER, power_w), (ENGINE, activity)):
            found.append(series(name, values, instance, profile, pod=pod))
    return found


TWO = {("7", "1g.5gb", "triton-a"): [0.5] * 5, ("1", "3g.20gb", "triton-b"): [0.25] * 5}


def read(
    found: Iterable[Series], since_s: Mapping[str, float] | None = None, window_s: float = 60.0, now_s: float = 65.0
) -> WatchedGpu:
    (gpu,) = watched_gpus(found, since_s or {}, window_s, now_s)
    return gpu


def test_joules_of_the_device_count_once_although_each_instance_repeats_them() -> None:
    window = read(gpu_series(TWO)).window
    assert window is not None
    assert (window.seconds, window.energy_j, window.check_j) == (60.0, 9_600.0, 9_600.0)
    assert (window.idle_w, window.sms) == (55.0, 108)
    assert {(part.name, part.sms, part.activity) for part in window.slices} == {
        ("1g.5gb/7", 14, 0.5),
        ("3g.20gb/1", 42, 0.25),
    }
    assert sum(row.energy_j for row in attribute_window(window)) == pytest.approx(9_600.0)


def test_two_exporters_of_one_gpu_that_read_at_different_moments_are_no_counter_that_goes_back() -> None:
    late = [found._replace(labels={**found.labels, "instance": "other:9400"}) for found in gpu_series(TWO)]
    late = [
        found._replace(samples=tuple(Sample(at_s + 1.0, max(value - 5e5, 0.0)) for at_s, value in found.samples))
        if found.name == ENERGY
        else found
        for found in late
    ]
    gpu = read([*gpu_series(TWO), *late])
    assert gpu.window is not None
    assert gpu.notes == ()


def test_a_window_begins_where_the_last_one_ended() -> None:
    window = read(gpu_series(TWO), {"GPU-1": 30.0}).window
    assert window is not None
    assert (window.seconds, window.energy_j) == (30.0, 4_800.0)


def test_a_slice_without_pod_and_activity_is_empty_and_pays_idle_only() -> None:
    window = read(gpu_series(TWO | {("9", "2g.10gb", ""): [0.0] * 5})).window
    assert window is not None
    rows = {row.name: row for row in attribute_window(window)}
    assert rows[EMPTY].idle_j == pytest.approx(55.0 * 60 * 28 / 108)
    assert rows[STRANDED].idle_j == pytest.approx(55.0 * 60 * 24 / 108)


def test_without_any_pod_label_no_slice_passes_for_empty() -> None:
    window = read(gpu_series({("7", "1g.5gb", ""): [0.5] * 5, ("8", "1g.5gb", ""): [0.0] * 5})).window
    assert window is not None
    assert [part.activity for part in window.slices] == [0.5, 0.0]


def test_the_exporters_own_pod_is_not_the_pod_of_a_slice() -> None:
    own = {("7", "1g.5gb", "nvidia-dcgm-exporter-x2x4z"): [0.5] * 5}
    assert [part.pod for part in read(gpu_series(own)).slices] == [None]
    renamed = [found._replace(labels={**found.labels, "exported_pod": "triton-a"}) for found in gpu_series(own)]
    assert [part.pod for part in read(renamed).slices] == ["triton-a"]


def test_a_pod_that_is_replaced_leaves_one_slice_with_all_samples_and_the_new_pod() -> None:
    before = [found._replace(samples=found.samples[:3]) for found in gpu_series({("7", "1g.5gb", "old"): [0.2] * 5})]
    after = [found._replace(samples=found.samples[3:]) for found in gpu_series({("7", "1g.5gb", "new"): [0.8] * 5})]
    gpu = read([*before, *after])
    (part,) = gpu.slices
    assert part.pod == "new"
    assert part.activity == pytest.approx((0.2 + 0.2 + 0.8 + 0.8) / 4)  # the sample that ends the window before is out
    assert gpu.window is not None
    assert gpu.window.energy_j == 9_600.0


def test_the_newer_names_of_the_metrics_are_the_same() -> None:
    renamed = {POWER: "DCGM_FI_DEV_BOARD_POWER_WATTS", ENGINE: "DCGM_FI_PROF_GR_ENGINE_UTIL_RATIO"}
    new = [found._replace(name=renamed.get(found.name, found.name)) for found in gpu_series(TWO)]
    assert read(new).window == read(gpu_series(TWO)).window
    both = read([*gpu_series(TWO), *new])
    assert both.window == read(gpu_series(TWO)).window


def test_sm_activity_stands_in_where_the_engines_is_missing_and_is_named() -> None:
    found = [part._replace(name=SMS) if part.name == ENGINE else part for part in gpu_series(TWO)]
    gpu = read(found)
    assert gpu.window is not None
    assert gpu.window.slices == read(gpu_series(TWO)).window.slices
    assert any(SMS in note for note in gpu.notes)


# --- what is missing or cannot be true --------------------------------------------------------------------------------


def only(found: Iterable[Series], *names: str) -> list[Series]:
    return [part for part in found if part.name in names]


def test_without_activity_of_a_slice_with_a_pod_nothing_is_divided() -> None:
    gpu = read([part for part in gpu_series(TWO) if part.name != ENGINE or part.labels["GPU_I_ID"] != "7"])
    assert gpu.window is None
    assert [part.activity for part in gpu.slices] == [0.25, None]
    assert any("no activity of 1g.5gb/7" in note for note in gpu.notes)


def test_without_a_counter_power_is_integrated_and_without_both_the_joules_are_unknown() -> None:
    gpu = read(only(gpu_series(TWO, power_w=(100, 200, 100, 200, 100)), POWER, ENGINE))
    assert gpu.window is not None
    assert (gpu.window.energy_j, gpu.window.check_j) == (9_000.0, None)
    assert any("no energy counter" in note for note in gpu.notes)
    blind = read(only(gpu_series(TWO), ENGINE))
    assert blind.window is None
    assert any("fewer than two samples" in note for note in blind.notes)


@pytest.mark.parametrize(
    ("energy_mj", "note"),
    [
        ((5e6, 7e6, 1e3, 2e6, 4e6), "went back"),
        ((5e6,) * 5, "stands still"),
        ((0, 0, 0, 0, 0), "stands still"),
        ((0, 1, 2, 3, 1e15), "cannot be true"),
        ((NAN, NAN, NAN, NAN, 5e6), "4 of 5 samples"),
        ((math.inf, -1.0, 1e6, 2e6, 3e6), "2 of 5 samples"),
    ],
)
def test_a_counter_that_cannot_be_true_is_named_and_gives_no_joules(energy_mj: Sequence[float], note: str) -> None:
    gpu = read(gpu_series(TWO, energy_mj=energy_mj))
    assert any(note in found for found in gpu.notes)
    if gpu.window is not None:  # from what is left of the counter, or from power
        assert 0.0 < gpu.window.energy_j / gpu.window.seconds < 1_000.0
    assert gpu.end_s == 60.0


def test_zeros_of_all_activities_on_a_busy_device_are_named_and_belong_to_no_slice() -> None:
    quiet = {key: [0.0] * 5 for key in TWO}
    gpu = read(gpu_series(quiet))
    assert any("all activities are 0 while the GPU draws 160 W, 105 W above idle" in note for note in gpu.notes)
    idle = read(gpu_series(quiet, energy_mj=(0, 8.5e5, 1.7e6, 2.5e6, 3.4e6)))
    assert idle.notes == ()


@pytest.mark.parametrize(
    ("activity", "mean", "note"),
    [
        ([0.1, 0.4, 0.4, 0.4, 0.4], 0.4, None),
        ([0.4, NAN, 0.4, 0.4, 0.4], 0.4, "1 of 4 samples"),
        ([0.4, 2147483632.0, 0.4, -1.0, 0.4], 0.4, "2 of 4 samples"),
        ([1.5] * 5, 1.0, "activity 1.50 counts as 1"),
    ],
)
def test_activity_is_the_mean_of_what_is_possible(activity: list[float], mean: float, note: str | None) -> None:
    gpu = read(gpu_series(TWO | {("7", "1g.5gb", "triton-a"): activity}))
    assert next(part.activity for part in gpu.slices if part.name == "1g.5gb/7") == pytest.approx(mean)
    assert bool(gpu.notes) == (note is not None)
    assert note is None or note in gpu.notes[0]


def test_impossible_power_is_left_out_of_the_check() -> None:
    gpu = read(gpu_series(TWO, power_w=(160, 0, 160, 1e300, 160)))
    assert gpu.window is not None
    assert gpu.window.check_j == pytest.approx(9_600.0)
    assert any("2 of 5 samples" in note for note in gpu.notes)


def test_a_gpu_that_is_not_scraped_any_more_is_named_with_the_age_of_its_figures() -> None:
    assert read(gpu_series(TWO), now_s=119.0).notes == ()
    assert "the newest sample is 70 s old" in read(gpu_series(TWO), now_s=130.0).notes[0]


def test_a_slice_that_was_removed_is_named_and_left_out() -> None:
    gone = [found._replace(samples=found.samples[:2]) for found in gpu_series({("3", "4g.20gb", "old"): [0.9] * 5})]
    gpu = read([*gpu_series(TWO), *gone])
    assert {part.name for part in gpu.slices} == {"1g.5gb/7", "3g.20gb/1"}
    assert any("4g.20gb/3 has no sample in the last 45 s" in note for note in gpu.notes)


def test_more_slices_than_a_gpu_has_sms_are_an_error_in_the_notes() -> None:
    gpu = read(gpu_series({(str(n), "3g.20gb", "triton"): [0.5] * 5 for n in range(3)}))
    assert gpu.window is None
    assert any("more SMs than its 108" in note for note in gpu.notes)


def test_profiles_and_models_that_are_not_in_the_table_are_named() -> None:
    wrong = read(gpu_series({("7", "1g.11gb", "triton-a"): [0.5] * 5}))
    assert wrong.window is None
    assert any("profile 1g.11gb" in note and "GPU_I_ID 7" in note for note in wrong.notes)
    media = read(gpu_series({("7", "1g.5gb+me", "triton-a"): [0.5] * 5}))
    assert media.window is not None
    unknown = [found._replace(labels={**found.labels, "modelName": "NVIDIA A30"}) for found in gpu_series(TWO)]
    assert any("'NVIDIA A30' is not in the table" in note for note in read(unknown).notes)
    (named,) = watched_gpus(unknown, {}, 60.0, 65.0, gpu=find_gpu("a100-40gb"), idle_w=60.0)
    assert named.window is not None
    assert named.window.idle_w == 60.0


def test_a_gpu_without_mig_is_one_slice() -> None:
    found = [series(ENERGY, (0, 2.4e6, 4.8e6, 7.2e6, 9.6e6)), series(ENGINE, [0.5] * 5, pod="triton-a")]
    window = read(found).window
    assert window is not None
    assert [(part.name, part.sms, part.activity) for part in window.slices] == [("whole GPU", 108, 0.5)]
    # the exporter may have the device's own rows beside those of its slices
    assert {part.name for part in read([*gpu_series(TWO), *found]).slices} == {"1g.5gb/7", "3g.20gb/1"}


def test_other_series_and_those_without_uuid_or_samples_are_ignored() -> None:
    strange = [
        Series("up", {"UUID": "GPU-2"}, (Sample(0.0, 1.0),)),
        Series(ENERGY, {}, (Sample(0.0, 1.0),)),
        Series(ENERGY, {"UUID": "GPU-3"}, ()),
    ]
    assert watched_gpus(strange, {}, 60.0, 65.0) == []
    assert read([*gpu_series(TWO), *strange]) == read(gpu_series(TWO))
