"""`cascade demo`: the whole service on embedded parts, ending in a ledger."""

from __future__ import annotations

import sys
import time
from datetime import date
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from bench.embedded import EmbeddedParts, ServiceProcess, Settings, fresh_directory, play_file, wait_for_decisions
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.config import load_config
from cascade.frames import read_labelled
from cascade.ledger import LedgerSummary, read_journal, render
from cascade.progress import Steps
from cascade.report.business import Assumptions
from cascade.report.figures import gather
from cascade.report.page import make_page
from cascade.report.plots import PlotsMissingError
from cascade.report.words import words
from cascade.simulator import SimulatorSettings, simulate
from streaming.commands import evaluate_topic, show_counts
from streaming.evaluation import Evaluation

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
# Another world than the one that the shipped bundle was trained on (seed 1), and later.
SIMULATION = SimulatorSettings(cards=3_000, terminals=6_000, days=46, start=date(2025, 6, 1), seed=2)
# One, so that the transactions of a terminal keep their order and the figures can be held against offline scores.
PARTITIONS = 1
# The live part's ledger on disk, the page that is made of it, and the grid whose average makes grams of its joules.
JOURNAL, REPORT, REGION = "journal", "report.html", "DEU"


class DemoLedger(msgspec.Struct, frozen=True, kw_only=True):
    """What the demo showed.

    `backlog`: the service at full speed on records that were already there, deadlines counted from the fetch.
    `live`: a second start of the service, on records that arrive at a steady rate, deadlines from their append.
    `transactions`: decided in both. `backlog_per_second`: decisions a second at full speed.
    """

    transactions: int
    backlog_per_second: float
    live_per_second: float
    sla_met: bool
    backlog: LedgerSummary
    live: LedgerSummary
    evaluation: Evaluation


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for logs, data and ledger; emptied first.")] = Path("build/demo"),
    rate: Annotated[float, typer.Option(min=1.0, help="Transactions a second in the live part.")] = 1_000.0,
    seconds: Annotated[float, typer.Option(min=1.0, help="Length of the live part.")] = 40.0,
    json: Annotated[bool, typer.Option("--json", help="Print the ledger as JSON.")] = False,
) -> None:
    """Stream simulated transactions through a real Kafka and a real Triton on this machine; end with a ledger.

    Two parts: first the service works off a backlog as fast as it can; then it is stopped, started again (it rebuilds
    its state from the log), and meets transactions as they arrive.
    """
    started_s = time.monotonic()
    directory = fresh_directory(out)
    bundle = load_bundle(SHIPPED_BUNDLE)
    with Steps() as progress:
        data_path = directory / "transactions.parquet"
        simulate(SIMULATION, lambda share: progress("simulate", share)).write_parquet(data_path)
        data = read_labelled(data_path, bundle.schema)
        live_rows = min(int(rate * seconds), data.batch.rows // 2)
        backlog_rows = data.batch.rows - live_rows
        progress("start Kafka and Triton", 0.0)
        with EmbeddedParts(directory, bundle) as parts:
            progress("start Kafka and Triton", 1.0)
            # append times of a backlog are long past: its deadlines count from the fetch
            backlog_path = parts.write_config(
                "backlog.toml",
                {"deadline": {"start": "fetch", "budget_ms": 1_000}, "labels": {"alignment": "exact"}},
                PARTITIONS,
            )
            live_path = parts.write_config("live.toml", _kept(directory / JOURNAL), PARTITIONS)
            play_file(
                load_config(backlog_path),
                data,
                slice(0, backlog_rows),
                None,
                lambda share: progress("fill Kafka", share),
            )
            with ServiceProcess(backlog_path) as service:
                service.wait_ready()
                wait_for_decisions(service, backlog_rows, lambda share: progress("decide the backlog", share))
                backlog = service.stop()
            with ServiceProcess(live_path) as service:
                progress("restart, rebuild state", 0.0)
                service.wait_ready()
                progress("restart, rebuild state", 1.0)
                play_file(
                    load_config(live_path),
                    data,
                    slice(backlog_rows, data.batch.rows),
                    rate,
                    lambda share: progress("decide live", share),
                )
                wait_for_decisions(service, data.batch.rows, lambda _: None)
                live = service.stop()
            evaluation = evaluate_topic(load_config(live_path), data_path, (None, None), progress).evaluation
    live = msgspec.structs.replace(live, quality=evaluation.comparison())
    ledger = DemoLedger(
        transactions=evaluation.transactions,
        backlog_per_second=backlog.per_second,
        live_per_second=live.per_second,
        sla_met=all(objective.met for objective in live.objectives),
        backlog=backlog,
        live=live,
        evaluation=evaluation,
    )
    (directory / "ledger.json").write_bytes(msgspec.json.encode(ledger) + b"\n")
    try:
        write_report(directory / JOURNAL, directory / REPORT)
    except PlotsMissingError as error:
        print(f"cascade demo: no page: {error}", file=sys.stderr)
    if json:
        print(msgspec.json.encode(ledger).decode())
    else:
        show(ledger, Console(), time.monotonic() - started_s, directory)


def _kept(journal: Path) -> Settings:
    """Settings of the live part: its ledger on disk, and its carbon by a country's average."""
    return {"ledger": {"directory": str(journal), "interval_s": 2.0}, "carbon": {"region": REGION}}


def write_report(journal: Path, out: Path) -> None:
    """The live part's journal as a page."""
    figures = gather(read_journal([journal]), None, None)
    command = f"cascade report {journal.name}"
    out.write_text(make_page(figures, Assumptions(region=REGION), words("en"), command), encoding="utf-8")


def show(ledger: DemoLedger, console: Console, elapsed_s: float, directory: Path) -> None:
    """Print the demo's ledger."""
    render(ledger.live, console)
    show_counts(ledger.evaluation, console)
    backlog = ledger.backlog
    console.print(
        f"\nAt full speed on a backlog: {backlog.transactions:,} transactions, {backlog.per_second:,.0f} a second,"
        f" {_energy(backlog)}."
        f"\nAs they arrive: {ledger.live.transactions:,} transactions, {ledger.live_per_second:,.0f} a second,"
        f" {_energy(ledger.live)}."
        f"\nService level {'met' if ledger.sla_met else 'NOT met'} as they arrive. {elapsed_s:.0f} s in all;"
        f" every figure: {directory / 'ledger.json'}, as a page: {directory / REPORT}",
        highlight=False,
    )


def _energy(summary: LedgerSummary) -> str:
    totals = (
        f"{total.per_transaction_mj:.2g} mJ each ({total.kind})"
        for total in summary.energy_totals
        if total.per_transaction_mj is not None
    )
    return ", ".join(totals) or "energy unknown"
