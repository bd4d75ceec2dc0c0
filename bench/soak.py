"""`cascade soak`: memory of the worker, with the Triton client in it, under steady load: does it grow?

The load repeats a small world: all its cards and terminals, and more event time than the longest window, pass within
the warm-up, so the feature state is as large then as it will ever be. What still grows after it is a leak.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import psutil
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bench.cluster import (
    SteadyLoad,
    escalating_bundle,
    origin,
    simulated,
    wait_until_all_committed,
    write_json,
)
from bench.embedded import EmbeddedParts, ServiceProcess, fresh_directory
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.columns import Float64
from cascade.errors import CascadeError
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import Steps

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
GROWTH_MAX = 0.02
ESCALATED_SHARE = 0.1
PARTITIONS = 2
SAMPLE_INTERVAL_S = 1.0
SETTLE_S_MAX = 60.0
# Event days that pass in the warm-up: more than the longest window (30 days) and its lateness.
WARM_UP_DAYS = 46
# What a card of the simulator makes a day, nearly.
TRANSACTIONS_A_CARD_AND_DAY = 1.15
DUPLICATES_WINDOW_S = 30.0


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """Resident memory of one process and its children after the warm-up.

    `first_mb`, `last_mb`: medians of the first and of the last third, MB. `by_thirds`: the growth from one to the
    other, a share. `by_fit`: of a straight line through all samples, from its start to its end, a share.
    """

    name: str
    samples: int
    first_mb: float
    last_mb: float
    by_thirds: float
    by_fit: float

    @property
    def worst(self) -> float:
        """The larger of the two."""
        return max(self.by_thirds, self.by_fit)


class SoakReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `cascade soak` saw; `ok`: the worker grew by no more than `growth_max`, and all was decided."""

    ok: bool
    growth_max: float
    growth: list[Growth]
    minutes: float
    warm_up_s: float
    transactions: int
    escalated_share: float
    deep_calls: int
    degraded_share: float
    settled: bool
    cards: int
    rate: float
    seed: int
    machine: Machine
    elapsed_s: float
    rss_mb: dict[str, list[float]]


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(min=0.5, help="Length, warm-up included.")] = 10.0,
    rate: Annotated[float, typer.Option(min=10.0, help="Transactions a second.")] = 500.0,
    warm_up: Annotated[float, typer.Option(min=10.0, help="Seconds that are not judged.")] = 120.0,
    seed: Annotated[int, typer.Option(help="Of the data.")] = 1,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/soak"),
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Sample the memory of worker and Triton under load; fail where the worker grows after the warm-up."""
    if 60 * minutes < 2 * warm_up:
        raise typer.BadParameter("at least as long as the warm-up must be judged: more --minutes, or less --warm-up")
    report = run_soak(out, minutes, rate, warm_up, seed)
    if json is not None:
        write_json(json, report)
    show(report, Console())
    if not report.ok:
        raise typer.Exit(1)


def run_soak(out: Path, minutes: float, rate: float, warm_up_s: float, seed: int) -> SoakReport:
    """See `soak`."""
    started_s = time.monotonic()
    directory = fresh_directory(out)
    cards = max(int(rate * warm_up_s / (WARM_UP_DAYS * TRANSACTIONS_A_CARD_AND_DAY)), 20)
    # The memory of duplicates is a ring: its pages are touched the first time round, which must end with the warm-up.
    duplicates = {"window_s": DUPLICATES_WINDOW_S, "ids_max": max(int(rate * warm_up_s / 2), 1_024)}
    schema = load_bundle(SHIPPED_BUNDLE).schema
    data = simulated(schema, cards=cards, terminals=cards, days=WARM_UP_DAYS, seed=seed)
    bundle = escalating_bundle(directory / "bundle", ESCALATED_SHARE, data)
    with Steps() as progress, ExitStack() as stack:
        progress("start Kafka and Triton", 0.0)
        parts = stack.enter_context(EmbeddedParts(directory, bundle))
        progress("start Kafka and Triton", 1.0)
        path = parts.write_config(
            "soak.toml",
            {"duplicates": duplicates, "state": {"snapshots": str(directory / "snapshots"), "interval_s": 10.0}},
            PARTITIONS,
        )
        service = stack.enter_context(ServiceProcess(path))
        service.wait_ready()
        if service.pid is None or parts.triton is None or parts.triton.pid is None:
            raise CascadeError("worker or Triton ended before the load began")
        memory = MemorySampler({"worker with Triton client": service.pid, "Triton": parts.triton.pid})
        stack.callback(memory.close)
        load = SteadyLoad(service.config, schema, data, rate)
        load.start()
        began_s, whole_s = time.monotonic(), 60 * minutes
        while (elapsed_s := time.monotonic() - began_s) < whole_s:
            load.check()
            service.check_running()
            progress("load", elapsed_s / whole_s)
            time.sleep(1.0)
        progress("load", 1.0)
        memory.close()
        sent = load.stop()
        settled = wait_until_all_committed(service.config, SETTLE_S_MAX)
        ledger = service.stop()
    growth = [
        measure_growth(name, np.array(samples[int(warm_up_s / SAMPLE_INTERVAL_S) :]))
        for name, samples in memory.rss_mb.items()
    ]
    return SoakReport(
        ok=settled and growth[0].worst <= GROWTH_MAX,
        growth_max=GROWTH_MAX,
        growth=growth,
        minutes=minutes,
        warm_up_s=warm_up_s,
        transactions=sent,
        escalated_share=ledger.escalation_share or 0.0,
        deep_calls=ledger.deep.calls,
        degraded_share=ledger.degraded_share or 0.0,
        settled=settled,
        cards=cards,
        rate=rate,
        seed=seed,
        machine=describe_machine(),
        elapsed_s=time.monotonic() - started_s,
        rss_mb=memory.rss_mb,
    )


class MemorySampler:
    """Resident memory (MB) of some processes, each with its children, once a second, in a thread."""

    def __init__(self, pids: dict[str, int]) -> None:
        self.rss_mb: dict[str, list[float]] = {name: [] for name in pids}
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop sampling; what was sampled stays."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        due_s = time.monotonic()
        while not self._stop.wait(max(due_s - time.monotonic(), 0.0)):
            due_s += SAMPLE_INTERVAL_S
            for name, process in self._processes.items():
                try:
                    family = [process, *process.children(recursive=True)]
                    self.rss_mb[name].append(sum(one.memory_info().rss for one in family) / 1e6)
                except psutil.Error:
                    return


def measure_growth(name: str, rss_mb: Float64) -> Growth:
    """Growth over the samples, at even distances in time; raises CascadeError where there are fewer than three."""
    if len(rss_mb) < 3:
        raise CascadeError(f"{name}: {len(rss_mb)} samples of memory after the warm-up; did it end?")
    third = len(rss_mb) // 3
    first, last = float(np.median(rss_mb[:third])), float(np.median(rss_mb[-third:]))
    slope, start = np.polyfit(np.arange(len(rss_mb)), rss_mb, 1)
    return Growth(
        name=name,
        samples=len(rss_mb),
        first_mb=first,
        last_mb=last,
        by_thirds=last / first - 1,
        by_fit=float(slope * (len(rss_mb) - 1) / start),
    )


def show(report: SoakReport, console: Console) -> None:
    """Print the report."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1), show_edge=False)
    table.add_column("resident memory, MB")
    for name in ("first third", "last third", "growth %", "line %", "max %"):
        table.add_column(name, justify="right", no_wrap=True)
    for position, one in enumerate(report.growth):
        limit = f"{100 * report.growth_max:g}" if position == 0 else "-"
        cells = f"{one.first_mb:.1f}", f"{one.last_mb:.1f}", f"{100 * one.by_thirds:+.2f}", f"{100 * one.by_fit:+.2f}"
        table.add_row(one.name, *cells, limit)
    console.print()
    console.print(table)
    console.print(
        f"\n {report.minutes:g} min at {report.rate:,.0f}/s, {report.transactions:,} transactions,"
        f" {report.escalated_share:.1%} escalated, {report.deep_calls:,} deep calls, {report.degraded_share:.1%}"
        f" degraded; the first {report.warm_up_s:g} s are not judged: by then all {report.cards:,} cards and"
        f" {WARM_UP_DAYS} days of event time have passed, and the rest repeats them;"
        f" line: of a straight line through all samples; {'no growth' if report.ok else 'FAILED'}\n"
        f" {origin(report.machine, report.seed)}",
        highlight=False,
    )
