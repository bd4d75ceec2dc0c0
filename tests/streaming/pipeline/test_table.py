from __future__ import annotations

import numpy as np
import pytest

from cascade.columns import ColumnBatch
from streaming.pipeline.table import Table


def table(count: int) -> Table:
    """Rows of the partitions 0 and 1 in turn."""
    return Table.of(
        "t", ColumnBatch({"card": np.arange(count) + 7}, count), ("v1",), partition_id=np.arange(count) % 2,
        offset=np.arange(count) + 100, start_ms=np.arange(count), screener_score=np.arange(count) / 100,
    )  # fmt: skip


@pytest.mark.parametrize("index", [np.array([3, 1]), np.array([False, True, False, True])])
def test_taken_rows_keep_all_that_belongs_to_them(index: np.ndarray) -> None:
    taken = table(4).take(index)
    for position, original in enumerate(np.arange(4)[index].tolist()):
        row = taken.rows[position]
        assert (row["offset"], row["partition_id"]) == (100 + original, original % 2)
        assert (row["start_ms"], row["screener_score"]) == (original, original / 100)
        assert taken.batch["card"][position] == 7 + original
    assert len(taken) == taken.batch.rows == 2
    assert (taken.topic, taken.bundles) == ("t", ("v1",))


def test_taken_rows_are_copies() -> None:
    whole = table(2)
    whole.take(np.array([0])).rows["score"] = 0.5
    assert whole.rows["score"].tolist() == [0.0, 0.0]


def test_offsets_are_grouped_by_partition_in_the_order_of_the_rows() -> None:
    _, found, _ = table(5).records(np.array([4, 1, 0, 3]))
    assert {at: offsets.tolist() for at, offsets in found.items()} == {("t", 0): [104, 100], ("t", 1): [101, 103]}
    assert list(table(5).records(np.array([1, 3]))[1]) == [("t", 1)]


def test_rows_belong_to_partitions_of_their_own_topic() -> None:
    assert table(3).belong_to([("t", 1), ("other", 0)]).tolist() == [False, True, False]


def test_records_are_those_of_the_rows_in_their_order() -> None:
    records, _, _ = table(4).records(np.array([2, 1]))
    assert (records.topic, records.partition_ids.tolist(), records.offsets.tolist()) == ("t", [0, 1], [102, 101])
