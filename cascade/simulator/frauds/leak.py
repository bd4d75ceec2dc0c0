"""Points of compromise: a merchant leaks the cards of its visitors; weeks later some have a few frauds elsewhere.

It shows only across cards: each fraud looks like an ordinary guest purchase online, and the card's own past holds no
sign but the visit.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from cascade.columns import Int64
from cascade.simulator.devices import NO_DEVICE
from cascade.simulator.draws import position_in_group, times_within
from cascade.simulator.genuine import log_spend
from cascade.simulator.rows import Campaigns, Rows, make_campaigns
from cascade.simulator.settings import DAY_MS, Kind
from cascade.simulator.world import World

LEAK_DAYS: Final = (4.0, 12.0)
VISITS_MIN: Final = 8
SOLD_SHARE: Final = 0.5
SIZES: Final = (2, 4)
DELAY_DAYS: Final = (1.0, 10.0)
DAYS: Final = (5.0, 20.0)
LOG_FACTOR: Final = 0.9
LOG_SPREAD: Final = 0.6


def leak_cards(rng: np.random.Generator, world: World, genuine: Rows, wanted: int) -> tuple[Campaigns, Rows]:
    """Frauds with the cards that visited leaking merchants, campaign by campaign (one a card), about `wanted` rows."""
    visit, end_ms = _sold_visits(rng, world, genuine, wanted)
    card = genuine.card[visit]
    count = len(visit)
    sizes = rng.integers(SIZES[0], SIZES[1] + 1, count)
    case = np.repeat(np.arange(count), sizes)
    start_ms = end_ms + (rng.uniform(*DELAY_DAYS, count) * DAY_MS).astype(np.int64)
    duration_ms = rng.uniform(*DAYS, count) * DAY_MS
    level = log_spend(world, card, start_ms) + LOG_FACTOR
    campaigns = make_campaigns(
        Kind.LEAKED_MERCHANT,
        count,
        card=card,
        start_ms=start_ms,
        end_ms=start_ms + duration_ms.astype(np.int64),
        rows=sizes,
        pool=world.terminals.internet,
        pool_other=world.terminals.internet,
        device=NO_DEVICE,
        log_amount=level,
        log_spread=LOG_SPREAD,
    )
    rows = Rows(
        card=card[case],
        terminal=world.terminals.draw(rng, campaigns.pool[case]),
        time_ms=start_ms[case] + times_within(rng, duration_ms, sizes),
        amount=np.exp(rng.normal(level[case], LOG_SPREAD)),
        device=np.full(len(case), NO_DEVICE, np.int64),
        kind=campaigns.kind[case],
    )
    valid = np.flatnonzero(rows.time_ms < world.cards.last_day[rows.card] * DAY_MS)[:wanted]
    return campaigns.take(np.unique(case[valid])), rows.take(valid)


def _sold_visits(rng: np.random.Generator, world: World, genuine: Rows, wanted: int) -> tuple[Int64, Int64]:
    """A visit of each card that is sold, by position in `genuine`, and the end of its merchant's leak, ms."""
    span = world.settings.span_ms
    order = np.lexsort((genuine.time_ms, genuine.terminal))
    code = (genuine.terminal * span + genuine.time_ms)[order]
    tries = min(world.settings.terminals, wanted + 16)
    terminal = np.unique(genuine.terminal[rng.integers(0, len(genuine.terminal), tries)])
    terminal = terminal[rng.permutation(len(terminal))]
    start = (rng.random(len(terminal)) * span).astype(np.int64)
    end = start + (rng.uniform(*LEAK_DAYS, len(terminal)) * DAY_MS).astype(np.int64)
    low = np.searchsorted(code, terminal * span + start)
    high = np.searchsorted(code, terminal * span + np.minimum(end, span))
    sizes = high - low
    sizes[sizes * SOLD_SHARE * np.mean(SIZES) > max(40.0, 0.2 * wanted)] = 0
    # merchants with few visits leak only where there are not enough others
    turn = np.argsort(sizes < VISITS_MIN, kind="stable")
    low, sizes = low[turn], sizes[turn]
    visit = order[np.repeat(low, sizes) + position_in_group(sizes)]
    end_of = np.repeat(end[turn], sizes)
    sold = np.flatnonzero(rng.random(len(visit)) < SOLD_SHARE)
    _, first = np.unique(genuine.card[visit[sold]], return_index=True)
    sold = sold[np.sort(first)][: wanted // 2 + 8]
    return visit[sold], end_of[sold]
