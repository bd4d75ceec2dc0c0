"""Joules of processor packages from Linux's powercap counters (RAPL: Intel, and AMD since Zen)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cascade.ledger.errors import MeterError
from cascade.protocols import EnergyReading

POWERCAP: Final = Path("/sys/class/powercap")


@dataclass(slots=True)
class _Package:
    """The counter of one package, µJ. `range_uj`: its maximum; None if not readable."""

    path: Path
    name: str
    range_uj: int | None
    last_uj: int
    counted_uj: int = 0
    wraps_unknown: int = 0

    def advance(self, now_uj: int) -> None:
        step = now_uj - self.last_uj
        if step < 0:
            # without the maximum, the µJ before the wrap are unknown and left out
            self.wraps_unknown += self.range_uj is None
            step = now_uj if self.range_uj is None else step + self.range_uj
        self.counted_uj += step
        self.last_uj = now_uj


class RaplMeter:
    """The energy of all processor packages of the machine, with everything that runs on it.

    It reads only the domains `package-N`: `core` is a part of them and `psys` contains them, so that either would count
    twice. The counters wrap after one to twenty minutes, so readings must be closer together, as an EnergySampler makes
    them. Source: Linux kernel, Documentation/power/powercap. Raises MeterError if no package is readable.
    """

    name = "rapl"

    def __init__(self, root: Path = POWERCAP) -> None:
        self._packages: Sequence[_Package] = [_open(path) for path in package_paths(root)]
        if not self._packages:
            raise MeterError(self.name, f"no processor package under {root}", "use the CPU model instead")

    def read(self) -> EnergyReading:
        """Joules since construction. Raises MeterError if a counter is not readable any more."""
        for package in self._packages:
            package.advance(_read_uj(package.path / "energy_uj"))
        names = ", ".join(package.name for package in self._packages)
        source = f"RAPL {names} (whole machine)"
        if wraps := sum(package.wraps_unknown for package in self._packages):
            source += f"; a lower bound: wrapped {wraps} times, and max_energy_range_uj is not readable"
        return EnergyReading(sum(package.counted_uj for package in self._packages) / 1e6, "measured", source)


def package_paths(root: Path = POWERCAP) -> list[Path]:
    """The powercap directories of the processor packages, sorted; empty if the kernel has none."""
    # intel-rapl-mmio has the same packages again
    return [zone for zone in sorted(root.glob("intel-rapl:*")) if _text(zone / "name").startswith("package")]


def _open(path: Path) -> _Package:
    try:
        range_uj: int | None = _read_uj(path / "max_energy_range_uj")
    except MeterError:
        range_uj = None
    return _Package(path, _text(path / "name"), range_uj, _read_uj(path / "energy_uj"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _read_uj(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except PermissionError as error:
        problem = f"only root may read {path} (since CVE-2020-8694)"
        remedy = "run as root, or let the service's group read energy_uj with a udev rule"
        raise MeterError("rapl", problem, remedy) from error
    except (OSError, ValueError) as error:
        remedy = "check that the powercap driver is loaded"
        raise MeterError("rapl", f"{path} cannot be read ({error})", remedy) from error
