"""Stolen card data: a run of purchases in shops of two far towns, back and forth; its twin is a day of travel.

Both have the same amounts, number of purchases, pause and towns. The thieves use copies of the card in both towns at
once, and grow bolder; the traveller changes the town once, in the pause, and buys in any order.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from cascade.columns import Bool, Float64, Int64
from cascade.simulator.devices import NO_DEVICE
from cascade.simulator.draws import order_within, position_in_group, running_within
from cascade.simulator.frauds.anchors import at_daytime, greed, years
from cascade.simulator.genuine import log_spend
from cascade.simulator.rows import Campaigns, Rows, make_campaigns
from cascade.simulator.settings import HOUR_MS, Kind
from cascade.simulator.world import World

SIZES: Final = (5, 9)
HOURS: Final = (4.0, 9.0)
LOG_FACTOR: Final = 0.5
LOG_SPREAD: Final = 0.6
# How much of the order of the amounts is chance: the spread of the rank, in ranks.
RANK_NOISE: Final = 0.7
# How often thieves buy twice in the same town.
STAYS: Final = 0.1
# Runs become slower over the years, by this factor a year.
SLOWER_PER_YEAR: Final = 1.2


def _run(rng: np.random.Generator, world: World, anchors: Rows, kind: Kind) -> tuple[Campaigns, Rows]:
    count = len(anchors.card)
    stolen = kind is Kind.STOLEN_CARD
    sizes = rng.integers(SIZES[0], SIZES[1] + 1, count)
    start_ms = at_daytime(rng, anchors.time_ms, 9.5, 12.0)
    duration_ms = rng.uniform(*HOURS, count) * HOUR_MS * np.minimum(SLOWER_PER_YEAR ** years(start_ms), 1.3)
    home = world.cards.home[anchors.card]
    far = _abroad(rng, world, home)
    case = np.repeat(np.arange(count), sizes)
    position = position_in_group(sizes)
    pause = (sizes * rng.uniform(0.3, 0.7, count)).astype(np.int64)
    time_ms = start_ms[case] + _times(rng, duration_ms, sizes, pause)
    # which of the two towns: back and forth, or once
    begins = rng.random(count) < 0.5
    switched = _back_and_forth(rng, sizes) if stolen else position >= pause[case]
    pool = np.where(switched ^ begins[case], far[case], home[case])
    terminal = world.terminals.draw(rng, pool)
    log_amount = log_spend(world, anchors.card, start_ms) + LOG_FACTOR + greed(rng, count, stolen)
    amount = np.exp(rng.normal(log_amount[case], LOG_SPREAD))
    if stolen:
        amount = _rising(rng, amount, sizes)
    campaigns = make_campaigns(
        kind,
        count,
        card=anchors.card,
        start_ms=start_ms,
        end_ms=start_ms + duration_ms.astype(np.int64),
        rows=sizes,
        pool=home,
        pool_other=far,
        device=NO_DEVICE,
        log_amount=log_amount,
        log_spread=LOG_SPREAD,
    )
    device = np.full(len(case), NO_DEVICE, np.int64)
    return campaigns, Rows(anchors.card[case], terminal, time_ms, amount, device, campaigns.kind[case])


def _abroad(rng: np.random.Generator, world: World, home: Int64) -> Int64:
    """A random town of another country for each home town; any town where a few draws find none."""
    country = world.terminals.town_country
    far = rng.integers(0, world.terminals.internet, len(home))
    for _ in range(8):
        same = np.flatnonzero(country[far] == country[home])
        far[same] = rng.integers(0, world.terminals.internet, len(same))
    return far


def _times(rng: np.random.Generator, duration_ms: Float64, sizes: Int64, pause: Int64) -> Int64:
    """Times in a run with one pause of about half the duration, before the row at position `pause`."""
    case = np.repeat(np.arange(len(sizes)), sizes)
    gaps = rng.gamma(1.5, 1.0, len(case))
    at_pause = position_in_group(sizes) == pause[case]
    gaps[at_pause] = 1.5 * sizes[case[at_pause]]
    running = np.cumsum(gaps)
    before = np.append(0.0, running)[np.cumsum(sizes) - sizes]
    whole = running[np.cumsum(sizes) - 1] - before if len(sizes) else before[:0]
    return np.asarray(0.999 * (running - before[case]) / whole[case] * duration_ms[case], np.int64)


def _back_and_forth(rng: np.random.Generator, sizes: Int64) -> Bool:
    """Which of two towns each row is in: it changes at almost every row."""
    changes = rng.random(int(sizes.sum())) >= STAYS
    switched: Bool = running_within(changes.astype(np.float64), sizes) % 2 == 1
    return switched


def _rising(rng: np.random.Generator, amount: Float64, sizes: Int64) -> Float64:
    """The amounts of each run in about rising order."""
    ascending = amount[order_within(amount, sizes)]
    rank = position_in_group(sizes) + rng.normal(0.0, RANK_NOISE, len(amount))
    return ascending[order_within(rank, sizes)]


stolen_cards = partial(_run, kind=Kind.STOLEN_CARD)
travel_days = partial(_run, kind=Kind.TRAVEL_DAY)
