"""Energy, money and tonnes of CO2e per year, at an assumed volume, price and place.

    kWh per year    = J per decision / 3.6e6 · volume · PUE
    money per year  = kWh · price
    tCO2e per year  = kWh · intensity / 1e6

They include only the energy of the service, and only one kind of it: measured or modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal

import msgspec

from cascade.errors import SettingError
from cascade.ledger.carbon import JOULES_PER_KWH, intensity_table
from cascade.ledger.render import number_text
from cascade.ledger.summary import LedgerSummary
from cascade.protocols import EnergyKind

# NVML is accurate to within 5 %. Stated watts per core may be wrong by a factor of two in either direction.
ENERGY_RANGE: Final[dict[EnergyKind, tuple[float, float]]] = {"measured": (0.95, 1.05), "modelled": (0.5, 2.0)}
PRICE_RANGE, VOLUME_RANGE, PUE_RANGE = (0.5, 2.0), (0.5, 2.0), (1.1, 2.0)
# The range of grids: nearly all hydro and nuclear power, and nearly all coal.
CLEAN_REGION, COAL_REGION = "SWE", "IND"
Input = Literal["energy", "volume", "price", "pue", "intensity"]


class Assumptions(msgspec.Struct, frozen=True, kw_only=True):
    """The assumptions behind the yearly figures.

    volume: decisions per year. price: per kWh, in `currency`. pue: of the data centre.
    region: ISO 3166-1 alpha-3 code of the place, for the carbon intensity of its grid.
    """

    volume: Annotated[float, msgspec.Meta(gt=0, le=1e15)] = 1e9
    price: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.20
    currency: Annotated[str, msgspec.Meta(min_length=1, max_length=8)] = "EUR"
    pue: Annotated[float, msgspec.Meta(ge=1, le=5)] = 1.54
    region: str = "DEU"

    @property
    def grid(self) -> tuple[str, int, float]:
        """Name, year and gCO2e per kWh of the region; raises SettingError for a region that is not in the table."""
        return _intensity(self.region)

    @property
    def g_per_kwh(self) -> float:
        """The carbon intensity of the region's grid, location-based, yearly average; raises as `grid`."""
        return self.grid[2]


class Year(msgspec.Struct, frozen=True):
    """The figures of a year by the energy of one kind: kWh, money in the assumed currency, tonnes of CO2e."""

    kind: EnergyKind
    kwh: float
    money: float
    t_co2e: float


class Swing(msgspec.Struct, frozen=True):
    """A yearly figure (`low`, `high`) at the two ends of the range of one input; the other inputs are as assumed.

    low_text, high_text: the ends of the range.
    """

    input: Input
    low_text: str
    high_text: str
    low: float
    high: float


def year(kind: EnergyKind, j_per_decision: float, assumptions: Assumptions) -> Year:
    """The yearly figures at `j_per_decision` joules per decision."""
    kwh = j_per_decision / JOULES_PER_KWH * assumptions.volume * assumptions.pue
    return Year(kind, kwh, money=kwh * assumptions.price, t_co2e=kwh * assumptions.g_per_kwh / 1e6)


def mass_text(t_co2e: float) -> str:
    """Tonnes as text in a unit of suitable size: t, kg or g."""
    return _text(t_co2e, (1.0, "t"), (1e3, "kg"), (1e6, "g"))


def energy_text(kwh: float) -> str:
    """kWh as text in a unit of suitable size: MWh, kWh or Wh."""
    return _text(kwh, (1e-3, "MWh"), (1.0, "kWh"), (1e3, "Wh"))


def _text(value: float, *units: tuple[float, str]) -> str:
    """The value in the first unit in which it is at least 1, else in the last."""
    scale, unit = next((unit for unit in units if value * unit[0] >= 1.0), units[-1])
    return f"{number_text(value, scale)} {unit}"


def years(summary: LedgerSummary, assumptions: Assumptions) -> list[Year]:
    """The yearly figures for each kind of energy whose joules are known."""
    return [
        year(total.kind, total.per_transaction_mj / 1e3, assumptions)
        for total in summary.energy_totals
        if total.per_transaction_mj is not None
    ]


def swings(base: Year, assumptions: Assumptions) -> tuple[list[Swing], list[Swing]]:
    """The swings of the money and of the tonnes of `base` for each input, the widest first."""
    low, high = PUE_RANGE
    shared = [
        _multiplied("energy", ENERGY_RANGE[base.kind]),
        _multiplied("volume", VOLUME_RANGE),
        Swing("pue", f"{low:g}", f"{high:g}", low / assumptions.pue, high / assumptions.pue),
    ]
    price, g_per_kwh = _multiplied("price", PRICE_RANGE), assumptions.g_per_kwh
    low, high = (_intensity(region)[2] for region in (CLEAN_REGION, COAL_REGION))
    grid = Swing("intensity", f"{low:.0f} g", f"{high:.0f} g", low / g_per_kwh, high / g_per_kwh)
    return _widest_first(base.money, [*shared, price]), _widest_first(base.t_co2e, [*shared, grid])


def _multiplied(name: Input, factors: tuple[float, float]) -> Swing:
    low, high = factors
    return Swing(name, f"× {low:g}", f"× {high:g}", low, high)


def _widest_first(value: float, factors: Sequence[Swing]) -> list[Swing]:
    """The swings of `value`, from the factors that each input multiplies it with."""
    scaled = [msgspec.structs.replace(swing, low=value * swing.low, high=value * swing.high) for swing in factors]
    return sorted(scaled, key=lambda swing: swing.low - swing.high)


def _intensity(region: str) -> tuple[str, int, float]:
    row = intensity_table().get(region.upper())
    if row is None:
        remedy = "use an ISO 3166-1 alpha-3 code, such as DEU"
        raise SettingError("report", "--region", region, "not in the table", remedy)
    return row
