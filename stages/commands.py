"""Commands for data and models: `train`, `simulate`, `repository`."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cascade.bundle import load_bundle
from cascade.durations import parse_ms
from cascade.errors import CascadeError
from cascade.local_parts import not_replaced
from cascade.policy import Costs
from cascade.progress import Steps
from stages.assembly import deep_signature
from stages.deep.repository import Target, write_repository
from stages.deep.signature import MODEL_NAME
from stages.training import Report, TrainingSettings, train_bundle

if TYPE_CHECKING:
    from cascade.simulator import Ceiling

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
SCHEMAS = Path(str(files("cascade") / "schemas"))


def duration_ms(text: str) -> int:
    """The ms of a duration option. Raises BadParameter if it is not a duration."""
    try:
        return parse_ms(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Labelled transactions, Parquet or CSV, with the schema's columns.")],
    out: Annotated[Path, typer.Option(help="Directory for the bundle; an existing bundle is replaced.")],
    schema: Annotated[Path, typer.Option(help="Schema file.", show_default="shipped")] = SCHEMAS / "simulator.toml",
    features: Annotated[Path, typer.Option(help="Feature file.", show_default="shipped")] = SCHEMAS / "features.toml",
    name: Annotated[str, typer.Option(help="First part of the bundle's version.")] = "bundle",
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Ignore data from this day (UTC) on.")
    ] = None,
    validation: Annotated[str, typer.Option(help="Length of the validation data, the last part.")] = "7d",
    warm_up: Annotated[str, typer.Option(help="Length of the warm-up, the first part.")] = "37d",
    budget: Annotated[float, typer.Option(min=0.0, max=1.0, help="Largest escalation rate.")] = 0.01,
    review_cost: Annotated[float, typer.Option(min=0.0, help="Cost of a review, in the amounts' currency.")] = 5.0,
    false_decline_cost: Annotated[float, typer.Option(min=0.0, help="Cost of a false decline, likewise.")] = 25.0,
    seed: Annotated[int, typer.Option(help="Random seed: the same seed gives the same bundle.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train screener and deep model, calibrate the policy, and write a bundle with its validation report.

    The command splits the data by time into a warm-up, which fills the windows of the features, training data, and
    validation data, from which it derives calibration and thresholds.
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
                f"training needs {error.name}, which is not installed; run pip install 'cascade-fraud[train]'"
            ) from error
    if json:
        print(msgspec.json.encode(report).decode())
        return
    console = Console()
    _show(report, console)
    console.print(f"bundle [bold]{manifest.version}[/bold] written to {out}")


def _show(report: Report, console: Console) -> None:
    part = report.validation
    title = f"validation, {part.first:%Y-%m-%d} to {part.last:%Y-%m-%d}: {part.transactions:,} transactions, "
    title += f"{part.frauds:,} frauds"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("AUC", "average precision", "CP@100", "recall"):
        table.add_column(column, justify="right", no_wrap=True)
    models = {"cascade": report.cascade, "screener only": report.screener_only, "deep only": report.deep_only}
    for name, model in models.items():
        measures = (model.auc, model.average_precision, model.card_precision_top100, model.recall_at_budget)
        table.add_row(name, *("–" if measure is None else f"{measure:.3f}" for measure in measures))
    console.print(table)
    console.print(
        "CP@100: card precision top-100; recall: at the escalation budget\n"
        f"escalated {report.escalation_share:.2%}\n"
        f"cost of the decisions: {report.cost_per_thousand:,.0f} per thousand transactions"
        f" ({report.cost_per_thousand_approve_all:,.0f} if all were approved)\n"
        f"ONNX differs from PyTorch by at most {report.onnx_difference_max:.1g}"
    )


@app.command()
def repository(
    bundle: Annotated[Path, typer.Option(help="Bundle with the deep model.")],
    out: Annotated[
        Path, typer.Option(help="Directory for the repository; an existing one is replaced. Not a mount point itself.")
    ],
    target: Annotated[Target, typer.Option(help="gpu: ONNX Runtime backend; cpu: Python backend.")] = "gpu",
) -> None:
    """Write the Triton model repository of a bundle's deep model.

    Its config.pbtxt sets batching, queue limit and timeout.
    """
    loaded = load_bundle(bundle)
    try:
        written = write_repository(bundle / "deep.onnx", deep_signature(loaded), out, target)
    except OSError as error:
        raise not_replaced(out, error) from error
    typer.echo(f"{written}: model {MODEL_NAME} of bundle {loaded.version} for {target}")


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    cards: Annotated[int, typer.Option(help="Cards at the start.")] = 5_000,
    terminals: Annotated[int, typer.Option(help="Terminals.")] = 10_000,
    days: Annotated[int, typer.Option(help="Days to simulate.")] = 90,
    start: Annotated[
        datetime, typer.Option(formats=["%Y-%m-%d"], help="First day (UTC).", show_default="2025-01-01")
    ] = datetime(2025, 1, 1),
    fraud_share: Annotated[float, typer.Option(help="Share of transactions that are frauds.")] = 0.007,
    seed: Annotated[int, typer.Option(help="Random seed: the same seed gives the same file.")] = 1,
    with_ceiling: Annotated[
        bool, typer.Option("--ceiling", help="Also print what an oracle reaches that knows the hidden states.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Write simulated card transactions with frauds of seven patterns, and genuine twins of most of them.

    Cards, merchants and devices have profiles, and behaviour drifts over time. The column `fraud` is the label as
    reported. The column `fraud_pattern` names the true pattern; it is part of the answer, never a feature.
    """
    import polars as pl

    from cascade.simulator import SimulatorSettings, ceiling, simulate_with_states

    settings = SimulatorSettings(
        cards=cards, terminals=terminals, days=days, start=start.date(), fraud_share=fraud_share, seed=seed
    )
    with Steps() as progress:
        simulation = simulate_with_states(settings, lambda share: progress("simulate", share))
    frame = simulation.frame
    out.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(out, compression="zstd")
    patterns: dict[str, int] = dict(
        frame.filter(pl.col("fraud_pattern") != "none")["fraud_pattern"].value_counts(sort=True).iter_rows()
    )
    frauds, reported = sum(patterns.values()), int(frame["fraud"].sum())
    best = ceiling(simulation) if with_ceiling else None
    if json:
        counts = {"transactions": frame.height, "frauds": frauds, "reported": reported, "patterns": patterns}
        print(msgspec.json.encode({"file": str(out), **counts, "ceiling": best}).decode())
        return
    console = Console()
    listed = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in patterns.items())
    console.print(f"{out}: {frame.height:,} transactions, {frauds:,} frauds ({listed}), {reported:,} reported")
    if with_ceiling:
        console.print("no ceiling: there are no reported frauds" if best is None else _ceiling_text(best))


def _ceiling_text(best: Ceiling) -> str:
    return (
        f"ceiling: average precision {best.average_precision:.3f} of an oracle that knows the hidden states"
        f" ({best.average_precision_truth:.3f} if every fraud and nothing else were reported)\n"
        f"of {best.frauds:,} reported frauds it gives {best.unlikely_share:.1%} at most 1/2, and"
        f" {best.indistinguishable_share:.1%} at most 0.1: nobody can tell these from genuine transactions"
    )
