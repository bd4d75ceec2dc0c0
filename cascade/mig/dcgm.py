"""DCGM's metrics of GPUs with MIG, from Prometheus, as windows for the attribution of joules to slices.

dcgm-exporter gives each metric once for each GPU instance, with the labels UUID (of the whole GPU), GPU_I_ID and
GPU_I_PROFILE. What belongs to the whole device, its joules and watts, is repeated with each instance (dcgm-exporter
issues 257, 317), so one series is taken for each UUID. Activity is that of the instance.

A value that is missing, not finite or impossible is left out and named in the notes; it is never read as 0. Zeros that
cannot be true are named too: a counter that stands still, no activity anywhere on a device that draws more than when
idle (dcgm-exporter issue 662).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

from cascade.errors import DataError
from cascade.ledger.slices import Slice, Window
from cascade.mig.gpus import GPUS, Gpu
from cascade.mig.prometheus import Sample, Series

# With the newer name where DCGM has introduced one; the energy field has none (DCGM exporter 4.8).
ENERGY: Final = ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION",)
POWER: Final = ("DCGM_FI_DEV_POWER_USAGE", "DCGM_FI_DEV_BOARD_POWER_WATTS")
ENGINE_ACTIVE: Final = ("DCGM_FI_PROF_GR_ENGINE_ACTIVE", "DCGM_FI_PROF_GR_ENGINE_UTIL_RATIO")
SM_ACTIVE: Final = ("DCGM_FI_PROF_SM_ACTIVE", "DCGM_FI_PROF_SM_UTIL_RATIO")
METRICS: Final = (*ENERGY, *POWER, *ENGINE_ACTIVE, *SM_ACTIVE)

# No GPU draws so much; a mean above it is a broken counter.
POWER_W_MAX: Final = 10_000.0
# Values a little above 1 occur on slices (DCGM issue 152) and count as 1; beyond this they are no activity.
ACTIVITY_MAX: Final = 8.0
# Without any activity, a device draws at most so many times its idle power.
QUIET_FACTOR: Final = 1.3
WHOLE: Final = "whole GPU"


class WatchedSlice(NamedTuple):
    """A slice in a window: the name that it has in the window's rows, its profile and pod.

    activity: mean over the window; None if no sample is usable. pod: None if no pod is known.
    """

    name: str
    profile: str
    sms: int
    pod: str | None
    activity: float | None


@dataclass(frozen=True, slots=True)
class WatchedGpu:
    """A GPU in a window.

    window: None if the joules or the slices are not known; `notes` has the reason.
    end_s: the last sample of the window, by Prometheus's clock; None without samples.
    """

    uuid: str
    model: str
    slices: tuple[WatchedSlice, ...]
    window: Window | None
    end_s: float | None
    notes: tuple[str, ...]


def watched_gpus(
    series: Iterable[Series],
    since_s: Mapping[str, float],
    window_s: float,
    now_s: float,
    gpu: Gpu | None = None,
    idle_w: float | None = None,
) -> list[WatchedGpu]:
    """The GPUs in the answer, by UUID, each with a window from its last end to its newest sample.

    - `since_s`: where the last window of a GPU ended, by UUID; without it the window is the newest `window_s` seconds.
    - `now_s`: a GPU without a sample for `window_s` before it has a note.
    - `gpu`: the model of all GPUs; None: by the label modelName.
    - `idle_w`: of each whole GPU with MIG on and nothing running; None: as in the table of GPUs.
    """
    by_uuid: dict[str, list[Series]] = {}
    for found in series:
        if found.name in METRICS and found.samples and found.labels.get("UUID"):
            by_uuid.setdefault(found.labels["UUID"], []).append(found)
    pod_of = _pod_reader([found for of_gpu in by_uuid.values() for found in of_gpu])
    readers = (_Reader(uuid, of_gpu, pod_of, gpu, idle_w) for uuid, of_gpu in sorted(by_uuid.items()))
    return [reader.read(since_s.get(reader.uuid), window_s, now_s) for reader in readers]


class _Pods(NamedTuple):
    """How the answer names the pod of a series; `known`: whether it names any."""

    label: str
    known: bool

    def of(self, labels: Mapping[str, str]) -> str | None:
        pod = labels.get(self.label, "")
        # where Prometheus does not honour the exporter's labels, `pod` is the exporter's own
        return pod if pod and "dcgm-exporter" not in pod else None


def _pod_reader(series: Sequence[Series]) -> _Pods:
    label = "exported_pod" if any("exported_pod" in found.labels for found in series) else "pod"
    pods = _Pods(label, known=False)
    return pods._replace(known=any(pods.of(found.labels) for found in series))


@dataclass(slots=True)
class _Reader:
    """Reads one GPU; `notes` grows on the way."""

    uuid: str
    series: Sequence[Series]
    pods: _Pods
    gpu: Gpu | None
    idle_w: float | None
    notes: list[str] = field(default_factory=list)

    def read(self, since_s: float | None, window_s: float, now_s: float) -> WatchedGpu:
        newest = max(self.series, key=lambda found: found.samples[-1])
        model = newest.labels.get("modelName", "")
        gpu = self.gpu or next((gpu for gpu in GPUS.values() if model in gpu.models), None)
        end_s = newest.samples[-1].at_s
        start_s = end_s - window_s if since_s is None else since_s
        if now_s - end_s > window_s:
            self.notes.append(f"the newest sample is {now_s - end_s:.0f} s old: check that the exporter is scraped")
        joules = self._joules(start_s)
        if gpu is None:
            self.notes.append(f"model {model!r} is not in the table of GPUs; name it with --gpu")
            return self._result(model, (), None, end_s)
        slices = self._slices(gpu, start_s, end_s)
        if joules is None or slices is None:
            return self._result(model, slices or (), None, end_s)
        return self._result(model, slices, self._window(gpu, slices, joules), joules.end_s)

    def _result(self, model: str, slices: tuple[WatchedSlice, ...], window: Window | None, end_s: float) -> WatchedGpu:
        return WatchedGpu(self.uuid, model, slices, window, end_s, tuple(self.notes))

    def _window(self, gpu: Gpu, slices: Sequence[WatchedSlice], joules: _Joules) -> Window | None:
        """The window, with slices on which nothing runs as empty; None if it cannot be attributed."""
        empty = {part.name for part in slices if self._is_empty(part)}
        blind = [part.name for part in slices if part.activity is None and part.name not in empty]
        if blind:
            self.notes.append(f"no activity of {', '.join(blind)}, so the joules cannot be divided")
            return None
        idle_w = gpu.idle_w if self.idle_w is None else self.idle_w
        watts = joules.energy_j / joules.seconds
        if not any(part.activity for part in slices) and watts > QUIET_FACTOR * idle_w:
            self.notes.append(
                f"all activities are 0 while the GPU draws {watts:.0f} W, {watts - idle_w:.0f} W above idle: "
                "do not trust them"
            )
        try:
            return Window(
                device=self.uuid,
                seconds=joules.seconds,
                energy_j=joules.energy_j,
                idle_w=idle_w,
                sms=gpu.sms,
                check_j=joules.check_j,
                slices=tuple(
                    Slice(name=part.name, sms=part.sms, activity=None if part.name in empty else part.activity)
                    for part in slices
                ),
            )
        except ValueError as error:
            self.notes.append(str(error))
            return None

    def _is_empty(self, part: WatchedSlice) -> bool:
        """A slice without pod and without activity; where no pod is known at all, it may have a process."""
        return part.pod is None and not part.activity and self.pods.known

    # --- joules of the device -----------------------------------------------------------------------------------------

    def _joules(self, start_s: float) -> _Joules | None:
        """Joules since `start_s` by the counter, or by integrated power where there is no counter."""
        power = self._device_samples(POWER, start_s, lambda watts: 0.0 < watts <= POWER_W_MAX, "W")
        counter_mj = self._device_samples(ENERGY, start_s, lambda energy_mj: energy_mj >= 0.0, "mJ")
        if len(counter_mj) < 2:
            if len(power) < 2:
                self.notes.append(
                    f"fewer than two samples of {ENERGY[0]} and of power in the window; "
                    "add them to the exporter's counters, or raise --interval"
                )
                return None
            self.notes.append("no energy counter: joules are integrated power")
            return _Joules(power[0].at_s, power[-1].at_s, _integral(power), None)
        if any(after.value < before.value for before, after in pairwise(counter_mj)):
            self.notes.append("the energy counter went back: the driver was reloaded; this window is left out")
            return None
        start, end = counter_mj[0], counter_mj[-1]
        seconds, energy_j = end.at_s - start.at_s, (end.value - start.value) / 1e3
        if not energy_j or energy_j > POWER_W_MAX * seconds:
            what = "stands still" if not energy_j else f"grew by {energy_j:.3g} J in {seconds:.0f} s"
            self.notes.append(f"the energy counter {what}, which cannot be true; this window is left out")
            return None
        inside = [sample for sample in power if start.at_s <= sample.at_s <= end.at_s]
        covered = len(inside) > 1 and inside[-1].at_s - inside[0].at_s > 0.9 * seconds
        scale = seconds / (inside[-1].at_s - inside[0].at_s) if covered else 0.0
        return _Joules(start.at_s, end.at_s, energy_j, _integral(inside) * scale if covered else None)

    def _device_samples(
        self, names: Sequence[str], start_s: float, usable: Callable[[float], bool], unit: str
    ) -> list[Sample]:
        """Samples since `start_s` of the instance and exporter that have the most; all instances repeat the device's.

        Not all samples together: exporters read a counter at different moments, so it would seem to go back.
        """
        by_reader: dict[tuple[str, ...], list[Sample]] = {}
        for found in self.series:
            if found.name in names:
                inside = [sample for sample in found.samples if sample.at_s >= start_s]
                reader = (found.name, *(found.labels.get(label, "") for label in ("GPU_I_ID", "job", "instance")))
                by_reader.setdefault(reader, []).extend(inside)
        chosen: list[Sample] = max(by_reader.values(), key=len, default=[])
        by_time = {sample.at_s: sample for sample in sorted(chosen)}
        return self._usable(list(by_time.values()), usable, f"{names[0]} in {unit}")

    def _usable(self, samples: Sequence[Sample], usable: Callable[[float], bool], what: str) -> list[Sample]:
        good = [sample for sample in samples if math.isfinite(sample.value) and usable(sample.value)]
        if len(good) < len(samples):
            self.notes.append(
                f"{len(samples) - len(good)} of {len(samples)} samples of {what} are impossible; left out"
            )
        return good

    # --- slices -------------------------------------------------------------------------------------------------------

    def _slices(self, gpu: Gpu, start_s: float, end_s: float) -> tuple[WatchedSlice, ...] | None:
        """The slices that the newest samples have; None if the SMs of one are not known."""
        newest: dict[str, Series] = {}
        for found in self.series:
            instance = found.labels.get("GPU_I_ID", "")
            if instance not in newest or found.samples[-1].at_s > newest[instance].samples[-1].at_s:
                newest[instance] = found
        if len(newest) > 1:
            newest.pop("", None)  # the device itself, beside its instances
        present = {}
        for instance, found in sorted(newest.items(), key=lambda item: (len(item[0]), item[0])):
            age_s = end_s - found.samples[-1].at_s
            if age_s > 0.5 * (end_s - start_s):
                self.notes.append(f"slice {_name(found)} has no sample in the last {age_s:.0f} s; taken as removed")
            else:
                present[instance] = found
        named = [self._slice(gpu, instance, found, start_s) for instance, found in present.items()]
        return None if None in named else tuple(part for part in named if part is not None)

    def _slice(self, gpu: Gpu, instance: str, newest: Series, start_s: float) -> WatchedSlice | None:
        pod = self.pods.of(newest.labels)
        activity = self._activity(instance, start_s)
        if not instance:
            return WatchedSlice(WHOLE, WHOLE, gpu.sms, pod, activity)
        profile = newest.labels.get("GPU_I_PROFILE", "")
        try:
            sms = gpu.profile(profile.partition("+")[0]).sms
        except DataError as error:
            self.notes.append(f"{error} (label GPU_I_PROFILE, GPU_I_ID {instance})")
            return None
        return WatchedSlice(_name(newest), profile, sms, pod, activity)

    def _activity(self, instance: str, start_s: float) -> float | None:
        for names in (ENGINE_ACTIVE, SM_ACTIVE):
            samples = sorted(
                sample
                for found in self.series
                if found.name in names and found.labels.get("GPU_I_ID", "") == instance
                for sample in found.samples
                if sample.at_s > start_s
            )
            good = self._usable(samples, lambda share: 0.0 <= share <= ACTIVITY_MAX, f"{names[0]} of {instance}")
            if good:
                if names is SM_ACTIVE:
                    self.notes.append(f"GPU_I_ID {instance}: activity from {SM_ACTIVE[0]}")
                mean = math.fsum(sample.value for sample in good) / len(good)
                if mean > 1.0:
                    self.notes.append(f"GPU_I_ID {instance}: activity {mean:.2f} counts as 1")
                return min(mean, 1.0)
        return None


class _Joules(NamedTuple):
    """Joules from `start_s` to `end_s`. `check_j`: integrated power of the same time; None if not known."""

    start_s: float
    end_s: float
    energy_j: float
    check_j: float | None

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


def _integral(power: Sequence[Sample]) -> float:
    """Joules by the trapezoid rule."""
    return math.fsum(0.5 * (a.value + b.value) * (b.at_s - a.at_s) for a, b in pairwise(power))


def _name(found: Series) -> str:
    """Profile and number of a GPU instance, as in `nvidia-smi`: `1g.5gb/7`."""
    return f"{found.labels.get('GPU_I_PROFILE', '')}/{found.labels.get('GPU_I_ID', '')}"
