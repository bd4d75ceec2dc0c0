"""A fake NVML for machines without a GPU: it plays back recorded traces."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence

import msgspec


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


class RecordedNvmlError(Exception):
    """The fake raises it where pynvml would raise its NVMLError."""


class RecordedNvml:
    """Plays back the traces of GPUs through the functions of `pynvml` that the meters call; a handle is a UUID."""

    NVMLError: type[Exception] = RecordedNvmlError

    def __init__(self, gpus: Sequence[RecordedGpu], clock: Callable[[], float] = time.monotonic) -> None:
        self._gpus = tuple(gpus)
        self._clock = clock
        self._start_s = clock()

    @classmethod
    def from_json(cls, content: bytes, clock: Callable[[], float] = time.monotonic) -> RecordedNvml:
        """The GPUs of a JSON list of RecordedGpu; raises msgspec.ValidationError for any other content."""
        return cls(msgspec.json.decode(content, type=tuple[RecordedGpu, ...]), clock)

    def nvmlInit(self) -> None:
        """Raises RecordedNvmlError if there is no GPU to play back."""
        if not self._gpus:
            raise RecordedNvmlError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        """Number of physical GPUs."""
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        """Handle of a physical GPU."""
        return self._gpus[index].uuid

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        """Handle of a GPU or of a MIG device."""
        self._parent(uuid)
        return uuid

    def nvmlDeviceIsMigDeviceHandle(self, handle: str) -> int:
        """1 for a MIG device."""
        return int(any(handle in gpu.mig_uuids for gpu in self._gpus))

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        """Handle of the GPU of a MIG device."""
        return self._parent(handle).uuid

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:
        """Current and pending mode; 1 is enabled."""
        mode = int(bool(self._parent(handle).mig_uuids))
        return mode, mode

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        """The UUID of a handle."""
        return handle

    def nvmlDeviceGetName(self, handle: str) -> str:
        """Name of the product."""
        return self._parent(handle).name

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        """The trace's energy at this moment, mJ."""
        return self._play(handle, self._parent(handle).energy_mj)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        """The trace's power at this moment, mW."""
        return self._play(handle, self._parent(handle).power_mw)

    def _parent(self, handle: str) -> RecordedGpu:
        for gpu in self._gpus:
            if handle == gpu.uuid or handle in gpu.mig_uuids:
                return gpu
        raise RecordedNvmlError("Not Found")

    def _play(self, handle: str, values: tuple[int, ...] | None) -> int:
        gpu = self._parent(handle)
        now_s = self._clock() - self._start_s
        if gpu.lost_after_s is not None and now_s > gpu.lost_after_s:
            raise RecordedNvmlError("GPU is lost")
        if values is None or handle in gpu.mig_uuids:
            raise RecordedNvmlError("Not Supported")
        return values[max(bisect.bisect_right(gpu.time_s, now_s) - 1, 0)]
