"""Commands for data and models: `train`, `simulate`, `repository`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console

from cascade.bundle import Manifest, load_bundle
from cascade.config import with_config_path
from cascade.errors import CascadeError
from cascade.local_parts import not_replaced
from cascade.progress import Steps
from stages.assembly import deep_signature
from stages.deep.repository import Target, write_repository
from stages.deep.signature import MODEL_NAME
from stages.recalibration import Changes, recalibrated
from stages.report import Report
from stages.report_table import show_report, show_sizes
from stages.settings import TrainingFile, load_training_file
from stages.training import TrainingSettings, train_bundles

if TYPE_CHECKING:
    from cascade.simulator import Ceiling

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
SCHEMAS = Path(str(files("cascade") / "schemas"))


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Labelled transactions, Parquet or CSV, with the schema's columns.")],
    out: Annotated[Path, typer.Option(help="Directory for the bundle; an existing bundle is replaced.")],
    schema: Annotated[Path, typer.Option(help="Schema file.", show_default="shipped")] = SCHEMAS / "simulator.toml",
    features: Annotated[Path, typer.Option(help="Feature file.", show_default="shipped")] = SCHEMAS / "features.toml",
    training: Annotated[
        Path | None, typer.Option(help="Training file; docs/training.example.toml shows every key.")
    ] = None,
    name: Annotated[str, typer.Option(help="First part of the bundle's version.")] = "bundle",
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Ignore data from this day (UTC) on.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed: the same seed gives the same bundle.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train screener, deep models and escalation rules, and write a bundle with its report for each size.

    The command splits the data by time into a warm-up, which fills the windows of the features, training data, and
    validation data, from which it derives calibration and thresholds. Each size of the deep model makes a bundle; the
    last one is written to OUT, the others beside it, to OUT-SIZE. An interrupted training goes on where it was.
    """
    settings = TrainingSettings(
        name=name,
        seed=seed,
        until_ms=None if until is None else int(until.replace(tzinfo=UTC).timestamp() * 1e3),
        file=TrainingFile() if training is None else load_training_file(training),
    )
    with Steps() as progress, with_config_path(training), training_installed():
        written = train_bundles(data, schema, features, out, settings, progress)
    if json:
        print(msgspec.json.encode({trained.size: trained.report for trained in written}).decode())
        return
    for trained in written:
        _print_result(trained.report, trained.manifest, trained.directory)
    show_sizes([trained.report for trained in written], Console())


@contextmanager
def training_installed() -> Iterator[None]:
    """Raises a CascadeError with the remedy where a module of the extra `train` is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CascadeError(
            f"training needs {error.name}, which is not installed; run pip install 'cascade-fraud[train]'"
        ) from error


@app.command()
def recalibrate(
    bundle: Annotated[Path, typer.Option(help="Bundle to start from.")],
    out: Annotated[Path, typer.Option(help="Directory for the new bundle; an existing bundle is replaced.")],
    budget: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Escalation budget.", show_default="the bundle's")
    ] = None,
    review_cost: Annotated[
        float | None, typer.Option(min=0.0, help="Fixed cost of a review.", show_default="the bundle's")
    ] = None,
    false_decline_cost: Annotated[
        float | None, typer.Option(min=0.0, help="Fixed cost of a false decline.", show_default="the bundle's")
    ] = None,
    reviews_per_day: Annotated[
        float | None, typer.Option(min=0.0, help="Most reviews on a mean day.", show_default="the bundle's")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Derive another policy for a bundle from its own validation rows, without data and without training.

    Models and features stay as they are. The training file's `[costs]` has the other cells of the cost matrix.
    """
    changes = Changes(budget, review_cost, false_decline_cost, reviews_per_day)
    manifest, report = recalibrated(load_bundle(bundle), changes, out)
    if json:
        print(msgspec.json.encode(report).decode())
        return
    _print_result(report, manifest, out)


def _print_result(report: Report, manifest: Manifest, out: Path) -> None:
    console = Console()
    show_report(report, console)
    console.print(f"bundle [bold]{manifest.version}[/bold] written to {out}")


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
