"""`cascade delivery`: what exactly-once costs, against at-least-once, in one run.

Both modes take turns on the same machine, broker, Triton and data. Throughput: a backlog that is there already, worked
off at full speed. Latency: transactions at a steady rate, from the broker's stamp (append) until a consumer downstream,
in a process of its own and reading what is committed only, has the decision in hand. The worker's own ledger ends
before that: with exactly-once a decision shows when its transaction is committed.
"""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bench.cluster import SteadyLoad, ends_of, origin, read_transactions, simulated, write_json
from bench.embedded import EmbeddedParts, ServiceProcess, fresh_directory, play_file, wait_for_decisions
from bench.observer import Observer, Seen
from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle
from cascade.columns import Float64
from cascade.config import Config, load_config
from cascade.errors import CascadeError
from cascade.frames import LabelledData
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import Steps

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
MODES = ("at-least-once", "exactly-once")
PARTITIONS = 2
# Seconds of the live part that are not counted: the compiler of the broker, and the processor's caches, settle.
WARM_UP_S = 3.0
# A backlog's append times are long past: deadlines count from the fetch.
SETTINGS: dict[str, Any] = {"deadline": {"start": "fetch", "budget_ms": 1_000}}


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One mode's turn: decisions a second on the backlog; screened append-to-visible latency on the live part."""

    mode: str
    per_second: float
    screened: int
    p50_ms: float
    p99_ms: float


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """Exactly-once over at-least-once, round by round: the median, the least and the largest."""

    median: float
    least: float
    largest: float


class DeliveryReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `cascade delivery` saw; `ratios` of `per_second`, `p50_ms` and `p99_ms`."""

    turns: list[Turn]
    ratios: dict[str, Ratio]
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
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Each mode's turns.")] = 3,
    backlog: Annotated[int, typer.Option(min=1_000, help="Transactions of the backlog.")] = 60_000,
    rate: Annotated[float, typer.Option(min=10.0, help="Transactions a second of the live part.")] = 500.0,
    seconds: Annotated[float, typer.Option(min=5.0, help="Length of the live part.")] = 20.0,
    nodes: Annotated[int, typer.Option(min=1, max=3, help="Of Kafka; 3 keep each record three times.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the data.")] = 1,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/delivery"),
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Measure throughput and latency with exactly-once against at-least-once delivery, by turns."""
    report = run_delivery(out, rounds, backlog, rate, seconds, nodes, seed)
    if json is not None:
        write_json(json, report)
    show(report, Console())


def run_delivery(
    out: Path, rounds: int, backlog: int, rate: float, seconds: float, nodes: int, seed: int
) -> DeliveryReport:
    """See `delivery`."""
    started_s = time.monotonic()
    directory = fresh_directory(out)
    bundle = load_bundle(SHIPPED_BUNDLE)
    data = _enough(bundle, backlog, seed)
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


def _enough(bundle: Bundle, rows: int, seed: int) -> LabelledData:
    # a card makes somewhat more than one transaction a day
    data = simulated(bundle.schema, cards=max(rows // 30, 10), terminals=max(rows // 30, 10), days=40, seed=seed)
    if data.batch.rows < rows:
        raise CascadeError(f"the simulator gave {data.batch.rows} transactions, {rows} are needed")
    return data


def _config(parts: EmbeddedParts, mode: str) -> Path:
    """A configuration with topics and a group of its own: nothing of an earlier turn is there."""
    name = uuid.uuid4().hex[:8]
    topics = {topic: f"{topic.replace('_', '-')}-{name}" for topic in Config().kafka.topics.__struct_fields__}
    own = {"kafka": {"topics": topics, "group": f"group-{name}"}, "delivery": mode}
    return parts.write_config(f"{mode}-{name}.toml", SETTINGS | own, PARTITIONS)


def _turn(path: Path, data: LabelledData, backlog: int, rate: float, seconds: float) -> Turn:
    config, bundle = load_config(path), load_bundle(SHIPPED_BUNDLE)
    play_file(config, data, slice(0, backlog), None, lambda _: None)
    boundary = ends_of(config, config.kafka.topics.transactions)
    with Observer(path) as observer, ServiceProcess(path) as service:
        service.wait_ready()
        wait_for_decisions(service, backlog, lambda _: None)
        load = SteadyLoad(config, bundle.schema, data, rate, first=backlog)
        load.start()
        time.sleep(seconds)
        rows = load.stop()
        wait_for_decisions(service, rows, lambda _: None)
        # the last transaction's commit, and the observer's last fetch
        time.sleep(1.0)
        seen = observer.end()
        service.stop()
    if len(seen.offset) < rows:
        raise CascadeError(f"the observer saw {len(seen.offset):,} of {rows:,} decisions")
    late = seen.offset >= np.array([boundary[number] for number in range(PARTITIONS)])[seen.partition]
    latency_ms = _latencies_ms(config, seen, late & seen.screened())
    p50, p99 = np.quantile(latency_ms, [0.5, 0.99])
    return Turn(
        mode=config.delivery,
        per_second=_rate(seen.seen_s[~late]),
        screened=len(latency_ms),
        p50_ms=float(p50),
        p99_ms=float(p99),
    )


def _rate(seen_s: Float64) -> float:
    """Rows a second, without those of the first fetch, before which nobody looked at the clock."""
    rest = seen_s[seen_s > seen_s[0]]
    return float(len(rest) / (seen_s[-1] - seen_s[0])) if len(rest) else float("nan")


def _latencies_ms(config: Config, seen: Seen, chosen: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Float64:
    """From append to visible, ms, of the chosen rows; those of the first seconds are left out."""
    logged = read_transactions(config, load_bundle(SHIPPED_BUNDLE).schema)
    # one row an offset from 0 on, partition by partition: nothing else writes there
    starts = np.searchsorted(logged.partition, np.arange(PARTITIONS))
    appended_ms = logged.appended_ms[starts[seen.partition] + seen.offset].astype(np.float64)[chosen]
    latency_ms = seen.seen_s[chosen] * 1e3 - appended_ms
    kept: Float64 = latency_ms[appended_ms >= appended_ms.min() + WARM_UP_S * 1e3]
    return kept


def _ratio(turns: list[Turn], name: str) -> Ratio:
    by_mode = {mode: np.array([getattr(one, name) for one in turns if one.mode == mode]) for mode in MODES}
    ratios = by_mode["exactly-once"] / by_mode["at-least-once"]
    return Ratio(median=float(np.median(ratios)), least=float(ratios.min()), largest=float(ratios.max()))


def show(report: DeliveryReport, console: Console) -> None:
    """Print the report."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1), show_edge=False)
    table.add_column("turn", min_width=16)
    for name in ("backlog tx/s", "screened", "p50 ms", "p99 ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in report.turns:
        cells = f"{one.per_second:,.0f}", f"{one.screened:,}", f"{one.p50_ms:.1f}", f"{one.p99_ms:.1f}"
        table.add_row(one.mode, *cells)
    table.add_section()
    ratios = [report.ratios[name] for name in ("per_second", "p50_ms", "p99_ms")]
    medians = [f"{one.median:.2f} ×" for one in ratios]
    spreads = [f"{one.least:.2f}–{one.largest:.2f}" for one in ratios]
    table.add_row("exactly / at least", medians[0], "", *medians[1:], style="bold")
    table.add_row("least–largest", spreads[0], "", *spreads[1:])
    console.print()
    console.print(table)
    console.print(
        f"\n {report.nodes} node{'s' if report.nodes > 1 else ''}; backlog of {report.backlog:,}; live at"
        f" {report.rate:,.0f}/s; latency from append until a consumer of its own, read_committed, has the decision;"
        f" transactions every {report.transaction_interval_ms} ms, at-least-once commits every"
        f" {report.commit_interval_ms} ms; {report.elapsed_s:,.0f} s in all\n"
        f" {origin(report.machine, report.seed)}",
        highlight=False,
    )
