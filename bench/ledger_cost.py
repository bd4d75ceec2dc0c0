"""What the ledger costs: CPU time of its records of a micro-batch, and of its work every second.

On a shared machine, a whole service with a ledger differs from a service without it by less than from run to run
(`cascade bench pipeline --scenario ledger`). So this benchmark calls the ledger alone, as the worker does, and gives
its share of the CPU time that the worker spends on the same batch, ledger included. Both run by turns in one thread.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from prometheus_client import generate_latest
from rich.console import Console

from bench.cluster import EndlessData, simulated
from bench.stages import CARDS, DAYS, TERMINALS, screened_table
from bench.tables import figure_table, print_table
from bench.turns import Spread, by_turns, seconds_of
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.columns import ByteColumn, Float64
from cascade.config import CarbonSettings
from cascade.ledger import (
    CpuModelMeter,
    DecidedRecords,
    Journal,
    Ledger,
    StageLaps,
    ledger_registry,
    make_carbon,
)
from cascade.ledger.machine import Machine, describe_machine
from stages.assembly import make_engine
from streaming.codecs import codec
from streaming.pipeline.encode import encode
from streaming.pipeline.table import Records

BATCHES = (1, 10, 100, 1_000)
FOLDED_ROWS = 100_000
ROWS_A_TURN = 20_000
CALLS_A_TURN_MAX = 400
_cpu_s = partial(seconds_of, clock=time.thread_time)


class BatchCost(msgspec.Struct, frozen=True, kw_only=True):
    """CPU µs for a micro-batch of `rows`, medians: of the ledger, and of decoding, features, screener and encoding.

    `share`: of the ledger in both together; `spread`: its least and largest.
    """

    rows: int
    ledger_us: float
    work_us: float
    share: float
    spread: tuple[float, float]


class LedgerCostReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `cascade bench ledger`.

    `second_us`: CPU µs of the work that is done once a second, by name: a sample of the meters, a journal line on the
    disk, a scrape. `account_bytes`: size of a journal line; `histogram_bytes`: of all counts in memory.
    """

    batches: list[BatchCost]
    second_us: dict[str, float]
    account_bytes: int
    histogram_bytes: int
    rounds: int
    seed: int
    machine: Machine


def run_ledger_cost(rounds: int, seed: int) -> LedgerCostReport:
    """Measures the ledger at each batch size; `seed`: of the data."""
    bundle = load_bundle(SHIPPED_BUNDLE)
    schema, roles = bundle.schema, bundle.schema.roles
    data = EndlessData(schema, simulated(schema, cards=CARDS, terminals=TERMINALS, days=DAYS, seed=seed))
    engine, reader = make_engine(bundle), codec("json", schema.fields, 65_536)
    engine.warm_up(max(BATCHES))
    engine.fold(data.rows(0, FOLDED_ROWS).batch)
    # each row comes once: rows that come again would be late, which costs several times as much
    needed = (rounds + 1) * sum(rows * _calls(rows) for rows in BATCHES)
    # a column, as the default client fetches them
    messages = ByteColumn.of(reader.encode(data.rows(FOLDED_ROWS, FOLDED_ROWS + needed).batch))
    taken = 0
    carbon = make_carbon(CarbonSettings(region="DEU"))
    ledger = Ledger(meters=[CpuModelMeter([os.getpid()], 7.0)], watts_per_core=7.0, carbon=carbon)
    chance = np.random.default_rng(seed)

    def decide(rows: int) -> None:
        nonlocal taken
        part = reader.decode(messages[taken : taken + rows]).batch
        taken += rows
        table = screened_table(part, roles, engine.screen(part, None).probability)
        encode("json", table, np.arange(rows), roles.transaction_id)

    return LedgerCostReport(
        batches=[_batch_cost(rows, rounds, ledger, decide, chance.lognormal(-5.5, 0.4, rows)) for rows in BATCHES],
        second_us=_second_us(ledger, rounds),
        account_bytes=len(ledger.account().to_json()),
        histogram_bytes=histogram_bytes(ledger),
        rounds=rounds,
        seed=seed,
        machine=describe_machine(),
    )


def _calls(rows: int) -> int:
    """The number of micro-batches of so many rows in a turn."""
    return min(ROWS_A_TURN // rows, CALLS_A_TURN_MAX)


def _batch_cost(rows: int, rounds: int, ledger: Ledger, decide: Callable[[int], None], latency_s: Float64) -> BatchCost:
    calls = _calls(rows)
    laps, records = StageLaps(), Records("transactions", np.zeros(rows, np.int64), np.arange(rows))

    def record_all() -> None:
        for _ in range(calls):
            record_batch(ledger, laps, latency_s, records)

    def decide_all() -> None:
        for _ in range(calls):
            decide(rows)

    seconds = by_turns({"ledger": partial(_cpu_s, record_all), "work": partial(_cpu_s, decide_all)}, rounds)
    share = Spread.of(seconds["ledger"] / (seconds["ledger"] + seconds["work"]))
    return BatchCost(
        rows=rows,
        ledger_us=1e6 * float(np.median(seconds["ledger"])) / calls,
        work_us=1e6 * float(np.median(seconds["work"])) / calls,
        share=share.median,
        spread=(share.least, share.largest),
    )


def record_batch(ledger: Ledger, laps: StageLaps, latency_s: Float64, records: DecidedRecords) -> None:
    """Records a micro-batch of screened transactions as the worker does, with its stamps of the clocks.

    latency_s (float64 [rows]): of the decisions, and of the waits before them. records: of the decisions.
    """
    rows = len(latency_s)
    laps.begin()
    laps.end("decode", rows)
    laps.skip()
    laps.end("features", rows)
    laps.end("screener", rows)
    laps.skip()
    laps.end("decide", rows)
    laps.end("produce", rows)
    ledger.record_batch(laps, latency_s)
    ledger.record_decisions("screened", latency_s, None, records)


def histogram_bytes(ledger: Ledger) -> int:
    """Memory of all counts of a ledger, bytes."""
    counters = ledger.counters()
    histograms = [*counters.paths.values(), *counters.stages.values(), counters.deep_calls, counters.recoveries]
    return sum(histogram.nbytes for histogram in histograms)


def _second_us(ledger: Ledger, rounds: int) -> dict[str, float]:
    registry = ledger_registry(ledger)
    with tempfile.TemporaryDirectory() as directory:
        journal = Journal(Path(directory), ledger.account, file_bytes_max=10**9, files_max=2)
        jobs: dict[str, Callable[[], object]] = {
            "sample": ledger.sample_energy,
            "journal": journal.write,
            "scrape": lambda: generate_latest(registry),
        }
        seconds = by_turns({name: partial(_cpu_s, job) for name, job in jobs.items()}, 10 * rounds)
        journal.close()
    return {name: 1e6 * float(np.median(values)) for name, values in seconds.items()}


def show_ledger_cost(report: LedgerCostReport, console: Console) -> None:
    """Prints the report as a table, a row a batch size."""
    table = figure_table(None, "rows", "ledger µs", "work µs", "share", "least–largest", "µs a row")
    for cost in report.batches:
        table.add_row(
            f"{cost.rows:,}",
            f"{cost.ledger_us:.1f}",
            f"{cost.work_us:,.1f}",
            f"{cost.share:.2%}",
            f"{cost.spread[0]:.2%}–{cost.spread[1]:.2%}",
            f"{cost.ledger_us / cost.rows:.3f}",
        )
    each = ", ".join(f"{name} {value:,.0f}" for name, value in report.second_us.items())
    core_share = sum(report.second_us.values()) / 1e6
    print_table(
        console,
        table,
        "CPU time of a micro-batch; work: decode, features, screener, encode",
        "without fetching, sending and the clients' threads: the share of a whole",
        "service is smaller",
        f"each second, µs of CPU: {each}; together {core_share:.2%} of a core",
        f"memory: {report.histogram_bytes:,} bytes of counts, a fixed size;",
        f"a journal line: {report.account_bytes:,} bytes",
        f"medians of {report.rounds} rounds by turns; seed {report.seed}",
        report.machine.text,
    )
