"""Commands over data and models: `train`, `simulate`."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cascade.bundle import load_bundle
from cascade.durations import parse_ms
from cascade.errors import CascadeError
from cascade.policy import Costs
from cascade.progress import Steps
from stages.assembly import deep_signature
from stages.deep.repository import Target, write_repository
from stages.deep.signature import MODEL_NAME
from stages.training import Report, TrainingSettings, train_bundle

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
SCHEMAS = Path(str(files("cascade") / "schemas"))


def duration_ms(text: str) -> int:
    """A duration option in ms; a usage error where it is none."""
    try:
        return parse_ms(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Labelled transactions, Parquet or CSV, with the schema's columns.")],
    out: Annotated[Path, typer.Option(help="Directory of the bundle; replaced where it exists.")],
    schema: Annotated[Path, typer.Option(help="Schema file.")] = SCHEMAS / "simulator.toml",
    features: Annotated[Path, typer.Option(help="Feature file.")] = SCHEMAS / "features.toml",
    name: Annotated[str, typer.Option(help="First part of the bundle's version.")] = "bundle",
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Use no data from this day (UTC) on.")
    ] = None,
    validation: Annotated[str, typer.Option(help="Length of the validation data, at the end.")] = "7d",
    warm_up: Annotated[str, typer.Option(help="Length of the start that only fills the feature state.")] = "37d",
    budget: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of traffic that may be escalated.")] = 0.01,
    review_cost: Annotated[float, typer.Option(min=0.0, help="Cost of a review, in the amounts' currency.")] = 5.0,
    false_decline_cost: Annotated[float, typer.Option(min=0.0, help="Cost of declining a genuine one.")] = 25.0,
    seed: Annotated[int, typer.Option(help="Seed of all that is random.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train screener and deep model, calibrate the policy, and write a bundle with its validation report.

    The data is cut by time: a warm-up that fills the feature state, the training part, and the validation part, on
    which calibration and thresholds are chosen.
    """
    settings = TrainingSettings(
        name=name,
        seed=seed,
        until_ms=None if until is None else int(until.replace(tzinfo=UTC).timestamp() * 1e3),
        validation_ms=duration_ms(validation),
        warm_up_ms=duration_ms(warm_up),
        escalation_budget=budget,
        costs=Costs(review=review_cost, false_decline=false_decline_cost),
    )
    with Steps() as progress:
        try:
            manifest, report = train_bundle(data, schema, features, out, settings, progress)
        except ModuleNotFoundError as error:
            raise CascadeError(
                f"training needs {error.name}, which is not installed; pip install 'cascade-fraud[train]'"
            ) from error
    if json:
        print(msgspec.json.encode(report).decode())
        return
    console = Console()
    _show(report, console)
    console.print(f"bundle [bold]{manifest.version}[/bold] written to {out}")


def _show(report: Report, console: Console) -> None:
    first, last = report.validation.first, report.validation.last
    table = Table(
        title=f"validation, {first:%Y-%m-%d} to {last:%Y-%m-%d}: {report.validation.transactions:,} transactions,"
        f" {report.validation.frauds:,} frauds",
        title_justify="left", box=box.SIMPLE_HEAD, show_edge=False,
    )  # fmt: skip
    table.add_column("", no_wrap=True)
    for column in ("AUC", "average precision", "CP@100", "recall"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, quality in (
        ("cascade", report.cascade),
        ("screener only", report.screener_only),
        ("deep only", report.deep_only),
    ):
        figures = (
            quality.auc, quality.average_precision, quality.card_precision_top100, quality.recall_at_budget,
        )  # fmt: skip
        table.add_row(name, *("–" if figure is None else f"{figure:.3f}" for figure in figures))
    console.print(table)
    console.print(
        "CP@100: card precision top-100; recall: at the escalation budget\n"
        f"escalated {report.escalation_share:.2%}\n"
        f"decisions cost {report.cost_per_thousand:,.0f} a thousand transactions"
        f" ({report.cost_per_thousand_approve_all:,.0f} if all were approved)\n"
        f"ONNX differs from PyTorch by at most {report.onnx_difference_max:.1g}"
    )


@app.command()
def repository(
    bundle: Annotated[Path, typer.Option(help="Bundle whose deep model is to be served.")],
    out: Annotated[Path, typer.Option(help="Directory of the Triton model repository; replaced where it exists.")],
    target: Annotated[Target, typer.Option(help="gpu: ONNX Runtime backend; cpu: Python backend.")] = "gpu",
) -> None:
    """Write the Triton model repository of a bundle's deep model.

    Batching, queue limit and timeout stand in the config.pbtxt that is written.
    """
    loaded = load_bundle(bundle)
    written = write_repository(bundle / "deep.onnx", deep_signature(loaded), out, target)
    typer.echo(f"{written}: model {MODEL_NAME} of bundle {loaded.version} for {target}")


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    cards: Annotated[int, typer.Option(help="Cards at the start.")] = 5_000,
    terminals: Annotated[int, typer.Option(help="Terminals.")] = 10_000,
    days: Annotated[int, typer.Option(help="Days to simulate.")] = 90,
    start: Annotated[datetime, typer.Option(formats=["%Y-%m-%d"], help="First day (UTC).")] = datetime(2025, 1, 1),
    fraud_share: Annotated[float, typer.Option(help="Share of transactions that are frauds.")] = 0.007,
    seed: Annotated[int, typer.Option(help="Seed: the same seed gives the same file.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write card transactions with known frauds: profiles of cards and terminals, times of day, drift, five patterns.

    The column `fraud_pattern` says which pattern a fraud belongs to: part of the answer, never a feature.
    """
    from cascade.simulator import SimulatorSettings
    from cascade.simulator import simulate as run

    settings = SimulatorSettings(
        cards=cards, terminals=terminals, days=days, start=start.date(), fraud_share=fraud_share, seed=seed
    )
    with Steps() as progress:
        frame = run(settings, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(out, compression="zstd")
    frauds = frame.filter(frame["fraud"] == 1)["fraud_pattern"].value_counts(sort=True)
    patterns = dict(frauds.iter_rows())
    if json:
        written = {
            "file": str(out),
            "transactions": frame.height,
            "frauds": sum(patterns.values()),
            "patterns": patterns,
        }
        print(msgspec.json.encode(written).decode())
        return
    told = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in patterns.items())
    Console().print(f"{out}: {frame.height:,} transactions, {sum(patterns.values()):,} frauds ({told})")
