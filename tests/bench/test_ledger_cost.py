"""The ledger's own cost: memory that does not grow, and little CPU time beside the work that it accounts for."""

from __future__ import annotations

import numpy as np
import pytest

import bench.ledger_cost
from bench.ledger_cost import BATCHES, histogram_bytes, record_batch, run_ledger_cost
from cascade.ledger import Ledger, StageLaps
from streaming.pipeline.table import Records


def test_the_counts_of_a_ledger_take_the_same_memory_whatever_it_records() -> None:
    ledger = Ledger(meters=[])
    empty = histogram_bytes(ledger)
    for rows in (1, 10_000):
        records = Records("transactions", np.zeros(rows, np.int64), np.arange(rows))
        record_batch(ledger, StageLaps(), np.geomspace(1e-9, 1e9, rows), records)
    assert ledger.counters().paths["screened"].count == 10_001
    assert histogram_bytes(ledger) == empty < 1 << 20


def test_the_ledger_takes_a_small_share_of_the_cpu_time_of_a_full_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"CARDS": 600, "TERMINALS": 600, "DAYS": 12, "FOLDED_ROWS": 2_000, "ROWS_A_TURN": 2_000}
    for name, value in {**small, "CALLS_A_TURN_MAX": 20}.items():
        monkeypatch.setattr(bench.ledger_cost, name, value)
    report = run_ledger_cost(3, 1)
    by_rows = {cost.rows: cost for cost in report.batches}
    assert tuple(by_rows) == BATCHES
    assert set(report.second_us) == {"sample", "journal", "scrape"}
    # the benchmark measures 1 %, and thread CPU time leaves out what else runs on the machine
    assert 0 < by_rows[1_000].share < 0.2
