"""Energy meters: finding those of this machine, and the CPU model for machines without a counter."""

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
from typing import Final, Self

import psutil

from cascade.config import EnergySettings
from cascade.errors import SettingError
from cascade.ledger.errors import MeterError
from cascade.ledger.nvml import NvmlLibrary, nvml_meters
from cascade.ledger.rapl import POWERCAP, RaplMeter
from cascade.plugins import METERS
from cascade.protocols import EnergyMeter, EnergyReading

# Names of the modelled meters: of the worker, of the processes that serve the deep model, and of reserved cores.
WORKER_METER: Final = "cpu-worker"
DEEP_METER: Final = "cpu-deep"
IDLE_METER: Final = "cpu-idle"


class CpuModelMeter:
    """Models energy as CPU seconds of processes × stated watts per busy core, without idle power.

    This process counts alone, because its children have other meters; any other process (Triton) counts with its
    descendants. Raises MeterError if a process does not exist, ValueError if `watts_per_core` is not positive or
    `pids` is empty.
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
        """Joules since construction; raises MeterError if a process has ended."""
        # the seconds of a descendant that nobody waited for disappear when it ends, but the total must not decrease
        self._last_s = max(self._last_s, self._cpu_s())
        used_s = self._last_s - self._start_s
        processes = ["this process"] if self._own else []
        processes += [f"process {process.pid} and its descendants" for process in self._others]
        source = f"{used_s:.2f} CPU s of {', '.join(processes)} × {self._watts_per_core:g} W per busy core (stated)"
        return EnergyReading(used_s * self._watts_per_core, "modelled", source)

    def _cpu_s(self) -> float:
        own_s = time.process_time() if self._own else 0.0
        return own_s + sum(_tree_cpu_s(process, self.name) for process in self._others)


class CpuIdleMeter:
    """Models the idle energy of cores that are reserved for the service: cores × time × stated watts.

    CpuModelMeter models the energy of work, without idle. `cores`: None for all cores that this process may use.
    """

    name = IDLE_METER

    def __init__(
        self, idle_watts_per_core: float, cores: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cores = len(os.sched_getaffinity(0)) if cores is None else cores
        self._watts, self._clock = idle_watts_per_core, clock
        self._start_s = clock()

    def read(self) -> EnergyReading:
        """Joules since construction."""
        elapsed_s = self._clock() - self._start_s
        source = f"{self._cores} reserved cores × {elapsed_s:.1f} s × {self._watts:g} W idle (stated)"
        return EnergyReading(self._cores * elapsed_s * self._watts, "modelled", source)


@cache
def _processors() -> dict[str, float]:
    """Watts per hardware thread, by processor: the thermal design power divided by the threads."""
    with (files("cascade.ledger") / "processors.csv").open(encoding="utf-8") as file:
        return {row["processor"]: float(row["tdp_w"]) / int(row["hardware_threads"]) for row in csv.DictReader(file)}


def watts_per_core(settings: EnergySettings) -> float:
    """Watts of a busy core: of `energy.processor`, else as stated. Raises SettingError for an unknown processor."""
    if not settings.processor:
        return settings.watts_per_core
    watts = _processors().get(settings.processor)
    if watts is None:
        remedy = f"use one of {', '.join(_processors())}, or state energy.watts_per_core"
        raise SettingError("configuration", "energy.processor", settings.processor, "not in the table", remedy)
    return watts


def _process(pid: int, name: str) -> psutil.Process:
    try:
        return psutil.Process(pid)
    except psutil.Error as error:
        raise MeterError(name, f"no process {pid}", "name the process that serves the model") from error


def _tree_cpu_s(root: psutil.Process, name: str) -> float:
    """CPU seconds of a process and its descendants, with the ended ones that their parent has waited for."""
    try:
        times = [root.cpu_times()]
        processes = root.children(recursive=True)
    except psutil.Error as error:
        remedy = "its energy is unknown from then on; restart the service"
        raise MeterError(name, f"process {root.pid} has ended", remedy) from error
    for process in processes:
        try:
            times.append(process.cpu_times())
        except psutil.Error:
            continue  # it ended between the two calls, and its parent has its seconds
    return float(sum(time.user + time.system + time.children_user + time.children_system for time in times))


def find_meters(
    pids: Sequence[int],
    watts_per_core: float,
    *,
    idle_watts_per_core: float = 0.0,
    registered: Sequence[str] = (),
    nvml: NvmlLibrary | None = None,
    powercap: Path = POWERCAP,
) -> list[EnergyMeter]:
    """The meters of this machine: GPUs by NVML, processor packages by RAPL, and always the CPU model.

    pids: the processes of the CPU model. This process gets one meter; the others, which serve the deep model, another.
    watts_per_core: watts of a busy core.
    idle_watts_per_core: watts of an idle reserved core; 0 for no such meter.
    registered: names of further meters (`energy.meters`). Each is a function that returns those of the hardware that is
    present.
    nvml: replaces the module `pynvml`.
    powercap: replaces the directory of the RAPL counters.

    Hardware that is absent or not readable has no meter. Raises MeterError and ValueError as CpuModelMeter does, and
    SettingError for a registered meter that cannot be imported or has the name of another meter.
    """
    meters: list[EnergyMeter] = list(nvml_meters(nvml_library() if nvml is None else nvml))
    with suppress(MeterError):  # often only root may read it, containers hide it, and virtual machines have none
        meters.append(RaplMeter(powercap))
    own = [pid for pid in pids if pid == os.getpid()]
    serving = [pid for pid in pids if pid != os.getpid()]
    if own or not serving:
        meters.append(CpuModelMeter(own, watts_per_core, WORKER_METER))
    if serving:
        meters.append(CpuModelMeter(serving, watts_per_core, DEEP_METER))
    if idle_watts_per_core:
        meters.append(CpuIdleMeter(idle_watts_per_core))
    for name in registered:
        meters += _registered_meters(name, {meter.name for meter in meters})
    return meters


def _registered_meters(name: str, taken: set[str]) -> list[EnergyMeter]:
    found: list[EnergyMeter] = list(METERS.load(name)())
    for meter in found:
        if meter.name in taken:
            problem = f"its meter {meter.name} has the name of another meter"
            raise SettingError("configuration", METERS.key, name, problem, "remove one of the two")
        taken.add(meter.name)
    return found


def nvml_library() -> NvmlLibrary:
    """The module `pynvml`, imported at the first call."""
    import pynvml

    return pynvml


class EnergySampler:
    """A context manager that calls `sample` at an interval on its own thread, so that no counter wraps unnoticed.

    `interval_s`: seconds, at least 0.1: counters step no faster, and metering costs power too.
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

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(timeout=10.0)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._sample()
