"""gCO2e of the metered energy after ISO/IEC 21031:2024 (Software Carbon Intensity): ((E · I) + M) per R.

E: a meter's joules, times the PUE of the data centre.
I: carbon intensity of the grid at that place and time, location-based.
M: the share of the hardware's manufacturing for that time, TE · (TiR / EL) · (RR / ToR).
R: decisions.
Offsets and market-based instruments are not included.
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
# The value of a feed is valid until the next value, but at most this long. After that the intensity is unknown.
STALE_AFTER: Final = timedelta(hours=25)
INTENSITY_MAX_G: Final = 3_000.0
FILE_BYTES_MAX: Final = 64 << 20


class Grid(Protocol):
    """Carbon intensity of the electricity at one place."""

    @property
    def basis(self) -> str:
        """The place, the kind of intensity and the source, in one line."""
        ...

    def g_per_kwh(self, at: datetime) -> float | None:
        """gCO2e per kWh at a moment with a time zone; None if it is not known."""
        ...


class Carbon:
    """Converts the joules of one service to grams of CO2e.

    `embodied_g_per_hour`: grams of manufacturing for each hour of the reserved hardware; None if another ledger
    accounts for the hardware.
    """

    def __init__(self, grid: Grid, pue: float, embodied_g_per_hour: float | None) -> None:
        self._grid, self._pue, self._embodied_g_per_hour = grid, pue, embodied_g_per_hour

    @property
    def bases(self) -> tuple[str, ...]:
        """All inputs, one line each."""
        lines = [f"{self._grid.basis}; PUE {self._pue:g}"]
        if self._embodied_g_per_hour is not None:
            rate = self._embodied_g_per_hour
            lines.append(
                f"embodied: {rate:.3g} g per hour" if rate else "embodied: not included (carbon.embodied_kg = 0)"
            )
        return tuple(lines)

    def operational_g(self, energy_j: float, at: datetime) -> float | None:
        """Grams for energy used around a moment; None if the intensity of the grid is not known."""
        intensity = self._grid.g_per_kwh(at)
        return None if intensity is None else energy_j / JOULES_PER_KWH * self._pue * intensity

    def embodied_g(self, elapsed_s: float) -> float:
        """Grams of manufacturing for a time of reserved hardware."""
        return elapsed_s / 3_600.0 * (self._embodied_g_per_hour or 0.0)


class YearlyGrid:
    """The average of a year for a country in `grid_intensity.csv`; raises SettingError for any other."""

    def __init__(self, region: str) -> None:
        row = intensity_table().get(region.upper())
        if row is None:
            remedy = "use an ISO 3166-1 alpha-3 code, such as DEU, or a file of intensities (carbon.file)"
            raise SettingError("configuration", "carbon.region", region, "not in the table", remedy)
        name, year, self._g_per_kwh = row
        self.basis = f"{name}, average of {year}: {self._g_per_kwh:g} g/kWh (Ember and Energy Institute, CC BY 4.0)"

    def g_per_kwh(self, at: datetime) -> float:
        """The average of the year, at every moment."""
        del at
        return self._g_per_kwh


class HourlyGrid:
    """Intensities by time from a file, which another program may replace at any time.

    The file is CSV with the columns `time` (ISO 8601) and `g_per_kwh`, or JSON as Electricity Maps serves it: an object
    with `datetime` and `carbonIntensity`, or with a list of such objects in `history`, `forecast` or `data`. `kind` is
    `average` or `marginal`. Raises SettingError if the file cannot be read at the start; later, the values that were
    read last remain.
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
        """The last value up to the moment; None if it is older than STALE_AFTER."""
        # the file may be half written or absent now: the next call reads it again
        with suppress(DataError):
            self._read()
        index = bisect_right(self._times, at) - 1
        if index < 0 or at - self._times[index] > STALE_AFTER:
            return None
        return self._values[index]

    def _read(self) -> None:
        try:
            changed_ns = self._path.stat().st_mtime_ns
            if changed_ns == self._read_ns:
                return
            text = self._path.read_bytes()[: FILE_BYTES_MAX + 1]
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})") from error
        if len(text) > FILE_BYTES_MAX:
            raise DataError(f"larger than {FILE_BYTES_MAX >> 20} MiB")
        entries = sorted(_from_json(text) if self._path.suffix == ".json" else _from_csv(text))
        if not entries:
            raise DataError("contains no intensity")
        self._times, self._values = [time for time, _ in entries], [value for _, value in entries]
        self._read_ns = changed_ns


def make_carbon(settings: CarbonSettings, embodied: bool = True) -> Carbon | None:
    """The Carbon of the settings; None if they name neither region nor file. Raises SettingError.

    `embodied`: True if this ledger accounts for the hardware, as exactly one ledger of a machine must.
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
    """Name, year and gCO2e per kWh, by region."""
    text = files("cascade.ledger").joinpath("grid_intensity.csv").read_text("utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return {row["region"]: (row["name"], int(row["year"]), float(row["g_per_kwh"])) for row in rows}


def _from_csv(text: bytes) -> list[tuple[datetime, float]]:
    try:
        rows = list(csv.DictReader(text.decode("utf-8").splitlines()))
        return [_entry(row["time"], row["g_per_kwh"]) for row in rows]
    except (UnicodeDecodeError, csv.Error, KeyError) as error:
        raise DataError(f"not a CSV with the columns time and g_per_kwh ({error})") from error


def _from_json(text: bytes) -> list[tuple[datetime, float]]:
    try:
        content: Any = msgspec.json.decode(text)
        lists = [content[name] for name in ("history", "forecast", "data") if isinstance(content.get(name), list)]
        entries = lists[0] if lists else [content]
        return [_entry(entry["datetime"], entry["carbonIntensity"]) for entry in entries]
    except (msgspec.DecodeError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"not a JSON with datetime and carbonIntensity ({error})") from error


def _entry(time: Any, value: Any) -> tuple[datetime, float]:
    try:
        moment, number = datetime.fromisoformat(str(time)), float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{time}: {value}: must be a time and a number") from error
    if not 0.0 <= number <= INTENSITY_MAX_G:
        raise DataError(f"{time}: {value} g/kWh: must be between 0 and {INTENSITY_MAX_G:g}")
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC), number
