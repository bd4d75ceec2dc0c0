from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from stages.metrics import Quality
from streaming.data_commands import show_evaluation
from streaming.evaluation import Evaluation, ModelEvaluation

QUALITY = Quality(auc=0.91234, average_precision=0.81234, card_precision_top100=0.71234, recall_at_budget=0.61234)
MODEL = ModelEvaluation(
    quality=QUALITY, caught=123_456, missed=234_567, false_alarms=345_678, cost_per_thousand=4_567_890.0
)
EVALUATION = Evaluation(
    bundle="2026-01-01-0123456789ab, 2026-02-01-0123456789ab, 2026-03-01-0123456789ab", transactions=987_654_321,
    frauds=876_543, missing=0, repeated=0, escalated_share=0.0512, degraded_share=0.001, offline_difference_max=0.0,
    deep_rows=987_654_321, review_from=0.1, decline_from=0.5, cascade=MODEL, screener_only=MODEL, deep_only=MODEL,
)  # fmt: skip


@pytest.mark.parametrize("width", [80, None], ids=["terminal of 80 columns", "redirected"])
def test_the_evaluation_shows_every_figure_whole(width: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    output = StringIO()
    show_evaluation(EVALUATION, Console(file=output, width=width, force_terminal=width is not None, color_system=None))
    title, *lines = output.getvalue().splitlines()
    assert EVALUATION.bundle in title
    assert max(map(len, lines)) <= 80
    assert "…" not in output.getvalue()
    for figure in ("0.912", "0.812", "0.712", "0.612", "123,456", "234,567", "345,678", "4,567,890"):
        assert sum(line.split().count(figure) for line in lines) == 3
