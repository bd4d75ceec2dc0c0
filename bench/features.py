"""What the features cost: time for each transaction and memory for each card, by the number of cards.

Cards and terminals are random and as many of each, so that every row touches other memory. The features are those of
the shipped bundle. Each size is filled with its events first and then measured in micro-batches, of many rows and of
one, as the service has them at ordinary load; the sizes take turns. So do feature files with longer sequences, and with
two. The sequences of one row in a hundred are read, as for an escalated row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import msgspec
import numpy as np
from rich.console import Console

from bench.tables import figure_table, print_table
from bench.turns import Spread, by_turns, seconds_of
from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle
from cascade.columns import ColumnBatch, Int64
from cascade.features import FeatureEngine
from cascade.features.spec import DAY_MS, FeatureSpec
from cascade.features.spec import Sequence as DeclaredSequence
from cascade.ledger.machine import Machine, describe_machine
from cascade.schema import Schema

FILL_ROWS, BATCH_ROWS, BATCHES_A_ROUND, SINGLE_ROWS_A_ROUND = 100_000, 1_000, 40, 4_000
DAYS, START_MS = 20, 1_735_689_600_000
# The sequences of one row in so many are read.
READ_EVERY = 100
# Lengths of sequences by key, each with the fields of the shipped bundle's.
SEQUENCES: tuple[Mapping[str, int], ...] = ({"card": 16}, {"card": 64}, {"card": 64, "terminal": 64})


class FeatureTiming(msgspec.Struct, frozen=True, kw_only=True):
    """Wall time at a number of cards: the median over the rounds; `spread`: the least and the largest.

    `us_per_single_row`: a micro-batch of one row, from its columns to its features.
    `bytes_per_card`: the state in use of cards and terminals, divided by the number of cards.
    """

    cards: int
    us_per_transaction: float
    spread: tuple[float, float]
    ratio_to_smallest: float
    us_per_single_row: float
    spread_single_row: tuple[float, float]
    bytes_per_card: float


class SequenceTiming(msgspec.Struct, frozen=True, kw_only=True):
    """CPU time with sequences of these lengths, by key; `ratio_to_first`: the median over the rounds."""

    lengths: dict[str, int]
    us_per_transaction: float
    spread: tuple[float, float]
    ratio_to_first: float
    us_per_single_row: float
    bytes_per_card: float


class FeaturesReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `cascade bench features`; `events_per_card`: the events of each card before the measurement.

    `sequences`: at `sequence_cards` cards.
    """

    timings: list[FeatureTiming]
    sequences: list[SequenceTiming]
    sequence_cards: int
    events_per_card: int
    batch: int
    rounds: int
    seed: int
    machine: Machine


def random_transactions(
    schema: Schema, chance: np.random.Generator, first_id: int, times_ms: Int64, cards: int, terminals: int
) -> ColumnBatch:
    """Transactions of random cards and terminals, with random amounts; other fields are 0.

    first_id: the ids count up from it.
    times_ms: event times, int64 [rows].
    cards, terminals: the number of each.
    """
    rows, roles = len(times_ms), schema.roles
    columns = {name: np.zeros(rows, field.dtype) for name, field in schema.fields.items()}
    columns[roles.transaction_id] = first_id + np.arange(rows)
    columns[roles.event_time] = times_ms
    columns[roles.amount] = chance.lognormal(3.0, 1.0, rows)
    columns[roles.card] = chance.integers(0, cards, rows)
    columns[roles.terminal] = chance.integers(0, terminals, rows)
    return ColumnBatch(columns, rows)


class FilledEngine:
    """A feature engine with the events of `cards` cards and as many terminals, and the transactions that come next."""

    def __init__(self, bundle: Bundle, cards: int, events_per_card: int, seed: int) -> None:
        self.cards = cards
        self._schema: Schema = bundle.schema
        self._chance = np.random.default_rng(seed)
        self._now_ms = START_MS
        self._next_id = 0
        self._partition_ids = np.zeros(BATCH_ROWS, np.int64)
        self._gap_ms = DAYS * DAY_MS / (cards * events_per_card)
        self.engine = FeatureEngine(_without_evictions(bundle.spec, cards, events_per_card), bundle.schema)
        self._buffers = self.engine.buffers()
        self._buffers.make_room(BATCH_ROWS)
        self.engine.warm_up()
        left = cards * events_per_card
        while left:
            rows = min(left, FILL_ROWS)
            self.engine.update(self.batch(rows))
            left -= rows

    def batch(self, rows: int) -> ColumnBatch:
        """The next `rows` transactions."""
        times_ms = self._now_ms + (np.arange(rows) * self._gap_ms).astype(np.int64)
        self._now_ms += max(int(rows * self._gap_ms), 1)
        self._next_id += rows
        return random_transactions(self._schema, self._chance, self._next_id - rows, times_ms, self.cards, self.cards)

    def measures(self, clock: Callable[[], float] = time.perf_counter) -> dict[int, Callable[[], float]]:
        """What takes turns, by the rows of a micro-batch: the time of the next micro-batches, µs a transaction."""
        counts = {BATCH_ROWS: BATCHES_A_ROUND, 1: SINGLE_ROWS_A_ROUND}
        return {rows: partial(self._us_per_row, rows, count, clock) for rows, count in counts.items()}

    def _us_per_row(self, rows: int, count: int, clock: Callable[[], float]) -> float:
        batches, partition_ids = [self.batch(rows) for _ in range(count)], self._partition_ids[:rows]
        update, buffers = self.engine.update, self._buffers
        read = [np.arange(-number * rows % READ_EVERY, rows, READ_EVERY) for number in range(count)]

        def work() -> None:
            for batch, chosen in zip(batches, read, strict=True):
                found = update(batch, partition_ids, buffers)
                if len(chosen):
                    found.sequences(chosen)

        return 1e6 * seconds_of(work, clock) / (count * rows)

    def bytes_per_card(self) -> float:
        """The state in use of cards and terminals, bytes a card."""
        return self.engine.state_bytes() / self.cards


def _without_evictions(spec: FeatureSpec, cards: int, events_per_card: int) -> FeatureSpec:
    """The features with room for every key and event, since this benchmark does not measure evictions."""
    limits = msgspec.structs.replace(
        spec.limits,
        keys_max=max(cards, 16),
        events_per_key_mean=min(2 * events_per_card, spec.limits.events_per_key_max),
    )
    return msgspec.structs.replace(spec, limits=limits)


def run_features(cards: Sequence[int], events_per_card: int, rounds: int, seed: int) -> FeaturesReport:
    """Measures each number of cards. The engines of all numbers are in memory at the same time.

    cards: the numbers of cards.
    events_per_card: events of each card and each terminal before the measurement.
    rounds: rounds that count; a first round fills the caches.
    seed: of the transactions.
    """
    bundle = load_bundle(SHIPPED_BUNDLE)
    engines = [FilledEngine(bundle, count, events_per_card, seed) for count in cards]
    measures = {(engine.cards, rows): measure for engine in engines for rows, measure in engine.measures().items()}
    cost_us = by_turns(measures, rounds)
    sequence_cards = sorted(cards)[len(cards) // 2]
    timings = []
    for engine in engines:
        spread, single = (Spread.of(cost_us[engine.cards, rows]) for rows in (BATCH_ROWS, 1))
        timings.append(
            FeatureTiming(
                cards=engine.cards,
                us_per_transaction=spread.median,
                spread=(spread.least, spread.largest),
                ratio_to_smallest=float(np.median(cost_us[engine.cards, BATCH_ROWS] / cost_us[min(cards), BATCH_ROWS])),
                us_per_single_row=single.median,
                spread_single_row=(single.least, single.largest),
                bytes_per_card=engine.bytes_per_card(),
            )
        )
    return FeaturesReport(
        timings=timings,
        sequences=run_sequences(bundle, sequence_cards, events_per_card, rounds, seed),
        sequence_cards=sequence_cards,
        events_per_card=events_per_card,
        batch=BATCH_ROWS,
        rounds=rounds,
        seed=seed,
        machine=describe_machine(),
    )


def run_sequences(bundle: Bundle, cards: int, events_per_card: int, rounds: int, seed: int) -> list[SequenceTiming]:
    """Measures each of SEQUENCES; the arguments are those of `run_features`, for one number of cards."""
    engines = [
        FilledEngine(replace(bundle, spec=_with_sequences(bundle.spec, lengths)), cards, events_per_card, seed)
        for lengths in SEQUENCES
    ]
    measures = {
        (place, rows): measure
        for place, engine in enumerate(engines)
        for rows, measure in engine.measures(time.thread_time).items()
    }
    cost_us = by_turns(measures, rounds)
    found = []
    for place, (lengths, engine) in enumerate(zip(SEQUENCES, engines, strict=True)):
        spread, single = (Spread.of(cost_us[place, rows]) for rows in (BATCH_ROWS, 1))
        found.append(
            SequenceTiming(
                lengths=dict(lengths),
                us_per_transaction=spread.median,
                spread=(spread.least, spread.largest),
                ratio_to_first=float(np.median(cost_us[place, BATCH_ROWS] / cost_us[0, BATCH_ROWS])),
                us_per_single_row=single.median,
                bytes_per_card=engine.bytes_per_card(),
            )
        )
    return found


def _with_sequences(spec: FeatureSpec, lengths: Mapping[str, int]) -> FeatureSpec:
    fields = spec.sequence[0].fields
    sequences = tuple(DeclaredSequence(key=key, length=length, fields=fields) for key, length in lengths.items())
    return msgspec.structs.replace(spec, sequence=sequences)


def show_features(report: FeaturesReport, console: Console) -> None:
    """Prints the report as a table, a row a number of cards."""
    table = figure_table(None, "cards", "µs/transaction", "least–largest", "× fewest", "one row, µs", "bytes/card")
    for timing in report.timings:
        table.add_row(
            f"{timing.cards:,}",
            f"{timing.us_per_transaction:.2f}",
            f"{timing.spread[0]:.2f}–{timing.spread[1]:.2f}",
            f"{timing.ratio_to_smallest:.2f}",
            f"{timing.us_per_single_row:.1f}",
            f"{timing.bytes_per_card:,.0f}",
        )
    lines = [
        f"{report.events_per_card} events for each card and each terminal; as many terminals as cards",
        f"batches of {report.batch:,}, and of one row; medians of {report.rounds} rounds that take turns",
        "one row: a micro-batch of one row, from its columns to its features",
        "bytes/card: state in use of a card and a terminal",
        f"sequences of one row in {READ_EVERY} are read",
    ]
    print_table(console, table, *lines)
    table = figure_table("steps", "CPU µs", "least–largest", "× first", "one row, CPU µs", "bytes/card")
    for sequence in report.sequences:
        table.add_row(
            ", ".join(f"{key} {length}" for key, length in sequence.lengths.items()),
            f"{sequence.us_per_transaction:.2f}",
            f"{sequence.spread[0]:.2f}–{sequence.spread[1]:.2f}",
            f"{sequence.ratio_to_first:.2f}",
            f"{sequence.us_per_single_row:.1f}",
            f"{sequence.bytes_per_card:,.0f}",
        )
    print_table(
        console,
        table,
        f"{report.sequence_cards:,} cards; steps by key, with the fields of the shipped bundle's sequence",
        f"{report.machine.text}; seed {report.seed}",
    )
