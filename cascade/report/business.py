"""From joules a decision to money and tonnes of CO2e a year, at a stated volume, price and place.

    kWh a year    = J a decision / 3.6e6 · volume · PUE
    money a year  = kWh · price
    tCO2e a year  = kWh · intensity / 1e6

The service's own energy only: of a measured or of a modelled kind, never of both together.
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

# NVML states 5 %; a stated figure of watts a core may be off by a factor of two either way.
ENERGY_RANGE: Final[dict[EnergyKind, tuple[float, float]]] = {"measured": (0.95, 1.05), "modelled": (0.5, 2.0)}
PRICE_RANGE, VOLUME_RANGE, PUE_RANGE = (0.5, 2.0), (0.5, 2.0), (1.1, 2.0)
# From nearly all hydro and nuclear power to nearly all coal.
CLEAN_REGION, COAL_REGION = "SWE", "IND"
Input = Literal["energy", "volume", "price", "pue", "intensity"]


class Assumptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the yearly figures rest on beside the ledger.

    `volume`: decisions a year. `price`: of a kWh, in `currency`.
    """

    volume: Annotated[float, msgspec.Meta(gt=0, le=1e15)] = 1e9
    price: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.20
    currency: Annotated[str, msgspec.Meta(min_length=1, max_length=8)] = "EUR"
    pue: Annotated[float, msgspec.Meta(ge=1, le=5)] = 1.54
    region: str = "DEU"

    @property
    def region_name(self) -> str:
        """As the table has it."""
        return _intensity(self.region)[0]

    @property
    def g_per_kwh(self) -> float:
        """Of the region, location-based, the year's average; raises SettingError for one that is not in the table."""
        return _intensity(self.region)[2]

    @property
    def year(self) -> int:
        """Of the intensity."""
        return _intensity(self.region)[1]


class Year(msgspec.Struct, frozen=True, kw_only=True):
    """A year's worth of decisions, of the energy of one kind."""

    kind: EnergyKind
    kwh: float
    money: float
    t_co2e: float


class Swing(msgspec.Struct, frozen=True, kw_only=True):
    """A yearly figure at the low and at the high end of one input's range, all others as assumed."""

    input: Input
    low_text: str
    high_text: str
    low: float
    high: float


def year(kind: EnergyKind, j_per_decision: float, given: Assumptions) -> Year:
    """The yearly figures."""
    kwh = j_per_decision / JOULES_PER_KWH * given.volume * given.pue
    return Year(kind=kind, kwh=kwh, money=kwh * given.price, t_co2e=kwh * given.g_per_kwh / 1e6)


def mass_text(t_co2e: float) -> str:
    """Tonnes in the unit that can be read: t, kg or g."""
    scale, unit = next((one for one in ((1.0, "t"), (1e3, "kg")) if t_co2e * one[0] >= 1.0), (1e6, "g"))
    return f"{number_text(t_co2e, scale)} {unit}"


def energy_text(kwh: float) -> str:
    """kWh in the unit that can be read: MWh, kWh or Wh."""
    scale, unit = next((one for one in ((1e-3, "MWh"), (1.0, "kWh")) if kwh * one[0] >= 1.0), (1e3, "Wh"))
    return f"{number_text(kwh, scale)} {unit}"


def years(summary: LedgerSummary, given: Assumptions) -> list[Year]:
    """One for each kind of energy whose joules are known."""
    return [
        year(total.kind, total.per_transaction_mj / 1e3, given)
        for total in summary.energy_totals
        if total.per_transaction_mj is not None
    ]


def swings(base: Year, given: Assumptions) -> tuple[Sequence[Swing], Sequence[Swing]]:
    """How money, and how tonnes, move with each input, the widest first."""
    low_g, high_g = _intensity(CLEAN_REGION)[2], _intensity(COAL_REGION)[2]
    energy, low_pue, high_pue = ENERGY_RANGE[base.kind], *PUE_RANGE
    shared: list[tuple[Input, str, str, float, float]] = [
        ("energy", f"× {energy[0]:g}", f"× {energy[1]:g}", *energy),
        ("volume", f"× {VOLUME_RANGE[0]:g}", f"× {VOLUME_RANGE[1]:g}", *VOLUME_RANGE),
        ("pue", f"{low_pue:g}", f"{high_pue:g}", low_pue / given.pue, high_pue / given.pue),
    ]
    price: tuple[Input, str, str, float, float] = (
        "price", f"× {PRICE_RANGE[0]:g}", f"× {PRICE_RANGE[1]:g}", *PRICE_RANGE
    )  # fmt: skip
    grid: tuple[Input, str, str, float, float] = (
        "intensity", f"{low_g:.0f} g", f"{high_g:.0f} g", low_g / given.g_per_kwh, high_g / given.g_per_kwh
    )  # fmt: skip
    return _widest_first(base.money, [*shared, price]), _widest_first(base.t_co2e, [*shared, grid])


def _widest_first(value: float, factors: Sequence[tuple[Input, str, str, float, float]]) -> list[Swing]:
    found = [
        Swing(input=name, low_text=low_text, high_text=high_text, low=value * low, high=value * high)
        for name, low_text, high_text, low, high in factors
    ]
    return sorted(found, key=lambda one: one.low - one.high)


def _intensity(region: str) -> tuple[str, int, float]:
    found = intensity_table().get(region.upper())
    if found is None:
        raise SettingError(
            "report", "--region", region, "is not in the table", "give an ISO 3166-1 alpha-3 code as DEU"
        )
    return found
