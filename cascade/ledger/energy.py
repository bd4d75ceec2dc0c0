"""Energy meters: which there are, and the model for machines without a counter."""

from __future__ import annotations

import csv
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

from cascade.config import EnergySettings
from cascade.errors import SettingError
from cascade.ledger.errors import MeterError
from cascade.ledger.nvml import NvmlLibrary, NvmlMeter, nvml_meters
from cascade.ledger.rapl import POWERCAP, RaplMeter
from cascade.protocols import EnergyMeter, EnergyReading

__all__ = ["CpuIdleMeter", "CpuModelMeter", "EnergySampler", "NvmlMeter", "RaplMeter", "find_meters", "watts_per_core"]

# Names of the modelled meters: the service's own processes, those that serve its deep model, and reserved cores.
WORKER_METER: Final = "cpu-worker"
DEEP_METER: Final = "cpu-deep"
IDLE_METER: Final = "cpu-idle"


class CpuModelMeter:
    """CPU seconds of processes × stated watts per busy core: modelled, for machines without a counter.

    This process counts by itself, since its children are other parts; any other process (Triton) counts with its
    descendants. Idle power is not in it. Raises MeterError where a process does not exist, ValueError where
    `watts_per_core` is not positive.
    """

    def __init__(self, pids: Sequence[int], watts_per_core: float, name: str = WORKER_METER) -> None:
        self.name = name
        if not (math.isfinite(watts_per_core) and watts_per_core > 0):
            raise ValueError(f"watts_per_core = {watts_per_core}: must be a positive number of watts")
        if not pids:
            raise ValueError("no process to meter")
        self._own = os.getpid() in pids
        self._others = [_process(pid, name) for pid in dict.fromkeys(pids) if pid != os.getpid()]
        self._watts_per_core = watts_per_core
        self._start_s = self._last_s = self._cpu_s()

    def read(self) -> EnergyReading:
        """Joules since the meter was made; raises MeterError where a process has ended."""
        # a descendant that ends unwaited-for takes its seconds along: what was counted once stays counted
        self._last_s = max(self._last_s, self._cpu_s())
        used_s = self._last_s - self._start_s
        parts = (["this process"] if self._own else []) + [
            f"process {process.pid} and its descendants" for process in self._others
        ]
        source = f"{used_s:.2f} CPU s of {', '.join(parts)} × {self._watts_per_core:g} W per busy core (stated)"
        return EnergyReading(used_s * self._watts_per_core, "modelled", source)

    def _cpu_s(self) -> float:
        own_s = time.process_time() if self._own else 0.0
        return own_s + sum(_tree_cpu_s(process, self.name) for process in self._others)


class CpuIdleMeter:
    """What the service's cores draw while they do nothing: cores × time × stated watts, modelled.

    For cores that are reserved for the service: they draw this besides what CpuModelMeter tells of their work.
    `cores`: None for all that this process may run on.
    """

    name = IDLE_METER

    def __init__(
        self, idle_watts_per_core: float, cores: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cores = len(os.sched_getaffinity(0)) if cores is None else cores
        self._watts, self._clock = idle_watts_per_core, clock
        self._start_s = clock()

    def read(self) -> EnergyReading:
        """Joules since the meter was made."""
        elapsed_s = self._clock() - self._start_s
        source = f"{self._cores} reserved cores × {elapsed_s:.1f} s × {self._watts:g} W idle (stated)"
        return EnergyReading(self._cores * elapsed_s * self._watts, "modelled", source)


@cache
def _processors() -> dict[str, float]:
    """Watts a hardware thread, by processor: its maker's thermal design power over its threads."""
    with (files("cascade.ledger") / "processors.csv").open(encoding="utf-8") as file:
        return {row["processor"]: float(row["tdp_w"]) / int(row["hardware_threads"]) for row in csv.DictReader(file)}


def watts_per_core(settings: EnergySettings) -> float:
    """Watts of a busy core: of the named processor, else the stated figure. Raises SettingError for an unknown one."""
    if not settings.processor:
        return settings.watts_per_core
    found = _processors().get(settings.processor)
    if found is None:
        raise SettingError(
            "configuration", "energy.processor", settings.processor, "not in the table",
            f"use one of {', '.join(_processors())}, or state energy.watts_per_core",
        )  # fmt: skip
    return found


def _process(pid: int, name: str) -> psutil.Process:
    try:
        return psutil.Process(pid)
    except psutil.Error as error:
        raise MeterError(name, f"no process {pid}", "give the process that serves the model") from error


def _tree_cpu_s(root: psutil.Process, name: str) -> float:
    """CPU seconds of a process, its descendants, and those of them that have ended and were waited for."""
    try:
        times = [root.cpu_times()]
        processes = root.children(recursive=True)
    except psutil.Error as error:
        raise MeterError(
            name,
            f"process {root.pid} has ended",
            "its energy is unknown from then on: start a new ledger",
        ) from error
    for process in processes:
        try:
            times.append(process.cpu_times())
        except psutil.Error:
            continue  # ended between the two calls: its parent has its seconds
    return float(sum(time.user + time.system + time.children_user + time.children_system for time in times))


def find_meters(
    pids: Sequence[int],
    watts_per_core: float,
    *,
    idle_watts_per_core: float = 0.0,
    nvml: NvmlLibrary | None = None,
    powercap: Path = POWERCAP,
) -> list[EnergyMeter]:
    """The meters that this machine offers: GPUs by NVML, processor packages by RAPL, and always the CPU model.

    `pids`: the processes of the model; this one is metered apart from the others, which serve the deep model. `nvml`:
    instead of the module `pynvml`. Hardware that is absent or may not be read is left out. Raises as CpuModelMeter
    does.
    """
    meters: list[EnergyMeter] = list(nvml_meters(nvml_library() if nvml is None else nvml))
    with suppress(MeterError):  # usual: root only, masked in containers, absent in virtual machines
        meters.append(RaplMeter(powercap))
    own = [pid for pid in pids if pid == os.getpid()]
    serving = [pid for pid in pids if pid != os.getpid()]
    if own or not serving:
        meters.append(CpuModelMeter(own, watts_per_core, WORKER_METER))
    if serving:
        meters.append(CpuModelMeter(serving, watts_per_core, DEEP_METER))
    if idle_watts_per_core:
        meters.append(CpuIdleMeter(idle_watts_per_core))
    return meters


def nvml_library() -> NvmlLibrary:
    """The module `pynvml`, loaded where it is wanted."""
    import pynvml

    library: NvmlLibrary = pynvml
    return library


class EnergySampler:
    """Calls `sample` at an interval on a thread of its own, so that counters neither wrap nor go unread.

    `interval_s`: at least 0.1 (counters step no faster, and metering costs power). Use it as a context manager.
    """

    INTERVAL_S_MIN: Final = 0.1

    def __init__(self, sample: Callable[[], object], interval_s: float = 1.0) -> None:
        if not interval_s >= self.INTERVAL_S_MIN:
            raise ValueError(f"interval_s = {interval_s}: must be at least {self.INTERVAL_S_MIN}")
        self._sample = sample
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="energy-sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join(timeout=10.0)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._sample()
