"""`cascade demo`: the whole service on embedded parts, from simulated transactions to a judged result."""

from __future__ import annotations

import sys
import time
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench.cluster import write_json
from bench.cores import OTHERS, Cores, CoreWatch
from bench.demo_cost import measured_cost, with_deep_only
from bench.demo_kept import Kept, kept
from bench.demo_verdict import energy_lines, light_line, quality_line, service_line
from bench.embedded import EmbeddedParts, ServiceProcess, Settings, fresh_directory, play_file, wait_for_decisions
from cascade.bundle import SHIPPED_LARGE_BUNDLE, load_bundle
from cascade.config import Config, load_config
from cascade.errors import CascadeError
from cascade.frames import read_labelled
from cascade.ledger import LedgerSummary, read_journal
from cascade.ledger.counterfactual import deep_only
from cascade.ledger.deep_cost import DeepCost
from cascade.ledger.render import number_text, percent_text
from cascade.ledger.sla import DEGRADED_SHARE, ObjectiveResult
from cascade.progress import StepProgress, Steps
from cascade.report.business import Assumptions
from cascade.report.figures import gather
from cascade.report.page import make_page
from cascade.report.plots import PlotsMissingError
from cascade.report.words import words
from cascade.simulator import SimulatorSettings, simulate
from streaming.data_commands import evaluate_topic
from streaming.evaluation import Evaluation
from streaming.warm_up import warm_up

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
# Other cards, and later, than the data that the shipped bundle was trained on (seed 1). The days before BEGIN are the
# history that fills the state, as long as its longest window.
SIMULATION = SimulatorSettings(cards=3_000, terminals=6_000, days=83, start=date(2025, 4, 25), seed=2)
BEGIN = datetime(2025, 6, 1)
# With a single partition the transactions of a terminal keep their order, as they do in the offline scores.
PARTITIONS = 1
LEDGER, JOURNAL, REPORT, DEEP_COST = "ledger.json", "journal", "report.html", "deep-cost.json"
# Cores that other processes may use while deep calls are measured; with more, the figures are those of a busy machine.
OTHERS_MAX = 0.2
# The deep model would take minutes for all transactions that look genuine; a weighted sample of them is judged.
DEEP_SHARE = 0.05
# The electric grid whose carbon intensity the ledger uses.
REGION = "DEU"


class DemoLedger(msgspec.Struct, frozen=True, kw_only=True):
    """Every figure of the demo.

    `backlog`: the service at full speed on records that were already there; deadlines count from the fetch.
    `live`: the service after a restart, on records at a steady rate; deadlines count from the append.
    `transactions`: decided in both parts. `backlog_per_second`: decisions a second at full speed. `live_cores`: the use
    of the machine's cores in the live part. `kept`: of deep-only's quality; None where it catches no fraud.
    `deep_cost`: of calls to this Triton, from which both parts' `counterfactual` follows; None where they could not be
    compared, for the reason `deep_only_problem`. `cost_cores`: the use of the cores meanwhile; only Triton and `load`,
    which calls it, should have any.
    """

    transactions: int
    backlog_per_second: float
    live_per_second: float
    sla_met: bool
    live_cores: Cores
    backlog: LedgerSummary
    live: LedgerSummary
    evaluation: Evaluation
    kept: Kept | None
    deep_cost: DeepCost | None
    cost_cores: Cores
    deep_only_problem: str | None = None


class Parts(msgspec.Struct, frozen=True):
    """The ledgers of both parts, and the measured cost of a deep call or the problem; see DemoLedger."""

    backlog: LedgerSummary
    live: LedgerSummary
    deep_cost: DeepCost | None = None
    problem: str | None = None


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for logs, data and ledger; emptied first.")] = Path("build/demo"),
    rate: Annotated[float, typer.Option(min=1.0, help="Transactions a second in the live part.")] = 1_000.0,
    seconds: Annotated[float, typer.Option(min=1.0, help="Length of the live part.")] = 40.0,
    json: Annotated[bool, typer.Option("--json", help="Print every figure as JSON instead.")] = False,
) -> None:
    """Stream simulated transactions through a real Kafka and a real Triton on this machine; print the result.

    First a history fills the state, and the service works off a backlog as fast as it can. Then it stops, starts again
    with its last snapshot, and decides transactions as they arrive. Then deep calls are measured, for the energy of
    deep-only. Last, the decisions are judged by the truth.

    `cascade ledger merge build/demo/journal` prints the live part's ledger as tables.
    """
    started_s = time.monotonic()
    directory = fresh_directory(out)
    with Steps() as progress:
        ledger = run_demo(directory, rate, seconds, progress)
    write_json(directory / LEDGER, ledger)
    if ledger.deep_cost is not None:
        write_json(directory / DEEP_COST, ledger.deep_cost)
    if (others := ledger.cost_cores.used[OTHERS]) > OTHERS_MAX:
        note = f"other processes used {others:.2g} cores while deep calls were measured: repeat it on a quiet machine"
        print(f"cascade demo: {note}", file=sys.stderr)
    if ledger.deep_only_problem is not None:
        print(f"cascade demo: deep-only is not measured: {ledger.deep_only_problem}", file=sys.stderr)
    try:
        write_report(directory, ledger.deep_cost)
    except PlotsMissingError as error:
        print(f"cascade demo: no page: {error}", file=sys.stderr)
    if json:
        print(msgspec.json.encode(ledger).decode())
        return
    print_result(ledger, Console(), time.monotonic() - started_s, directory)


def run_demo(directory: Path, rate: float, seconds: float, progress: Steps) -> DemoLedger:
    """Runs both parts and judges their decisions.

    directory: for data, logs and configurations.
    rate: transactions a second of the live part; seconds: its length, at most half of the data.
    progress: shows the steps.
    """
    bundle = load_bundle(SHIPPED_LARGE_BUNDLE)
    data_path = directory / "transactions.parquet"
    simulate(SIMULATION, lambda share: progress("simulate", share)).write_parquet(data_path)
    data = read_labelled(data_path, bundle.schema)
    begin_ms = BEGIN.replace(tzinfo=UTC).timestamp() * 1e3
    first, end = int(np.searchsorted(data.batch[bundle.schema.roles.event_time], begin_ms)), data.batch.rows
    middle = end - min(int(rate * seconds), (end - first) // 2)
    # the append times of a backlog are long past, so its deadlines count from the fetch
    state = {"snapshots": str(directory / "snapshots")}
    deadline = {"start": "fetch", "budget_ms": 1_000}
    backlog_settings: Settings = {"deadline": deadline, "labels": {"alignment": "exact"}, "state": state}
    journal = {"directory": str(directory / JOURNAL), "interval_s": 2.0}
    live_settings: Settings = {"ledger": journal, "carbon": {"region": REGION}, "state": state}
    progress("start Kafka and Triton", 0.0)
    with EmbeddedParts(directory, bundle) as parts:
        progress("start Kafka and Triton", 1.0)
        backlog_path = parts.write_config("backlog.toml", backlog_settings, PARTITIONS)
        live_path = parts.write_config("live.toml", live_settings, PARTITIONS)
        backlog_config, live_config = load_config(backlog_path), load_config(live_path)
        warm_up(backlog_config, bundle, data.take(np.arange(first)), progress)
        play_file(backlog_config, data, slice(first, middle), None, lambda share: progress("fill Kafka", share))
        with ServiceProcess(backlog_path) as service:
            service.wait_ready()
            wait_for_decisions(service, middle - first, lambda share: progress("decide the backlog", share))
            backlog = service.stop()
        with ServiceProcess(live_path) as service:
            progress("restart, restore state", 0.0)
            service.wait_ready()
            progress("restart, restore state", 1.0)
            watch = CoreWatch.now(_processes(service, parts))
            play_file(live_config, data, slice(middle, end), rate, lambda share: progress("decide live", share))
            wait_for_decisions(service, end - first, lambda _: None)
            live_cores = watch.cores()
            live = service.stop()
        watch = CoreWatch.now(_processes(service, parts))
        found = compared(live_config, backlog, live, progress)
        cost_cores = watch.cores()
        judged = evaluate_topic(live_config, data_path, (BEGIN, None), progress, DEEP_SHARE)
    evaluation = judged.evaluation
    return DemoLedger(
        transactions=evaluation.transactions,
        backlog_per_second=backlog.per_second,
        live_per_second=live.per_second,
        sla_met=all(objective.met for objective in live.objectives),
        live_cores=live_cores,
        backlog=found.backlog,
        live=msgspec.structs.replace(found.live, quality=evaluation.comparison()),
        evaluation=evaluation,
        kept=kept(judged, data, bundle),
        deep_cost=found.deep_cost,
        cost_cores=cost_cores,
        deep_only_problem=found.problem,
    )


def compared(config: Config, backlog: LedgerSummary, live: LedgerSummary, progress: StepProgress) -> Parts:
    """Both ledgers with their comparison with deep-only, or the problem where there is none."""
    try:
        cost = measured_cost(config, (backlog, live), progress)
        return Parts(with_deep_only(backlog, cost), with_deep_only(live, cost), cost)
    except CascadeError as error:
        return Parts(backlog, live, problem=str(error))


def _processes(service: ServiceProcess, parts: EmbeddedParts) -> dict[str, list[int | None]]:
    """The ids of what runs here; Kafka and Triton may run elsewhere."""
    found: dict[str, list[int | None]] = {"service": [service.pid]}
    if parts.broker is not None:
        found["Kafka"] = list(parts.broker.pids)
    if parts.triton is not None:
        found["Triton"] = [parts.triton.pid]
    return found


def write_report(directory: Path, cost: DeepCost | None) -> None:
    """Writes the live part's journal as a page, with deep-only at the measured cost of a deep call."""
    figures = gather(read_journal([directory / JOURNAL]), None, None)
    command, counterfactual = f"cascade report {JOURNAL}", None
    if cost is not None:
        command, counterfactual = f"{command} --deep-cost {DEEP_COST}", deep_only(figures.summary, cost)
    page = make_page(figures, Assumptions(region=REGION), words("en"), command, counterfactual)
    (directory / REPORT).write_text(page, encoding="utf-8")


def print_result(ledger: DemoLedger, console: Console, elapsed_s: float, directory: Path) -> None:
    """Prints the result in fourteen lines, so that it is still on the screen after the steps above it.

    Two lines more say who used the cores, where the service level is missed. The last four are for those who read only
    four lines.

    ledger: every figure of the demo.
    elapsed_s: duration of the whole demo.
    directory: where the ledger and the page are.
    """
    backlog, live, judged = ledger.backlog, ledger.live, ledger.evaluation
    objectives = {objective.name: objective for objective in live.objectives}
    table = Table.grid(padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("streamed", f"{ledger.transactions:,} transactions, {judged.frauds:,} frauds, in {elapsed_s:.0f} s")
    if judged.missing or judged.repeated:
        table.add_row("", f"{judged.missing:,} without a decision, {judged.repeated:,} decided again")
    table.add_row("decided", f"backlog: {_decided(backlog)}")
    table.add_row("", f"live: {_decided(live)}")
    table.add_row(
        "escalated",
        f"{percent_text(judged.escalated_share)} of all; degraded live: {_against_limit(objectives[DEGRADED_SHARE])}",
    )
    for path in ("screened", "escalated"):
        latency = live.paths[path].latency
        p50_ms = number_text(latency.p50_ms if latency else None)
        p99 = _against_limit(objectives[f"p99 of {path}"])
        table.add_row("latency" if path == "screened" else "", f"{path} live: p50 {p50_ms} ms, p99 {p99}")
    if not ledger.sla_met:
        cores, waited = ledger.live_cores, ledger.live_cores.waited_share
        used = ", ".join(f"{name} {share:.{1 if share >= 10 else 2}f}" for name, share in cores.used.items())
        table.add_row("cores", f"of {cores.cores}: {used}")
        if waited is not None:
            share = percent_text(waited)
            table.add_row("", f"the service waited for a core in {share} of the time that it had work")
    for model in live.quality.models if live.quality else ():
        first = model.name == "cascade"
        sampled = model.name == "deep only" and judged.deep_rows < judged.transactions
        table.add_row(
            "judged" if first else "",
            f"{model.name}: AP {number_text(model.average_precision)}{' (average precision)' if first else ''}, caught"
            f" {model.frauds_caught:,}, false alarms {model.false_alarms:,}{' (a sample)' if sampled else ''}",
        )
    files = ", ".join(name for name in (LEDGER, REPORT, JOURNAL) if (directory / name).exists())
    table.add_row("figures", f"{files} in {directory}")
    table.add_row("kept light", light_line(judged.escalated_share, ledger.transactions))
    table.add_row("quality", quality_line(ledger.kept))
    for line in energy_lines(backlog, live):
        table.add_row("energy", line)
    table.add_row("service", service_line(live.objectives, ledger.live_cores))
    console.print()
    console.print(table, highlight=False)


def _decided(summary: LedgerSummary) -> str:
    energy = (f", {number_text(total.per_transaction_mj)} mJ each ({total.kind})" for total in summary.energy_totals)
    return f"{summary.transactions:,} at {summary.per_second:,.0f}/s{''.join(energy)}"


def _against_limit(objective: ObjectiveResult) -> str:
    scale, unit = (100.0, "%") if objective.unit == "share" else (1.0, objective.unit)
    value, limit = (number_text(figure, scale) for figure in (objective.value, objective.limit))
    return f"{value} {unit} (limit {limit} {unit}, {objective.status})"
