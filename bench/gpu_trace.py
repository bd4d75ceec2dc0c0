"""Counters of all GPUs over a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np

from cascade.ledger.nvml import NvmlLibrary

# Ten a second for three hours: bounds the memory of a long run, whose later samples are dropped.
SAMPLES_MAX: Final = 108_000


class RecordedGpu(msgspec.Struct, frozen=True, kw_only=True):
    """The trace of one GPU: readings at the times `time_s`, in seconds from 0 on, increasing.

    energy_mj: mJ since the driver was loaded; None without this counter.
    power_mw: mW; None without this counter.
    mig_uuids: its MIG devices; empty without MIG.
    lost_after_s: when the GPU falls off the bus; None for never.
    """

    uuid: str
    name: str
    time_s: tuple[float, ...]
    energy_mj: tuple[int, ...] | None = None
    power_mw: tuple[int, ...] | None = None
    mig_uuids: tuple[str, ...] = ()
    lost_after_s: float | None = None


class GpuTrace:
    """Reads the energy and the power of every GPU at each `sample`. `start_s`: the clock at time 0 of the trace.

    A GPU's trace leaves out a counter that failed at any sample.
    """

    def __init__(self, nvml: NvmlLibrary, clock: Callable[[], float] = time.monotonic) -> None:
        self._nvml, self._clock = nvml, clock
        self._handles = _handles(nvml)
        self.start_s: Final = clock()
        self._time_s: list[float] = []
        self._energy_mj: list[list[int | None]] = [[] for _ in self._handles]
        self._power_mw: list[list[int | None]] = [[] for _ in self._handles]

    @property
    def gpus(self) -> int:
        """The number of GPUs; 0 without a driver."""
        return len(self._handles)

    def sample(self) -> None:
        """Reads every GPU once; does nothing after `SAMPLES_MAX` samples."""
        if not self._handles or len(self._time_s) >= SAMPLES_MAX:
            return
        self._time_s.append(self._clock() - self.start_s)
        for handle, energy, power in zip(self._handles, self._energy_mj, self._power_mw, strict=True):
            energy.append(self._read(self._nvml.nvmlDeviceGetTotalEnergyConsumption, handle))
            power.append(self._read(self._nvml.nvmlDeviceGetPowerUsage, handle))

    def _read(self, counter: Callable[[Any], int], handle: Any) -> int | None:
        try:
            return counter(handle)
        except self._nvml.NVMLError:
            return None

    def recorded(self) -> tuple[RecordedGpu, ...]:
        """The trace of each GPU."""
        return tuple(
            RecordedGpu(
                uuid=self._nvml.nvmlDeviceGetUUID(handle),
                name=self._nvml.nvmlDeviceGetName(handle),
                time_s=tuple(self._time_s),
                energy_mj=_complete(energy),
                power_mw=_complete(power),
            )
            for handle, energy, power in zip(self._handles, self._energy_mj, self._power_mw, strict=True)
        )


def power_j(gpu: RecordedGpu, start_s: float, stop_s: float) -> float | None:
    """Joules of a GPU from `start_s` to `stop_s`: its power, integrated by the trapezoid rule; None without power.

    The energy counter steps about every 0.1 s. Over a turn of a few seconds the integrated power is finer than the
    counter, and independent of it.
    """
    if gpu.power_mw is None or len(gpu.time_s) < 2:
        return None
    time_s, power_w = np.asarray(gpu.time_s), np.asarray(gpu.power_mw) / 1e3
    energy_j = np.concatenate([[0.0], np.cumsum(0.5 * (power_w[1:] + power_w[:-1]) * np.diff(time_s))])
    return float(np.interp(stop_s, time_s, energy_j) - np.interp(start_s, time_s, energy_j))


def _handles(nvml: NvmlLibrary) -> list[Any]:
    try:
        nvml.nvmlInit()
        return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return []


def _complete(values: list[int | None]) -> tuple[int, ...] | None:
    known = tuple(value for value in values if value is not None)
    return known if known and len(known) == len(values) else None
