"""`cascade ledger`: what services have kept on disk, put together."""

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
from cascade.ledger.journal import Life, merged_between, read_journal
from cascade.ledger.render import number_text, render
from cascade.ledger.slices import METHODS, SliceBooks, attribute_windows, read_trace
from cascade.ledger.summary import LedgerSummary

INTERVALS_MAX = 10_000

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Ledgers that services have kept on disk, as [ledger] of the configuration says.",
)

Paths = Annotated[list[Path], typer.Argument(help="Directories of services, or files from them.", exists=True)]
From = Annotated[
    str | None, typer.Option("--from", help="From the last line up to this time: 2026-11-25T08:00, in UTC.")
]
Until = Annotated[str | None, typer.Option("--until", help="Up to the last line up to this time.")]


@app.command()
def merge(
    paths: Paths,
    start: From = None,
    until: Until = None,
    deep_cost: Annotated[
        Path | None,
        typer.Option(help="What `cascade bench deep-calls` wrote on the service's machine: adds deep-only."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of tables.")] = False,
) -> None:
    """One ledger of all services, workers and restarts: counts and latencies as if one had seen everything.

    Error budgets burn over windows that end with the last line: 5 and 30 minutes, 1 and 6 hours, 3 days.
    """
    lives = read_journal(paths)
    found = merged_between(lives, moment("--from", start), moment("--until", until))
    if found is None:
        raise DataError("no account between these times: each service writes a line every ledger.interval_s")
    burn = burn_rates(lives, moment("--from", start), moment("--until", until))
    summary = msgspec.structs.replace(summarise(found), burn=burn)
    if deep_cost is not None:
        counterfactual = deep_only(summary, DeepCost.read(deep_cost))
        summary = msgspec.structs.replace(summary, counterfactual=counterfactual)
    if json:
        sys.stdout.buffer.write(summary.to_json_line() + b"\n")
        return
    console = Console()
    render(summary, console)
    console.print(_told(lives), highlight=False)


@app.command()
def intervals(
    paths: Paths,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="Length of an interval, at least that of the lines.")
    ] = 3_600.0,
    start: From = None,
    until: Until = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON an interval instead of a table.")] = False,
) -> None:
    """The same, interval by interval: decisions, escalation, latency and energy over time."""
    lives = read_journal(paths)
    first = moment("--from", start) or min(life.accounts[0].started for life in lives)
    last = moment("--until", until) or max(life.accounts[-1].ended for life in lives)
    summaries = interval_summaries(lives, first, last, seconds)
    if json:
        sys.stdout.buffer.writelines(summary.to_json_line() + b"\n" for summary in summaries)
        return
    console = Console()
    console.print()
    console.print(_table(summaries))
    console.print(_told(lives), highlight=False)


@app.command()
def slices(
    trace: Annotated[Path, typer.Argument(help="JSON lines, a window of a device each; see docs/energy.md.")],
    method: Annotated[
        str, typer.Option(help=f"How joules are shared: {', '.join(METHODS)}; the last two for comparison.")
    ] = METHODS[0],
    json: Annotated[bool, typer.Option("--json", help="One line of JSON a device instead of tables.")] = False,
) -> None:
    """Joules of GPUs cut into MIG slices, by slice, from a recorded trace; the rows add up to the device's counter."""
    if method not in METHODS:
        raise DataError(f"--method {method}: use one of {', '.join(METHODS)}")
    try:
        content = trace.read_bytes()
    except OSError as error:
        raise DataError(f"{trace}: cannot be read ({error.strerror})") from error
    found = attribute_windows(read_trace(content, str(trace)), method)
    if json:
        sys.stdout.buffer.writelines(msgspec.json.encode(books) + b"\n" for books in found)
        return
    console = Console()
    for books in found:
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
    told = f"attributed from the device's counter; residual {abs(books.residual_share):.2%}"
    if books.check_j is None or not books.energy_j:
        return told
    return f"{told}; power integrated {books.check_j / books.energy_j - 1:+.2%}"


def interval_summaries(lives: list[Life], first: datetime, last: datetime, seconds: float) -> list[LedgerSummary]:
    """A summary for each interval of `seconds` from `first` on in which there were accounts, up to `last`.

    What a line tells belongs to the interval in which it was written. Raises DataError for too many intervals.
    """
    step = timedelta(seconds=seconds)
    count = max(-((first - last) // step), 0)
    if count > INTERVALS_MAX:
        raise DataError(f"{count:,} intervals of {seconds:g} s, at most {INTERVALS_MAX:,} are told: take longer ones")
    found = (merged_between(lives, first + number * step, first + (number + 1) * step) for number in range(count))
    return [summarise(account) for account in found if account is not None]


def moment(option: str, text: str | None) -> datetime | None:
    """A time that an option gives, with a time zone; raises DataError for anything else."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise DataError(f"{option} {text}: not a time; write it as 2026-11-25T08:00") from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _told(lives: list[Life]) -> str:
    torn = sum(life.torn for life in lives)
    lines = sum(len(life.accounts) for life in lives)
    return f"\n {lines:,} lines of {len(lives):,} {'life' if len(lives) == 1 else 'lives'}" + (
        f"; {torn} cut off by a crash, passed over" if torn else ""
    )


def _table(summaries: list[LedgerSummary]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 0, 0, 1))
    names = ("until, UTC", "decisions", "/s", "esc. %", "degr. %", "scr. ms", "esc. ms", "meas. mJ", "mod. mJ")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for one in summaries:
        joules = {total.kind: total.per_transaction_mj for total in one.energy_totals}
        table.add_row(
            f"{one.ended.astimezone(UTC):%m-%d %H:%M:%S}", f"{one.transactions:,}", f"{one.per_second:,.0f}",
            _percent(one.escalation_share), _percent(one.degraded_share), _p99_ms(one, "screened"),
            _p99_ms(one, "escalated"), number_text(joules.get("measured")), number_text(joules.get("modelled")),
        )  # fmt: skip
    table.caption = "p99 by path, append to decision; energy a transaction, measured and modelled"
    table.caption_justify = "left"
    return table


def _percent(share: float | None) -> str:
    return number_text(share, 100.0)


def _p99_ms(summary: LedgerSummary, path: str) -> str:
    latency = summary.paths[path].latency
    return number_text(None if latency is None else latency.p99_ms)
