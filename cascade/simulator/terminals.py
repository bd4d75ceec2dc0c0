"""Terminals: their places, countries, categories, price levels and opening hours.

A terminal stands for a merchant. Pools are sets of terminals from which a purchase is drawn: a pool for each town, one
for the internet, and one for each category of the internet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from cascade.columns import Bool, Float64, Int64
from cascade.simulator.draws import cumulative
from cascade.simulator.settings import CATEGORIES, COUNTRIES, SimulatorSettings

ONLINE_SHARE: Final = 0.12
LOG_PRICE_SPREAD: Final = 0.4

# By category, as in CATEGORIES: weight in town, weight online, log price level, hours of opening.
_CATEGORY: Final = np.array(
    [
        [0.24, 0.06, 0.0, 7.0, 22.0],  # grocery
        [0.19, 0.10, 0.0, 8.0, 23.5],  # restaurant; online: delivery
        [0.08, 0.0, 0.7, 0.0, 24.0],  # fuel
        [0.05, 0.04, -1.1, 0.0, 24.0],  # transit
        [0.12, 0.18, 0.5, 9.0, 20.0],  # clothing
        [0.04, 0.14, 0.9, 9.0, 20.0],  # electronics
        [0.08, 0.08, 0.5, 8.0, 20.0],  # home
        [0.08, 0.05, 0.0, 8.0, 20.0],  # health
        [0.02, 0.09, 1.0, 0.0, 24.0],  # travel
        [0.06, 0.08, 0.2, 10.0, 23.9],  # entertainment
        [0.0, 0.12, -0.8, 0.0, 24.0],  # digital
        [0.04, 0.06, 0.2, 8.0, 19.0],  # services
    ]
)


@dataclass(frozen=True, slots=True)
class Terminals:
    """Terminals and the pools from which purchases draw them.

    - `town` int64 [terminals]: the last number, `internet`, is of online merchants.
    - `category`, `country` int64 [terminals]: positions in CATEGORIES and COUNTRIES.
    - `log_price` float64 [terminals]: price level; its mean in towns and online is 0.
    - `open_h`, `close_h` float64 [terminals]: hours of opening; 0 and 24 where it never closes.
    - `popularity` float64 [terminals].
    - `order` int64 [places], `mass` float64 [places]: the terminals pool by pool, and the running sum of popularity.
    - `first`, `last` int64 [pools]: positions of a pool in `order`, inclusive.
    - `town_country` int64 [towns].
    """

    town: Int64
    category: Int64
    country: Int64
    log_price: Float64
    open_h: Float64
    close_h: Float64
    popularity: Float64
    order: Int64
    mass: Float64
    first: Int64
    last: Int64
    town_country: Int64

    @property
    def internet(self) -> int:
        """The pool of all online merchants, and their number of a town."""
        return len(self.town_country)

    def online_category(self, category: Int64) -> Int64:
        """The pools of these categories of online merchants. A pool without merchants is the whole internet's."""
        return self.internet + 1 + category

    def online_pool(self, name: str) -> int:
        """The pool of one category of online merchants, by its name."""
        return self.internet + 1 + CATEGORIES.index(name)

    def draw(self, rng: np.random.Generator, pool: Int64) -> Int64:
        """A random terminal of each given pool, with probabilities in proportion to popularity."""
        low, last = self.first[pool], self.last[pool]
        bottom = np.where(low > 0, self.mass[low - 1], 0.0)
        target = bottom + rng.random(len(pool)) * (self.mass[last] - bottom)
        position = np.searchsorted(self.mass, target, side="right")
        return self.order[np.clip(position, low, last)].astype(np.int64, copy=False)

    def probability(self, pool: Int64, terminal: Int64) -> Float64:
        """The probability that `draw` returns a terminal of a pool, both int64 [rows]."""
        low, last = self.first[pool], self.last[pool]
        bottom = np.where(low > 0, self.mass[low - 1], 0.0)
        share = self.popularity[terminal] / (self.mass[last] - bottom)
        return np.where(self._inside(pool, terminal), share, 0.0)

    def _inside(self, pool: Int64, terminal: Int64) -> Bool:
        of_category = pool > self.internet
        whole = self.first[pool] == self.first[self.internet]
        in_category = (self.category[terminal] == pool - self.internet - 1) | whole
        inside: Bool = np.where(
            of_category, (self.town[terminal] == self.internet) & in_category, self.town[terminal] == pool
        )
        return inside


def make_terminals(rng: np.random.Generator, settings: SimulatorSettings) -> Terminals:
    """The terminals of a simulation. Towns have at least one each, the internet at least two."""
    count = settings.terminals
    towns = int(np.clip(count // 150, 2, 200))
    online = max(2, round(ONLINE_SHARE * count))
    size = 1.0 / (np.arange(towns) + 2.0)
    town = rng.choice(towns, count, p=size / size.sum()).astype(np.int64)
    town[:towns] = np.arange(towns)  # every town has a shop
    town[count - online :] = towns
    town = town[rng.permutation(count)]
    is_online = town == towns
    # Zipf with an offset, so that no single terminal dominates a town
    rank = rng.permutation(count).astype(np.float64)
    popularity: Float64 = (rank + 0.002 * count + 1.0) ** -0.9
    weight = np.where(is_online[:, np.newaxis], _CATEGORY[:, 1], _CATEGORY[:, 0])
    category = (cumulative(weight) < rng.random((count, 1))).sum(1).astype(np.int64)
    country_weight = 1.0 / (np.arange(len(COUNTRIES)) + 1.0)
    town_country = rng.choice(len(COUNTRIES), towns, p=country_weight / country_weight.sum())
    town_country[: min(towns, len(COUNTRIES))] = np.arange(min(towns, len(COUNTRIES)))
    merchant_country = rng.choice(len(COUNTRIES), count, p=np.sqrt(country_weight) / np.sqrt(country_weight).sum())
    log_price = _CATEGORY[category, 2] + rng.normal(0.0, LOG_PRICE_SPREAD, count)
    for part in (is_online, ~is_online):
        log_price[part] -= np.average(log_price[part], weights=popularity[part])
    closes = (_CATEGORY[category, 4] < 24.0) & ~is_online
    shift = rng.choice([-0.5, 0.0, 0.0, 0.5], count)
    order, first, last = _pools(town, category, towns)
    return Terminals(
        town=town,
        category=category,
        country=np.where(is_online, merchant_country, town_country[np.minimum(town, towns - 1)]).astype(np.int64),
        log_price=log_price,
        open_h=np.where(closes, _CATEGORY[category, 3] + shift, 0.0),
        close_h=np.where(closes, np.minimum(_CATEGORY[category, 4] + shift, 23.9), 24.0),
        popularity=popularity,
        order=order,
        mass=np.cumsum(popularity[order]),
        first=first,
        last=last,
        town_country=town_country.astype(np.int64),
    )


def _pools(town: Int64, category: Int64, internet: int) -> tuple[Int64, Int64, Int64]:
    """The terminals pool by pool, and the first and last position of each pool."""
    by_town = np.argsort(town, kind="stable")
    online = np.flatnonzero(town == internet)
    by_category = online[np.argsort(category[online], kind="stable")]
    edges = np.searchsorted(town[by_town], np.arange(internet + 2))
    cells = len(town) + np.searchsorted(category[by_category], np.arange(len(CATEGORIES) + 1))
    empty = cells[1:] == cells[:-1]
    first = np.concatenate([edges[:-1], np.where(empty, edges[-2], cells[:-1])])
    last = np.concatenate([edges[1:] - 1, np.where(empty, edges[-1] - 1, cells[1:] - 1)])
    return np.concatenate([by_town, by_category]), first.astype(np.int64), last.astype(np.int64)
