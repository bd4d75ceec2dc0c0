"""`cascade delivery`: measures the cost of exactly-once delivery against at-least-once delivery, in one run.

Both modes take turns on the same machine, broker, Triton and data. Throughput: the worker decides a backlog at full
speed. Latency: from the append of a transaction, at a steady rate, until a `read_committed` consumer in another process
has the decision. The worker's own ledger measures less: with exactly-once delivery a decision becomes visible when its
transaction is committed.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from rich.console import Console

from bench.cluster import SteadyLoad, end_offsets, origin, read_transactions, simulated
from bench.embedded import EmbeddedParts, ServiceProcess, fresh_directory, new_names, play_file, wait_for_decisions
from bench.observer import SCREENED, Observations, Observer
from bench.tables import figure_table, print_table, publish
from bench.turns import Spread
from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle
from cascade.columns import Bool, Float64
from cascade.config import Config, load_config
from cascade.errors import CascadeError
from cascade.frames import LabelledData
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import Steps

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
MODES = ("at-least-once", "exactly-once")
PARTITIONS = 2
# The first seconds of the live part, in which the broker's JVM still compiles; they are left out.
WARM_UP_S = 3.0
# Deadlines count from the fetch, since a backlog's append times are long past.
SETTINGS: dict[str, Any] = {"deadline": {"start": "fetch", "budget_ms": 1_000}}


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of a mode.

    `per_second`: decisions a second on the backlog. `screened`: number of screened decisions of the live part;
    `p50_ms`, `p99_ms`: their latency from append to visible decision.
    """

    mode: str
    per_second: float
    screened: int
    p50_ms: float
    p99_ms: float


class DeliveryReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of `cascade delivery`.

    `ratios`: exactly-once divided by at-least-once within each round, of `per_second`, `p50_ms` and `p99_ms`.
    """

    turns: list[Turn]
    ratios: dict[str, Spread]
    rounds: int
    backlog: int
    rate: float
    seconds: float
    nodes: int
    transaction_interval_ms: int
    commit_interval_ms: int
    seed: int
    machine: Machine
    elapsed_s: float


@app.command()
def delivery(
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Number of turns of each mode.")] = 3,
    backlog: Annotated[int, typer.Option(min=1_000, help="Transactions of the backlog.")] = 60_000,
    rate: Annotated[float, typer.Option(min=10.0, help="Transactions a second of the live part.")] = 500.0,
    seconds: Annotated[float, typer.Option(min=5.0, help="Duration of the live part.")] = 20.0,
    nodes: Annotated[int, typer.Option(min=1, max=3, help="Kafka nodes; 3 also means three replicas.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the data.")] = 1,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/delivery"),
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Measure throughput and latency of exactly-once against at-least-once delivery, by turns."""
    publish(run_delivery(out, rounds, backlog, rate, seconds, nodes, seed), show, json)


def run_delivery(
    out: Path, rounds: int, backlog: int, rate: float, seconds: float, nodes: int, seed: int
) -> DeliveryReport:
    """Run `cascade delivery`; the command's options explain the arguments."""
    started_s = time.monotonic()
    directory = fresh_directory(out)
    bundle = load_bundle(SHIPPED_BUNDLE)
    data = _simulated_rows(bundle, backlog, seed)
    turns: list[Turn] = []
    with Steps() as progress, ExitStack() as stack:
        progress("start Kafka and Triton", 0.0)
        parts = stack.enter_context(EmbeddedParts(directory, bundle, nodes=nodes))
        progress("start Kafka and Triton", 1.0)
        for number in range(rounds * len(MODES)):
            path = _config(parts, MODES[number % len(MODES)])
            turns.append(_turn(path, data, backlog, rate, seconds))
            progress("measure, by turns", len(turns) / (rounds * len(MODES)))
        config = load_config(path)
    return DeliveryReport(
        turns=turns,
        ratios={name: _ratio(turns, name) for name in ("per_second", "p50_ms", "p99_ms")},
        rounds=rounds,
        backlog=backlog,
        rate=rate,
        seconds=seconds,
        nodes=nodes,
        transaction_interval_ms=config.worker.transaction_interval_ms,
        commit_interval_ms=config.worker.commit_interval_ms,
        seed=seed,
        machine=describe_machine(),
        elapsed_s=time.monotonic() - started_s,
    )


def _simulated_rows(bundle: Bundle, rows: int, seed: int) -> LabelledData:
    # a card makes slightly more than one transaction a day
    data = simulated(bundle.schema, cards=max(rows // 30, 10), terminals=max(rows // 30, 10), days=40, seed=seed)
    if data.batch.rows < rows:
        raise CascadeError(f"the simulator returned {data.batch.rows} transactions, {rows} are needed")
    return data


def _config(parts: EmbeddedParts, mode: str) -> Path:
    """Write a configuration with new topics and a new group, so that a turn sees nothing of an earlier one."""
    kafka = new_names()
    return parts.write_config(
        f"{mode}-{kafka['group']}.toml", SETTINGS | {"kafka": kafka, "delivery": mode}, PARTITIONS
    )


def _turn(path: Path, data: LabelledData, backlog: int, rate: float, seconds: float) -> Turn:
    config, bundle = load_config(path), load_bundle(SHIPPED_BUNDLE)
    play_file(config, data, slice(0, backlog), None, lambda _: None)
    boundary = end_offsets(config, config.kafka.topics.transactions)
    with Observer(path) as observer, ServiceProcess(path) as service:
        service.wait_ready()
        wait_for_decisions(service, backlog, lambda _: None)
        load = SteadyLoad(config, bundle.schema, data, rate, first=backlog)
        load.start()
        time.sleep(seconds)
        rows = load.stop()
        wait_for_decisions(service, rows, lambda _: None)
        # for the commit of the last transaction, and the observer's last fetch
        time.sleep(1.0)
        seen = observer.end()
        service.stop()
    if len(seen.offset) < rows:
        raise CascadeError(f"the observer saw {len(seen.offset):,} of {rows:,} decisions")
    live = seen.offset >= np.array([boundary[number] for number in range(PARTITIONS)])[seen.partition]
    latency_ms = _latencies_ms(config, seen, live & (seen.path == SCREENED))
    p50, p99 = np.quantile(latency_ms, [0.5, 0.99])
    return Turn(
        mode=config.delivery,
        per_second=_rate(seen.seen_s[~live]),
        screened=len(latency_ms),
        p50_ms=float(p50),
        p99_ms=float(p99),
    )


def _rate(seen_s: Float64) -> float:
    """Rows a second, from the first fetch on; its own rows do not count, since their duration is unknown."""
    rest = seen_s[seen_s > seen_s[0]]
    return float(len(rest) / (seen_s[-1] - seen_s[0])) if len(rest) else float("nan")


def _latencies_ms(config: Config, seen: Observations, chosen: Bool) -> Float64:
    """Time from append to visible decision of the `chosen` rows after the warm-up, ms."""
    logged = read_transactions(config, load_bundle(SHIPPED_BUNDLE).schema)
    # rows are sorted by partition, and offsets have no gaps, since nothing else writes to the topic
    starts = np.searchsorted(logged.partition, np.arange(PARTITIONS))
    appended_ms = logged.appended_ms[starts[seen.partition] + seen.offset].astype(np.float64)[chosen]
    latency_ms = seen.seen_s[chosen] * 1e3 - appended_ms
    warm: Float64 = latency_ms[appended_ms >= appended_ms.min() + WARM_UP_S * 1e3]
    return warm


def _ratio(turns: list[Turn], name: str) -> Spread:
    by_mode = {mode: np.array([getattr(turn, name) for turn in turns if turn.mode == mode]) for mode in MODES}
    return Spread.of(by_mode["exactly-once"] / by_mode["at-least-once"])


def show(report: DeliveryReport, console: Console) -> None:
    """Print the report."""
    table = figure_table("delivery", "backlog tx/s", "screened", "p50 ms", "p99 ms")
    for turn in report.turns:
        figures = f"{turn.per_second:,.0f}", f"{turn.screened:,}", f"{turn.p50_ms:.1f}", f"{turn.p99_ms:.1f}"
        table.add_row(turn.mode, *figures)
    table.add_section()
    ratios = [report.ratios[name] for name in ("per_second", "p50_ms", "p99_ms")]
    medians = [f"{ratio.median:.2f} ×" for ratio in ratios]
    spreads = [f"{ratio.least:.2f}–{ratio.largest:.2f}" for ratio in ratios]
    table.add_row("exactly / at least", medians[0], "", *medians[1:], style="bold")
    table.add_row("least–largest", spreads[0], "", *spreads[1:])
    print_table(
        console,
        table,
        f"backlog: {report.backlog:,} transactions; live: {report.rate:,.0f}/s for {report.seconds:g} s;"
        f" Kafka nodes: {report.nodes}; {report.elapsed_s:,.0f} s",
        "p50, p99: from append until a read_committed consumer has the decision",
        f"Kafka transactions every {report.transaction_interval_ms} ms; at-least-once commits every"
        f" {report.commit_interval_ms} ms",
        origin(report.machine, report.seed),
    )
