"""Rings of mules: a colluding terminal charges many unrelated cards within hours; its twin is a concert or a ferry.

Both have the same number of new cards, the same times and the same multiset of near-equal amounts. The ring raises
its amounts step by step and begins anew below the limit that it fears; visitors pay their prices in any order. Nothing
of it shows in the card's own past.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from cascade.columns import Float64, Int64
from cascade.simulator.devices import NO_DEVICE
from cascade.simulator.draws import order_within, position_in_group, times_within
from cascade.simulator.frauds.anchors import at_daytime
from cascade.simulator.rows import Campaigns, Rows, make_campaigns
from cascade.simulator.settings import DAY_MS, HOUR_MS, Kind
from cascade.simulator.world import World

SIZES: Final = (10, 20)
HOURS: Final = (1.0, 5.0)
PRICE_LOG_EUR: Final = float(np.log(70.0))
PRICE_LOG_SPREAD: Final = 0.5
STEPS: Final = (4, 6)
# Growth of a ring's amounts at each step, and the spread around it.
STEP_LOG: Final = 0.1
STEP_NOISE: Final = 0.015


def _gathering(rng: np.random.Generator, world: World, anchors: Rows, kind: Kind) -> tuple[Campaigns, Rows]:
    count = len(anchors.card)
    sizes = rng.integers(SIZES[0], SIZES[1] + 1, count)
    case = np.repeat(np.arange(count), sizes)
    start_ms = at_daytime(rng, anchors.time_ms, 10.0, 14.5)
    duration_ms = rng.uniform(*HOURS, count) * HOUR_MS
    time_ms = start_ms[case] + times_within(rng, duration_ms, sizes)
    terminal = _small_shops(rng, world, count)
    card = _cards_in_use(rng, world, time_ms)
    price = rng.normal(PRICE_LOG_EUR, PRICE_LOG_SPREAD, count)
    log_amount = price[case] + _steps(rng, sizes)
    if kind is Kind.CONCERT:
        log_amount = log_amount[order_within(rng.random(len(case)), sizes)]
    campaigns = make_campaigns(
        kind,
        count,
        terminal=terminal,
        start_ms=start_ms,
        end_ms=start_ms + duration_ms.astype(np.int64),
        rows=sizes,
        device=NO_DEVICE,
        log_amount=price + STEP_LOG * 2.0,
        log_spread=STEP_LOG * 1.5,
    )
    device = np.full(len(case), NO_DEVICE, np.int64)
    return campaigns, Rows(card, terminal[case], time_ms, np.exp(log_amount), device, campaigns.kind[case])


def _steps(rng: np.random.Generator, sizes: Int64) -> Float64:
    """Log amounts above the price: rising by steps, from a random step on, anew after the last."""
    case = np.repeat(np.arange(len(sizes)), sizes)
    steps = rng.integers(STEPS[0], STEPS[1] + 1, len(sizes))
    phase = rng.integers(0, steps)
    step = (position_in_group(sizes) + phase[case]) % steps[case]
    return STEP_LOG * step + rng.normal(0.0, STEP_NOISE, len(case))


def _small_shops(rng: np.random.Generator, world: World, count: int) -> Int64:
    """Terminals in towns, each as likely as any other."""
    local = np.flatnonzero(~world.is_online(np.arange(len(world.terminals.town))))
    return local[rng.integers(0, len(local), count)].astype(np.int64)


def _cards_in_use(rng: np.random.Generator, world: World, time_ms: Int64) -> Int64:
    """A random card that is valid at each time; any card where none is found in a few draws."""
    day = time_ms // DAY_MS
    card = rng.integers(0, len(world.cards.home), len(time_ms))
    for _ in range(6):
        invalid = np.flatnonzero((day < world.cards.first_day[card]) | (day >= world.cards.last_day[card]))
        card[invalid] = rng.integers(0, len(world.cards.home), len(invalid))
    return card


mule_rings = partial(_gathering, kind=Kind.MULE_RING)
concerts = partial(_gathering, kind=Kind.CONCERT)
