"""Does the escalation budget hold, and what does it cost? Streams of scores, and the shipped models.

For each stream: the least and the most escalated of any 10,000 rows, and the value (the sum of the escalated rows'
scores) as a share of the best possible choice, by one who knows all scores in advance and keeps within the same
bucket. Beside it the fixed threshold that the budget gives on the stream's first rows, as training measures it.

For the shipped models: average precision of the cascade with the bundle's threshold and with the budget held, from a
cold state on, on simulated transactions that the bundle was not trained on.
"""

from __future__ import annotations

import time
from contextlib import closing
from datetime import date

import msgspec
import numpy as np
from rich.console import Console
from sklearn.metrics import average_precision_score

from bench.best_choice import best_value
from bench.cluster import simulated
from bench.tables import figure_table, print_table
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.columns import Bool, Float64
from cascade.config import DeepSettings
from cascade.escalation_budget import WINDOW_ROWS, EscalationBudget
from cascade.ledger.machine import Machine, describe_machine
from stages.assembly import make_deep_stage, make_engine
from stages.offline import score_offline

ROWS = 300_000
# The rows on which the fixed threshold is measured.
MEASURED_ROWS = 20_000
BUDGETS = (0.0025, 0.01, 0.05)
# Later and of other cards than the data that the shipped bundle was trained on.
SIMULATION = {"cards": 1_500, "terminals": 3_000, "days": 46, "start": date(2025, 6, 1)}


class StreamResult(msgspec.Struct, frozen=True, kw_only=True):
    """A stream at a budget.

    `least`, `most`: escalated of any WINDOW_ROWS rows, as multiples of the budget; `fixed_most`: by the fixed
    threshold. `kept`: value of the chosen rows over that of the best possible choice within the same bounds. `free`:
    value of the highest scores of the whole stream over the same; `fixed`: of the fixed threshold. `us_per_row`: time
    of the control.
    """

    stream: str
    budget: float
    least: float
    most: float
    kept: float
    free: float
    fixed: float
    fixed_most: float
    us_per_row: float


class ModelResult(msgspec.Struct, frozen=True, kw_only=True):
    """The shipped models on simulated data: AP, escalated share, and the most of any WINDOW_ROWS, × the budget."""

    name: str
    average_precision: float
    share: float
    most: float


class EscalationReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `cascade bench escalation`."""

    streams: list[StreamResult]
    models: list[ModelResult]
    rows: int
    seed: int
    machine: Machine


def run_escalation(seed: int) -> EscalationReport:
    """Runs all streams at all budgets, and the shipped models; `seed`: of the streams and the simulation."""
    streams = score_streams(ROWS, seed)
    return EscalationReport(
        streams=[stream_result(name, scores, budget) for budget in BUDGETS for name, scores in streams.items()],
        models=_model_results(seed),
        rows=ROWS,
        seed=seed,
        machine=describe_machine(),
    )


def score_streams(rows: int, seed: int) -> dict[str, Float64]:
    """Streams of positive scores, float64 [rows], by name: what escalating each row gains."""
    chance, row = np.random.default_rng(seed), np.arange(rows)

    def gains() -> Float64:
        return chance.exponential(1.0, rows)

    campaigns, bursts = gains(), gains()
    for start in chance.integers(0, rows - 1_000, rows // 10_000):
        campaigns[chance.integers(start, start + 1_000, 150)] += 4.0
    for start in chance.integers(0, rows - 200, rows // 30_000):
        bursts[start : start + 200] *= 4.0
    return {
        "stationary": gains(),
        "heavy tail": chance.lognormal(0.0, 1.0, rows),
        "day's curve": gains() * (1.0 + 0.5 * np.sin(2 * np.pi * row / 30_000)),
        "campaigns": campaigns,
        "bursts": bursts,
        "two drifts": gains() * np.select([row < rows // 3, row < 2 * rows // 3], [1.0, 2.0], 0.7),
        "slow drift": gains() * (1.0 + row / rows),
        "cold state": gains() * np.where(row < rows // 10, 3.0, 1.0),
        "whole numbers": np.round(gains()),
    }


def stream_result(name: str, scores: Float64, budget: float) -> StreamResult:
    """Runs one stream at one budget. The policy's threshold is that of the stream's first rows."""
    threshold = float(np.quantile(scores[:MEASURED_ROWS], 1 - budget))
    control, none = EscalationBudget(budget, threshold), np.zeros(len(scores), bool)
    control.choose(scores[:0], none[:0])
    began_s = time.perf_counter()
    escalate = control.choose(scores, none)
    seconds = time.perf_counter() - began_s
    best = best_value(scores, budget, control.capacity)
    fixed = scores > threshold
    least, most = extremes(escalate, budget)
    highest = np.sort(scores)[len(scores) - int(budget * len(scores)) :]
    return StreamResult(
        stream=name,
        budget=budget,
        least=least,
        most=most,
        kept=float(scores[escalate].sum()) / best,
        free=float(highest.sum()) / best,
        fixed=float(scores[fixed].sum()) / best,
        fixed_most=extremes(fixed, budget)[1],
        us_per_row=1e6 * seconds / len(scores),
    )


def extremes(escalate: Bool, budget: float) -> tuple[float, float]:
    """The least and the most escalated of any WINDOW_ROWS rows, as multiples of the budget."""
    counts = np.concatenate([[0], np.cumsum(escalate)])
    window = (counts[WINDOW_ROWS:] - counts[:-WINDOW_ROWS]) / (budget * WINDOW_ROWS)
    return float(window.min()), float(window.max())


def _model_results(seed: int) -> list[ModelResult]:
    """The bundle's threshold beside the budget held, in the order of the stream, from an empty state on."""
    bundle = load_bundle(SHIPPED_BUNDLE)
    data = simulated(bundle.schema, **SIMULATION, seed=seed + 1)
    every = np.ones(data.batch.rows, bool)
    with closing(make_deep_stage(bundle, DeepSettings(backend="onnxruntime"))) as deep:
        offline = score_offline(make_engine(bundle), deep, data, every, lambda _: None)
    policy, scores = bundle.policy, offline.escalation
    raw = offline.screener_raw, offline.deep_raw
    held = offline.cascade(policy)[1]
    masks = {
        "the bundle's threshold": scores > policy.escalation.threshold,
        "the budget held": held,
        "the highest scores, as many": scores > np.sort(scores)[len(scores) - int(held.sum()) - 1],
        "nothing": ~every,
        "everything": every,
    }
    return [
        ModelResult(
            name=name,
            average_precision=float(average_precision_score(data.fraud, policy.probability(*raw, mask))),
            share=float(mask.mean()),
            most=extremes(mask, policy.escalation.budget)[1],
        )
        for name, mask in masks.items()
    ]


def show_escalation(report: EscalationReport, console: Console) -> None:
    """Prints the report."""
    columns = ("budget", "least", "most", "kept", "free", "fixed", "its most")
    table = figure_table("stream", *columns, title="Escalated of any 10,000 rows, × budget, and value")
    for found in report.streams:
        table.add_row(
            found.stream,
            f"{found.budget:.2%}",
            f"{found.least:.2f}",
            f"{found.most:.2f}",
            f"{found.kept:.1%}",
            f"{found.free:.1%}",
            f"{found.fixed:.1%}",
            f"{found.fixed_most:.2f}",
        )
    us = [found.us_per_row for found in report.streams]
    print_table(
        console,
        table,
        "kept: sum of the escalated rows' scores, of the best possible choice within the same bounds",
        "free: of the highest scores of the whole stream, without bounds",
        "fixed: of the threshold of the first rows, which does not hold the budget; its most of 10,000",
        f"the control takes {min(us):.2f} to {max(us):.2f} µs a row; {report.rows:,} rows a stream, seed {report.seed}",
        report.machine.text,
    )
    models = figure_table("escalated, shipped models", "AP", "share", "most of 10,000")
    for model in report.models:
        models.add_row(model.name, f"{model.average_precision:.4f}", f"{model.share:.2%}", f"{model.most:.2f}")
    print_table(console, models, "simulated transactions that the bundle was not trained on, from a cold state on")
