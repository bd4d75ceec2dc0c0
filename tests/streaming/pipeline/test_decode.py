from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cascade.schema import Field
from streaming.codecs import Codec, RejectReason, codec
from streaming.kafka import FetchedBatch
from streaming.pipeline.decode import Decoder, Rejected
from streaming.pipeline.offsets import NOTHING_DECIDED, Decided
from streaming.pipeline.table import Table

AHEAD_MS_MAX = 3_600_000
NOW_MS = 3_500.5
FIELDS = {
    "time": Field(type="timestamp", unit="ms"),
    "id": Field(type="int64"),
    "amount": Field(type="float64", minimum=0),
}


def json_codec() -> Codec:
    return codec("json", FIELDS, 1024)


def message(time_ms: int, identity: int) -> bytes:
    return msgspec.json.encode({"time": time_ms, "id": identity, "amount": 1.0})


def fetch(partition: int, values: list[bytes | None], first_offset: int = 0, topic: str = "t") -> FetchedBatch:
    count = len(values)
    return FetchedBatch(
        topic, partition, np.arange(count) + first_offset, np.arange(count) + 1_000 * (partition + 1),
        [b"%d" % partition] * count, values, [()] * count,
    )  # fmt: skip


def decode(
    *fetched: FetchedBatch, decided: dict[tuple[str, int], Decided] | None = None, from_append: bool = True
) -> tuple[Table, list[Rejected]]:
    decoder = Decoder(json_codec(), "time", AHEAD_MS_MAX, from_append, "v1")
    known = [(decided or {}).get((part.topic, part.partition), NOTHING_DECIDED) for part in fetched]
    table, undecided, found = decoder.decode(list(fetched), known, NOW_MS)
    assert undecided == np.count_nonzero(table.rows["undecided"])
    return table, found


def taken(*fetched: FetchedBatch, decided_until: dict[tuple[str, int], int] | None = None) -> Table:
    return decode(*fetched, decided={at: Decided(until) for at, until in (decided_until or {}).items()})[0]


def rejected(*fetched: FetchedBatch, decided_until: dict[tuple[str, int], int] | None = None) -> list[Rejected]:
    return decode(*fetched, decided={at: Decided(until) for at, until in (decided_until or {}).items()})[1]


streams = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12), min_size=1, max_size=4)


@given(streams)
def test_partitions_are_merged_by_time_each_in_its_own_order(times: list[list[int]]) -> None:
    fetched = [
        fetch(partition, [message(time_ms, 100 * partition + row) for row, time_ms in enumerate(partition_times)])
        for partition, partition_times in enumerate(times)
    ]
    table = taken(*fetched)
    assert sorted(table.batch["id"].tolist()) == [
        100 * p + row for p, partition_times in enumerate(times) for row in range(len(partition_times))
    ]
    for partition in range(len(times)):
        assert table.rows["offset"][table.rows["partition_id"] == partition].tolist() == list(
            range(len(times[partition]))
        )
    # a late row is ordered by the latest time before it in its partition
    rows = zip(table.rows["partition_id"].tolist(), table.rows["offset"].tolist(), strict=True)
    effective = [max(times[partition][: offset + 1]) for partition, offset in rows]
    assert effective == sorted(effective)


@given(streams, st.data())
def test_every_column_belongs_to_the_same_record(times: list[list[int]], data: st.DataObject) -> None:
    first = [data.draw(st.integers(0, 50)) for _ in times]
    floors = {("t", partition): data.draw(st.integers(0, 60)) for partition in range(len(times))}
    fetched = [
        fetch(
            partition,
            [message(time_ms, 1_000 * partition + row) for row, time_ms in enumerate(partition_times)],
            first[partition],
        )
        for partition, partition_times in enumerate(times)
    ]
    table = taken(*fetched, decided_until=floors)
    for row in range(table.batch.rows):
        partition, position = divmod(int(table.batch["id"][row]), 1_000)
        assert (table.topic, table.rows["partition_id"][row]) == ("t", partition)
        assert table.rows["offset"][row] == first[partition] + position
        assert table.batch["time"][row] == times[partition][position]
        assert table.rows["appended_ms"][row] == 1_000 * (partition + 1) + position
        assert table.rows["undecided"][row] == (first[partition] + position >= floors["t", partition])


def test_a_partition_without_a_committed_offset_is_all_undecided() -> None:
    table = taken(fetch(0, [message(1, 1)]), fetch(1, [message(2, 2)]), decided_until={("t", 0): 5})
    assert table.rows["undecided"].tolist() == [False, True]


def test_unreadable_records_leave_the_rows_around_them_whole() -> None:
    values = [b"no json", message(5, 1), None, message(6, 2), b'{"time": 7}']
    table, (part,) = decode(fetch(3, values, 40))
    assert table.rows["offset"].tolist() == [41, 43]
    assert table.rows["appended_ms"].tolist() == [4_001, 4_003]
    assert [reject.index for reject in part.rejects] == [0, 2, 4]
    assert [part.fetched.values[reject.index] for reject in part.rejects] == [b"no json", None, b'{"time": 7}']
    assert part.rejects[0].reason is RejectReason.SYNTAX


def test_rejects_name_their_partition() -> None:
    table, parts = decode(fetch(0, [message(1, 1)]), fetch(1, [b"bad"], 7), fetch(2, [b"", message(3, 3)], 9))
    found = [(part.fetched.partition, [reject.index for reject in part.rejects]) for part in parts]
    assert found == [(1, [0]), (2, [0])]
    assert table.rows["partition_id"].tolist() == [0, 2]


def test_a_record_that_was_a_dead_letter_before_the_restart_is_none_again() -> None:
    (part,) = rejected(fetch(0, [b"bad", b"bad too"], 10), decided_until={("t", 0): 11})
    assert [reject.index for reject in part.rejects] == [1]
    assert rejected(fetch(0, [b"bad", b"bad too"], 10), decided_until={("t", 0): 12}) == []


def test_a_fetch_of_nothing_readable_is_an_empty_batch() -> None:
    table = taken(fetch(0, [b"bad"]), fetch(1, [None]))
    assert table.batch.rows == 0
    assert set(table.batch.columns) == set(FIELDS)
    assert len(table) == 0


def test_rows_that_were_decided_ahead_of_the_prefix_are_not_decided_again() -> None:
    values = [message(1, 1), b"bad", message(3, 3), message(4, 4), b"bad too"]
    decided = {("t", 0): Decided(11, np.array([11, 13]))}
    table, parts = decode(fetch(0, values, 10), decided=decided)
    assert table.rows["offset"][table.rows["undecided"]].tolist() == [12]
    # a record without a decision before decided ones: the previous owner had escalated it
    assert table.rows["offset"][table.rows["was_escalated"]].tolist() == [12]
    assert [reject.index for part in parts for reject in part.rejects] == [4]


def test_an_event_far_ahead_of_its_record_is_refused_and_the_others_stay() -> None:
    record_ms = 1_000 * (0 + 1) + 1
    values = [message(0, 1), message(record_ms + AHEAD_MS_MAX + 1, 2), message(2, 3)]
    table, (part,) = decode(fetch(0, values))
    assert table.batch["id"].tolist() == [1, 3]
    assert table.rows["offset"].tolist() == [0, 2]
    assert [(reject.index, reject.reason) for reject in part.rejects] == [(1, RejectReason.FUTURE_EVENT)]


def test_deadlines_count_from_the_append_but_never_from_later_than_now_or_from_the_micro_batch() -> None:
    early, late = (fetch(partition, [message(1, 1)]) for partition in (0, 5))  # appended at 1,000 and 6,000 ms
    rows = decode(early, late)[0].rows
    assert rows["start_ms"].tolist() == [1_000.0, NOW_MS]
    assert rows["queue_ms"].tolist() == [NOW_MS - 1_000.0, 0.0]
    rows = decode(early, late, from_append=False)[0].rows
    assert rows["start_ms"].tolist() == [NOW_MS, NOW_MS]
    assert rows["queue_ms"].tolist() == [0.0, 0.0]
