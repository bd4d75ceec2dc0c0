"""The intensity of genuine purchases, as the processes of `genuine` define it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cascade.columns import Bool, Float64, Int64
from cascade.simulator.cards import HOUR_MEAN, HOUR_SPREAD
from cascade.simulator.frauds.mix import TWIN_SHARE
from cascade.simulator.genuine import (
    EXPLORES_LOCAL,
    EXPLORES_ONLINE,
    LARGE_LOG_FACTOR,
    LARGE_LOG_SPREAD,
    LARGE_SHARE,
    LOG_SPREAD,
    TINY_LOG_EUR,
    TINY_LOG_SPREAD,
    TINY_SHARE,
    day_weights,
    is_closed,
    log_level,
    online_share,
)
from cascade.simulator.rows import Rows
from cascade.simulator.settings import DAY_MS, HOUR_MS
from cascade.simulator.world import World


def genuine_intensity(world: World, rows: Rows) -> Float64:
    """Genuine purchases a day at each row's card, time, terminal, device and log amount, float64 [rows]."""
    day = rows.time_ms // DAY_MS
    online = world.is_online(rows.terminal)
    per_day = (1.0 - TWIN_SHARE) * world.cards.rate[rows.card] * day_weights(world.settings)[day]
    share = online_share(world, rows.card, rows.time_ms)
    town, log_factor = world.spells.at(rows.card, rows.time_ms)
    where = np.where(online, share, 1.0 - share) * _terminal(world, rows, online, town)
    devices = world.devices.probability(rows.card, rows.time_ms, rows.device)
    with_device = np.where(online, devices, (rows.device == 0).astype(np.float64))
    return per_day * _hour(world, rows) * where * with_device * _amount(world, rows, online, log_factor)


def _terminal(world: World, rows: Rows, online: Bool, town: Int64) -> Float64:
    terminals, cards = world.terminals, world.cards
    away = (town >= 0) & ~online
    explores = np.where(online, EXPLORES_ONLINE, EXPLORES_LOCAL)
    home, place = cards.home[rows.card], terminals.town[rows.terminal]
    near = np.diff(cards.near, axis=1, prepend=0.0)
    to_place = np.where(online, 1.0, near[home, np.minimum(place, terminals.internet - 1)])
    found = to_place * terminals.probability(place, rows.terminal)
    usual = cards.preference(rows.card, rows.terminal, online, rows.time_ms)
    on_journey = terminals.probability(np.maximum(town, 0), rows.terminal)
    return np.where(away, on_journey, explores * found + (1.0 - explores) * usual)


def _hour(world: World, rows: Rows) -> Float64:
    """Density of the time of day, per day: the card's habits within opening hours, and what is moved into them."""
    opens, closes = world.terminals.open_h[rows.terminal], world.terminals.close_h[rows.terminal]
    hour = rows.time_ms % DAY_MS / HOUR_MS
    weights = np.diff(world.cards.hours[rows.card], axis=1, prepend=0.0)
    mean = HOUR_MEAN + world.cards.hour_shift[rows.card][:, np.newaxis]
    density, inside = np.zeros(len(hour)), np.zeros(len(hour))
    for wrap in (-24.0, 0.0, 24.0):
        density += (weights * normal(hour[:, np.newaxis], mean + wrap, HOUR_SPREAD)).sum(1)
        below = _below((closes[:, np.newaxis] - mean - wrap) / HOUR_SPREAD)
        inside += (weights * (below - _below((opens[:, np.newaxis] - mean - wrap) / HOUR_SPREAD))).sum(1)
    moved = np.maximum(1.0 - inside, 0.0) / (closes - opens)
    return 24.0 * np.where(is_closed(hour, opens, closes), 0.0, density + moved)


def _amount(world: World, rows: Rows, online: Bool, log_factor: Float64) -> Float64:
    log_amount = np.log(rows.amount)
    level = log_level(world, rows.card, rows.terminal, rows.time_ms) + log_factor
    large_spread = float(np.hypot(LOG_SPREAD, LARGE_LOG_SPREAD))
    usual = (1.0 - LARGE_SHARE) * normal(log_amount, level, LOG_SPREAD)
    usual += LARGE_SHARE * normal(log_amount, level + LARGE_LOG_FACTOR, large_spread)
    tiny = np.where(online, TINY_SHARE, 0.0)
    return (1.0 - tiny) * usual + tiny * normal(log_amount, TINY_LOG_EUR, TINY_LOG_SPREAD)


def normal(value: Float64, mean: Float64 | float, spread: Float64 | float) -> Float64:
    """Density of the normal distribution."""
    density: Float64 = np.exp(-0.5 * ((value - mean) / spread) ** 2) / (np.sqrt(2.0 * np.pi) * spread)
    return density


def _below(value: Float64) -> Float64:
    """The normal distribution function, by Abramowitz and Stegun 26.2.17 (error below 1e-7)."""
    t = 1.0 / (1.0 + 0.2316419 * np.abs(value))
    coefficients = (1.330274429, -1.821255978, 1.781477937, -0.356563782, 0.319381530)
    tail = np.zeros_like(value)
    for coefficient in coefficients:
        tail = (tail + coefficient) * t
    tail = tail * np.exp(-0.5 * value**2) / np.sqrt(2.0 * np.pi)
    result: NDArray[np.float64] = np.where(value >= 0, 1.0 - tail, tail)
    return result
