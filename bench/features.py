"""What the feature kernel costs a transaction, and a card in memory, from a thousand cards to ten million.

Random cards and terminals, as many of each, so that every row meets other memory; the shipped features. Each size is
filled first, so that every card has its events, and then measured in micro-batches; the sizes take turns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle
from cascade.columns import ColumnBatch
from cascade.features import FeatureEngine
from cascade.features.spec import DAY_MS, FeatureSpec
from cascade.ledger.machine import Machine, describe_machine
from cascade.schema import Schema

FILL_ROWS, BATCH_ROWS, BATCHES_A_ROUND = 100_000, 1_000, 40
DAYS, START_MS = 20, 1_735_689_600_000


class FeatureTiming(msgspec.Struct, frozen=True, kw_only=True):
    """At so many cards: medians over the rounds, wall time; `bytes_per_card`: state in use, of cards and terminals."""

    cards: int
    us_per_transaction: float
    spread: tuple[float, float]
    ratio_to_smallest: float
    bytes_per_card: float


class FeaturesReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `cascade bench features` saw; `events_per_card`: of each, when it was measured."""

    timings: list[FeatureTiming]
    events_per_card: int
    batch: int
    rounds: int
    seed: int
    machine: Machine


class World:
    """An engine that knows `cards` cards and terminals, and the transactions that come next."""

    def __init__(self, bundle: Bundle, cards: int, events_per_card: int, seed: int) -> None:
        self.cards = cards
        self._schema: Schema = bundle.schema
        self._chance = np.random.default_rng(seed)
        self._now_ms = START_MS
        self._next_id = 0
        self._gap_ms = DAYS * DAY_MS / (cards * events_per_card)
        self.engine = FeatureEngine(_roomy(bundle.spec, cards, events_per_card), bundle.schema)
        self.engine.warm_up()
        left = cards * events_per_card
        while left:
            rows = min(left, FILL_ROWS)
            self.engine.update(self.batch(rows))
            left -= rows

    def batch(self, rows: int) -> ColumnBatch:
        """The next transactions."""
        schema, roles, chance = self._schema, self._schema.roles, self._chance
        times = self._now_ms + (np.arange(rows) * self._gap_ms).astype(np.int64)
        self._now_ms += max(int(rows * self._gap_ms), 1)
        columns = {name: np.zeros(rows, field.dtype) for name, field in schema.fields.items()}
        columns[roles.transaction_id] = np.arange(self._next_id, self._next_id + rows)
        self._next_id += rows
        columns[roles.event_time] = times
        columns[roles.card] = chance.integers(0, self.cards, rows)
        columns[roles.terminal] = chance.integers(0, self.cards, rows)
        columns[roles.amount] = chance.lognormal(3.0, 1.0, rows)
        return ColumnBatch(columns, rows)

    def us_per_transaction(self) -> float:
        """Of the next micro-batches."""
        batches = [self.batch(BATCH_ROWS) for _ in range(BATCHES_A_ROUND)]
        started_s = time.perf_counter()
        for one in batches:
            self.engine.update(one)
        return (time.perf_counter() - started_s) / (BATCHES_A_ROUND * BATCH_ROWS) * 1e6

    def bytes_per_card(self) -> float:
        """State in use."""
        return sum(array.nbytes for array in self.engine._used().values()) / self.cards


def _roomy(spec: FeatureSpec, cards: int, events_per_card: int) -> FeatureSpec:
    """The same with room for all of it: an eviction is another measurement."""
    limits = msgspec.structs.replace(
        spec.limits,
        keys_max=max(cards, 16),
        events_per_key_mean=min(2 * events_per_card, spec.limits.events_per_key_max),
    )
    return msgspec.structs.replace(spec, limits=limits)


def run_features(cards: Sequence[int], events_per_card: int, rounds: int, seed: int) -> FeaturesReport:
    """Measure each number of cards; memory for all of them at once."""
    bundle = load_bundle(SHIPPED_BUNDLE)
    worlds = [World(bundle, one, events_per_card, seed) for one in cards]
    cost: dict[int, list[float]] = {one: [] for one in cards}
    for round_ in range(rounds + 1):
        for world in worlds:
            found = world.us_per_transaction()
            if round_:  # the first is for the caches
                cost[world.cards].append(found)
    smallest = np.array(cost[min(cards)])
    timings = [
        FeatureTiming(
            cards=world.cards, us_per_transaction=float(np.median(cost[world.cards])),
            spread=(min(cost[world.cards]), max(cost[world.cards])),
            ratio_to_smallest=float(np.median(np.array(cost[world.cards]) / smallest)),
            bytes_per_card=world.bytes_per_card(),
        )
        for world in worlds
    ]  # fmt: skip
    return FeaturesReport(
        timings=timings, events_per_card=events_per_card, batch=BATCH_ROWS, rounds=rounds, seed=seed,
        machine=describe_machine(),
    )  # fmt: skip


def show_features(report: FeaturesReport, console: Console) -> None:
    """Print the report."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1), show_edge=False)
    for name in ("cards", "µs a transaction", "least–largest", "× of the fewest", "bytes a card"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in report.timings:
        table.add_row(
            f"{one.cards:,}", f"{one.us_per_transaction:.2f}", f"{one.spread[0]:.2f}–{one.spread[1]:.2f}",
            f"{one.ratio_to_smallest:.2f}", f"{one.bytes_per_card:,.0f}",
        )  # fmt: skip
    console.print()
    console.print(table)
    console.print(
        f"\n {report.events_per_card} events a card and as many a terminal, as many terminals as cards; batches of"
        f" {report.batch:,}, medians of {report.rounds} rounds, by turns; bytes of the state in use, of a card and its"
        f" terminal\n {report.machine.text}; seed {report.seed}",
        highlight=False,
    )
