from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cascade.schema import Field
from streaming.codecs import Codec, RejectReason, codec
from streaming.kafka import FetchedBatch
from streaming.pipeline.intake import Intake, take_in
from streaming.worker.offsets import Decided

AHEAD_MS_MAX = 3_600_000
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


def taken(*fetched: FetchedBatch, decided_until: dict[tuple[str, int], int] | None = None) -> Intake:
    decided = {partition: Decided(until) for partition, until in (decided_until or {}).items()}
    return take_in(list(fetched), json_codec(), "time", decided, AHEAD_MS_MAX)


streams = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12), min_size=1, max_size=4)


@given(streams)
def test_partitions_are_merged_by_time_each_in_its_own_order(times: list[list[int]]) -> None:
    fetched = [
        fetch(partition, [message(time_ms, 100 * partition + row) for row, time_ms in enumerate(partition_times)])
        for partition, partition_times in enumerate(times)
    ]
    intake = taken(*fetched)
    assert sorted(intake.batch["id"].tolist()) == [
        100 * p + row for p, partition_times in enumerate(times) for row in range(len(partition_times))
    ]
    for partition in range(len(times)):
        assert intake.offsets[intake.partition_index == partition].tolist() == list(range(len(times[partition])))
    # a late row is ordered by the latest time before it in its partition
    rows = zip(intake.partition_index.tolist(), intake.offsets.tolist(), strict=True)
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
    intake = taken(*fetched, decided_until=floors)
    for row in range(intake.batch.rows):
        partition, position = divmod(int(intake.batch["id"][row]), 1_000)
        assert intake.partitions[intake.partition_index[row]] == ("t", partition)
        assert intake.offsets[row] == first[partition] + position
        assert intake.batch["time"][row] == times[partition][position]
        assert intake.appended_ms[row] == 1_000 * (partition + 1) + position
        assert intake.undecided[row] == (first[partition] + position >= floors["t", partition])


def test_a_partition_without_a_committed_offset_is_all_undecided() -> None:
    intake = taken(fetch(0, [message(1, 1)]), fetch(1, [message(2, 2)]), decided_until={("t", 0): 5})
    assert intake.undecided.tolist() == [False, True]


def test_unreadable_records_leave_the_rows_around_them_whole() -> None:
    values = [b"no json", message(5, 1), None, message(6, 2), b'{"time": 7}']
    intake = taken(fetch(3, values, 40))
    assert intake.offsets.tolist() == [41, 43]
    assert intake.appended_ms.tolist() == [4_001.0, 4_003.0]
    (rejected,) = intake.rejected
    assert [reject.index for reject in rejected.rejects] == [0, 2, 4]
    assert [rejected.fetched.values[reject.index] for reject in rejected.rejects] == [b"no json", None, b'{"time": 7}']
    assert rejected.rejects[0].reason is RejectReason.SYNTAX


def test_rejects_name_their_partition() -> None:
    intake = taken(fetch(0, [message(1, 1)]), fetch(1, [b"bad"], 7), fetch(2, [b"", message(3, 3)], 9))
    rejected = [(part.fetched.partition, [reject.index for reject in part.rejects]) for part in intake.rejected]
    assert rejected == [(1, [0]), (2, [0])]
    assert intake.partition_index.tolist() == [0, 2]


def test_a_record_that_was_a_dead_letter_before_the_restart_is_none_again() -> None:
    intake = taken(fetch(0, [b"bad", b"bad too"], 10), decided_until={("t", 0): 11})
    (rejected,) = intake.rejected
    assert [reject.index for reject in rejected.rejects] == [1]
    assert taken(fetch(0, [b"bad", b"bad too"], 10), decided_until={("t", 0): 12}).rejected == []


def test_a_fetch_of_nothing_readable_is_an_empty_batch() -> None:
    intake = taken(fetch(0, [b"bad"]), fetch(1, [None]))
    assert intake.batch.rows == 0
    assert set(intake.batch.columns) == set(FIELDS)
    assert len(intake.undecided) == len(intake.offsets) == len(intake.partition_index) == 0


def test_rows_that_were_decided_ahead_of_the_prefix_are_not_decided_again() -> None:
    values = [message(1, 1), b"bad", message(3, 3), message(4, 4), b"bad too"]
    decided = {("t", 0): Decided(11, np.array([11, 13]))}
    intake = take_in([fetch(0, values, 10)], json_codec(), "time", decided, AHEAD_MS_MAX)
    assert intake.offsets[intake.undecided].tolist() == [12]
    assert [reject.index for rejected in intake.rejected for reject in rejected.rejects] == [4]


def test_an_event_far_ahead_of_its_record_is_refused_and_the_others_stay() -> None:
    record_ms = 1_000 * (0 + 1) + 1
    values = [message(0, 1), message(record_ms + AHEAD_MS_MAX + 1, 2), message(2, 3)]
    intake = taken(fetch(0, values))
    assert intake.batch["id"].tolist() == [1, 3]
    assert intake.offsets.tolist() == [0, 2]
    (rejected,) = intake.rejected
    assert [(reject.index, reject.reason) for reject in rejected.rejects] == [(1, RejectReason.FUTURE_EVENT)]
