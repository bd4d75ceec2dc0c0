"""The figures that the README states, from the decisions topic, on the Handbook's data."""

from __future__ import annotations

from pathlib import Path

import msgspec
import polars as pl
import pytest

import cascade
from bench.handbook import Summary, handbook

SHARED = Path(cascade.__file__).parents[2] / "shared"
DATA = SHARED / "data" / "handbook.parquet"
PROTOCOL = SHARED / "tools" / "handbook_protocol.py"

pytestmark = [
    pytest.mark.long,
    pytest.mark.kafka,
    pytest.mark.triton,
    pytest.mark.training,
    pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not here (the Handbook's data, see its README)"),
]


@pytest.mark.timeout(1_500)
def test_the_cascade_reaches_the_stated_quality_from_the_topic(
    tmp_path: Path, kafka_parts: Path, triton_parts: Path
) -> None:
    out = tmp_path / "handbook"
    handbook(DATA, out, PROTOCOL)
    summary = msgspec.json.decode((out / "summary.json").read_bytes(), type=Summary)
    assert summary.protocol is not None
    reached = summary.protocol["cascade"]
    assert reached.average_precision >= 0.72
    assert reached.card_precision_top100 >= 0.30
    evaluation = summary.evaluation
    assert evaluation.escalated_share <= 0.01
    assert (evaluation.missing, evaluation.repeated, evaluation.degraded_share) == (0, 0, 0.0)
    assert evaluation.offline_difference_max <= 1e-6
    scores = pl.read_parquet(out / "scores.parquet")
    assert scores.columns == ["TRANSACTION_ID", "score", "stage"]
    assert set(scores["stage"].unique()) == {"screener", "deep"}
    assert scores["TRANSACTION_ID"].n_unique() == len(scores) == evaluation.transactions
