"""The parts of a simulated world: settings, terminals, cards, devices, spells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cascade.columns import Bool, Int64
from cascade.simulator.cards import Cards, make_cards
from cascade.simulator.devices import Devices, make_devices
from cascade.simulator.settings import SimulatorSettings
from cascade.simulator.spells import Spells, make_spells
from cascade.simulator.subscriptions import Subscriptions, make_subscriptions
from cascade.simulator.terminals import Terminals, make_terminals


@dataclass(frozen=True, slots=True)
class World:
    """Everything that is drawn before the first transaction."""

    settings: SimulatorSettings
    terminals: Terminals
    cards: Cards
    devices: Devices
    spells: Spells
    subscriptions: Subscriptions

    def is_online(self, terminal: Int64) -> Bool:
        """Whether each terminal is an online merchant, bool [rows]."""
        online: Bool = self.terminals.town[terminal] == self.terminals.internet
        return online


def make_world(rng: np.random.Generator, settings: SimulatorSettings) -> World:
    """Draws the world of a simulation."""
    streams = rng.spawn(5)
    terminals = make_terminals(streams[0], settings)
    cards = make_cards(streams[1], settings, terminals)
    count = len(cards.home)
    return World(
        settings=settings,
        terminals=terminals,
        cards=cards,
        devices=make_devices(streams[2], settings, count),
        spells=make_spells(streams[3], settings, count, terminals.internet),
        subscriptions=make_subscriptions(streams[4], settings, cards, terminals),
    )
