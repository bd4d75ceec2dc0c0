"""Decisions and energy at each escalated share, side by side, and what follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from bench.worth.shared_cost import SharedCost, collected_rows
from cascade.ledger.carbon import JOULES_PER_KWH
from cascade.ledger.counterfactual import filled_rows
from cascade.ledger.deep_cost import DeepCost, Estimate
from cascade.ledger.errors import CounterfactualError
from cascade.ledger.unit_costs import UnitCosts
from cascade.protocols import EnergyKind
from stages.intervals import Figure
from stages.worth import Way

_ONE: Final = Estimate(1.0, 1.0, 1.0)


class Electricity(msgspec.Struct, frozen=True):
    """`price` of a kWh in `currency`, which is that of the amounts; `pue` of the data centre."""

    price: float
    currency: str
    pue: float

    def money(self, mj: float) -> float:
        """The price of 1,000 transactions of `mj` millijoules each."""
        return mj / JOULES_PER_KWH * self.pue * self.price


class WayEnergy(msgspec.Struct, frozen=True, kw_only=True):
    """The energy of a way to decide, by one kind.

    - `share`: escalated; None for deep-only. `rows_per_call`: of a deep call; None without one.
    - `mj`: of a transaction. `saving`: deep-only's energy ÷ this. `money_per_thousand`: electricity of 1,000.
    - `unit_costs`: c0, s and D behind them.
    """

    share: float | None
    rows_per_call: float | None
    mj: Estimate
    saving: Estimate
    saving_without_idle: Estimate | None
    money_per_thousand: float
    unit_costs: UnitCosts


class KindWorth(msgspec.Struct, frozen=True, kw_only=True):
    """The ways by one kind of energy, in the order of the decisions, and the verdict.

    - `best`: position of the share with the least cost of decisions and electricity; 0 is the screener alone.
    - `gain_on_screener`, `gain_on_deep`: of the best share, for 1,000 transactions, electricity included.
    - `pays`: the gain on the screener alone is surely above zero.
    """

    kind: EnergyKind
    energy: tuple[WayEnergy, ...]
    best: int
    gain_on_screener: Figure
    gain_on_deep: Figure
    pays: bool


class WorthReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `cascade worth` for a bundle at `rate` transactions a second.

    `ways`: decisions, of `transactions` of validation with `frauds`. `kinds`: energy and verdict, never both kinds in
    one figure. `shared`: c0 and s. `cost`: of a deep call.
    """

    bundle: str
    rate: float
    transactions: int
    frauds: int
    reviews_per_day_max: float | None
    electricity: Electricity
    ways: tuple[Way, ...]
    kinds: tuple[KindWorth, ...]
    shared: SharedCost
    cost: DeepCost


def kind_worth(
    kind: EnergyKind, ways: Sequence[Way], shared: SharedCost, cost: DeepCost, rate: float, electricity: Electricity
) -> KindWorth:
    """Energy and verdict by one kind. Raises CounterfactualError if no deep call is surely dearer than idle."""
    energy = tuple(_way_energy(kind, way.share, shared, cost, rate, electricity) for way in ways)
    totals = [way.cost_per_thousand.value + of_way.money_per_thousand for way, of_way in zip(ways, energy, strict=True)]
    # deep-only, the last way, is no share to choose
    best = min(range(len(ways) - 1), key=totals.__getitem__)
    money = [of_way.money_per_thousand for of_way in energy]
    on_screener = _more(ways[best].gain_on_screener, money[0] - money[best])
    return KindWorth(
        kind=kind,
        energy=energy,
        best=best,
        gain_on_screener=on_screener,
        gain_on_deep=_more(ways[best].gain_on_deep, money[-1] - money[best]),
        pays=best > 0 and on_screener.low > 0.0,
    )


def _more(figure: Figure, money: float) -> Figure:
    return Figure(figure.value + money, figure.low + money, figure.high + money)


def _way_energy(
    kind: EnergyKind, share: float | None, shared: SharedCost, cost: DeepCost, rate: float, electricity: Electricity
) -> WayEnergy:
    """Deep-only's calls are as full as its limit allows; the cascade's have what came while it collects them."""
    filled = filled_rows(cost, rate, shared.limit_ms)
    deep_only_mj = cost.row_mj(filled, kind)
    if deep_only_mj.low <= 0.0:
        raise CounterfactualError(
            f"worth: the {kind} joules do not show that a deep call needs more than idle; measure in longer or more"
            " rounds with `cascade bench deep-calls`, and name the file with --cost"
        )
    rows = min(collected_rows((share or 0.0) * rate, shared.collected_s), float(cost.rows[-1])) if share else None
    unit = UnitCosts(
        shared_mj=shared.shared_mj[kind],
        idle_mj=shared.idle_mj[kind],
        screener_mj=shared.screener_mj[kind],
        deep_only_mj=deep_only_mj,
        own_deep_mj=None if rows is None else cost.row_mj(rows, kind),
    )
    mj = unit.whole_mj if share is None else unit.cascade_mj(share)
    return WayEnergy(
        share=share,
        rows_per_call=float(filled) if share is None else rows,
        mj=mj,
        saving=_ONE if share is None else unit.saving(share),
        saving_without_idle=_ONE if share is None else unit.saving_without_idle(share),
        money_per_thousand=electricity.money(mj.value),
        unit_costs=unit,
    )
