"""`cascade handbook`: the service's figures on the Fraud Detection Handbook's data, from the decisions topic.

The command trains on the data up to 2018-07-31, streams the data through Kafka, and scores the decisions of the
Handbook's test weeks under its published protocol: the first one by default. The later ones are decided by the same
bundle, which by then is up to three weeks older.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from datetime import datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console

from bench.cluster import write_json
from bench.embedded import EmbeddedParts, ServiceProcess, fresh_directory, play_file, wait_for_decisions
from bench.tables import figure_table, print_table
from cascade.bundle import load_bundle
from cascade.config import load_config
from cascade.errors import CascadeError
from cascade.frames import read_labelled
from cascade.ledger import LedgerSummary
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import Steps
from stages.report import Report
from stages.screener.search import SearchSettings
from stages.settings import DataSettings, DeepSettings, DeepSizes, EscalationSettings, TrainingFile
from stages.training import TrainingSettings, train_bundles
from streaming.data_commands import between, evaluate_topic
from streaming.evaluation import Evaluation

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
SCHEMAS = Path(str(files("cascade") / "schemas"))
TEST_WEEK = (datetime(2018, 8, 8), datetime(2018, 8, 15))
WEEK = timedelta(days=7)
# At most 1 % of the test week is to be escalated; the budget leaves 0.1 % for the drift since the validation week.
SETTINGS = TrainingSettings(
    name="handbook",
    seed=1,
    until_ms=1_533_081_600_000,
    file=TrainingFile(
        data=DataSettings(validation="7d"),
        escalation=EscalationSettings(budget=0.009),
        # this data is a control, not a goal: a short training is enough, and the run stays short
        screener=SearchSettings(leaves=(31,), learning_rates=(0.1,), fraud_weights=(), objectives=()),
        deep=DeepSizes(("small",), genuine_share=0.15, small=DeepSettings(hidden=64)),
    ),
)
# The run replays months, so append times mean nothing and no transaction is urgent.
SERVICE: dict[str, dict[str, object]] = {
    "deadline": {"start": "fetch", "budget_ms": 60_000},
    "labels": {"alignment": "exact"},
}
# Chapters 3 (fold 0) and 5 and 7 (mean of the test folds): AUC, average precision, CP@100.
PUBLISHED = {
    "published, random forest, this week": (0.867, 0.658, 0.287),
    "published, XGBoost, this week": (0.862, 0.639, 0.273),
    "published, XGBoost, four folds": (0.869, 0.687, 0.303),
    "published, LSTM, four folds": (0.876, 0.665, 0.297),
}
PROTOCOL_LINE = re.compile(r"fold \d+: .*AUC ([\d.]+)\s+AP ([\d.]+)\s+CP@100 ([\d.]+)")


class Protocol(msgspec.Struct, frozen=True):
    """Figures under the Handbook's protocol."""

    auc: float
    average_precision: float
    card_precision_top100: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The result of the run.

    `protocol`: figures by decider, each the mean of the weeks; None where the protocol's script was not found. `weeks`:
    those of the cascade, a figure for each test week.
    """

    bundle: str
    protocol: dict[str, Protocol] | None
    weeks: list[Protocol]
    evaluation: Evaluation
    training: Report
    ledger: LedgerSummary
    machine: Machine
    elapsed_s: float


@app.command()
def handbook(
    data: Annotated[Path, typer.Option(help="The Handbook's transactions as one Parquet file.")],
    out: Annotated[Path, typer.Option(help="Directory for bundle, scores and summary; emptied first.")] = Path(
        "build/handbook"
    ),
    protocol: Annotated[
        Path | None, typer.Option(help="The protocol's script; by default the one beside the data's folder.")
    ] = None,
    folds: Annotated[int, typer.Option(min=1, max=4, help="Test weeks to judge, from the first one on.")] = 1,
) -> None:
    """Reproduce the figures on the Fraud Detection Handbook's data.

    Trains the models, plays four and a half months of transactions through Kafka, and judges the decisions of a week,
    or of several; about ten minutes on two cores.
    """
    started_s = time.monotonic()
    if not data.exists():
        raise CascadeError(f"{data}: not found; give the Handbook's transactions with --data")
    directory = fresh_directory(out)
    judged_span = (TEST_WEEK[0], TEST_WEEK[0] + folds * WEEK)
    with Steps() as progress:
        (trained,) = train_bundles(
            data, SCHEMAS / "handbook.toml", SCHEMAS / "features.toml", directory / "bundle", SETTINGS, progress
        )
        bundle = load_bundle(directory / "bundle")
        labelled = read_labelled(data, bundle.schema)
        past = int(between(labelled, bundle.schema.roles.event_time, None, judged_span[1]).sum())
        with EmbeddedParts(directory, bundle) as parts:
            config_path = parts.write_config("cascade.toml", SERVICE)
            config = load_config(config_path)
            play_file(config, labelled, slice(0, past), None, lambda share: progress("fill Kafka", share))
            with ServiceProcess(config_path) as service:
                service.wait_ready()
                wait_for_decisions(service, past, lambda share: progress("decide", share))
                ledger = service.stop()
            judged = evaluate_topic(config, data, judged_span, progress)
    scores = judged.scores.rename({"transaction_id": "TRANSACTION_ID"})
    tables = {
        "cascade": ("scores.parquet", scores.select("TRANSACTION_ID", "score", "stage")),
        "screener only": ("scores_screener_only.parquet", scores.select("TRANSACTION_ID", score="screener_only")),
        "deep only": ("scores_deep_only.parquet", scores.select("TRANSACTION_ID", score="deep_only")),
    }
    for file, table in tables.values():
        table.write_parquet(directory / file)
    script = protocol or data.resolve().parent.parent / "tools" / "handbook_protocol.py"
    found: dict[str, list[Protocol]] = {}
    if script.exists():
        found = {name: _protocol(script, directory / file, data, folds) for name, (file, _) in tables.items()}
    summary = Summary(
        bundle=trained.manifest.version,
        protocol={name: _mean(weeks) for name, weeks in found.items()} or None,
        weeks=found.get("cascade", []),
        evaluation=judged.evaluation,
        training=trained.report,
        ledger=ledger,
        machine=describe_machine(),
        elapsed_s=time.monotonic() - started_s,
    )
    write_json(directory / "summary.json", summary)
    _show(summary, Console(), directory)


def _protocol(script: Path, scores: Path, data: Path, folds: int) -> list[Protocol]:
    """The figures of each test week, as the protocol's script prints them."""
    command = [sys.executable, str(script), str(scores), "--data", str(data), "--folds", str(folds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    weeks = [Protocol(*map(float, figures)) for figures in PROTOCOL_LINE.findall(done.stdout)]
    if len(weeks) != folds:
        raise CascadeError(f"{script}: printed no figures ({(done.stderr or done.stdout).strip().splitlines()[-1:]})")
    return weeks


def _mean(weeks: list[Protocol]) -> Protocol:
    return Protocol(*np.mean([msgspec.structs.astuple(week) for week in weeks], axis=0).tolist())


def _show(summary: Summary, console: Console, directory: Path) -> None:
    evaluation = summary.evaluation
    last = TEST_WEEK[0] + max(len(summary.weeks), 1) * WEEK - timedelta(days=1)
    title = f"Fraud Detection Handbook, decisions of {TEST_WEEK[0]:%Y-%m-%d} to {last:%m-%d}, its protocol"
    table = figure_table("decided by", "AUC", "average precision", "CP@100", title=title)
    for name, published in PUBLISHED.items():
        table.add_row(name, *(f"{figure:.3f}" for figure in published), style="dim")
    for name, figures in (summary.protocol or {}).items():
        label = f"{name}, {evaluation.escalated_share:.2%} escalated" if name == "cascade" else name
        table.add_row(label, *(f"{figure:.3f}" for figure in msgspec.structs.astuple(figures)))
    for number, week in enumerate(summary.weeks if len(summary.weeks) > 1 else []):
        table.add_row(f"cascade, fold {number}", *(f"{figure:.3f}" for figure in msgspec.structs.astuple(week)))
    missing = () if summary.protocol else ("the protocol's script was not found: name it with --protocol",)
    print_table(
        console,
        table,
        *missing,
        f"{summary.ledger.transactions:,} transactions decided at {summary.ledger.per_second:,.0f}/s",
        f"{evaluation.transactions:,} judged, {evaluation.missing} without a decision,"
        f" {evaluation.degraded_share:.2%} degraded",
        f"scores differ from the offline scores by at most {evaluation.offline_difference_max:.1g}",
        f"{summary.elapsed_s:.0f} s in all; figures in {directory / 'summary.json'}",
    )
