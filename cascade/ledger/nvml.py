"""Joules of NVIDIA GPUs from NVML; the only place that calls it, and where its errors become ours."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar

from cascade.ledger.errors import MeterError
from cascade.protocols import EnergyReading

_Result = TypeVar("_Result")
_MIG_ENABLED: Final = 1
# NVML API reference, nvmlDeviceGetPowerUsage: within 5 % of the current draw.
UNCERTAINTY: Final = 0.05


class NvmlLibrary(Protocol):
    """The functions of the module `pynvml` that are used, with its own names."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> Any:
        """Connect to the driver."""
        ...

    def nvmlDeviceGetCount(self) -> int:
        """Number of physical GPUs."""
        ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        """Handle of a physical GPU."""
        ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        """Handle of a GPU or MIG device."""
        ...

    def nvmlDeviceIsMigDeviceHandle(self, handle: Any) -> int:
        """1 for a MIG device."""
        ...

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: Any) -> Any:
        """Handle of the GPU that holds a MIG device."""
        ...

    def nvmlDeviceGetMigMode(self, handle: Any) -> Any:
        """Current and pending MIG mode."""
        ...

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        """UUID of a handle."""
        ...

    def nvmlDeviceGetName(self, handle: Any) -> str:
        """Name of the product."""
        ...

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:
        """Energy since the driver was loaded, mJ."""
        ...

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        """Power, mW."""
        ...


class NvmlMeter:
    """Energy of one whole GPU, by UUID.

    A MIG device has no counter of its own: its parent's is read, which covers all slices, and the source says so.
    The counter `nvmlDeviceGetTotalEnergyConsumption` (mJ, Volta and newer) steps about every 100 ms. Beside it
    `nvmlDeviceGetPowerUsage` (mW) is integrated by the trapezoid rule between reads, at least one a second: a check of
    the counter, and the meter itself where the GPU has no counter. The uncertainty is what NVML's documentation states
    of power. Raises MeterError where the GPU has neither.
    """

    def __init__(
        self, nvml: NvmlLibrary, uuid: str, name: str = "gpu", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self._nvml = nvml
        self._clock = clock
        self._handle = self._physical(self._call(nvml.nvmlDeviceGetHandleByUUID, uuid))
        self.uuid: str = self._call(nvml.nvmlDeviceGetUUID, self._handle)
        self._about = self._describe()
        self._lost: MeterError | None = None
        self._energy_j = 0.0
        self._samples = 1
        self._last_mj = self._optional(nvml.nvmlDeviceGetTotalEnergyConsumption)
        self._integrated_j = 0.0
        self._last_mw = self._power_mw()
        self._last_s = self._first_s = clock()

    def read(self) -> EnergyReading:
        """Joules since the meter was made; raises MeterError, then and ever after, where the counter is lost."""
        if self._lost is not None:
            raise self._lost
        try:
            power = None if self._last_mw is None else self._integrate_power(self._last_mw)
            if self._last_mj is None:
                self._energy_j, check_j = self._integrated_j, None
                source = power or ""
            else:
                source = self._read_counter(self._last_mj)
                check_j = None if power is None else self._integrated_j
        except MeterError as error:
            # what was used meanwhile is unknown, so the meter must not come back with a smaller sum
            self._lost = error
            raise
        return EnergyReading(self._energy_j, "measured", f"{source} of {self._about}", UNCERTAINTY, check_j)

    def _read_counter(self, last_mj: int) -> str:
        now_mj = self._call(self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._handle)
        if now_mj < last_mj:
            raise MeterError(self.name, "the energy counter went back: the driver was reloaded", "start a new ledger")
        self._energy_j += (now_mj - last_mj) / 1e3
        self._last_mj = now_mj
        return "NVML total energy"

    def _integrate_power(self, last_mw: int) -> str | None:
        """Where the joules come from; None where power, as a check only, cannot be read any more."""
        now_mw = self._power_mw()
        if now_mw is None:
            self._last_mw = None
            return None
        now_s = self._clock()
        self._integrated_j += 0.5 * (last_mw + now_mw) / 1e3 * (now_s - self._last_s)
        self._last_mw, self._last_s = now_mw, now_s
        self._samples += 1
        return f"NVML power integrated over {self._samples} samples in {now_s - self._first_s:.1f} s"

    def _power_mw(self) -> int | None:
        """The power now; as a check only, None where it cannot be read."""
        read = self._nvml.nvmlDeviceGetPowerUsage
        return self._call(read, self._handle) if self._last_mj is None else self._optional(read)

    def _physical(self, handle: Any) -> Any:
        with suppress(self._nvml.NVMLError):  # drivers before MIG do not know the question
            if self._nvml.nvmlDeviceIsMigDeviceHandle(handle):
                return self._call(self._nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle)
        return handle

    def _describe(self) -> str:
        about = f"{self._call(self._nvml.nvmlDeviceGetName, self._handle)} ({self.uuid})"
        mode = self._optional(self._nvml.nvmlDeviceGetMigMode)
        return f"{about}, all MIG slices together" if mode and mode[0] == _MIG_ENABLED else about

    def _optional(self, function: Callable[[Any], _Result]) -> _Result | None:
        try:
            return function(self._handle)
        except self._nvml.NVMLError:
            return None

    def _call(self, function: Callable[[Any], _Result], argument: Any) -> _Result:
        try:
            return function(argument)
        except self._nvml.NVMLError as error:
            raise MeterError(
                self.name, f"NVML: {error}", "check nvidia-smi, and that the container may see the whole GPU"
            ) from error


def nvml_meters(nvml: NvmlLibrary, clock: Callable[[], float] = time.monotonic) -> list[NvmlMeter]:
    """A meter for each physical GPU with a counter or a power reading; empty where there is no driver."""
    try:
        nvml.nvmlInit()
        uuids = [
            nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount())
        ]
    except nvml.NVMLError:
        return []
    meters: dict[str, NvmlMeter] = {}
    for index, uuid in enumerate(uuids):
        with suppress(MeterError):
            meter = NvmlMeter(nvml, uuid, f"gpu{index}", clock)
            meters.setdefault(meter.uuid, meter)  # slices of one GPU share its counter
    return list(meters.values())
