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
    """One package's counter, µJ; `range_uj` is None where the maximum cannot be read."""

    path: Path
    name: str
    range_uj: int | None
    last_uj: int
    counted_uj: int = 0
    wraps_unknown: int = 0

    def advance(self, now_uj: int) -> None:
        step = now_uj - self.last_uj
        if step < 0:
            # without the maximum, what was counted before the wrap is unknown: take the sure part only
            self.wraps_unknown += self.range_uj is None
            step = now_uj if self.range_uj is None else step + self.range_uj
        self.counted_uj += step
        self.last_uj = now_uj


class RaplMeter:
    """Energy of all processor packages of the machine, everything that runs on it included.

    Only the domains `package-N`: they contain `core` and are contained in `psys`, so adding those would count twice.
    The counters wrap after about a minute to twenty; reads must be closer together than that (the EnergySampler's are).
    Source: Linux kernel, Documentation/power/powercap. Raises MeterError where no package can be read.
    """

    name = "rapl"

    def __init__(self, root: Path = POWERCAP) -> None:
        self._packages: Sequence[_Package] = [_open(path) for path in package_paths(root)]
        if not self._packages:
            raise MeterError(self.name, f"no processor package under {root}", "use the model of CPU seconds instead")

    def read(self) -> EnergyReading:
        """Joules since the meter was made; raises MeterError where a counter can no longer be read."""
        for package in self._packages:
            package.advance(_read_uj(package.path / "energy_uj"))
        names = ", ".join(package.name for package in self._packages)
        source = f"RAPL {names} (whole machine)"
        if wraps := sum(package.wraps_unknown for package in self._packages):
            source += f"; a lower bound: wrapped {wraps} times and max_energy_range_uj cannot be read"
        return EnergyReading(sum(package.counted_uj for package in self._packages) / 1e6, "measured", source)


def package_paths(root: Path = POWERCAP) -> list[Path]:
    """Powercap directories of the processor packages, in order; empty where the kernel offers none."""
    # not intel-rapl-mmio: it repeats the same packages
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
        raise MeterError(
            "rapl",
            f"{path} may be read by root only (since CVE-2020-8694)",
            "run as root, or let the service's group read energy_uj with a udev rule",
        ) from error
    except (OSError, ValueError) as error:
        raise MeterError(
            "rapl", f"{path} cannot be read ({error})", "see whether the powercap driver is loaded"
        ) from error
