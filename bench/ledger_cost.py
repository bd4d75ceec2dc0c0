"""What the ledger costs: CPU time of everything it is told for a micro-batch, and of what it does every second.

Whole services with and without it differ by less than one run differs from the next on a shared machine (`cascade bench
pipeline --scenario ledger`); so here is the ledger alone, as the worker calls it, and its share of what the worker
spends on such a batch with the ledger's part in it, both in one thread and by turns.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from prometheus_client import generate_latest
from rich import box
from rich.console import Console
from rich.table import Table

from bench.cluster import simulated
from bench.stages import CARDS, DAYS, TERMINALS
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.columns import Float64
from cascade.config import CarbonSettings
from cascade.ledger import CpuModelMeter, Journal, Ledger, StageClock, ledger_registry, make_carbon
from cascade.ledger.machine import Machine, describe_machine
from stages.assembly import make_engine
from streaming.codecs import codec
from streaming.decisions import DecisionColumns, encode_decisions

BATCHES = (1, 10, 100, 1_000)
ROWS_A_TURN = 20_000
CALLS_A_TURN_MAX = 400


class BatchCost(msgspec.Struct, frozen=True, kw_only=True):
    """Of a micro-batch of `rows`: CPU µs of the ledger, and of decoding, features, screener and encoding. Medians."""

    rows: int
    ledger_us: float
    work_us: float
    share: float
    spread: tuple[float, float]


class LedgerCostReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `cascade bench ledger` saw.

    `second_us`: CPU µs of what happens once a second: the meters' sample, a line of the journal on the disk, a scrape.
    `account_bytes`: of a line; `histogram_bytes`: of all counts in memory, whatever has happened.
    """

    batches: list[BatchCost]
    second_us: dict[str, float]
    account_bytes: int
    histogram_bytes: int
    rounds: int
    seed: int
    machine: Machine


def run_ledger_cost(rounds: int, seed: int) -> LedgerCostReport:
    """Measure everything."""
    bundle = load_bundle(SHIPPED_BUNDLE)
    data = simulated(bundle.schema, CARDS, TERMINALS, DAYS, seed).batch
    engine, reader = make_engine(bundle), codec("json", bundle.schema.fields, 65_536)
    engine.features.warm_up()
    engine.fold(data.take(np.arange(100_000)))
    roles = bundle.schema.roles
    carbon = make_carbon(CarbonSettings(region="DEU"))
    ledger = Ledger(meters=[CpuModelMeter([os.getpid()], 7.0)], watts_per_core=7.0, carbon=carbon)
    chance = np.random.default_rng(seed)

    def work(first: int, rows: int) -> None:
        part = reader.decode(messages[first : first + rows]).batch
        screened = engine.screen(part, None)
        codes, offsets, none = np.zeros(rows, np.uint8), np.arange(rows), np.zeros(rows)
        encode_decisions(
            "json",
            DecisionColumns(
                "transactions", 0, ["1"] * rows, offsets, np.full(rows, -1), part[roles.transaction_id], codes, codes,
                screened.probability, screened.probability, codes, part[roles.event_time], part[roles.event_time], none,
                none, none, none, none,
            ),
        )  # fmt: skip

    messages = reader.encode(data.take(np.arange(100_000, 100_000 + 2 * ROWS_A_TURN)))
    found = []
    for rows in BATCHES:
        calls = min(ROWS_A_TURN // rows, CALLS_A_TURN_MAX)
        costs: dict[str, list[float]] = {"ledger": [], "work": []}
        for round_ in range(rounds + 1):
            latency_s = chance.lognormal(-5.5, 0.4, rows)
            for name in ("ledger", "work"):
                started_s = time.thread_time()
                for call in range(calls):
                    if name == "ledger":
                        tell(ledger, latency_s, rows)
                    else:
                        work(call * rows, rows)
                if round_:  # the first is for the caches
                    costs[name].append(1e6 * (time.thread_time() - started_s) / calls)
        shares = np.array(costs["ledger"]) / (np.array(costs["ledger"]) + np.array(costs["work"]))
        found.append(
            BatchCost(
                rows=rows, ledger_us=float(np.median(costs["ledger"])), work_us=float(np.median(costs["work"])),
                share=float(np.median(shares)), spread=(float(shares.min()), float(shares.max())),
            )
        )  # fmt: skip
    counters = ledger.counters()
    held = [*counters.paths.values(), *counters.stages.values(), counters.deep_calls, counters.recoveries]
    return LedgerCostReport(
        batches=found, second_us=_second(ledger, rounds), account_bytes=len(ledger.account().to_json()),
        histogram_bytes=sum(one._counts.nbytes for one in held), rounds=rounds, seed=seed, machine=describe_machine(),
    )  # fmt: skip


def tell(ledger: Ledger, latency_s: Float64, rows: int) -> None:
    """All that the worker tells for a micro-batch of certain transactions, its clocks around the stages included."""
    clock = StageClock()
    ledger.record_queue(latency_s)
    for stage in ("decode", "features", "screener", "decide", "produce"):
        with clock:
            pass
        ledger.record_stage(stage, clock.wall_s, clock.cpu_s, rows)
    ledger.record_decisions("screened", latency_s)


def _second(ledger: Ledger, rounds: int) -> dict[str, float]:
    registry = ledger_registry(ledger)
    with tempfile.TemporaryDirectory() as directory:
        journal = Journal(Path(directory), ledger.account, file_bytes_max=10**9, files_max=2)
        jobs: dict[str, Callable[[], object]] = {
            "sample": ledger.sample_energy,
            "journal": journal.write,
            "scrape": lambda: generate_latest(registry),
        }
        costs: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(10 * rounds):
            for name, job in jobs.items():
                started_s = time.thread_time()
                job()
                costs[name].append(1e6 * (time.thread_time() - started_s))
        journal.close()
    return {name: float(np.median(one)) for name, one in costs.items()}


def show_ledger_cost(report: LedgerCostReport, console: Console) -> None:
    """Print the report."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1), show_edge=False)
    for name in ("rows", "ledger µs", "work µs", "share", "least–largest", "µs a row"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in report.batches:
        table.add_row(
            f"{one.rows:,}", f"{one.ledger_us:.1f}", f"{one.work_us:,.1f}", f"{one.share:.2%}",
            f"{one.spread[0]:.2%}–{one.spread[1]:.2%}", f"{one.ledger_us / one.rows:.3f}",
        )  # fmt: skip
    seconds = ", ".join(f"{name} {value:,.0f}" for name, value in report.second_us.items())
    whole = sum(report.second_us.values())
    console.print()
    console.print(table)
    console.print(
        "\n CPU time of a micro-batch; work: decode, features, screener, encode. Fetching, sending and the clients'\n"
        f" threads are not in it, so the share of a whole service is smaller\n each second, µs of CPU: {seconds};"
        f" together {whole / 1e4:.2f} % of a core\n memory: {report.histogram_bytes:,} bytes of counts, whatever"
        f" happens; a journal line {report.account_bytes:,} bytes\n medians of {report.rounds} rounds by turns;"
        f" {report.machine.text}; seed {report.seed}",
        highlight=False,
    )
