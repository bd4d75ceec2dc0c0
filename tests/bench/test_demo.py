"""The demo's result: a dozen lines with every figure that a newcomer looks for, then four for a CFO; eighty columns."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from bench.cores import Cores
from bench.demo import DemoLedger, print_result
from bench.demo_kept import Kept
from cascade.ledger import CpuModelMeter, Ledger, LedgerSummary
from stages.intervals import Figure
from stages.metrics import Quality
from streaming.evaluation import Evaluation, ModelEvaluation


def model(average_precision: float, caught: int) -> ModelEvaluation:
    quality = Quality(auc=0.9, average_precision=average_precision, card_precision_top100=0.1, recall_at_budget=0.5)
    return ModelEvaluation(quality=quality, caught=caught, missed=9, false_alarms=3_566, cost_per_thousand=1.0)


EVALUATION = Evaluation(
    bundle="b-1",
    transactions=162_598,
    frauds=1_138,
    missing=0,
    repeated=0,
    escalated_share=0.0077,
    degraded_share=0.0,
    offline_difference_max=0.0,
    deep_rows=162_598,
    review_from=0.04,
    decline_from=0.5,
    cascade=model(0.375, 629),
    screener_only=model(0.324, 630),
    deep_only=model(0.413, 651),
)


def summary(transactions: int, screened_s: float) -> LedgerSummary:
    ledger = Ledger(meters=[CpuModelMeter([1], 7.0)], watts_per_core=7.0)
    ledger.record_decisions("screened", np.full(transactions, screened_s))
    ledger.record_decisions("escalated", np.full(300, 0.012))
    return ledger.summary(EVALUATION.comparison())


CORES = Cores(
    cores=64,
    used={"service": 10.417, "Kafka": 0.612, "Triton": 0.123, "load": 0.3, "others": 11.111},
    waited_share=0.24,
)


def printed(tmp_path: Path, evaluation: Evaluation, sla_met: bool = False) -> list[str]:
    backlog, live = summary(122_298, 1.0), summary(39_700, 0.047)
    ledger = DemoLedger(
        transactions=evaluation.transactions,
        backlog_per_second=1.0,
        live_per_second=1.0,
        sla_met=sla_met,
        live_cores=CORES,
        backlog=backlog,
        live=live,
        evaluation=evaluation,
        kept=Kept(Figure(0.908, 0.85, 0.97), Figure(0.966, 0.93, 1.0)),
        deep_cost=None,
        cost_cores=CORES,
    )
    console = Console(width=80, record=True)
    print_result(ledger, console, 67.2, tmp_path.relative_to(tmp_path.parent))
    return console.export_text().strip().splitlines()


def test_the_result_has_limits_energy_and_the_models_side_by_side_and_who_used_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    for name in ("ledger.json", "report.html"):
        (tmp_path / name).touch()
    lines = printed(tmp_path, EVALUATION)
    expected = [
        "162,598 transactions, 1,138 frauds, in 67 s",
        "backlog: 122,598 at ",
        "live: 40,000 at ",
        "0.770 % of all; degraded live: 0 % (limit 0.100 %, met)",
        "ms (limit 5.00 ms, missed)",
        "ms (limit 20.0 ms, met)",
        "of 64: service 10.4, Kafka 0.61, Triton 0.12, load 0.30, others 11.1",
        "the service waited for a core in 24.0 % of the time that it had work",
        "cascade: AP 0.375 (average precision), caught 629, false alarms 3,566",
        "deep only: AP 0.413, caught 651",
        "screener only: AP 0.324, caught 630",
        "ledger.json, report.html in ",
        "kept light 99.2 % of 162,598 transactions never reached the deep model",
        "quality    90.8 % of deep-only's average precision, 96.6 % of its caught frauds",
        "energy     deep-only is not measured; ledger.json says why",
        "service    missed 1 of 3 limits; no free core: others, Kafka took 12 of 64",
    ]
    assert [text in line for line, text in zip(lines, expected, strict=True)] == [True] * 16
    assert max(map(len, lines)) <= 80
    assert all("mJ each (modelled)" in line for line in lines[1:3])


def test_where_the_service_level_is_met_nobody_asks_who_used_the_cores(tmp_path: Path) -> None:
    lines = printed(tmp_path, EVALUATION, sla_met=True)
    assert len(lines) == 14
    assert not any("core" in line for line in lines[:-1])


def test_a_result_with_missing_or_repeated_decisions_shows_their_counts(tmp_path: Path) -> None:
    lines = printed(tmp_path, msgspec.structs.replace(EVALUATION, missing=3, repeated=2))
    assert "3 without a decision, 2 decided again" in lines[1]
