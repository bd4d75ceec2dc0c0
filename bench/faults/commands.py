"""`cascade simulate-faults`: the worker under thousands of schedules of faults, and what an oracle found."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bench.faults.run import Outcome, simulate
from bench.faults.schedule import derive
from bench.faults.world import KINDS
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import Steps

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
SEEDS_A_CHUNK = 20
# From so many schedules on a kind of fault that never struck is a hole in the test, and fails it.
ALL_KINDS_FROM = 500
VIOLATIONS_SHOWN = 20
# A child that is forked has the threads' locks of its parent; one that is spawned starts clean.
START_METHOD = "spawn"


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    """A seed whose run broke a promise, and how, a line each."""

    seed: int
    problems: list[str]


class FaultsReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `cascade simulate-faults` saw.

    `schedules`: runs, of the seeds from `first_seed` on. `faults`: how often each kind struck. `violations`: runs that
    broke a promise, `seeds`: which, `details`: how. `simulated_s`: time on the simulated clock, `seconds`: on this
    machine's.
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
        """The kinds of fault that did not strike once."""
        return [kind for kind, count in self.faults.items() if not count]


def run_schedules(
    schedules: int, first_seed: int, processes: int = 2, tell: Callable[[float], None] = lambda share: None
) -> FaultsReport:
    """Run the schedules of so many seeds from the first one on, side by side; `tell` hears which share is done."""
    started_s = time.monotonic()
    fired: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    violations: list[Violation] = []
    simulated_s, done = 0.0, 0
    end = first_seed + schedules
    chunks = [range(start, min(start + SEEDS_A_CHUNK, end)) for start in range(first_seed, end, SEEDS_A_CHUNK)]
    with multiprocessing.get_context(START_METHOD).Pool(min(processes, len(chunks))) as pool:
        for seeds, counted, found, seconds in pool.imap_unordered(_run_chunk, chunks):
            fired.update(counted)
            violations += found
            simulated_s += seconds
            done += seeds
            tell(done / schedules)
    violations.sort(key=lambda one: one.seed)
    return FaultsReport(
        schedules=schedules,
        faults={kind: fired[kind] for kind in KINDS},
        violations=len(violations),
        seeds=[one.seed for one in violations],
        first_seed=first_seed,
        simulated_s=round(simulated_s, 1),
        seconds=round(time.monotonic() - started_s, 1),
        processes=processes,
        machine=describe_machine(),
        details=violations,
    )


def _run_chunk(seeds: range) -> tuple[int, dict[str, int], list[Violation], float]:
    fired: Counter[str] = Counter()
    violations = []
    seconds = 0.0
    for seed in seeds:
        outcome = simulate(seed)
        fired.update(outcome.fired)
        seconds += outcome.seconds
        if outcome.problems:
            violations.append(Violation(seed=seed, problems=outcome.problems))
    return len(seeds), dict(fired), violations, seconds


@app.command()
def simulate_faults(
    schedules: Annotated[int, typer.Option(min=1, help="How many seeds to run.")] = 1_000,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 1,
    out: Annotated[Path, typer.Option(help="File for the figures, as JSON.")] = Path("build/faults.json"),
    processes: Annotated[int, typer.Option(min=1, max=64, help="Processes side by side.")] = 2,
    replay: Annotated[int | None, typer.Option(min=0, help="Run this seed alone; print its options and trace.")] = None,
) -> None:
    """Drive the worker through crashes, delays and lies on a simulated clock, and judge what came of it.

    Ends with status 1 where a promise was broken, or, from 500 schedules on, where a kind of fault never struck.
    """
    console = Console()
    if replay is not None:
        outcome = simulate(replay)
        _show_trace(outcome)
        raise typer.Exit(bool(outcome.problems))
    with Steps() as progress:
        report = run_schedules(schedules, seed, processes, lambda share: progress("simulate faults", share))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    _show(report, console)
    if report.violations or (schedules >= ALL_KINDS_FROM and report.never_struck):
        raise typer.Exit(1)


def _show(report: FaultsReport, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("fault")
    table.add_column("struck", justify="right")
    for kind, count in report.faults.items():
        table.add_row(kind, f"{count:,}")
    console.print(table)
    console.print(
        f"{report.schedules:,} schedules, seeds {report.first_seed} to {report.first_seed + report.schedules - 1}, in"
        f" {report.seconds:.0f} s ({report.schedules / max(report.seconds, 0.1):.1f} a second in {report.processes}"
        f" processes; {report.simulated_s:,.0f} s of simulated time); {sum(report.faults.values()):,} faults;"
        f" violations: {report.violations}",
        highlight=False,
    )
    console.print(f"{report.machine.processor}, {report.machine.cores} cores", style="dim", highlight=False)
    if report.never_struck:
        console.print(f"never struck: {', '.join(report.never_struck)}", highlight=False)
    for one in report.details[:VIOLATIONS_SHOWN]:
        console.print(f"VIOLATION, again with: cascade simulate-faults --replay {one.seed}", style="bold red")
        for problem in one.problems:
            console.print(f"  {problem}", highlight=False, soft_wrap=True)


def _show_trace(outcome: Outcome) -> None:
    """Plain lines: traces are long, and are read with other tools."""
    print(msgspec.json.format(msgspec.json.encode(derive(outcome.seed)), indent=2).decode())
    for time_s, who, what in outcome.trace:
        print(f"{time_s:10.5f}  {who:<12}  {what}")
    print(f"faults: {dict(sorted(outcome.fired.items()))}")
    for problem in outcome.problems or ["no promise was broken"]:
        print(problem)
