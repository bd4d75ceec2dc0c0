"""`cascade soak`: checks that the memory of the worker, with its Triton client, does not grow under a steady load.

The load repeats a small data set. Within the warm-up it covers all cards and terminals, and more event time than the
longest window, so the feature state has its final size then. Memory that grows after the warm-up is a leak.
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
from rich.console import Console

from bench.cluster import (
    SteadyLoad,
    escalating_bundle,
    origin,
    simulated,
    wait_until_all_committed,
    write_json,
)
from bench.embedded import EmbeddedParts, ServiceProcess, fresh_directory
from bench.tables import figure_table, print_table
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.columns import Float64
from cascade.errors import CascadeError
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import Steps

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
GROWTH_MAX = 0.02
# Memory that is taken once, for instance by the first overload: 3 to 4 % were seen.
ONCE_MAX = 0.1
GROWTH_PARTS = 6
ESCALATED_SHARE = 0.1
PARTITIONS = 2
SAMPLE_INTERVAL_S = 1.0
SETTLE_S_MAX = 60.0
# Event days of the warm-up: more than the longest window (30 days) with its lateness.
WARM_UP_DAYS = 46
# About what `cascade.simulator` makes.
TRANSACTIONS_PER_CARD_DAY = 1.15
DUPLICATES_WINDOW_S = 30.0


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """Resident memory of one process and its children after the warm-up.

    `parts_mb`: medians of the six parts of this time, MB. `growth`: over this time, a share of the first part: the
    median of the five steps from part to part, times five. A leak shows in most steps; an overload that takes memory
    once shows in one.
    """

    name: str
    samples: int
    parts_mb: list[float]
    growth: float

    @property
    def ok(self) -> bool:
        """Whether the memory neither grows nor was taken once beyond the limits."""
        return self.growth <= GROWTH_MAX and self.parts_mb[-1] / self.parts_mb[0] - 1 <= ONCE_MAX


class SoakReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of `cascade soak`.

    `ok`: the worker's memory is within `growth_max` and ONCE_MAX, and `settled`. `settled`: all transactions were
    decided and committed soon after the load. `growth`: of worker and Triton, in this order. `rss_mb`: samples, one a
    second.
    """

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
    minutes: Annotated[float, typer.Option(min=0.5, help="Duration with the warm-up, minutes.")] = 10.0,
    rate: Annotated[float, typer.Option(min=10.0, help="Transactions a second.")] = 500.0,
    warm_up: Annotated[float, typer.Option(min=10.0, help="Warm-up, seconds; its samples do not count.")] = 120.0,
    seed: Annotated[int, typer.Option(help="Seed of the data.")] = 1,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/soak"),
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Sample the memory of worker and Triton under load.

    The exit status is 1 if the worker's memory grows by more than 2 % after the warm-up, or is 10 % larger at the end.
    """
    if 60 * minutes < 2 * warm_up:
        raise typer.BadParameter("must be at least twice --warm-up", param_hint="--minutes")
    report = run_soak(out, minutes, rate, warm_up, seed)
    if json is not None:
        write_json(json, report)
    show(report, Console())
    if not report.ok:
        raise typer.Exit(1)


def run_soak(out: Path, minutes: float, rate: float, warm_up_s: float, seed: int) -> SoakReport:
    """Run `cascade soak`; the command's options explain the arguments."""
    started_s = time.monotonic()
    directory = fresh_directory(out)
    cards = max(int(rate * warm_up_s / (WARM_UP_DAYS * TRANSACTIONS_PER_CARD_DAY)), 20)
    # First decisions are in a ring buffer, whose pages become resident in its first round: within the warm-up.
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
        ok=settled and growth[0].ok,
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
    """Samples the resident memory of processes once a second, in a thread; each with its children. `rss_mb`: in MB."""

    def __init__(self, pids: dict[str, int]) -> None:
        self.rss_mb: dict[str, list[float]] = {name: [] for name in pids}
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        due_s = time.monotonic()
        while not self._stop.wait(max(due_s - time.monotonic(), 0.0)):
            due_s += SAMPLE_INTERVAL_S
            for name, process in self._processes.items():
                try:
                    family = [process, *process.children(recursive=True)]
                    self.rss_mb[name].append(sum(member.memory_info().rss for member in family) / 1e6)
                except psutil.Error:
                    return


def measure_growth(name: str, rss_mb: Float64) -> Growth:
    """The growth over samples at even distances in time; raises CascadeError for too few samples."""
    if len(rss_mb) < GROWTH_PARTS:
        raise CascadeError(f"{name}: only {len(rss_mb)} memory samples after the warm-up; the process may have ended")
    parts_mb = [float(np.median(part)) for part in np.array_split(rss_mb, GROWTH_PARTS)]
    growth_mb = float(np.median(np.diff(parts_mb))) * (GROWTH_PARTS - 1)
    return Growth(name=name, samples=len(rss_mb), parts_mb=parts_mb, growth=growth_mb / parts_mb[0])


def show(report: SoakReport, console: Console) -> None:
    """Print the report."""
    table = figure_table("resident memory", "first MB", "last MB", "growth %", "limit %")
    limits = [f"{100 * report.growth_max:g}", "-"]
    for growth, limit in zip(report.growth, limits, strict=True):
        memory = f"{growth.parts_mb[0]:.1f}", f"{growth.parts_mb[-1]:.1f}"
        table.add_row(growth.name, *memory, f"{100 * growth.growth:+.2f}", limit)
    print_table(
        console,
        table,
        "first, last: medians of the first and last sixth; growth: median step between sixths, times five;"
        f" the worker's last MB may exceed its first by {ONCE_MAX:.0%}",
        f"{report.minutes:g} min at {report.rate:,.0f}/s: {report.transactions:,} transactions;"
        f" escalated: {report.escalated_share:.1%}; deep calls: {report.deep_calls:,};"
        f" degraded: {report.degraded_share:.1%}",
        f"warm-up: {report.warm_up_s:g} s, with all {report.cards:,} cards and {WARM_UP_DAYS} days of event time",
        "all decided and committed" if report.settled else f"NOT all decided within {SETTLE_S_MAX:.0f} s",
        "passed" if report.ok else "FAILED",
        origin(report.machine, report.seed),
    )
