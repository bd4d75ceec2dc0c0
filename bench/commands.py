"""`cascade bench`: speed, always beside what it is compared with, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from bench.cluster import write_json
from bench.pipeline.page import check_plots, make_page
from bench.pipeline.report import show as show_pipeline
from bench.pipeline.run import run_pipeline
from bench.pipeline.scenario import load_scenario
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


@app.command()
def pipeline(
    scenario: Annotated[str, typer.Option(help="A shipped scenario by name, or a TOML file.")] = "pipeline",
    compare: Annotated[
        list[str] | None, typer.Option(help="Only these variants, the first as the reference; once for each.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Instead of the scenario's.")] = None,
    out: Annotated[Path, typer.Option(help="Directory for logs and data; emptied first.")] = Path("build/pipeline"),
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write it as one self-contained page.")] = None,
) -> None:
    """Whole services side by side: throughput, latency and CPU time, from topic to topic, by turns."""
    wanted = load_scenario(scenario)
    if compare:
        wanted = wanted.only(compare)
    if rounds is not None:
        wanted = msgspec.structs.replace(wanted, rounds=rounds)
    if html is not None:
        check_plots()
    report = run_pipeline(wanted, out)
    if json is not None:
        write_json(json, report)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(make_page(report), encoding="utf-8")
    show_pipeline(report, Console())
