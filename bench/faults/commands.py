"""`cascade simulate-faults`: runs the real worker under thousands of fault schedules; an oracle checks each run."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from bench.faults.run import Outcome, simulate
from bench.faults.schedule import derive
from bench.faults.world import KINDS
from bench.tables import figure_table, print_table, publish
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import Steps

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
SEEDS_PER_CHUNK = 20
# With this many schedules each kind of fault must strike at least once.
ALL_KINDS_FROM = 500
VIOLATIONS_SHOWN_MAX = 20
# A forked child inherits locks that the parent's threads hold; a spawned one does not.
START_METHOD = "spawn"


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    """A seed whose run broke promises. `problems`: how, a line each."""

    seed: int
    problems: list[str]


class FaultsReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of `cascade simulate-faults`.

    `schedules`: number of runs, of the seeds from `first_seed`. `faults`: how often each kind struck. `violations`:
    number of runs that broke a promise; `seeds`: their seeds; `details`: how. `simulated_s`: time on the simulated
    clock. `seconds`: time on this machine.
    """

    schedules: int
    faults: dict[str, int]
    violations: int
    seeds: list[int]
    first_seed: int
    simulated_s: float
    seconds: float
    processes: int
    machine: Machine
    details: list[Violation]

    @property
    def never_struck(self) -> list[str]:
        """The kinds of fault that did not strike."""
        return [kind for kind, count in self.faults.items() if not count]


def run_schedules(
    schedules: int, first_seed: int, processes: int = 2, on_progress: Callable[[float], None] = lambda share: None
) -> FaultsReport:
    """Run the schedules of `schedules` seeds from `first_seed`; in this process if there is one chunk or process.

    on_progress: called with the share that is done.
    """
    started_s = time.monotonic()
    fired: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    violations: list[Violation] = []
    simulated_s = 0.0
    seeds = range(first_seed, first_seed + schedules)
    processes = min(processes, math.ceil(schedules / SEEDS_PER_CHUNK))
    with ExitStack() as stack:
        outcomes: Iterable[Outcome] = map(_simulate, seeds)
        if processes > 1:
            pool = stack.enter_context(multiprocessing.get_context(START_METHOD).Pool(processes))
            outcomes = pool.imap_unordered(_simulate, seeds, SEEDS_PER_CHUNK)
        for done, outcome in enumerate(outcomes, start=1):
            fired.update(outcome.fired)
            simulated_s += outcome.seconds
            if outcome.problems:
                violations.append(Violation(seed=outcome.seed, problems=outcome.problems))
            on_progress(done / schedules)
    violations.sort(key=lambda violation: violation.seed)
    return FaultsReport(
        schedules=schedules,
        faults=dict(fired),
        violations=len(violations),
        seeds=[violation.seed for violation in violations],
        first_seed=first_seed,
        simulated_s=round(simulated_s, 1),
        seconds=round(time.monotonic() - started_s, 1),
        processes=processes,
        machine=describe_machine(),
        details=violations,
    )


def _simulate(seed: int) -> Outcome:
    """Run one seed; its trace stays behind, since it would pass between processes."""
    return replace(simulate(seed), trace=[])


@app.command()
def simulate_faults(
    schedules: Annotated[int, typer.Option(min=1, help="Number of seeds to run.")] = 1_000,
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 1,
    out: Annotated[Path, typer.Option(help="JSON file for the report.")] = Path("build/faults.json"),
    processes: Annotated[int, typer.Option(min=1, max=64, help="Number of parallel processes.")] = 2,
    replay: Annotated[int | None, typer.Option(min=0, help="Run only this seed; print its options and trace.")] = None,
) -> None:
    """Run the worker through seeded faults on a simulated clock, and check every run.

    The exit status is 1 if a run broke a promise. With 500 schedules or more it is also 1 if a kind of fault never
    struck.
    """
    if replay is not None:
        outcome = simulate(replay)
        _show_trace(outcome)
        raise typer.Exit(bool(outcome.problems))
    with Steps() as progress:
        report = run_schedules(schedules, seed, processes, partial(progress, "simulate faults"))
    publish(report, _show, out)
    if report.violations or (schedules >= ALL_KINDS_FROM and report.never_struck):
        raise typer.Exit(1)


def _show(report: FaultsReport, console: Console) -> None:
    table = figure_table("fault", "struck")
    for kind, count in report.faults.items():
        table.add_row(kind, f"{count:,}")
    notes = [f"never struck: {', '.join(report.never_struck)}"] if report.never_struck else []
    print_table(
        console,
        table,
        f"schedules: {report.schedules:,}, from seed {report.first_seed};"
        f" {report.schedules / max(report.seconds, 0.1):.1f}/s; processes: {report.processes}",
        f"time: {report.seconds:.0f} s; simulated time: {report.simulated_s:,.0f} s",
        f"faults: {sum(report.faults.values()):,}",
        f"violations: {report.violations}",
        *notes,
        f"{report.machine.processor}, {report.machine.cores} cores",
    )
    for violation in report.details[:VIOLATIONS_SHOWN_MAX]:
        console.print(f"VIOLATION: cascade simulate-faults --replay {violation.seed}", style="bold red")
        for problem in violation.problems:
            console.print(f"  {problem}", highlight=False, soft_wrap=True)


def _show_trace(outcome: Outcome) -> None:
    """Print plain lines, which other tools can read."""
    print(msgspec.json.format(msgspec.json.encode(derive(outcome.seed)), indent=2).decode())
    for time_s, actor, event in outcome.trace:
        print(f"{time_s:10.5f}  {actor:<12}  {event}")
    print(f"faults: {dict(sorted(outcome.fired.items()))}")
    for problem in outcome.problems or ["no promise was broken"]:
        print(problem)
