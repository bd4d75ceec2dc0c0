"""`cascade ledger`: merges and prints the journals that services write."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from cascade.errors import DataError
from cascade.ledger.burn import burn_rates
from cascade.ledger.counterfactual import deep_only
from cascade.ledger.deep_cost import DeepCost
from cascade.ledger.figures import summarise
from cascade.ledger.journal import NO_ACCOUNT, Run, merged_between, read_journal
from cascade.ledger.render import number_text, render
from cascade.ledger.slices import METHODS, SliceBooks, attribute_windows, read_trace
from cascade.ledger.summary import LedgerSummary

INTERVALS_MAX = 10_000

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Print the journals of services: the figures that [ledger] of the configuration makes them write to disk.",
)

Paths = Annotated[list[Path], typer.Argument(help="Journal directories of services, or files in them.", exists=True)]
From = Annotated[str | None, typer.Option("--from", help="Start, in UTC unless it has an offset: 2026-11-25T08:00.")]
Until = Annotated[str | None, typer.Option("--until", help="End; both default to the whole journal.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of tables.")]
DeepCostFile = Annotated[
    Path | None,
    typer.Option(help="File of `cascade bench deep-calls` from the same machine; adds the comparison with deep-only."),
]


@app.command()
def merge(
    paths: Paths,
    start: From = None,
    until: Until = None,
    deep_cost: DeepCostFile = None,
    json: Json = False,
) -> None:
    """Print one ledger of all services, workers and restarts.

    Burn rates of the error budgets cover the last 5 and 30 minutes, 1 and 6 hours, and 3 days of the journal.
    """
    runs = read_journal(paths)
    account = merged_between(runs, moment("--from", start), moment("--until", until))
    if account is None:
        raise DataError(NO_ACCOUNT)
    burn = burn_rates(runs, moment("--from", start), moment("--until", until))
    summary = msgspec.structs.replace(summarise(account), burn=burn)
    if deep_cost is not None:
        counterfactual = deep_only(summary, DeepCost.read(deep_cost))
        summary = msgspec.structs.replace(summary, counterfactual=counterfactual)
    if json:
        sys.stdout.buffer.write(summary.to_json_line() + b"\n")
        return
    console = Console()
    render(summary, console)
    console.print(_journal_note(runs), highlight=False)


@app.command()
def intervals(
    paths: Paths,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="Length of an interval; use ledger.interval_s or more.")
    ] = 3_600.0,
    start: From = None,
    until: Until = None,
    json: Json = False,
) -> None:
    """Print the figures over time, a row for each interval.

    A row has the decisions, the shares of escalated and degraded ones, p99 latencies and the energy of a transaction.
    """
    runs = read_journal(paths)
    first = moment("--from", start) or min(run.accounts[0].started for run in runs)
    last = moment("--until", until) or max(run.accounts[-1].ended for run in runs)
    summaries = interval_summaries(runs, first, last, seconds)
    if json:
        sys.stdout.buffer.writelines(summary.to_json_line() + b"\n" for summary in summaries)
        return
    console = Console()
    console.print()
    console.print(_table(summaries))
    console.print(_journal_note(runs), highlight=False)


@app.command()
def slices(
    trace: Annotated[Path, typer.Argument(help="JSON lines, one window of one GPU each; see docs/energy.md.")],
    method: Annotated[
        str, typer.Option(help=f"Rule that divides the joules: {', '.join(METHODS)}. The last two are for comparison.")
    ] = METHODS[0],
    json: Json = False,
) -> None:
    """Divide the joules of GPUs among their MIG slices.

    The trace has the recorded readings. The rows of a GPU add up to its energy counter.
    """
    if method not in METHODS:
        raise DataError(f"--method {method}: use one of {', '.join(METHODS)}")
    try:
        content = trace.read_bytes()
    except OSError as error:
        raise DataError(f"{trace}: cannot be read ({error.strerror})") from error
    devices = attribute_windows(read_trace(content, str(trace)), method)
    if json:
        sys.stdout.buffer.writelines(msgspec.json.encode(books) + b"\n" for books in devices)
        return
    console = Console()
    for books in devices:
        console.print(f"\n{books.device}: {books.energy_j:,.1f} J in {books.seconds:,.0f} s", highlight=False)
        console.print(_slices_table(books))
        console.print(_slices_note(books), highlight=False, style="dim")


def _slices_table(books: SliceBooks) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("line", no_wrap=True)
    for name in ("idle J", "dynamic J", "J", "%"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in books.rows:
        share = row.energy_j / books.energy_j if books.energy_j else None
        joules = (row.idle_j, row.dynamic_j, row.energy_j)
        table.add_row(row.name, *map(number_text, joules), _percent(share))
    return table


def _slices_note(books: SliceBooks) -> str:
    note = f"attributed from the GPU's counter; residual {abs(books.residual_share):.2%}"
    if books.check_j is None or not books.energy_j:
        return note
    return f"{note}; power integrated {books.check_j / books.energy_j - 1:+.2%}"


def interval_summaries(runs: list[Run], first: datetime, last: datetime, seconds: float) -> list[LedgerSummary]:
    """Summaries of the intervals of `seconds` between `first` and `last`, without those that have no journal line.

    A line counts in the interval in which it was written. Raises DataError for more than INTERVALS_MAX intervals.
    """
    step = timedelta(seconds=seconds)
    count = max(-((first - last) // step), 0)
    if count > INTERVALS_MAX:
        raise DataError(f"{count:,} intervals of {seconds:g} s, the maximum is {INTERVALS_MAX:,}; raise --seconds")
    accounts = (merged_between(runs, first + number * step, first + (number + 1) * step) for number in range(count))
    return [summarise(account) for account in accounts if account is not None]


def moment(option: str, text: str | None) -> datetime | None:
    """The time in an option's text, in UTC unless the text has an offset; raises DataError if it is not a time."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise DataError(f"{option} {text}: not a time; write it as 2026-11-25T08:00") from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _journal_note(runs: list[Run]) -> str:
    torn = sum(run.torn for run in runs)
    lines = sum(len(run.accounts) for run in runs)
    return f"\n {lines:,} journal lines from {len(runs):,} {'run' if len(runs) == 1 else 'runs'} of the service" + (
        f"; {torn} lines skipped that a crash cut off" if torn else ""
    )


def _table(summaries: list[LedgerSummary]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 0, 0, 1))
    names = ("until, UTC", "decisions", "/s", "esc. %", "degr. %", "scr. ms", "esc. ms", "meas. mJ", "mod. mJ")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for summary in summaries:
        mj = {total.kind: total.per_transaction_mj for total in summary.energy_totals}
        counts = (f"{summary.transactions:,}", f"{summary.per_second:,.0f}")
        shares = (_percent(summary.escalation_share), _percent(summary.degraded_share))
        p99_ms = (_p99_ms(summary, "screened"), _p99_ms(summary, "escalated"))
        energy = (number_text(mj.get("measured")), number_text(mj.get("modelled")))
        table.add_row(f"{summary.ended.astimezone(UTC):%m-%d %H:%M:%S}", *counts, *shares, *p99_ms, *energy)
    table.caption = "scr., esc. ms: p99 of the screened and the escalated path; meas., mod. mJ: energy per transaction"
    table.caption_justify = "left"
    return table


def _percent(share: float | None) -> str:
    return number_text(share, 100.0)


def _p99_ms(summary: LedgerSummary, path: str) -> str:
    latency = summary.paths[path].latency
    return number_text(None if latency is None else latency.p99_ms)
