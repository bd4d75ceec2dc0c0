"""A fake NVML for machines without a GPU: it plays back recorded traces."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence

from bench.gpu_trace import RecordedGpu


class RecordedNvmlError(Exception):
    """The fake raises it where pynvml would raise its NVMLError."""


class RecordedNvml:
    """Plays back the traces of GPUs through the functions of `pynvml` that the meters call; a handle is a UUID."""

    NVMLError: type[Exception] = RecordedNvmlError

    def __init__(self, gpus: Sequence[RecordedGpu], clock: Callable[[], float] = time.monotonic) -> None:
        self._gpus = tuple(gpus)
        self._clock = clock
        self._start_s = clock()

    def nvmlInit(self) -> None:
        if not self._gpus:
            raise RecordedNvmlError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self._gpus[index].uuid

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._parent(uuid)
        return uuid

    def nvmlDeviceIsMigDeviceHandle(self, handle: str) -> int:
        return int(any(handle in gpu.mig_uuids for gpu in self._gpus))

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        return self._parent(handle).uuid

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:
        mode = int(bool(self._parent(handle).mig_uuids))
        return mode, mode

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetName(self, handle: str) -> str:
        return self._parent(handle).name

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self._play(handle, self._parent(handle).energy_mj)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
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
