"""The screener's benchmark: every method on every model, wrong scores refused, a table of eighty columns."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from rich.console import Console

import bench.screener
from bench.screener import ScreenerReport, run_screener, show
from cascade.columns import Float32, Float64
from cascade.errors import CascadeError
from stages.screener.compiled import CompiledScreener


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.screener, "SIZES", ((5, 8, 3),))
    monkeypatch.setattr(bench.screener, "BATCHES", (1, 64))
    monkeypatch.setattr(bench.screener, "ROWS_A_TURN", 128)


def test_every_method_is_timed_on_every_model_in_json_and_in_a_table_of_eighty_columns() -> None:
    report = run_screener(rounds=3, seed=2)
    assert {timing.model for timing in report.timings} == {"shipped", "5 × 8, depth 3"}
    # an ONNX tree ensemble has no splits by category, which the shipped model has
    expected = {"lightgbm": (2, 2), "compiled": (2, 2), "onnxruntime": (1, 2), "lightgbm, one row": (2, 1)}
    for method, (models, batches) in expected.items():
        timings = [timing for timing in report.timings if timing.method == method]
        assert len(timings) == models * batches
        assert all(timing.us_per_row > 0 for timing in timings)
        assert all(timing.spread[0] <= timing.ratio_to_lightgbm <= timing.spread[1] for timing in timings)
    assert all(timing.ratio_to_lightgbm == 1.0 for timing in report.timings if timing.method == "lightgbm")
    assert any("onnxruntime" in name and "category" in name for name in report.missing)
    assert msgspec.json.decode(msgspec.json.encode(report), type=ScreenerReport) == report
    console = Console(width=80, record=True)
    show(report, console)
    text = console.export_text()
    assert "lightgbm, one row" in text
    assert "…" not in text


def test_wrong_scores_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CompiledScreener.score

    def wrong(self: CompiledScreener, features: Float32) -> Float64:
        return np.asarray(whole(self, features) + 1e-6)

    monkeypatch.setattr(CompiledScreener, "score", wrong)
    with pytest.raises(CascadeError, match=r"compiled on shipped: scores differ from LightGBM's by up to 1e-06"):
        run_screener(rounds=3, seed=2)
