"""Genuine purchases: when, where, with which device and for how much."""

from __future__ import annotations

from typing import Final

import numpy as np

from cascade.columns import Bool, Float64, Int64
from cascade.progress import Progress
from cascade.simulator.cards import HOUR_MEAN, HOUR_SPREAD, LOCAL_SLOTS, ONLINE_SLOTS
from cascade.simulator.devices import NO_DEVICE
from cascade.simulator.draws import pick_columns, position_in_group, zipf
from cascade.simulator.rows import Rows
from cascade.simulator.settings import DAY_MS, HOUR_MS, MINUTE_MS, YEAR_MS, Kind, SimulatorSettings
from cascade.simulator.world import World

LOG_SPREAD: Final = 0.55
# Of all purchases: rare large ones, whose log amounts are this much higher.
LARGE_SHARE: Final = 0.001
LARGE_LOG_FACTOR: Final = 2.5
LARGE_LOG_SPREAD: Final = 0.5
# Of online purchases: tiny ones, such as apps and donations.
TINY_SHARE: Final = 0.05
TINY_LOG_EUR: Final = float(np.log(1.8))
TINY_LOG_SPREAD: Final = 0.5
EXPLORES_LOCAL: Final = 0.14
EXPLORES_ONLINE: Final = 0.15

_TRIP_SHARE: Final = 0.16
_TRIP_EXTRA: Final = 2.0
_WEEKDAY_WEIGHT: Final = np.array([0.90, 0.92, 0.95, 1.00, 1.18, 1.22, 0.83])
_DECEMBER: Final = 1.25
_PAY_DAYS: Final = 1.12
# Purchases made at a time, so that intermediate arrays stay small.
_CHUNK: Final = 2_000_000


def day_weights(settings: SimulatorSettings) -> Float64:
    """Relative activity of each day, mean 1: weekday, the days after pay-day, December before Christmas."""
    dates = np.datetime64(settings.start, "D") + np.arange(settings.days)
    weekday = (dates.astype(np.int64) + 3) % 7  # the epoch was a Thursday
    month = dates.astype("datetime64[M]")
    month_day = (dates - month).astype(np.int64)
    pay = np.where((month_day >= 26) | (month_day < 3), _PAY_DAYS, 1.0)
    december = np.where((month.astype(np.int64) % 12 == 11) & (month_day < 24), _DECEMBER, 1.0)
    weights = _WEEKDAY_WEIGHT[weekday] * pay * december
    relative: Float64 = weights / weights.mean()
    return relative


def genuine_times(rng: np.random.Generator, world: World, share: float) -> tuple[Int64, Int64]:
    """Card and time (ms from the start) of each purchase. `share`: of the cards' rates, what others do not make."""
    settings, cards = world.settings, world.cards
    weights = day_weights(settings)
    highest = weights.max()
    lived = cards.last_day - cards.first_day
    expected = share * cards.rate * lived * highest / (1.0 + _TRIP_SHARE * _TRIP_EXTRA)
    card = np.repeat(np.arange(len(lived)), rng.poisson(expected))
    day = cards.first_day[card] + (rng.random(len(card)) * lived[card]).astype(np.int64)
    accepted = rng.random(len(card)) * highest < weights[day]
    card, day = card[accepted], day[accepted]
    habit = pick_columns(rng, cards.hours, card)
    hour = rng.normal(HOUR_MEAN[habit] + cards.hour_shift[card], HOUR_SPREAD[habit]) % 24.0
    time_ms = day * DAY_MS + (hour * HOUR_MS).astype(np.int64)

    # shopping trips: bursts that are genuine
    extras = np.where(rng.random(len(card)) < _TRIP_SHARE, 1 + rng.poisson(_TRIP_EXTRA - 1.0, len(card)), 0)
    trip = np.repeat(np.arange(len(card)), extras)
    step = position_in_group(extras) + 1
    gap_ms = rng.gamma(1.5, 14.0 * MINUTE_MS, len(trip))
    later = time_ms[trip] + (step * gap_ms).astype(np.int64)
    inside = later < cards.last_day[card[trip]] * DAY_MS
    return np.concatenate([card, card[trip[inside]]]), np.concatenate([time_ms, later[inside]])


def genuine_purchases(rng: np.random.Generator, world: World, card: Int64, time_ms: Int64, progress: Progress) -> Rows:
    """Terminal, device and amount of each purchase, given its card and time, both int64 [rows]."""
    starts = range(0, max(len(card), 1), _CHUNK)
    parts = []
    for start in starts:
        chunk = slice(start, start + _CHUNK)
        parts.append(_purchases(rng, world, card[chunk], time_ms[chunk]))
        progress((start + _CHUNK) / max(len(card), start + _CHUNK))
    return Rows.joined(parts)


def _purchases(rng: np.random.Generator, world: World, card: Int64, time_ms: Int64) -> Rows:
    terminals = world.terminals
    count = len(card)
    town, log_factor = world.spells.at(card, time_ms)
    online = rng.random(count) < online_share(world, card, time_ms)
    explores = rng.random(count) < np.where(online, EXPLORES_ONLINE, EXPLORES_LOCAL)
    away = (town >= 0) & ~online
    slot = np.where(online, zipf(rng, ONLINE_SLOTS, count), zipf(rng, LOCAL_SLOTS, count))
    terminal = world.cards.preferred(card, slot, online, time_ms)
    wandering = np.flatnonzero(explores | away)
    near = pick_columns(rng, world.cards.near, world.cards.home[card[wandering]])
    goal = np.where(away[wandering], town[wandering], near)
    goal[online[wandering]] = terminals.internet
    terminal[wandering] = terminals.draw(rng, goal)

    amount = np.exp(log_level(world, card, terminal, time_ms) + log_factor + rng.normal(0.0, LOG_SPREAD, count))
    large = np.flatnonzero(rng.random(count) < LARGE_SHARE)
    amount[large] *= np.exp(rng.normal(LARGE_LOG_FACTOR, LARGE_LOG_SPREAD, len(large)))
    shop = np.flatnonzero(online)
    tiny = shop[rng.random(len(shop)) < TINY_SHARE]
    amount[tiny] = np.exp(rng.normal(TINY_LOG_EUR, TINY_LOG_SPREAD, len(tiny)))
    device = np.full(count, NO_DEVICE, np.int64)
    device[shop] = world.devices.draw(rng, card[shop], time_ms[shop])
    time_ms = _when_open(rng, world, terminal, time_ms)
    return Rows(card, terminal, time_ms, amount, device, np.full(count, Kind.PURCHASE, np.int8))


def online_share(world: World, card: Int64, time_ms: Int64) -> Float64:
    """The probability that a purchase is online, float64 [rows]; it grows over the years."""
    logit = world.cards.online_logit[card] + world.settings.online_growth_per_year * time_ms / YEAR_MS
    return 1.0 / (1.0 + np.exp(-logit))


def log_level(world: World, card: Int64, terminal: Int64, time_ms: Int64) -> Float64:
    """Mean of the log amount, EUR: the card's spend level + the terminal's price level + inflation."""
    return log_spend(world, card, time_ms) + world.terminals.log_price[terminal]


def log_spend(world: World, card: Int64, time_ms: Int64) -> Float64:
    """The same at a terminal of a mean price level, which is 0."""
    inflation = np.log1p(world.settings.spend_inflation_per_year) * time_ms / YEAR_MS
    level: Float64 = world.cards.log_spend[card] + inflation
    return level


def _when_open(rng: np.random.Generator, world: World, terminal: Int64, time_ms: Int64) -> Int64:
    """Moves what falls outside the opening hours to a random time of the same day within them."""
    opens, closes = world.terminals.open_h[terminal], world.terminals.close_h[terminal]
    hour = time_ms % DAY_MS / HOUR_MS
    closed = np.flatnonzero(is_closed(hour, opens, closes))
    moved = opens[closed] + rng.random(len(closed)) * (closes[closed] - opens[closed])
    result = time_ms.copy()
    result[closed] += ((moved - hour[closed]) * HOUR_MS).astype(np.int64)
    return result


def is_closed(hour: Float64, opens: Float64, closes: Float64) -> Bool:
    """Whether a time of day, hours, lies outside opening hours."""
    closed: Bool = (hour < opens) | (hour >= closes)
    return closed
