"""Card testing: tiny online amounts, then large ones. Two twins: a basket with add-ons, and a day of transit taps.

All three have the same numbers of tiny and large amounts within an hour. A tester tries the card before using it; a
buyer adds small things in any order; a passenger taps in buses and then buys large things online.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from cascade.columns import Int64
from cascade.simulator.devices import NO_DEVICE
from cascade.simulator.draws import order_within, position_in_group, times_within
from cascade.simulator.frauds.anchors import greed, years
from cascade.simulator.genuine import log_spend
from cascade.simulator.rows import Campaigns, Rows, make_campaigns
from cascade.simulator.settings import CATEGORIES, HOUR_MS, Kind
from cascade.simulator.world import World

TINY: Final = (2, 3)
LARGE: Final = (3, 4)
HOURS: Final = (0.3, 0.9)
TINY_LOG_EUR: Final = float(np.log(1.8))
TINY_LOG_SPREAD: Final = 0.5
# Testers raise their tiny amounts over the years, and buyers their small ones.
TINY_GROWTH_PER_YEAR: Final = 0.2
LARGE_LOG_FACTOR: Final = 1.1
LARGE_LOG_SPREAD: Final = 0.6
# Devices: the owner's (in frauds: copied), else none.
OWN_DEVICE: Final = 0.5


def _burst(rng: np.random.Generator, world: World, anchors: Rows, kind: Kind) -> tuple[Campaigns, Rows]:
    terminals = world.terminals
    count = len(anchors.card)
    tiny = rng.integers(TINY[0], TINY[1] + 1, count)
    sizes = tiny + rng.integers(LARGE[0], LARGE[1] + 1, count)
    case = np.repeat(np.arange(count), sizes)
    start_ms = anchors.time_ms + (rng.uniform(0.2, 20.0, count) * HOUR_MS).astype(np.int64)
    duration_ms = rng.uniform(*HOURS, count) * HOUR_MS
    time_ms = start_ms[case] + times_within(rng, duration_ms, sizes)
    is_tiny = position_in_group(sizes) < tiny[case]
    if kind is Kind.BASKET:
        is_tiny = is_tiny[order_within(rng.random(len(case)), sizes)]
    shops = _shops(rng, world, count)
    pool = np.where(is_tiny, terminals.online_pool("digital"), shops[case])
    terminal = terminals.draw(rng, pool)
    device = np.where(rng.random(count) < OWN_DEVICE, world.devices.main(anchors.card, start_ms), NO_DEVICE)
    row_device = device[case]
    if kind is Kind.TRANSIT_DAY:
        taps = _transit(world)
        terminal = np.where(is_tiny, taps[rng.integers(0, len(taps), len(case))], terminal)
        row_device = np.where(world.is_online(terminal), row_device, NO_DEVICE)
    level = log_spend(world, anchors.card, start_ms) + LARGE_LOG_FACTOR + greed(rng, count, kind is Kind.CARD_TESTING)
    small = TINY_LOG_EUR + TINY_GROWTH_PER_YEAR * years(start_ms)
    spread = np.where(is_tiny, TINY_LOG_SPREAD, LARGE_LOG_SPREAD)
    amount = np.exp(rng.normal(np.where(is_tiny, small[case], level[case]), spread))
    campaigns = make_campaigns(
        kind,
        count,
        card=anchors.card,
        start_ms=start_ms,
        end_ms=start_ms + duration_ms.astype(np.int64),
        rows=sizes,
        pool=shops,
        pool_other=terminals.online_pool("digital"),
        device=device,
        log_amount=level,
        log_spread=LARGE_LOG_SPREAD,
        log_amount_other=small,
        log_spread_other=TINY_LOG_SPREAD,
        other_share=tiny / sizes,
    )
    return campaigns, Rows(anchors.card[case], terminal, time_ms, amount, row_device, campaigns.kind[case])


def _shops(rng: np.random.Generator, world: World, count: int) -> Int64:
    """The category of online merchants at which each case spends: electronics, clothing, travel or entertainment."""
    names = ("electronics", "clothing", "travel", "entertainment")
    category = np.array([CATEGORIES.index(name) for name in names])
    return world.terminals.online_category(category[rng.integers(0, len(category), count)])


def _transit(world: World) -> Int64:
    """Terminals of transit in towns; where there are none, all terminals in towns."""
    local = ~world.is_online(np.arange(len(world.terminals.town)))
    taps = np.flatnonzero(local & (world.terminals.category == CATEGORIES.index("transit")))
    return taps if len(taps) else np.flatnonzero(local)


card_tests = partial(_burst, kind=Kind.CARD_TESTING)
baskets = partial(_burst, kind=Kind.BASKET)
transit_days = partial(_burst, kind=Kind.TRANSIT_DAY)
