"""Single stages: what each costs a transaction, and beside it the plain way to do the same, by turns in one run.

CPU time of one thread, at one batch size. The plain way is what most people write: `json.loads`, dictionaries of
totals, LightGBM's `predict`, a record a decision. It is a yardstick that moves with the machine, so the ratio says
whether a stage became slower, where microseconds would say how busy the machine was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import lightgbm
import msgspec
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bench.cluster import origin, simulated
from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle
from cascade.columns import ColumnBatch
from cascade.config import DuplicateSettings
from cascade.ledger.machine import Machine, describe_machine
from stages.assembly import make_engine
from streaming.codecs import codec
from streaming.decisions import DecisionColumns, _decisions, encode_decisions
from streaming.duplicates import FirstDecisions

CARDS, TERMINALS, DAYS = 20_000, 20_000, 20
BATCHES_A_TURN = 12
Work = Callable[[int], object]


class StageTiming(msgspec.Struct, frozen=True, kw_only=True):
    """A stage: medians over the rounds; `ratio`: how many times the plain way's cost; `spread`: least and largest."""

    stage: str
    us_per_transaction: float
    plain_us_per_transaction: float
    ratio: float
    spread: tuple[float, float]


class StagesReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `cascade bench stages` saw."""

    stages: list[StageTiming]
    batch: int
    rounds: int
    seed: int
    machine: Machine


@dataclass(frozen=True, slots=True)
class Stage:
    """Two ways to do the same with the batch of that number."""

    name: str
    ours: Work
    plain: Work


def run_stages(batch: int, rounds: int, seed: int) -> StagesReport:
    """Measure every stage."""
    bundle = load_bundle(SHIPPED_BUNDLE)
    data = simulated(bundle.schema, CARDS, TERMINALS, DAYS, seed).batch
    count = data.rows // batch
    parts = [data.take(np.arange(number * batch, (number + 1) * batch)) for number in range(count)]
    timings = [_timed(stage, count, batch, rounds) for stage in _stages(bundle, parts)]
    return StagesReport(stages=timings, batch=batch, rounds=rounds, seed=seed, machine=describe_machine())


def _timed(stage: Stage, count: int, batch: int, rounds: int) -> StageTiming:
    next_batch, cost = 0, {"ours": [0.0] * 0, "plain": [0.0] * 0}
    for round_ in range(rounds + 1):
        for name, work in (("ours", stage.ours), ("plain", stage.plain)):
            numbers = [(next_batch + step) % count for step in range(BATCHES_A_TURN)]
            started_s = time.thread_time()
            for number in numbers:
                work(number)
            if round_:  # the first is for the caches
                cost[name].append((time.thread_time() - started_s) / (BATCHES_A_TURN * batch) * 1e6)
        next_batch += BATCHES_A_TURN
    ratios = np.array(cost["plain"]) / np.array(cost["ours"])
    return StageTiming(
        stage=stage.name, us_per_transaction=float(np.median(cost["ours"])),
        plain_us_per_transaction=float(np.median(cost["plain"])), ratio=float(np.median(ratios)),
        spread=(float(ratios.min()), float(ratios.max())),
    )  # fmt: skip


def _stages(bundle: Bundle, parts: list[ColumnBatch]) -> list[Stage]:
    return [
        _decode(bundle, parts), _features(bundle, parts), _screener(bundle, parts), _duplicates(bundle, parts),
        _encode(bundle, parts),
    ]  # fmt: skip


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
        """Count, sum and maximum since ever, of card and terminal: a tenth of what the engine gives."""
        part = rest[number % len(rest)]
        rows = zip(part[roles.card].tolist(), part[roles.terminal].tolist(), part[roles.amount].tolist(), strict=True)
        found = []
        for card, terminal, amount in rows:
            row = []
            for key in (("card", card), ("terminal", terminal)):
                total = totals.setdefault(key, [0.0, 0.0, 0.0])
                total[0] += 1
                total[1] += amount
                total[2] = max(total[2], amount)
                row += [total[0], total[1] / total[0], total[2]]
            found.append(row)
        return np.array(found, np.float32)

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

    def ours(number: int) -> object:
        part = parts[number]
        offsets = state["offset"] + np.arange(part.rows)
        state["offset"] += part.rows
        return cache.look_up(part, roles, np.zeros(part.rows, np.int64), offsets, np.full(part.rows, 1, np.int64))

    def plain(number: int) -> object:
        part = parts[number]
        ids, cards, amounts = (part[name].tolist() for name in (roles.transaction_id, roles.card, roles.amount))
        return [seen.setdefault(key, len(seen)) for key in zip(ids, cards, amounts, strict=True)]

    return Stage("duplicates", ours, plain)


def _encode(bundle: Bundle, parts: list[ColumnBatch]) -> Stage:
    roles, chance = bundle.schema.roles, np.random.default_rng(1)
    encoder = msgspec.json.Encoder()

    def columns(number: int) -> DecisionColumns:
        part = parts[number]
        rows, scores = part.rows, chance.random(part.rows)
        codes, offsets = np.zeros(rows, np.uint8), np.arange(rows)
        return DecisionColumns(
            "transactions", 0, ["1"] * rows, offsets, np.full(rows, -1), part[roles.transaction_id], codes, codes,
            scores, scores, codes, part[roles.event_time], part[roles.event_time], scores, scores, scores, scores,
            scores,
        )  # fmt: skip

    made = [columns(number) for number in range(2 * BATCHES_A_TURN)]
    return Stage(
        "encode decisions",
        lambda number: encode_decisions("json", made[number % len(made)]),
        lambda number: [encoder.encode(one) for one in _decisions(made[number % len(made)])],
    )


def show_stages(report: StagesReport, console: Console) -> None:
    """Print the report."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1), show_edge=False)
    table.add_column("CPU µs a transaction", no_wrap=True)
    for name in ("ours", "the plain way", "ratio", "least–largest"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in report.stages:
        table.add_row(
            one.stage, f"{one.us_per_transaction:.2f}", f"{one.plain_us_per_transaction:.2f}", f"{one.ratio:.1f} ×",
            f"{one.spread[0]:.1f}–{one.spread[1]:.1f}",
        )  # fmt: skip
    console.print()
    console.print(table)
    console.print(
        f"\n one thread, batches of {report.batch:,}, medians of {report.rounds} rounds, by turns\n"
        f" {origin(report.machine, report.seed)}",
        highlight=False,
    )
