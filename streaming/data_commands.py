"""Commands with a labelled data file before or beside a running service: `warm-up`, `replay`, `evaluate`."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cascade.bundle import load_bundle
from cascade.columns import Bool
from cascade.config import Config, DeepSettings, load_config, with_config_path
from cascade.frames import LabelledData, read_labelled
from cascade.progress import Steps
from cascade.readable import readable
from cascade.schema import load_schema
from stages.assembly import make_deep_stage
from streaming.commands import BROKER_WAIT_S, ConfigOption, CreateTopicsOption
from streaming.evaluation import Evaluation, Judged, ModelEvaluation, read_decisions
from streaming.evaluation import evaluate as judge
from streaming.kafka import make_consumer, make_producer
from streaming.kafka.topics import wait_for_broker
from streaming.player import Player
from streaming.service.topics import check_topics
from streaming.warm_up import warm_up

# A larger difference is not rounding: the service's features differed from those of the whole file.
SCORE_DIFFERENCE_MAX = 1e-6
app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
FromOption = Annotated[datetime | None, typer.Option("--from", formats=["%Y-%m-%d"], help="First day, UTC.")]
ToOption = Annotated[datetime | None, typer.Option("--to", formats=["%Y-%m-%d"], help="Day after the last one, UTC.")]


@app.command()
def replay(
    data: Annotated[Path, typer.Option(help="Labelled transactions, Parquet or CSV, with the schema's columns.")],
    rate: Annotated[
        str,
        typer.Option(
            help="Mean transactions per second, in the rhythm of the event times; or max: as fast as possible."
        ),
    ] = "max",
    config: ConfigOption = Path("cascade.toml"),
    schema: Annotated[Path | None, typer.Option(help="Schema file; default: the bundle's schema.")] = None,
    start: FromOption = None,
    end: ToOption = None,
    create_topics: CreateTopicsOption = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Play a data file into Kafka: transactions in the rhythm of their event times, labels `label.delay` later.

    A label is sent for each fraud. It is sent and acknowledged before the first transaction whose event time is after
    the label's delay. Labels of frauds before --from that are due by then are sent first.
    """
    settings = load_config(config)
    known = load_schema(schema) if schema is not None else load_bundle(Path(settings.bundle.path)).schema
    labelled = read_labelled(data, known)
    chosen = np.flatnonzero(between(labelled, known.roles.event_time, start, end))
    rows = slice(int(chosen[0]), int(chosen[-1]) + 1) if len(chosen) else slice(0, 0)
    pace = _rate(rate)
    wait_for_broker(settings.kafka, BROKER_WAIT_S, lambda text: typer.echo(text, err=True))
    check_topics(settings, create_topics)
    producer = make_producer(settings.kafka)
    with Steps() as progress:
        played = Player(settings, known, producer).play(labelled, rows, pace, lambda share: progress("replay", share))
    producer.close(BROKER_WAIT_S)
    if json:
        print(msgspec.json.encode(played).decode())
        return
    per_second = played.transactions / max(played.elapsed_s, 1e-9)
    typer.echo(
        f"{played.transactions:,} transactions and {played.labels:,} labels in {played.elapsed_s:.1f} s"
        f" ({per_second:,.0f} transactions/s); at most {played.behind_s_max * 1e3:.0f} ms behind schedule"
    )


@app.command(name="warm-up")
def warm_up_command(
    data: Annotated[Path, typer.Option(help="Labelled transactions, Parquet or CSV, with the schema's columns.")],
    config: ConfigOption = Path("cascade.toml"),
    start: FromOption = None,
    end: ToOption = None,
    create_topics: CreateTopicsOption = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Fill the state from history before a service's first decision, so that its cards are not all new.

    Writes a snapshot to `state.snapshots`, from which the service starts. The history must end before the topic's first
    record, and the group must not have decided anything. Each card's history goes to the partition that Kafka's default
    partitioner chooses for the card as key.
    """
    settings = load_config(config)
    bundle = load_bundle(Path(settings.bundle.path))
    labelled = read_labelled(data, bundle.schema)
    labelled = labelled.take(between(labelled, bundle.schema.roles.event_time, start, end))
    wait_for_broker(settings.kafka, BROKER_WAIT_S, lambda text: typer.echo(text, err=True))
    check_topics(settings, create_topics)
    with Steps() as progress, with_config_path(config):
        done = warm_up(settings, bundle, labelled, progress)
    if json:
        print(msgspec.json.encode(done).decode())
        return
    typer.echo(
        f"{done.rows:,} transactions and {done.frauds:,} frauds in {done.partitions} partitions: {done.megabytes:,} MB"
        f" of state, which cover {done.covered:.0%} of the longest window"
    )
    if done.forgotten:
        typer.echo(f"no room for {done.forgotten:,} keys: raise keys_max of the feature file", err=True)


@app.command()
def evaluate(
    data: Annotated[Path, typer.Option(help="The labelled file that was replayed.")],
    config: ConfigOption = Path("cascade.toml"),
    start: FromOption = None,
    end: ToOption = None,
    deep_share: Annotated[
        float,
        typer.Option(min=0.001, max=1.0, help="Share of the likely genuine rows that the deep model scores, weighted."),
    ] = 1.0,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file, as JSON.")] = None,
) -> None:
    """Compare the decisions topic with the labels, beside the screener alone and the deep model alone.

    Both models are scored offline by the same bundle, with features from the whole file. So the file should contain all
    transactions that were replayed.
    """
    settings = load_config(config)
    with Steps() as progress:
        judged = evaluate_topic(settings, data, (start, end), progress, deep_share)
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_bytes(readable(judged.evaluation))
    show_evaluation(judged.evaluation, Console())


def evaluate_topic(
    settings: Config,
    data: Path,
    days: tuple[datetime | None, datetime | None],
    progress: Steps,
    deep_share: float = 1.0,
) -> Judged:
    """Reads the decisions topic and evaluates it by the labels in the file `data`, for days from, to (UTC).

    deep_share: see `streaming.evaluation.evaluate`.
    """
    bundle = load_bundle(Path(settings.bundle.path))
    labelled = read_labelled(data, bundle.schema)
    within = between(labelled, bundle.schema.roles.event_time, *days)
    wait_for_broker(settings.kafka, BROKER_WAIT_S, lambda text: typer.echo(text, err=True))
    with closing(make_consumer(settings.kafka, None)) as consumer:
        decisions, repeated = read_decisions(consumer, settings.kafka.topics.decisions, settings.kafka.codec, progress)
    with closing(make_deep_stage(bundle, DeepSettings(backend="onnxruntime", threads=2))) as deep:
        return judge(decisions, repeated, labelled, within, bundle, deep, progress, deep_share)


def between(data: LabelledData, event_time: str, start: datetime | None, end: datetime | None) -> Bool:
    """Mask of the rows from `start` on and before `end` (UTC days), bool [rows]."""
    times = data.batch[event_time]
    mask: Bool = np.ones(len(times), bool)
    if start is not None:
        mask &= times >= start.replace(tzinfo=UTC).timestamp() * 1e3
    if end is not None:
        mask &= times < end.replace(tzinfo=UTC).timestamp() * 1e3
    return mask


def _rate(text: str) -> float | None:
    if text == "max":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0.0 < rate <= 1e7:
        raise typer.BadParameter(
            "use a number of transactions per second, above 0 and at most 10,000,000, or max", param_hint="--rate"
        )
    return rate


def show_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Prints an evaluation: a table with a column for each way to decide, within 80 columns, and the counts."""
    title = f"{evaluation.transactions:,} decisions, {evaluation.frauds:,} frauds, bundle {evaluation.bundle}"
    console.print(title, style="italic", soft_wrap=True)
    models = (evaluation.cascade, evaluation.screener_only, evaluation.deep_only)
    table = Table("decided by", box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("cascade", "screener only", "deep only"):
        table.add_column(name, justify="right", no_wrap=True)
    for figures in zip(_NAMES, *map(_figures, models), strict=True):
        table.add_row(*figures)
    console.print(table)
    console.print(f"caught: reviewed or declined, from a probability of {evaluation.review_from:.3f} on", style="dim")
    show_counts(evaluation, console)


def show_counts(evaluation: Evaluation, console: Console) -> None:
    """Prints the counts and the largest score difference of an evaluation."""
    difference = f"largest difference from the offline scores {evaluation.offline_difference_max:.1g}"
    if evaluation.offline_difference_max > SCORE_DIFFERENCE_MAX:
        difference += ": the service read labels later than their delay (see labels.alignment)"
    if evaluation.deep_rows < evaluation.transactions:
        console.print(f"deep only: estimated from a weighted sample of {evaluation.deep_rows:,} transactions")
    console.print(
        f"escalated {evaluation.escalated_share:.2%}; degraded {evaluation.degraded_share:.2%}; without a decision"
        f" {evaluation.missing:,}; repeated decisions {evaluation.repeated:,}\n{difference}"
    )


_NAMES = (
    "AUC", "average precision", "card precision top-100", "recall at the escalation budget", "frauds caught",
    "frauds missed", "false alarms", "policy cost of 1,000 transactions",
)  # fmt: skip


def _figures(model: ModelEvaluation) -> list[str]:
    """The figures of a column, in the order of `_NAMES`."""
    quality = model.quality
    ranks = (quality.auc, quality.average_precision, quality.card_precision_top100, quality.recall_at_budget)
    counts = (model.caught, model.missed, model.false_alarms)
    return [
        *("–" if rank is None else f"{rank:.3f}" for rank in ranks),
        *(f"{count:,}" for count in counts),
        f"{model.cost_per_thousand:,.0f}",
    ]
