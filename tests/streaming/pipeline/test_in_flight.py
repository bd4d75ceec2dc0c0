from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

from cascade.columns import ColumnBatch
from streaming.pipeline.in_flight import DeepCall, Rows


def rows(count: int) -> Rows:
    return Rows(
        partitions=[("t", 0), ("t", 1)],
        partition_index=np.arange(count) % 2,
        offsets=np.arange(count) + 100,
        batch=ColumnBatch({"card": np.arange(count) + 7}, count),
        start_ms=np.arange(count, dtype=float),
        queue_ms=np.arange(count) / 10,
        screener_score=np.arange(count) / 100,
        features_ms=1.0,
        screener_ms=2.0,
    )


def call(deadlines_ms: list[float]) -> DeepCall:
    return DeepCall(rows(len(deadlines_ms)), np.array(deadlines_ms), Future(), sent_s=0.0)


@pytest.mark.parametrize("index", [np.array([3, 1]), np.array([False, True, False, True])])
def test_taken_rows_keep_all_that_belongs_to_them(index: np.ndarray) -> None:
    taken = rows(4).take(index)
    for position, original in enumerate(np.arange(4)[index].tolist()):
        assert taken.offsets[position] == 100 + original
        assert taken.partition_index[position] == original % 2
        assert taken.batch["card"][position] == 7 + original
        assert taken.start_ms[position] == original
        assert taken.queue_ms[position] == original / 10
        assert taken.screener_score[position] == original / 100
    assert len(taken) == taken.batch.rows == 2
    assert (taken.partitions, taken.features_ms, taken.screener_ms) == ([("t", 0), ("t", 1)], 1.0, 2.0)


def test_each_row_expires_once_and_at_its_own_deadline() -> None:
    deep_call = call([50.0, 20.0, 50.0, 80.0])
    assert deep_call.expire(19.9).tolist() == []
    assert deep_call.expire(20.0).tolist() == [1]
    assert deep_call.expire(20.0).tolist() == []
    assert deep_call.expire(60.0).tolist() == [0, 2]
    assert deep_call.open.tolist() == [False, False, False, True]
    assert deep_call.expire(1e9).tolist() == [3]
    assert deep_call.expire(2e9).tolist() == []


def test_an_answer_decides_only_what_has_not_expired() -> None:
    deep_call = call([10.0, 99.0, 99.0])
    deep_call.expire(10.0)
    assert deep_call.close().tolist() == [1, 2]
    assert deep_call.close().tolist() == []
    assert deep_call.expire(1e9).tolist() == [], "a decided row must not be decided again at its deadline"


def test_dropped_rows_of_lost_partitions_are_decided_by_nobody_here() -> None:
    deep_call = call([50.0, 60.0, 70.0, 80.0])
    deep_call.drop(frozenset({("t", 1)}))
    assert deep_call.expire(65.0).tolist() == [0]
    assert deep_call.close().tolist() == [2]
