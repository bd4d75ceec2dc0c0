"""Carbon of the energy that meters tell, after ISO/IEC 21031:2024 (Software Carbon Intensity): ((E · I) + M) per R.

E: a meter's joules, times the data centre's PUE. I: the grid's intensity at the place and the time, location-based. M:
the share of the hardware's making that the time stands for, TE · (TiR / EL) · (RR / ToR). R: decisions. Nothing is
offset, and nothing market-based is in it.
"""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from cascade.config import CarbonSettings
from cascade.errors import DataError, SettingError

JOULES_PER_KWH: Final = 3.6e6
HOURS_PER_YEAR: Final = 8_766.0
# A value of a feed holds until the next one, but not for longer: then the intensity is unknown.
STALE: Final = timedelta(hours=25)
INTENSITY_MAX_G: Final = 3_000.0
FILE_BYTES_MAX: Final = 64 << 20


class Grid(Protocol):
    """Carbon intensity of the electricity at one place."""

    @property
    def basis(self) -> str:
        """What it is and where it is from, in a line."""
        ...

    def g_per_kwh(self, at: datetime) -> float | None:
        """gCO2e per kWh at a moment with a time zone; None where it is not known."""
        ...


class Carbon:
    """From joules to grams of CO2e, for one service.

    `embodied_g_per_hour`: what each hour of the reserved hardware stands for; None where another ledger accounts it.
    """

    def __init__(self, grid: Grid, pue: float, embodied_g_per_hour: float | None) -> None:
        self._grid, self._pue, self._embodied_g_per_hour = grid, pue, embodied_g_per_hour

    @property
    def bases(self) -> tuple[str, ...]:
        """All inputs, in a line each."""
        lines = [f"{self._grid.basis}; PUE {self._pue:g}"]
        if self._embodied_g_per_hour is not None:
            rate = self._embodied_g_per_hour
            lines.append(
                f"embodied: {rate:.3g} g an hour" if rate else "embodied: not accounted (carbon.embodied_kg = 0)"
            )
        return tuple(lines)

    def operational_g(self, energy_j: float, at: datetime) -> float | None:
        """Grams of energy that was used around a moment; None where the grid's intensity is not known."""
        intensity = self._grid.g_per_kwh(at)
        return None if intensity is None else energy_j / JOULES_PER_KWH * self._pue * intensity

    def embodied_g(self, elapsed_s: float) -> float:
        """Grams that a time of reserved hardware stands for."""
        return elapsed_s / 3_600.0 * (self._embodied_g_per_hour or 0.0)


class YearlyGrid:
    """A country's average of a year, from the table that ships; raises SettingError for one that is not in it."""

    def __init__(self, region: str) -> None:
        found = intensity_table().get(region.upper())
        if found is None:
            raise SettingError(
                "configuration", "carbon.region", region, "is not in the table",
                "give an ISO 3166-1 alpha-3 code as DEU, or a file of intensities (carbon.file)",
            )  # fmt: skip
        name, year, self._g_per_kwh = found
        self.basis = f"{name}, average of {year}: {self._g_per_kwh:g} g/kWh (Ember and Energy Institute, CC BY 4.0)"

    def g_per_kwh(self, at: datetime) -> float:
        """The year's average, whatever the moment."""
        del at
        return self._g_per_kwh


class HourlyGrid:
    """Intensities by time, of a file that may be replaced by a newer one while it is read.

    CSV with the columns `time` (ISO 8601) and `g_per_kwh`, or JSON as Electricity Maps serves it: an object with
    `datetime` and `carbonIntensity`, or with a list of such objects in `history`, `forecast` or `data`. `kind` says
    what they are, average or marginal. Raises SettingError where the file cannot be read at the start; later, what was
    read last holds.
    """

    def __init__(self, path: Path, region: str, kind: str) -> None:
        self._path = path
        self.basis = f"{region or path.name}, {kind}, by the hour from {path.name}"
        self._read_ns = 0
        self._times: list[datetime] = []
        self._values: list[float] = []
        try:
            self._read()
        except DataError as error:
            raise SettingError("configuration", "carbon.file", str(path), str(error), "see docs/carbon.md") from error

    def g_per_kwh(self, at: datetime) -> float | None:
        """The last value up to the moment, unless it is older than a day."""
        # half written, or gone: the next look may find it whole
        with suppress(DataError):
            self._read()
        place = bisect_right(self._times, at)
        if not place or at - self._times[place - 1] > STALE:
            return None
        return self._values[place - 1]

    def _read(self) -> None:
        try:
            changed_ns = self._path.stat().st_mtime_ns
            if changed_ns == self._read_ns:
                return
            text = self._path.read_bytes()[: FILE_BYTES_MAX + 1]
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})") from error
        if len(text) > FILE_BYTES_MAX:
            raise DataError(f"more than {FILE_BYTES_MAX >> 20} MiB")
        entries = sorted(_from_json(text) if self._path.suffix == ".json" else _from_csv(text))
        if not entries:
            raise DataError("no intensity in it")
        self._times, self._values = [time for time, _ in entries], [value for _, value in entries]
        self._read_ns = changed_ns


def make_carbon(settings: CarbonSettings, embodied: bool = True) -> Carbon | None:
    """As the settings say; None where neither region nor file is given. Raises SettingError.

    `embodied`: whether this ledger accounts the hardware's making; of several on one machine, one does.
    """
    if settings.file:
        grid: Grid = HourlyGrid(Path(settings.file), settings.region, settings.kind)
    elif settings.region:
        grid = YearlyGrid(settings.region)
    else:
        return None
    rate = 1e3 * settings.embodied_kg * settings.reserved_share / (settings.life_years * HOURS_PER_YEAR)
    return Carbon(grid, settings.pue, rate if embodied else None)


@cache
def intensity_table() -> Mapping[str, tuple[str, int, float]]:
    """By region: name, year, gCO2e per kWh."""
    text = files("cascade.ledger").joinpath("grid_intensity.csv").read_text("utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return {row["region"]: (row["name"], int(row["year"]), float(row["g_per_kwh"])) for row in rows}


def _from_csv(text: bytes) -> list[tuple[datetime, float]]:
    try:
        rows = list(csv.DictReader(text.decode("utf-8").splitlines()))
        return [_entry(row["time"], row["g_per_kwh"]) for row in rows]
    except (UnicodeDecodeError, csv.Error, KeyError) as error:
        raise DataError(f"no CSV with the columns time and g_per_kwh ({error})") from error


def _from_json(text: bytes) -> list[tuple[datetime, float]]:
    try:
        found: Any = msgspec.json.decode(text)
        lists = [found[name] for name in ("history", "forecast", "data") if isinstance(found.get(name), list)]
        entries = lists[0] if lists else [found]
        return [_entry(one["datetime"], one["carbonIntensity"]) for one in entries]
    except (msgspec.DecodeError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"no JSON with datetime and carbonIntensity ({error})") from error


def _entry(time: Any, value: Any) -> tuple[datetime, float]:
    try:
        moment, number = datetime.fromisoformat(str(time)), float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{time}: {value}: not a time and a number") from error
    if not 0.0 <= number <= INTENSITY_MAX_G:
        raise DataError(f"{time}: {value} g/kWh is out of range, 0 to {INTENSITY_MAX_G:g}")
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC), number
