"""`cascade bench`: speed, always beside what it is compared with, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.cluster import write_json
from bench.screener import run_screener, show

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True,
    help="Speed, always beside what it is compared with, in one run.",
)  # fmt: skip


@app.callback()
def _commands() -> None:
    """Keeps each benchmark a command with a name of its own."""


@app.command()
def screener(
    rounds: Annotated[int, typer.Option(min=3, help="Rounds in which the methods take turns.")] = 9,
    seed: Annotated[int, typer.Option(help="Of data and models.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """The compiled screener against LightGBM, its single-row call, and what else is installed."""
    report = run_screener(rounds, seed)
    if json is not None:
        write_json(json, report)
    show(report, Console())
