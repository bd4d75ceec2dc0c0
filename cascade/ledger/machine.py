"""The machine and the versions of the software behind a ledger's figures."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Final

import msgspec
import psutil

# The packages that decide, transport or measure.
_PACKAGES: Final = (
    "cascade-fraud",
    "numpy",
    "numba",
    "lightgbm",
    "onnxruntime",
    "onnxruntime-gpu",
    "tritonclient",
    "kafka-python",
    "confluent-kafka",
    "msgspec",
    "nvidia-ml-py",
)


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A machine and its software. `cores`: logical processors that the process may use. `memory_gib`: physical memory.

    packages: installed versions, by package.
    """

    processor: str
    cores: int
    memory_gib: float
    system: str
    python: str
    packages: dict[str, str]

    @property
    def text(self) -> str:
        """The whole description in one line."""
        packages = ", ".join(f"{name} {version}" for name, version in self.packages.items())
        return (
            f"{self.processor}, {self.cores} cores, {self.memory_gib:g} GiB; {self.system}; Python {self.python}; "
            f"{packages}"
        )


def describe_machine() -> Machine:
    """Describes this machine and its software."""
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: version for name in _PACKAGES if (version := _version(name)) is not None},
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
