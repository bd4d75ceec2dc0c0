"""Where and when campaigns begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from cascade.columns import Float64, Int64
from cascade.simulator.rows import Campaigns, Rows
from cascade.simulator.settings import DAY_MS, YEAR_MS
from cascade.simulator.world import World

# A family of frauds or twins: campaigns that begin at the given genuine rows, and their rows, campaign by campaign.
Family = Callable[[np.random.Generator, World, Rows], tuple[Campaigns, Rows]]
_TRIES: Final = 8
# Careless thieves: this share of the campaigns on a card has log amounts that are higher by GREED.
GREEDY_SHARE: Final = 0.4
GREED: Final = 1.5


def fill(
    family: Family, rng: np.random.Generator, world: World, genuine: Rows, wanted: int
) -> tuple[list[Campaigns], list[Rows]]:
    """Campaigns of a family that begin at random genuine rows, until they have `wanted` rows.

    Rows while the card is not valid are left out. The last campaign may be cut. After some tries, fewer rows return.
    """
    campaigns: list[Campaigns] = []
    parts: list[Rows] = []
    missing = wanted
    for _ in range(_TRIES):
        if missing <= 0 or not len(genuine.card):
            break
        anchors = genuine.take(rng.integers(0, len(genuine.card), missing // 3 + 4))
        made, rows = family(rng, world, anchors)
        valid = np.flatnonzero(rows.time_ms < world.cards.last_day[rows.card] * DAY_MS)
        valid = valid[rows.time_ms[valid] >= world.cards.first_day[rows.card[valid]] * DAY_MS][:missing]
        if not len(valid):
            continue
        ends = np.cumsum(made.rows).astype(np.int64)
        campaigns.append(made.take(np.arange(int(np.searchsorted(ends, valid[-1], side="right")) + 1)))
        parts.append(rows.take(valid))
        missing -= len(valid)
    return campaigns, parts


def greed(rng: np.random.Generator, count: int, fraud: bool) -> Float64:
    """What careless thieves add to the log amounts of each campaign; 0 for the others and for twins."""
    greedy = rng.random(count) < GREEDY_SHARE
    return np.where(greedy & fraud, GREED, 0.0)


def years(time_ms: Int64) -> Float64:
    """Years since the start of the simulation."""
    return time_ms / YEAR_MS


def at_daytime(rng: np.random.Generator, time_ms: Int64, earliest_h: float, latest_h: float) -> Int64:
    """A random time between two hours of the same day, ms."""
    return time_ms // DAY_MS * DAY_MS + (rng.uniform(earliest_h, latest_h, len(time_ms)) * DAY_MS / 24).astype(np.int64)
