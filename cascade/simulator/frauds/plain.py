"""Frauds that any screener finds: a single large amount at night, and a compromised terminal, by its labels."""

from __future__ import annotations

from typing import Final

import numpy as np

from cascade.columns import Int64
from cascade.simulator.devices import NO_DEVICE
from cascade.simulator.draws import position_in_group
from cascade.simulator.rows import Campaigns, Rows, make_campaigns
from cascade.simulator.settings import DAY_MS, HOUR_MS, Kind
from cascade.simulator.world import World

LOG_EUR: Final = float(np.log(420.0))
LOG_EUR_SPREAD: Final = 0.6
NIGHT_H: Final = 6
COMPROMISED_DAYS: Final = (45.0, 90.0)
COMPROMISED_SHARE: Final = (0.75, 0.98)
COMPROMISED_ROWS_MIN: Final = 8


def large_amounts(rng: np.random.Generator, world: World, anchors: Rows) -> tuple[Campaigns, Rows]:
    """One large online purchase between midnight and six, as a guest, in the night after the anchor."""
    count = len(anchors.card)
    start_ms = (anchors.time_ms // DAY_MS + 1) * DAY_MS
    campaigns = make_campaigns(
        Kind.LARGE_AMOUNT,
        count,
        card=anchors.card,
        start_ms=start_ms,
        end_ms=start_ms + NIGHT_H * HOUR_MS,
        rows=1.0,
        pool=world.terminals.internet,
        pool_other=world.terminals.internet,
        device=NO_DEVICE,
        log_amount=LOG_EUR,
        log_spread=LOG_EUR_SPREAD,
    )
    rows = Rows(
        card=anchors.card,
        terminal=world.terminals.draw(rng, campaigns.pool),
        time_ms=start_ms + rng.integers(0, NIGHT_H * HOUR_MS, count),
        amount=np.exp(rng.normal(LOG_EUR, LOG_EUR_SPREAD, count)),
        device=campaigns.device,
        kind=campaigns.kind,
    )
    return campaigns, rows


def compromise_terminals(rng: np.random.Generator, world: World, genuine: Rows, wanted: int) -> tuple[Campaigns, Int64]:
    """Turns about `wanted` genuine purchases into frauds: for weeks, a share of those at a terminal.

    Returns the campaigns, and the positions of these purchases, int64, at most `wanted`.
    """
    span = world.settings.span_ms
    order = np.lexsort((genuine.time_ms, genuine.terminal))
    code = (genuine.terminal * span + genuine.time_ms)[order]
    # terminals by their visits: a busy one is worth the work
    terminal = np.unique(genuine.terminal[rng.integers(0, len(genuine.terminal), 2 * wanted + 64)])
    terminal = terminal[rng.permutation(len(terminal))]
    tries = len(terminal)
    # some began before the simulation, so that their number is the same throughout
    length = rng.uniform(*COMPROMISED_DAYS, tries) * DAY_MS
    start = (rng.random(tries) * (span + length) - length).astype(np.int64)
    start, end = np.maximum(start, 0), np.minimum(start + length.astype(np.int64), span)
    low, high = np.searchsorted(code, terminal * span + start), np.searchsorted(code, terminal * span + end)
    sizes = high - low
    # a terminal that is hardly used is not worth it, and no single busy one makes up the whole pattern
    sizes[(sizes < COMPROMISED_ROWS_MIN) | (sizes * np.mean(COMPROMISED_SHARE) > max(60.0, 0.1 * wanted))] = 0
    enough = int(np.searchsorted(np.cumsum(sizes * min(COMPROMISED_SHARE)), wanted)) + 1
    chosen = np.flatnonzero(sizes[:enough] > 0)
    share = rng.uniform(*COMPROMISED_SHARE, len(chosen))
    campaigns = make_campaigns(
        Kind.COMPROMISED_TERMINAL,
        len(chosen),
        terminal=terminal[chosen],
        start_ms=start[chosen],
        end_ms=end[chosen],
        share=share,
    )
    sizes, low = sizes[chosen], low[chosen]
    candidates = order[np.repeat(low, sizes) + position_in_group(sizes)]
    hit = rng.random(len(candidates)) < np.repeat(share, sizes)
    hit &= genuine.kind[candidates] == Kind.PURCHASE
    campaign = np.repeat(np.arange(len(chosen)), sizes)[hit][:wanted]
    used = np.unique(campaign)
    return campaigns.take(used), candidates[hit][:wanted].astype(np.int64)
