"""Subscriptions: the same amount at the same online merchant every 30 days, charged by the merchant at night."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from cascade.columns import Float64, Int64
from cascade.simulator.cards import Cards
from cascade.simulator.devices import NO_DEVICE
from cascade.simulator.rows import Rows
from cascade.simulator.settings import CATEGORIES, DAY_MS, HOUR_MS, Kind, SimulatorSettings
from cascade.simulator.terminals import Terminals

PERIOD_DAYS: Final = 30
# Of a card with one purchase a day; a card that is used less has fewer.
PER_CARD: Final = 1.2
_LOG_EUR: Final = float(np.log(11.0))


@dataclass(frozen=True, slots=True)
class Subscriptions:
    """A row per subscription. `phase_ms`: time of the first charge since the start of the simulation."""

    card: Int64
    terminal: Int64
    phase_ms: Int64
    amount: Float64


def make_subscriptions(
    rng: np.random.Generator, settings: SimulatorSettings, cards: Cards, terminals: Terminals
) -> Subscriptions:
    """Subscriptions to digital goods and services."""
    a_card = min(1.0, settings.transactions_per_card_day) * PER_CARD
    card = np.repeat(np.arange(len(cards.home)), rng.poisson(a_card, len(cards.home)))
    category = np.where(rng.random(len(card)) < 0.7, CATEGORIES.index("digital"), CATEGORIES.index("services"))
    day = rng.integers(0, PERIOD_DAYS, len(card))
    return Subscriptions(
        card=card,
        terminal=terminals.draw(rng, terminals.online_category(category)),
        phase_ms=(day * DAY_MS + rng.uniform(2.0, 6.0, len(card)) * HOUR_MS).astype(np.int64),
        amount=np.asarray(np.round(np.exp(rng.normal(_LOG_EUR, 0.5, len(card)))) - 0.01, np.float64),
    )


def charges(rng: np.random.Generator, settings: SimulatorSettings, cards: Cards, held: Subscriptions) -> Rows:
    """All charges of all subscriptions while their cards are valid."""
    times = np.maximum(0, (settings.span_ms - held.phase_ms + PERIOD_DAYS * DAY_MS - 1) // (PERIOD_DAYS * DAY_MS))
    which = np.repeat(np.arange(len(times)), times)
    number = np.arange(len(which)) - np.repeat(np.cumsum(times) - times, times)
    time_ms = held.phase_ms[which] + number * PERIOD_DAYS * DAY_MS + rng.integers(0, HOUR_MS // 4, len(which))
    card = held.card[which]
    day = time_ms // DAY_MS
    inside = (day >= cards.first_day[card]) & (day < cards.last_day[card])
    rows = Rows(
        card=card,
        terminal=held.terminal[which],
        time_ms=time_ms,
        amount=np.maximum(held.amount[which], 0.99),
        device=np.full(len(which), NO_DEVICE, np.int64),
        kind=np.full(len(which), Kind.SUBSCRIPTION, np.int8),
    )
    return rows.take(inside)
