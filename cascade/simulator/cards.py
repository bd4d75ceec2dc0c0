"""Cards: homes, habits, preferred merchants, and when they are valid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from cascade.columns import Bool, Float64, Int64
from cascade.simulator.draws import cumulative, pick_columns, zipf_weights
from cascade.simulator.settings import CATEGORIES, COUNTRIES, DAY_MS, SimulatorSettings
from cascade.simulator.terminals import Terminals

LOCAL_SLOTS: Final = 16
ONLINE_SLOTS: Final = 6
FAVOURITES: Final = 2
LOG_SPEND_EUR: Final = float(np.log(24.0))

# Habits through the day: morning, noon, afternoon, evening, night.
HOUR_MEAN: Final = np.array([8.2, 12.6, 16.4, 19.6, 1.0])
HOUR_SPREAD: Final = np.array([1.0, 0.9, 1.6, 1.5, 2.2])
_HOUR_CONCENTRATION: Final = np.array([1.6, 2.2, 2.8, 2.6, 0.3])

# Online favourites of cards: groceries, clothing and digital goods are many people's, and nobody buys fuel.
_FAVOURITE_WEIGHT: Final = np.array([0.8, 1.2, 0.001, 0.5, 1.6, 1.3, 0.9, 0.6, 1.0, 0.9, 1.3, 0.6])
# A preferred merchant is replaced once, at a random time within this many days of the simulation.
_REPLACED_WITHIN_DAYS: Final = 540.0


@dataclass(frozen=True, slots=True)
class Cards:
    """Profiles, a row per card. Days count from the start of the simulation; `last_day` is exclusive.

    - `near` float64 [towns, towns]: cumulative probability of each town, by the home town.
    - `rate` float64: purchases a day, subscriptions not included.
    - `hours` float64 [cards, 5]: cumulative probability of each habit of the day, shifted by `hour_shift` hours.
    - `favourite` int64 [cards, 2]: the online categories that the card prefers.
    - `local`, `online` int64 [cards, slots]: preferred terminals, most used first; `local_next`, `online_next` replace
      them from `switch_ms` int64 [cards, slots of both] on.
    """

    first_day: Int64
    last_day: Int64
    home: Int64
    near: Float64
    rate: Float64
    log_spend: Float64
    online_logit: Float64
    hours: Float64
    hour_shift: Float64
    favourite: Int64
    local: Int64
    local_next: Int64
    online: Int64
    online_next: Int64
    switch_ms: Int64

    def preferred(self, card: Int64, slot: Int64, online: Bool, time_ms: Int64) -> Int64:
        """The terminals in the given slots at the given times; all int64 [rows]."""
        replaced = time_ms >= self.switch_ms[card, np.where(online, LOCAL_SLOTS + slot, slot)]
        shop, click = np.minimum(slot, LOCAL_SLOTS - 1), np.minimum(slot, ONLINE_SLOTS - 1)
        at_shop = np.where(replaced, self.local_next[card, shop], self.local[card, shop])
        return np.where(online, np.where(replaced, self.online_next[card, click], self.online[card, click]), at_shop)

    def preference(self, card: Int64, terminal: Int64, online: Bool, time_ms: Int64) -> Float64:
        """The share that a terminal has among the card's purchases at preferred merchants."""
        share = np.zeros(len(card))
        for slot in range(LOCAL_SLOTS):
            here = self.preferred(card, np.full(len(card), slot), online & (slot < ONLINE_SLOTS), time_ms) == terminal
            weight = np.where(online, _ONLINE_WEIGHT[slot], _LOCAL_WEIGHT[slot])
            share += np.where(here, weight, 0.0)
        return share


_LOCAL_WEIGHT: Final = zipf_weights(LOCAL_SLOTS)
_ONLINE_WEIGHT: Final = np.append(zipf_weights(ONLINE_SLOTS), np.zeros(LOCAL_SLOTS - ONLINE_SLOTS))


def make_cards(rng: np.random.Generator, settings: SimulatorSettings, terminals: Terminals) -> Cards:
    """The cards of a simulation, those that are replaced included."""
    first_day, last_day = _lifetimes(rng, settings)
    count = len(first_day)
    size = np.diff(np.append(terminals.first[: terminals.internet], terminals.last[terminals.internet - 1] + 1))
    near = _near(rng, terminals, size.astype(np.float64))
    home = rng.choice(terminals.internet, count, p=size / size.sum()).astype(np.int64)
    favourite = np.argsort(rng.standard_exponential((count, len(CATEGORIES))) / _FAVOURITE_WEIGHT, axis=1)
    favourite = favourite[:, :FAVOURITES].astype(np.int64)

    def local() -> Int64:
        usual = pick_columns(rng, near, np.repeat(home, LOCAL_SLOTS))
        return terminals.draw(rng, usual).reshape(count, LOCAL_SLOTS)

    def online() -> Int64:
        liked = favourite[np.arange(count)[:, np.newaxis], rng.integers(0, FAVOURITES, (count, ONLINE_SLOTS))]
        return terminals.draw(rng, terminals.online_category(liked.ravel())).reshape(count, ONLINE_SLOTS)

    return Cards(
        first_day=first_day,
        last_day=last_day,
        home=home,
        near=near,
        rate=settings.transactions_per_card_day * rng.gamma(2.0, 0.5, count),
        log_spend=LOG_SPEND_EUR + rng.normal(0.0, 0.45, count),
        online_logit=rng.normal(-1.3, 0.8, count),
        hours=cumulative(rng.standard_gamma(_HOUR_CONCENTRATION, (count, len(HOUR_MEAN)))),
        hour_shift=rng.normal(0.0, 0.7, count),
        favourite=favourite,
        local=local(),
        local_next=local(),
        online=online(),
        online_next=online(),
        switch_ms=(rng.uniform(0.0, _REPLACED_WITHIN_DAYS, (count, LOCAL_SLOTS + ONLINE_SLOTS)) * DAY_MS).astype(
            np.int64
        ),
    )


def _near(rng: np.random.Generator, terminals: Terminals, size: Float64) -> Float64:
    """Cumulative probability of each town by the home town: large and close towns first. Countries lie apart."""
    centre = rng.random((len(COUNTRIES), 2)) * 2.0
    place = centre[terminals.town_country] + rng.normal(0.0, 0.12, (len(size), 2))
    distance = np.hypot(*(place[:, np.newaxis] - place[np.newaxis]).transpose(2, 0, 1))
    return cumulative(size * np.exp(-distance / 0.05))


def _lifetimes(rng: np.random.Generator, settings: SimulatorSettings) -> tuple[Int64, Int64]:
    """First and last day of each card: a Poisson process renews each of the `cards` places."""
    renewals = rng.poisson(settings.card_turnover_per_year * settings.days / 365.25, settings.cards)
    place = np.concatenate([np.arange(settings.cards), np.repeat(np.arange(settings.cards), renewals)])
    begin = np.concatenate(
        [np.zeros(settings.cards, np.int64), rng.integers(0, settings.days, int(renewals.sum()), dtype=np.int64)]
    )
    order = np.lexsort((begin, place))
    place, begin = place[order], begin[order]
    last_of_place = np.append(place[1:] != place[:-1], True)
    end = np.where(last_of_place, settings.days, np.append(begin[1:], settings.days))
    mix = rng.permutation(len(begin))  # a card's number does not reveal its age
    return begin[mix], end[mix]
