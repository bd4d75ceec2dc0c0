"""Terminals: every pool can be drawn from, by popularity; countries, prices and hours."""

import numpy as np
import pytest

from cascade.simulator import CATEGORIES, COUNTRIES, Simulation, SimulatorSettings
from cascade.simulator.terminals import Terminals, make_terminals


@pytest.fixture(scope="module", params=[20, 1_000])
def terminals(request: pytest.FixtureRequest) -> Terminals:
    return make_terminals(np.random.default_rng(1), SimulatorSettings(terminals=request.param))


def test_every_pool_has_terminals_and_draws_its_own(terminals: Terminals) -> None:
    for pool in range(terminals.internet + 1 + len(CATEGORIES)):
        drawn = terminals.draw(np.random.default_rng(2), np.full(500, pool))
        assert (terminals.probability(np.full(500, pool), drawn) > 0).all(), pool


def test_probabilities_of_a_pool_add_up_to_one_and_are_those_of_the_draws(terminals: Terminals) -> None:
    every = np.arange(len(terminals.town))
    for pool in (0, terminals.internet, terminals.online_pool("digital"), terminals.online_pool("fuel")):
        probability = terminals.probability(np.full(len(every), pool), every)
        assert probability.sum() == pytest.approx(1.0)
        drawn = terminals.draw(np.random.default_rng(3), np.full(200_000, pool))
        share = np.bincount(drawn, minlength=len(every)) / 200_000
        assert np.abs(share - probability).max() < 0.006


def test_a_town_is_in_one_country_and_every_country_has_towns(simulation: Simulation) -> None:
    terminals = simulation.world.terminals
    local = terminals.town < terminals.internet
    assert np.array_equal(terminals.country[local], terminals.town_country[terminals.town[local]])
    assert set(terminals.country[local]) == set(range(len(COUNTRIES)))


def test_price_levels_are_centred_in_towns_and_online(terminals: Terminals) -> None:
    online = terminals.town == terminals.internet
    for part in (online, ~online):
        assert np.average(terminals.log_price[part], weights=terminals.popularity[part]) == pytest.approx(0.0, abs=1e-9)


def test_shops_close_at_night_and_online_merchants_do_not(simulation: Simulation) -> None:
    terminals = simulation.world.terminals
    online = terminals.town == terminals.internet
    assert ((terminals.open_h == 0) & (terminals.close_h == 24))[online].all()
    assert (terminals.open_h[~online] >= 6.5).mean() > 0.7
    assert (terminals.close_h > terminals.open_h).all()
