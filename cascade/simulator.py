"""A seeded simulator of card transactions with five patterns of fraud, for demos, tests and load.

A card has a home town and habits: a spend level, hours of the day, preferred terminals, a share of online shopping. Its
owner travels, and has weeks of higher spending. Over the years prices rise, shopping moves online, and new cards
replace old ones. The patterns:

- `stolen_card`: within hours or two days, a run of rising amounts at terminals that the card does not use.
- `compromised_terminal`: for ten days to four weeks, a share of a terminal's transactions, at ordinary amounts.
- `card_testing`: two to five tiny online amounts within minutes, then a large one.
- `account_takeover`: for about two weeks, a share of the card's own transactions, with multiplied amounts.
- `large_amount`: a single very large amount.

Genuine transactions resemble each pattern: shopping trips (bursts), travel (unusual terminals), small online purchases,
weeks of higher spending, and rare large purchases. So no single column identifies a pattern.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime, time, timedelta
from typing import Final

import numpy as np
import polars as pl

from cascade.columns import Bool, Float64, Int64
from cascade.errors import SettingError
from cascade.progress import Progress

PATTERNS: Final = ("none", "stolen_card", "compromised_terminal", "card_testing", "account_takeover", "large_amount")
ENTRY_MODES: Final = ("chip", "contactless", "online")

_DAY_MS: Final = 86_400_000
_HOUR_MS: Final = 3_600_000
_MINUTE_MS: Final = 60_000
_YEAR_MS: Final = 365.25 * _DAY_MS
# Measured: 190 to 240 bytes per row at the peak, so a run needs at most about 12 GB.
_ROWS_MAX: Final = 50_000_000

# Share of each pattern in the frauds; the key is the pattern's position in PATTERNS.
_PATTERN_MIX: Final = {1: 0.27, 2: 0.28, 3: 0.17, 4: 0.20, 5: 0.08}
_INSERTED: Final = (1, 3, 5)

_AMOUNT_EUR_MEDIAN: Final = 24.0
_AMOUNT_EUR_MIN: Final = 0.5
_AMOUNT_EUR_MAX: Final = 25_000.0
_AMOUNT_LOG_SPREAD: Final = 0.55

# Habits through the day: morning, noon, afternoon, evening, night.
_HOUR_MEAN: Final = np.array([8.2, 12.6, 16.4, 19.6, 1.0])
_HOUR_SPREAD: Final = np.array([1.0, 0.9, 1.6, 1.5, 2.2])
_HOUR_CONCENTRATION: Final = np.array([1.6, 2.2, 2.8, 2.6, 0.3])
_WEEKDAY_WEIGHT: Final = np.array([0.90, 0.92, 0.95, 1.00, 1.18, 1.22, 0.83])

_PREFERRED_LOCAL: Final = 16
_PREFERRED_ONLINE: Final = 6
_TRIP_SHARE: Final = 0.16


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorSettings:
    """What to simulate. Raises SettingError if a value is out of range.

    - `cards`: cards in use on any day.
    - `terminals`: shops and online merchants together.
    - `start`, `days`: the first day, which begins at 00:00 UTC, and the number of days.
    - `fraud_share`: share of frauds in all transactions.
    - `transactions_per_card_day`: mean over cards and days.
    - `spend_inflation_per_year`: growth of the amounts (0.05 is five per cent).
    - `online_growth_per_year`: growth of the log-odds of an online purchase.
    - `card_turnover_per_year`: share of the cards that new cards, with new habits, replace.
    """

    cards: int = 5_000
    terminals: int = 10_000
    days: int = 180
    start: date = date(2025, 1, 1)
    seed: int = 1
    fraud_share: float = 0.007
    transactions_per_card_day: float = 1.2
    spend_inflation_per_year: float = 0.06
    online_growth_per_year: float = 0.4
    card_turnover_per_year: float = 0.3

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                remedy = f"use {low:,} to {high:,}".replace(",", " ")
                raise SettingError("simulator", name, value, "out of range", remedy)
        if not date(2000, 1, 1) <= self.start <= date(2100, 1, 1) - timedelta(days=self.days):
            raise SettingError("simulator", "start", str(self.start), "out of range", "stay within 2000 to 2099")
        rows = self.cards * self.days * self.transactions_per_card_day
        if rows > _ROWS_MAX:
            problem = f"about {rows:.0f} transactions do not fit in memory"
            remedy = f"make cards x days x transactions_per_card_day at most {_ROWS_MAX}"
            raise SettingError("simulator", "days", self.days, problem, remedy)

    @property
    def start_ms(self) -> int:
        """First moment of the simulation, ms since the epoch."""
        return round(datetime.combine(self.start, time(), UTC).timestamp() * 1_000)

    @property
    def span_ms(self) -> int:
        """Length of the simulation, ms."""
        return self.days * _DAY_MS


_LIMITS: Final[dict[str, tuple[float, float]]] = {
    "cards": (10, 10_000_000),
    "terminals": (20, 1_000_000),
    "days": (1, 3_650),
    "seed": (0, 2**63 - 1),
    "fraud_share": (0.0, 0.2),
    "transactions_per_card_day": (0.01, 100.0),
    "spend_inflation_per_year": (-0.5, 1.0),
    "online_growth_per_year": (-3.0, 3.0),
    "card_turnover_per_year": (0.0, 5.0),
}


@dataclass(frozen=True, slots=True)
class _Terminals:
    """Terminals in towns; the last town is the internet.

    - `town` int64 [terminals], `log_price` float64 [terminals]: town and price level of each terminal.
    - `order` int64 [terminals]: the terminals town by town.
    - `mass` float64 [terminals]: cumulative popularity in that order.
    - `first` int64 [towns + 1]: position in that order at which each town begins.
    """

    town: Int64
    log_price: Float64
    order: Int64
    mass: Float64
    first: Int64

    @property
    def internet(self) -> int:
        return len(self.first) - 2

    def draw(self, rng: np.random.Generator, town: Int64) -> Int64:
        """A random terminal of each given town, with probabilities in proportion to popularity."""
        low, last = self.first[town], self.first[town + 1] - 1
        bottom = np.where(low > 0, self.mass[low - 1], 0.0)
        target = bottom + rng.random(len(town)) * (self.mass[last] - bottom)
        position = np.searchsorted(self.mass, target, side="right")
        return self.order[np.clip(position, low, last)].astype(np.int64, copy=False)


@dataclass(frozen=True, slots=True)
class _Cards:
    """Profiles, a row per card. Days count from the start of the simulation; `last_day` is exclusive."""

    first_day: Int64
    last_day: Int64
    home: Int64
    near: Float64  # cumulative probability of each town, by the home town, [towns, towns]
    rate: Float64  # transactions a day
    log_spend: Float64
    online_logit: Float64
    hours: Float64  # cumulative probability of each habit of the day, [cards, habits]
    hour_shift: Float64
    local: Int64  # preferred terminals, most used first
    online: Int64


@dataclass(frozen=True, slots=True)
class _World:
    """Settings, terminals and cards of a simulation."""

    settings: SimulatorSettings
    terminals: _Terminals
    cards: _Cards


@dataclass(frozen=True, slots=True)
class _Rows:
    """Transactions in any order. `time_ms`: since the start of the simulation; `pattern`: position in PATTERNS."""

    card: Int64
    terminal: Int64
    time_ms: Int64
    amount: Float64
    pattern: Int64

    def take(self, index: Int64 | Bool) -> _Rows:
        return _Rows(*(getattr(self, field.name)[index] for field in fields(self)))


def simulate(settings: SimulatorSettings, progress: Progress | None = None) -> pl.DataFrame:
    """Simulate transactions, in order of event_time, then transaction_id. Equal settings give an equal frame.

    Columns: `transaction_id` int64, `event_time` datetime[ms, UTC], `card_id` int64, `terminal_id` int64, `amount`
    float64 (EUR, two decimals), `entry_mode` string (one of ENTRY_MODES), `fraud` int8, and `fraud_pattern` string
    (one of PATTERNS; `none` for a genuine transaction). `fraud_pattern` is part of the answer and never a feature.

    The simulation calls `progress` with the share that is done.
    """
    report = progress or (lambda share: None)
    # a stream of random numbers for each part: a change in one part leaves the others as they were
    streams = [np.random.Generator(np.random.PCG64(seed)) for seed in np.random.SeedSequence(settings.seed).spawn(9)]
    report(0.0)
    terminals = _make_terminals(streams[0], settings)
    cards = _make_cards(streams[1], settings, terminals)
    report(0.1)
    world = _World(settings, terminals, cards)
    card, time_ms = _genuine_times(streams[2], world)
    rows = _genuine_purchases(streams[3], world, card, time_ms)
    report(0.6)
    rows = _add_fraud(streams[4:8], world, rows)
    report(0.85)
    frame = _frame(streams[8], settings, terminals, rows)
    report(1.0)
    return frame


def _pick_columns(rng: np.random.Generator, cumulative: Float64, row: Int64) -> Int64:
    """A random column for each row number, by cumulative probabilities (each row of `cumulative` ends in 1)."""
    columns = cumulative.shape[1]
    flat = (cumulative + np.arange(len(cumulative))[:, np.newaxis]).ravel()
    found = np.searchsorted(flat, row + rng.random(len(row)), side="right") - row * columns
    column: Int64 = np.clip(found, 0, columns - 1)
    return column


def _cumulative(weights: Float64) -> Float64:
    cumulative = np.cumsum(weights, axis=-1)
    cumulative /= cumulative[..., -1:]
    return cumulative


def _make_terminals(rng: np.random.Generator, settings: SimulatorSettings) -> _Terminals:
    count = settings.terminals
    towns = int(np.clip(count // 150, 2, 200))
    online = max(2, round(0.12 * count))
    size = 1.0 / (np.arange(towns) + 2.0)
    town = rng.choice(towns, count, p=size / size.sum()).astype(np.int64)
    town[:towns] = np.arange(towns)  # every town has a shop
    town[count - online :] = towns
    town = town[rng.permutation(count)]
    # Zipf with an offset, so that no single terminal dominates a town
    popularity = 1.0 / (rng.permutation(count) + 0.002 * count + 1.0) ** 0.9
    order = np.argsort(town, kind="stable")
    return _Terminals(
        town=town,
        log_price=rng.normal(0.0, 0.55, count),
        order=order,
        mass=np.cumsum(popularity[order]),
        first=np.searchsorted(town[order], np.arange(towns + 2)),
    )


def _make_cards(rng: np.random.Generator, settings: SimulatorSettings, terminals: _Terminals) -> _Cards:
    first_day, last_day = _lifetimes(rng, settings)
    count = len(first_day)
    towns = terminals.internet
    place = rng.random((towns, 2))
    size = np.diff(terminals.first)[:towns].astype(np.float64)
    distance = np.hypot(*(place[:, np.newaxis] - place[np.newaxis]).transpose(2, 0, 1))
    home = rng.choice(towns, count, p=size / size.sum()).astype(np.int64)
    near = _cumulative(size * np.exp(-distance / 0.07))
    usual = _pick_columns(rng, near, np.repeat(home, _PREFERRED_LOCAL))
    internet = np.full(count * _PREFERRED_ONLINE, terminals.internet)
    return _Cards(
        first_day=first_day,
        last_day=last_day,
        home=home,
        near=near,
        rate=settings.transactions_per_card_day * rng.gamma(2.0, 0.5, count),
        log_spend=np.log(_AMOUNT_EUR_MEDIAN) + rng.normal(0.0, 0.45, count),
        online_logit=rng.normal(-1.3, 0.8, count),
        hours=_cumulative(rng.standard_gamma(_HOUR_CONCENTRATION, (count, len(_HOUR_MEAN)))),
        hour_shift=rng.normal(0.0, 0.7, count),
        local=terminals.draw(rng, usual).reshape(count, _PREFERRED_LOCAL),
        online=terminals.draw(rng, internet).reshape(count, _PREFERRED_ONLINE),
    )


def _lifetimes(rng: np.random.Generator, settings: SimulatorSettings) -> tuple[Int64, Int64]:
    """First and last day of each card: a Poisson process renews each of the `cards` places."""
    renewals = rng.poisson(settings.card_turnover_per_year * settings.days / 365.25, settings.cards)
    place = np.concatenate([np.arange(settings.cards), np.repeat(np.arange(settings.cards), renewals)])
    begin = np.concatenate(
        [np.zeros(settings.cards, np.int64), rng.integers(0, settings.days, int(renewals.sum()), dtype=np.int64)]
    )
    order = np.lexsort((begin, place))
    place, begin = place[order], begin[order]
    last_of_place = np.append(place[1:] != place[:-1], True)
    end = np.where(last_of_place, settings.days, np.append(begin[1:], settings.days))
    mix = rng.permutation(len(begin))  # a card's number does not reveal its age
    return begin[mix], end[mix]


def _day_weights(settings: SimulatorSettings) -> Float64:
    """Relative activity of each day, from the weekday and the days after pay-day."""
    dates = np.datetime64(settings.start, "D") + np.arange(settings.days)
    weekday = (dates.astype(np.int64) + 3) % 7  # the epoch was a Thursday
    month_day = (dates - dates.astype("datetime64[M]")).astype(np.int64)
    pay = np.where((month_day >= 26) | (month_day < 3), 1.12, 1.0)
    return _WEEKDAY_WEIGHT[weekday] * pay


def _genuine_times(rng: np.random.Generator, world: _World) -> tuple[Int64, Int64]:
    """Card and time (ms from the start) of each genuine transaction."""
    settings, cards = world.settings, world.cards
    weights = _day_weights(settings)
    highest = weights.max()
    lived = cards.last_day - cards.first_day
    extra_mean = 2.0
    expected = cards.rate * lived * highest / (1.0 + _TRIP_SHARE * extra_mean)
    card = np.repeat(np.arange(len(lived)), rng.poisson(expected))
    day = cards.first_day[card] + (rng.random(len(card)) * lived[card]).astype(np.int64)
    accepted = rng.random(len(card)) * highest < weights[day]
    card, day = card[accepted], day[accepted]
    habit = _pick_columns(rng, cards.hours, card)
    hour = rng.normal(_HOUR_MEAN[habit] + cards.hour_shift[card], _HOUR_SPREAD[habit]) % 24.0
    time_ms = day * _DAY_MS + (hour * _HOUR_MS).astype(np.int64)

    # shopping trips: bursts that are genuine
    extras = np.where(rng.random(len(card)) < _TRIP_SHARE, 1 + rng.poisson(extra_mean - 1.0, len(card)), 0)
    trip = np.repeat(np.arange(len(card)), extras)
    step = _position_in_group(extras) + 1
    gap_ms = rng.gamma(1.5, 14.0 * _MINUTE_MS, len(trip))
    later = time_ms[trip] + (step * gap_ms).astype(np.int64)
    inside = later < cards.last_day[card[trip]] * _DAY_MS
    return np.concatenate([card, card[trip[inside]]]), np.concatenate([time_ms, later[inside]])


def _position_in_group(sizes: Int64) -> Int64:
    """0, 1, 2, … within consecutive groups of the given sizes."""
    ends = np.cumsum(sizes)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - sizes, sizes)


@dataclass(frozen=True, slots=True)
class _Spells:
    """Journeys and weeks of higher spending: genuine behaviour unlike the card's habits. Sorted by card and start."""

    code: Int64  # card x span + start
    end_ms: Int64
    town: Int64  # -1: at home
    log_factor: Float64

    def at(self, card: Int64, time_ms: Int64, span_ms: int) -> tuple[Int64, Float64]:
        """Town (-1: at home) and log of the spend factor for each transaction."""
        found = np.searchsorted(self.code, card * span_ms + time_ms, side="right") - 1
        safe = np.maximum(found, 0)
        if not len(self.code):
            return np.full(len(card), -1), np.zeros(len(card))
        active = (found >= 0) & (self.code[safe] // span_ms == card) & (time_ms < self.end_ms[safe])
        return np.where(active, self.town[safe], -1), np.where(active, self.log_factor[safe], 0.0)


def _make_spells(rng: np.random.Generator, world: _World) -> _Spells:
    settings, cards, towns = world.settings, world.cards, world.terminals.internet
    a_year = 5.0
    per_card = rng.poisson(a_year * settings.days / 365.25, len(cards.home))
    card = np.repeat(np.arange(len(per_card)), per_card)
    start = rng.integers(0, settings.span_ms, len(card), dtype=np.int64)
    length = rng.integers(2 * _DAY_MS, 12 * _DAY_MS, len(card), dtype=np.int64)
    travels = rng.random(len(card)) < 0.6
    town = np.where(travels, rng.integers(0, towns, len(card)), -1)
    log_factor = np.where(travels, rng.uniform(0.0, 0.4, len(card)), rng.uniform(0.2, 0.9, len(card)))
    code = card * settings.span_ms + start
    order = np.argsort(code, kind="stable")
    return _Spells(code[order], (start + length)[order], town[order], log_factor[order])


def _genuine_purchases(rng: np.random.Generator, world: _World, card: Int64, time_ms: Int64) -> _Rows:
    """Terminal and amount of each genuine transaction."""
    settings, cards, terminals = world.settings, world.cards, world.terminals
    count = len(card)
    years = time_ms / _YEAR_MS
    town, log_factor = _make_spells(rng, world).at(card, time_ms, settings.span_ms)
    logit = cards.online_logit[card] + settings.online_growth_per_year * years
    online = rng.random(count) * (1.0 + np.exp(-logit)) < 1.0

    explores = rng.random(count) < np.where(online, 0.3, 0.14)
    away = (town >= 0) & ~online
    wandering = np.flatnonzero(explores | away)
    near = _pick_columns(rng, cards.near, cards.home[card[wandering]])
    goal = np.where(away[wandering], town[wandering], near)
    goal[online[wandering]] = terminals.internet

    terminal = cards.local[card, _zipf(rng, _PREFERRED_LOCAL, count)]
    shop = np.flatnonzero(online)
    terminal[shop] = cards.online[card[shop], _zipf(rng, _PREFERRED_ONLINE, len(shop))]
    terminal[wandering] = terminals.draw(rng, goal)

    amount = _amounts(rng, world, card, terminal, time_ms)
    amount *= np.exp(log_factor)
    large = np.flatnonzero(rng.random(count) < 0.001)
    amount[large] *= np.exp(rng.uniform(1.6, 3.4, len(large)))
    small = shop[rng.random(len(shop)) < 0.04]
    amount[small] = rng.uniform(0.5, 5.0, len(small))
    return _Rows(card, terminal, time_ms, amount, np.zeros(count, np.int64))


def _zipf(rng: np.random.Generator, choices: int, count: int) -> Int64:
    """`count` random positions below `choices`, by Zipf's law with exponent 1: lower positions are likelier."""
    cumulative = _cumulative(np.reciprocal(np.arange(1, choices + 1, dtype=np.float64)))
    return np.minimum(np.searchsorted(cumulative, rng.random(count), side="right"), choices - 1)


def _amounts(rng: np.random.Generator, world: _World, card: Int64, terminal: Int64, time_ms: Int64) -> Float64:
    """Lognormal amounts, EUR: the card's spend level x the terminal's price level x inflation."""
    level = world.cards.log_spend[card] + world.terminals.log_price[terminal]
    level += np.log1p(world.settings.spend_inflation_per_year) * time_ms / _YEAR_MS
    return np.exp(level + rng.normal(0.0, _AMOUNT_LOG_SPREAD, len(card)))


def _add_fraud(streams: list[np.random.Generator], world: _World, genuine: _Rows) -> _Rows:
    """Add the frauds: some patterns change genuine rows, the others insert rows."""
    settings = world.settings
    inserted_share = sum(_PATTERN_MIX[pattern] for pattern in _INSERTED)
    # frauds / (genuine + inserted) = fraud_share, solved for frauds
    frauds = settings.fraud_share * len(genuine.card) / (1.0 - inserted_share * settings.fraud_share)
    wanted = {pattern: round(frauds * share) for pattern, share in _PATTERN_MIX.items()}
    if not len(genuine.card):
        return genuine
    compromised = _campaign_rows(
        streams[0], settings, genuine.terminal, genuine, days=(10, 28), share=(0.4, 0.9), wanted=wanted[2]
    )
    genuine.pattern[compromised] = 2
    taken = _campaign_rows(
        streams[1], settings, genuine.card, genuine, days=(10, 18), share=(0.35, 0.6), wanted=wanted[4]
    )
    genuine.amount[taken] *= streams[1].uniform(3.0, 7.0, len(taken))
    genuine.pattern[taken] = 4
    parts = [
        genuine,
        _fill(_stolen_cards, streams[2], world, genuine, wanted[1]),
        _fill(_card_tests, streams[2], world, genuine, wanted[3]),
        _fill(_large_amounts, streams[3], world, genuine, wanted[5]),
    ]
    return _Rows(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(_Rows)))


def _campaign_rows(
    rng: np.random.Generator,
    settings: SimulatorSettings,
    key: Int64,
    rows: _Rows,
    *,
    days: tuple[float, float],
    share: tuple[float, float],
    wanted: int,
) -> Int64:
    """Up to `wanted` rows that fraud campaigns hit.

    A campaign hits a key for some days, and each of the key's rows in that time with some probability.

    - `key` int64 [rows]: the card or terminal of each row.
    - `days`, `share`: (least, most) length of a campaign, and (least, most) probability that it hits a row.
    """
    span = settings.span_ms
    order = np.lexsort((rows.time_ms, key))
    code = (key * span + rows.time_ms)[order]
    tries = 2 * wanted + 64
    target = rng.integers(0, int(key.max()) + 1, tries)
    length = (rng.uniform(*days, tries) * _DAY_MS).astype(np.int64)
    start = (rng.random(tries) * span).astype(np.int64)
    low = np.searchsorted(code, target * span + start)
    high = np.searchsorted(code, target * span + np.minimum(start + length, span))
    sizes = high - low
    # no single busy key makes up the whole pattern
    sizes[sizes * np.mean(share) > max(40.0, 0.1 * wanted)] = 0
    enough = int(np.searchsorted(np.cumsum(sizes * min(share)), wanted)) + 1
    sizes, low = sizes[:enough], low[:enough]
    chance = np.repeat(rng.uniform(*share, len(sizes)), sizes)
    candidates = order[np.repeat(low, sizes) + _position_in_group(sizes)]
    hit = candidates[rng.random(len(candidates)) < chance]
    _, first = np.unique(hit, return_index=True)  # a row of two campaigns counts once
    hit = hit[np.sort(first)]
    free: Int64 = hit[rows.pattern[hit] == 0][:wanted]
    return free


_Pattern = Callable[[np.random.Generator, _World, _Rows], _Rows]


def _fill(pattern: _Pattern, rng: np.random.Generator, world: _World, genuine: _Rows, wanted: int) -> _Rows:
    """`wanted` rows of a pattern that begins at random genuine rows; fewer if the cards expire before."""
    anchors = rng.integers(0, len(genuine.card), wanted + wanted // 4 + 8)
    rows = pattern(rng, world, genuine.take(anchors))
    last_ms = world.cards.last_day[rows.card] * _DAY_MS
    inside = np.flatnonzero(rows.time_ms < last_ms)[:wanted]
    return rows.take(inside)


def _stolen_cards(rng: np.random.Generator, world: _World, anchors: _Rows) -> _Rows:
    sizes = rng.integers(3, 10, len(anchors.card))
    victim = np.repeat(np.arange(len(sizes)), sizes)
    card = anchors.card[victim]
    count = len(victim)
    # from a burst within an hour to a few purchases over two days
    pace_ms = np.repeat(np.exp(rng.uniform(np.log(8.0), np.log(240.0), len(anchors.card))) * _MINUTE_MS, sizes)
    gap_ms = rng.gamma(1.5, pace_ms / 1.5, count)
    delay_ms = np.repeat(rng.uniform(0.2, 20.0, len(anchors.card)) * _HOUR_MS, sizes)
    time_ms = anchors.time_ms[victim] + (delay_ms + _running_within(gap_ms, sizes)).astype(np.int64)
    town = np.repeat(rng.integers(0, world.terminals.internet, len(anchors.card)), sizes)
    town[rng.random(count) < 0.35] = world.terminals.internet
    terminal = world.terminals.draw(rng, town)
    # the amounts rise: their order reveals more than their sum
    boldness = rng.uniform(0.1, 0.5, count) * (1 + _position_in_group(sizes))
    amount = _amounts(rng, world, card, terminal, time_ms) * np.exp(np.minimum(boldness, 2.3))
    return _Rows(card, terminal, time_ms, amount, np.full(count, 1))


def _card_tests(rng: np.random.Generator, world: _World, anchors: _Rows) -> _Rows:
    sizes = rng.integers(3, 7, len(anchors.card))
    victim = np.repeat(np.arange(len(sizes)), sizes)
    card = anchors.card[victim]
    count = len(victim)
    position = _position_in_group(sizes)
    large = position == np.repeat(sizes - 1, sizes)
    gap_ms = np.where(large, rng.gamma(1.5, 25.0, count), rng.gamma(1.5, 3.0, count)) * _MINUTE_MS
    delay_ms = np.repeat(rng.uniform(0.5, 72.0, len(anchors.card)) * _HOUR_MS, sizes)
    time_ms = anchors.time_ms[victim] + (delay_ms + _running_within(gap_ms, sizes)).astype(np.int64)
    terminal = world.terminals.draw(rng, np.full(count, world.terminals.internet))
    amount = _amounts(rng, world, card, terminal, time_ms) * np.exp(rng.uniform(1.0, 2.6, count))
    amount = np.where(large, amount, rng.uniform(0.5, 4.0, count))
    return _Rows(card, terminal, time_ms, amount, np.full(count, 3))


def _large_amounts(rng: np.random.Generator, world: _World, anchors: _Rows) -> _Rows:
    card = anchors.card
    count = len(card)
    time_ms = anchors.time_ms + (rng.uniform(0.0, 24.0, count) * _HOUR_MS).astype(np.int64)
    town = _pick_columns(rng, world.cards.near, world.cards.home[card])
    town[rng.random(count) < 0.5] = world.terminals.internet
    amount = np.exp(rng.normal(np.log(700.0), 0.5, count))
    return _Rows(card, world.terminals.draw(rng, town), time_ms, amount, np.full(count, 5))


def _running_within(values: Float64, sizes: Int64) -> Float64:
    """Cumulative sums within consecutive groups of the given sizes."""
    total = np.cumsum(values)
    before = np.cumsum(sizes) - sizes
    within: Float64 = total - np.repeat(np.append(0.0, total)[before], sizes)
    return within


def _frame(rng: np.random.Generator, settings: SimulatorSettings, terminals: _Terminals, rows: _Rows) -> pl.DataFrame:
    order = np.argsort(rows.time_ms, kind="stable")
    rows = rows.take(order)
    count = len(order)
    amount = np.round(np.clip(rows.amount, _AMOUNT_EUR_MIN, _AMOUNT_EUR_MAX), 2)
    # contactless up to the usual limit of 50 EUR, and more of it from year to year
    contactless = rng.random(count) < np.where(amount <= 50.0, 0.72, 0.18) + 0.04 * rows.time_ms / _YEAR_MS
    mode = np.where(terminals.town[rows.terminal] == terminals.internet, 2, contactless.astype(np.int64))
    return pl.DataFrame(
        {
            "transaction_id": np.arange(count, dtype=np.int64),
            "event_time": pl.Series(settings.start_ms + rows.time_ms).cast(pl.Datetime("ms", "UTC")),
            "card_id": rows.card,
            "terminal_id": rows.terminal,
            "amount": amount,
            "entry_mode": _names(ENTRY_MODES, mode),
            "fraud": (rows.pattern > 0).astype(np.int8),
            "fraud_pattern": _names(PATTERNS, rows.pattern),
        }
    )


def _names(names: tuple[str, ...], position: Int64) -> pl.Series:
    return pl.Series(names).gather(pl.Series(position))
