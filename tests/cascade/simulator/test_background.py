"""Densities of genuine purchases are those of the processes that draw them."""

import numpy as np
import pytest

from cascade.simulator import Kind, Simulation
from cascade.simulator.background import _amount, _hour, _terminal, genuine_intensity, normal
from cascade.simulator.rows import Rows


@pytest.fixture(scope="module")
def purchases(simulation: Simulation) -> Rows:
    rows = simulation.rows
    genuine = np.flatnonzero((rows.kind == Kind.PURCHASE) & (rows.time_ms > 0))
    return rows.take(genuine[:: len(genuine) // 2_000])


def repeated(rows: Rows, row: int, count: int, **columns: np.ndarray) -> Rows:
    one = rows.take(np.full(count, row))
    return Rows(**{name: columns.get(name, getattr(one, name)) for name in Rows._names()})


@pytest.mark.parametrize("row", [0, 311, 700, 1_204])
def test_the_time_of_day_integrates_to_one(simulation: Simulation, purchases: Rows, row: int) -> None:
    grid = np.arange(0, 86_400_000, 60_000, dtype=np.int64)
    density = _hour(simulation.world, repeated(purchases, row, len(grid), time_ms=grid))
    assert density.mean() == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize("row", [5, 402, 1_100])
def test_terminals_of_a_card_add_up_to_one(simulation: Simulation, purchases: Rows, row: int) -> None:
    world = simulation.world
    every = np.arange(len(world.terminals.town))
    rows = repeated(purchases, row, len(every), terminal=every)
    town, _ = world.spells.at(rows.card, rows.time_ms)
    online = world.is_online(every)
    probability = _terminal(world, rows, online, town)
    assert probability[online].sum() == pytest.approx(1.0)
    assert probability[~online].sum() == pytest.approx(1.0)


@pytest.mark.parametrize("row", [0, 950])
def test_log_amounts_integrate_to_one(simulation: Simulation, purchases: Rows, row: int) -> None:
    log_amount = np.linspace(-6.0, 14.0, 4_001)
    rows = repeated(purchases, row, len(log_amount), amount=np.exp(log_amount))
    online = simulation.world.is_online(rows.terminal)
    density = _amount(simulation.world, rows, online, np.zeros(len(log_amount)))
    assert density.sum() * (log_amount[1] - log_amount[0]) == pytest.approx(1.0, abs=1e-4)


def test_every_purchase_is_possible(simulation: Simulation, purchases: Rows) -> None:
    intensity = genuine_intensity(simulation.world, purchases)
    assert (intensity > 0).mean() > 0.998  # a purchase of a shopping trip that passes midnight may fall on a last day


def test_the_normal_density_is_that_of_the_formula() -> None:
    assert normal(np.array([1.0]), 0.0, 2.0)[0] == pytest.approx(0.17603266, abs=1e-8)
