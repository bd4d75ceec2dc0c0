"""Joules of NVIDIA GPUs from NVML. Only this module calls NVML; it raises MeterError for NVML's errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

from cascade.ledger.errors import MeterError
from cascade.protocols import EnergyReading

_Result = TypeVar("_Result")
_MIG_ENABLED: Final = 1
# NVML API reference, nvmlDeviceGetPowerUsage: accurate to within 5 % of the current draw.
UNCERTAINTY: Final = 0.05
# The module `pynvml`, which has no types, or the tests' RecordedNvml, which has the same functions.
NvmlLibrary = Any


class NvmlMeter:
    """The energy of one whole GPU.

    The counter is `nvmlDeviceGetTotalEnergyConsumption` (mJ, Volta and newer), which steps about every 100 ms. The
    meter also integrates `nvmlDeviceGetPowerUsage` (mW) between readings by the trapezoid rule, which needs a reading
    each second. The integral checks the counter, or replaces it on a GPU without one. The uncertainty is that of NVML's
    documentation for power. A MIG device has no counter, so the meter reads the whole GPU, and `source` names that.

    nvml: the module `pynvml`. uuid: of a GPU or a MIG device. name: of the meter. clock: seconds that never go back.

    Raises MeterError if the GPU has neither counter nor power.
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
        """Joules since construction. Raises MeterError if the counter is lost, and at each later call."""
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
            # the joules until a later reading would be missing from the sum
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
        """The source of the integral; None if power served as a check only and is not readable any more."""
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
        """The power now. If it is only a check of the counter, None if it is not readable, else raises MeterError."""
        read = self._nvml.nvmlDeviceGetPowerUsage
        return self._call(read, self._handle) if self._last_mj is None else self._optional(read)

    def _physical(self, handle: Any) -> Any:
        with suppress(self._nvml.NVMLError):  # drivers older than MIG lack the function
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
            remedy = "check nvidia-smi, and that the container has access to the whole GPU"
            raise MeterError(self.name, f"NVML: {error}", remedy) from error


def nvml_meters(nvml: NvmlLibrary, clock: Callable[[], float] = time.monotonic) -> list[NvmlMeter]:
    """A meter for each physical GPU with a counter or a power reading; empty without a driver."""
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
