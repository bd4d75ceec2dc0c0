"""Single stages: the CPU time of each for a transaction, beside plain Python code that does the same work.

Both run by turns in one thread, at one batch size. The plain code is what most people write: `json.loads`, dictionaries
of totals, LightGBM's `predict`, an object for each decision. Both slow down alike on a busy machine, so the ratio shows
whether a stage became slower, and microseconds alone would not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import lightgbm
import msgspec
import numpy as np
from rich.console import Console

from bench.cluster import origin, simulated
from bench.tables import figure_table, print_table
from bench.turns import Spread, by_turns, seconds_of
from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle
from cascade.columns import ColumnBatch, Float64
from cascade.config import DuplicateSettings
from cascade.ledger.machine import Machine, describe_machine
from cascade.schema import Roles
from stages.assembly import make_engine
from streaming.codecs import codec
from streaming.pipeline.duplicates import FirstDecisions
from streaming.pipeline.encode import decisions, encode
from streaming.pipeline.table import Table

CARDS, TERMINALS, DAYS = 20_000, 20_000, 20
BATCHES_A_TURN = 12
Work = Callable[[int], object]


class StageTiming(msgspec.Struct, frozen=True, kw_only=True):
    """CPU time of a stage, medians over the rounds.

    `ratio`: plain code's time over the stage's; `spread`: its least and largest.
    """

    stage: str
    us_per_transaction: float
    plain_us_per_transaction: float
    ratio: float
    spread: tuple[float, float]


class StagesReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `cascade bench stages`."""

    stages: list[StageTiming]
    batch: int
    rounds: int
    seed: int
    machine: Machine


@dataclass(frozen=True, slots=True)
class Stage:
    """The service's code and plain code for the same work on the batch with a given number."""

    name: str
    cascade: Work
    plain: Work


def run_stages(batch: int, rounds: int, seed: int) -> StagesReport:
    """Measures every stage; `batch`: transactions of a micro-batch, `seed`: of the data."""
    bundle = load_bundle(SHIPPED_BUNDLE)
    data = simulated(bundle.schema, cards=CARDS, terminals=TERMINALS, days=DAYS, seed=seed).batch
    count = data.rows // batch
    parts = [data.take(np.arange(number * batch, (number + 1) * batch)) for number in range(count)]
    makers = (_decode, _features, _screener, _duplicates, _encode)
    timings = [_timed(make(bundle, parts), count, batch, rounds) for make in makers]
    return StagesReport(stages=timings, batch=batch, rounds=rounds, seed=seed, machine=describe_machine())


def _timed(stage: Stage, count: int, batch: int, rounds: int) -> StageTiming:
    def measured(work: Work) -> Callable[[], float]:
        numbers = cycle(range(count))

        def us_per_transaction() -> float:
            seconds = seconds_of(lambda: [work(next(numbers)) for _ in range(BATCHES_A_TURN)], time.thread_time)
            return 1e6 * seconds / (BATCHES_A_TURN * batch)

        return us_per_transaction

    cost_us = by_turns({"cascade": measured(stage.cascade), "plain": measured(stage.plain)}, rounds)
    ratio = Spread.of(cost_us["plain"] / cost_us["cascade"])
    return StageTiming(
        stage=stage.name,
        us_per_transaction=float(np.median(cost_us["cascade"])),
        plain_us_per_transaction=float(np.median(cost_us["plain"])),
        ratio=ratio.median,
        spread=(ratio.least, ratio.largest),
    )


def _decode(bundle: Bundle, parts: list[ColumnBatch]) -> Stage:
    reader = codec("json", bundle.schema.fields, 65_536)
    messages = [reader.encode(part) for part in parts]
    names = list(bundle.schema.fields)

    def plain(number: int) -> object:
        rows = [json.loads(message) for message in messages[number]]
        return {name: np.array([row[name] for row in rows]) for name in names}

    return Stage("decode JSON", lambda number: reader.decode(messages[number]), plain)


def _features(bundle: Bundle, parts: list[ColumnBatch]) -> Stage:
    engine, roles = make_engine(bundle).features, bundle.schema.roles
    engine.warm_up()
    for part in parts[: len(parts) // 2]:
        engine.update(part)
    rest = parts[len(parts) // 2 :]
    totals: dict[tuple[str, int], list[float]] = {}

    def plain(number: int) -> object:
        """Count, mean and maximum of card and terminal without windows: a tenth of the engine's features."""
        part = rest[number % len(rest)]
        rows = zip(part[roles.card].tolist(), part[roles.terminal].tolist(), part[roles.amount].tolist(), strict=True)
        features = []
        for card, terminal, amount in rows:
            row = []
            for key in (("card", card), ("terminal", terminal)):
                total = totals.setdefault(key, [0.0, 0.0, 0.0])
                total[0] += 1
                total[1] += amount
                total[2] = max(total[2], amount)
                row += [total[0], total[1] / total[0], total[2]]
            features.append(row)
        return np.array(features, np.float32)

    return Stage("features", lambda number: engine.update(rest[number % len(rest)]), plain)


def _screener(bundle: Bundle, parts: list[ColumnBatch]) -> Stage:
    engine = make_engine(bundle)
    rows = [engine.features.update(part).features for part in parts[: 4 * BATCHES_A_TURN]]
    booster = lightgbm.Booster(model_str=bundle.content["screener.txt"].decode())
    return Stage(
        "screener",
        lambda number: engine._screener.score(rows[number % len(rows)]),
        lambda number: booster.predict(rows[number % len(rows)], raw_score=True, num_threads=1),
    )


def _duplicates(bundle: Bundle, parts: list[ColumnBatch]) -> Stage:
    roles, cache = bundle.schema.roles, FirstDecisions(DuplicateSettings())
    seen: dict[tuple[int, int, float], int] = {}
    state = {"offset": 0}

    def look_up(number: int) -> object:
        part = parts[number]
        offsets = state["offset"] + np.arange(part.rows)
        state["offset"] += part.rows
        return cache.look_up(Table.of("transactions", part, ("1",), offset=offsets, appended_ms=1), roles)

    def plain(number: int) -> object:
        part = parts[number]
        ids, cards, amounts = (part[name].tolist() for name in (roles.transaction_id, roles.card, roles.amount))
        return [seen.setdefault(key, len(seen)) for key in zip(ids, cards, amounts, strict=True)]

    return Stage("duplicates", look_up, plain)


def _encode(bundle: Bundle, parts: list[ColumnBatch]) -> Stage:
    roles, chance = bundle.schema.roles, np.random.default_rng(1)
    encoder = msgspec.json.Encoder()
    scores = [chance.random(part.rows) for part in parts[: 2 * BATCHES_A_TURN]]
    tables = [screened_table(part, roles, score) for part, score in zip(parts, scores, strict=False)]
    every = [np.arange(len(table)) for table in tables]

    def write(number: int) -> object:
        index = number % len(tables)
        return encode("json", tables[index], every[index], roles.transaction_id)

    def plain(number: int) -> object:
        index = number % len(tables)
        return [encoder.encode(each) for each in decisions(tables[index], every[index], roles.transaction_id)]

    return Stage("encode decisions", write, plain)


def screened_table(batch: ColumnBatch, roles: Roles, scores: Float64) -> Table:
    """A table of transactions that the screener has decided, with these scores (float64, [rows])."""
    return Table.of(
        "transactions", batch, ("1",), offset=np.arange(batch.rows), event_time_ms=batch[roles.event_time],
        score=scores, screener_score=scores, queue_ms=scores, features_ms=scores, screener_ms=scores,
        decided_ms=batch[roles.event_time], start_ms=batch[roles.event_time] - scores,
    )  # fmt: skip


def show_stages(report: StagesReport, console: Console) -> None:
    """Prints the report as a table, a row a stage."""
    table = figure_table("CPU µs a transaction", "Cascade", "plain Python", "ratio", "least–largest")
    for timing in report.stages:
        table.add_row(
            timing.stage,
            f"{timing.us_per_transaction:.2f}",
            f"{timing.plain_us_per_transaction:.2f}",
            f"{timing.ratio:.1f} ×",
            f"{timing.spread[0]:.1f}–{timing.spread[1]:.1f}",
        )
    method = f"one thread, batches of {report.batch:,}; medians of {report.rounds} rounds in which both take turns"
    print_table(console, table, method, origin(report.machine, report.seed))
