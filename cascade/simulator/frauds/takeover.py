"""Account takeover: a new device, then purchases in categories that the card did not use, over days.

Two twins: a new phone with which the owner's habits go on, and a new hobby (other categories) on the old device. All
three have the same numbers, times and amounts; only what the purchases have in common with the past differs.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from cascade.columns import Int64
from cascade.simulator.cards import ONLINE_SLOTS
from cascade.simulator.draws import times_within, zipf
from cascade.simulator.frauds.anchors import greed, years
from cascade.simulator.genuine import log_spend
from cascade.simulator.rows import Campaigns, Rows, make_campaigns
from cascade.simulator.settings import CATEGORIES, DAY_MS, Kind
from cascade.simulator.world import World

SIZES: Final = (4, 7)
DAYS: Final = (2.0, 8.0)
LOG_FACTOR: Final = 0.6
LOG_SPREAD: Final = 0.6
# Takeovers become quicker over the years, by this factor a year; so do the twins, which are weeks of sales.
QUICKER_PER_YEAR: Final = 0.9


def _spree(rng: np.random.Generator, world: World, anchors: Rows, kind: Kind) -> tuple[Campaigns, Rows]:
    count = len(anchors.card)
    sizes = rng.integers(SIZES[0], SIZES[1] + 1, count)
    case = np.repeat(np.arange(count), sizes)
    start_ms = anchors.time_ms + (rng.uniform(0.1, 2.0, count) * DAY_MS).astype(np.int64)
    duration_ms = rng.uniform(*DAYS, count) * DAY_MS * QUICKER_PER_YEAR ** years(start_ms)
    time_ms = start_ms[case] + times_within(rng, duration_ms, sizes)
    pools = _other_categories(rng, world, anchors.card)
    if kind is Kind.NEW_PHONE:
        slot = zipf(rng, ONLINE_SLOTS, len(case))
        terminal = world.cards.preferred(anchors.card[case], slot, np.ones(len(case), np.bool_), time_ms)
    else:
        terminal = world.terminals.draw(rng, pools[case, rng.integers(0, 2, len(case))])
    # numbers beyond the devices of the world are new ones; `make_transactions` makes them unique
    new = world.devices.count + 1 + np.arange(count)
    device = world.devices.main(anchors.card, start_ms) if kind is Kind.NEW_HOBBY else new
    level = log_spend(world, anchors.card, start_ms) + LOG_FACTOR + greed(rng, count, kind is Kind.ACCOUNT_TAKEOVER)
    campaigns = make_campaigns(
        kind,
        count,
        card=anchors.card,
        start_ms=start_ms,
        end_ms=start_ms + duration_ms.astype(np.int64),
        rows=sizes,
        pool=pools[:, 0],
        pool_other=pools[:, 1],
        device=device,
        log_amount=level,
        log_spread=LOG_SPREAD,
    )
    amount = np.exp(rng.normal(level[case], LOG_SPREAD))
    return campaigns, Rows(anchors.card[case], terminal, time_ms, amount, device[case], campaigns.kind[case])


def _other_categories(rng: np.random.Generator, world: World, card: Int64) -> Int64:
    """Pools of two online categories that are not the cards' favourites, int64 [cards, 2]."""
    weight = rng.random((len(card), len(CATEGORIES)))
    weight[:, CATEGORIES.index("fuel")] = 2.0
    np.put_along_axis(weight, world.cards.favourite[card], 3.0, axis=1)
    return world.terminals.online_category(np.argsort(weight, axis=1)[:, :2].astype(np.int64))


takeovers = partial(_spree, kind=Kind.ACCOUNT_TAKEOVER)
new_hobbies = partial(_spree, kind=Kind.NEW_HOBBY)
new_phones = partial(_spree, kind=Kind.NEW_PHONE)
