"""Runs a simulation: world, genuine purchases, frauds and twins, labels; then the frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from cascade.columns import Bool, Int64
from cascade.progress import Progress
from cascade.simulator.devices import NO_DEVICE
from cascade.simulator.frauds.mix import TWIN_SHARE, add_frauds_and_twins
from cascade.simulator.genuine import genuine_purchases, genuine_times
from cascade.simulator.labels import report
from cascade.simulator.rows import Campaigns, Int8, Rows
from cascade.simulator.settings import (
    CATEGORIES,
    COUNTRIES,
    ENTRY_MODES,
    PATTERNS,
    YEAR_MS,
    Kind,
    SimulatorSettings,
)
from cascade.simulator.subscriptions import PER_CARD, PERIOD_DAYS, charges
from cascade.simulator.world import World, make_world

AMOUNT_EUR_MIN = 0.5
AMOUNT_EUR_MAX = 25_000.0


@dataclass(frozen=True, slots=True)
class Simulation:
    """Transactions with the hidden states behind them.

    - `frame`: see `simulate`. `rows`: the same transactions in the same order, with their kinds.
    - `campaigns`: what ran on which card or terminal.
    - `report_delay_ms` int64 [rows]: from a transaction to the report of its fraud; -1: never reported.
    """

    world: World
    frame: pl.DataFrame
    rows: Rows
    campaigns: Campaigns
    report_delay_ms: Int64


def simulate(settings: SimulatorSettings, progress: Progress | None = None) -> pl.DataFrame:
    """Simulate transactions, in order of event_time, then transaction_id. Equal settings give an equal frame.

    Columns: `transaction_id` int64, `event_time` datetime[ms, UTC], `card_id` int64, `terminal_id` int64, `amount`
    float64 (EUR, two decimals), `entry_mode`, `category`, `country` string (of ENTRY_MODES, CATEGORIES, COUNTRIES; the
    last two are the merchant's), `device_id` int64 (0: none), `fraud` int8 (as reported), and `fraud_pattern` string
    (of PATTERNS, the truth; `none` for a genuine transaction). `fraud_pattern` is part of the answer, never a feature.

    The simulation calls `progress` with the share that is done.
    """
    return simulate_with_states(settings, progress).frame


def simulate_with_states(settings: SimulatorSettings, progress: Progress | None = None) -> Simulation:
    """Simulate as `simulate` does, and return the hidden states beside the frame."""
    told = progress or (lambda share: None)
    # a stream of random numbers for each part: a change in one part leaves the others as they were
    streams = np.random.Generator(np.random.PCG64(settings.seed)).spawn(7)
    told(0.0)
    world = make_world(streams[0], settings)
    told(0.1)
    # subscriptions and twins are part of the asked volume
    subscribed = PER_CARD * min(1.0, settings.transactions_per_card_day) / PERIOD_DAYS
    share = 1.0 - TWIN_SHARE - subscribed / settings.transactions_per_card_day
    card, time_ms = genuine_times(streams[1], world, share)
    purchases = genuine_purchases(streams[2], world, card, time_ms, lambda part: told(0.1 + 0.4 * part))
    genuine = Rows.joined([purchases, charges(streams[3], settings, world.cards, world.subscriptions)])
    del card, time_ms, purchases
    rows, campaigns = add_frauds_and_twins(streams[4], world, genuine, lambda part: told(0.5 + 0.2 * part))
    del genuine
    rows = rows.take(np.argsort(rows.time_ms, kind="stable"))
    told(0.8)
    reported, delay_ms = report(streams[5], settings, is_fraud(rows.kind))
    frame = _frame(streams[6], world, rows, reported)
    told(1.0)
    return Simulation(world, frame, rows, campaigns, delay_ms)


def is_fraud(kind: Int8) -> Bool:
    """Whether transactions of these kinds are frauds, bool [rows]."""
    fraud: Bool = (kind >= Kind.STOLEN_CARD) & (kind <= Kind.MULE_RING)
    return fraud


def _frame(rng: np.random.Generator, world: World, rows: Rows, reported: Bool) -> pl.DataFrame:
    settings, terminals = world.settings, world.terminals
    count = len(rows.card)
    amount = np.round(np.clip(rows.amount, AMOUNT_EUR_MIN, AMOUNT_EUR_MAX), 2)
    # contactless up to the usual limit of 50 EUR, and more of it from year to year
    contactless = rng.random(count) < np.where(amount <= 50.0, 0.72, 0.18) + 0.04 * rows.time_ms / YEAR_MS
    mode = np.where(world.is_online(rows.terminal), 2, contactless.astype(np.int64))
    pattern = np.where(is_fraud(rows.kind), rows.kind - Kind.STOLEN_CARD + 1, 0)
    return pl.DataFrame(
        {
            "transaction_id": np.arange(count, dtype=np.int64),
            "event_time": pl.Series(settings.start_ms + rows.time_ms).cast(pl.Datetime("ms", "UTC")),
            "card_id": rows.card,
            "terminal_id": rows.terminal,
            "amount": amount,
            "entry_mode": _names(ENTRY_MODES, mode),
            "category": _names(CATEGORIES, terminals.category[rows.terminal]),
            "country": _names(COUNTRIES, terminals.country[rows.terminal]),
            "device_id": _device_ids(rng, rows.device),
            "fraud": reported.astype(np.int8),
            "fraud_pattern": _names(PATTERNS, pattern),
        }
    )


def _device_ids(rng: np.random.Generator, device: Int64) -> Int64:
    """Random numbers in place of the devices', so that a number does not reveal a device's age; 0 stays 0."""
    number = rng.permutation(int(device.max(initial=0))) + 1
    return np.append(NO_DEVICE, number)[device]


def _names(names: tuple[str, ...], position: Int64) -> pl.Series:
    return pl.Series(names).gather(pl.Series(position))
