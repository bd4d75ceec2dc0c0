from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cascade.errors import SettingError, StateError
from cascade.protocols import SystemClock
from streaming.worker.files import FsspecFiles
from streaming.worker.snapshots import SUFFIX, Snapshot, SnapshotStore
from tests.timing import SetClock

PARTITION, LABELS = ("transactions", 0), ("labels", 0)


class TickingClock(SystemClock):
    """Each look is ten milliseconds later: files are named by their time."""

    now_s = 1_000.0

    def time(self) -> float:
        self.now_s += 0.01
        return self.now_s


def at_once(work: Callable[[], None]) -> Future[None]:
    done: Future[None] = Future()
    work()
    done.set_result(None)
    return done


def open_store(url: str, keep: int = 3, mark: str = "mark", name: str = "one") -> SnapshotStore:
    return SnapshotStore(FsspecFiles(url), keep, mark, name, TickingClock(), at_once)


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return open_store(str(tmp_path / "state"))


def snapshot(offset: int, labels: int = 0, *partitions: int) -> Snapshot:
    arrays = {"card.slots": np.full((5, 2), offset, np.int64), "card.step_values": np.ones((2, 3), np.float32)}
    offsets = {("transactions", partition_id): offset for partition_id in partitions or (0,)}
    return Snapshot(arrays, offsets, {LABELS: labels}, {})


def save(store: SnapshotStore, *snapshots: Snapshot) -> None:
    for snapshot in snapshots:
        store.save(snapshot).result(10)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "state").iterdir())


def newest(store: SnapshotStore, committed: int, **beginnings: int) -> Snapshot | None:
    names = store.candidates({PARTITION: committed}, {(topic, 0): offset for topic, offset in beginnings.items()})
    return next((found for found in map(store.load, names[PARTITION]) if found is not None), None)


def offset_of(found: Snapshot | None) -> int | None:
    return None if found is None else found.transactions[PARTITION]


def test_a_snapshot_comes_back_as_it_was(store: SnapshotStore) -> None:
    save(store, snapshot(7, labels=3))
    found = newest(store, 9)
    assert found is not None
    assert (found.transactions, found.labels) == ({PARTITION: 7}, {LABELS: 3})
    for name, array in snapshot(7).arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert np.array_equal(found.arrays[name], array)


class CountedFiles(FsspecFiles):
    """Counts the files that are read as a whole."""

    reads = 0

    def read(self, name: str) -> bytes:
        self.reads += 1
        return super().read(name)


@pytest.mark.parametrize(("saved_by", "reads_ahead"), [("one", 1), ("two", 0)], ids=["own", "another worker's"])
def test_a_worker_that_is_back_reads_its_newest_snapshot_once_and_ahead_of_its_use(
    tmp_path: Path, saved_by: str, reads_ahead: int
) -> None:
    url = str(tmp_path / "state")
    save(open_store(url, name=saved_by), snapshot(7), snapshot(8))
    counted = CountedFiles(url)
    back = SnapshotStore(counted, 3, "mark", "one", TickingClock(), at_once)
    back.read_ahead()
    assert counted.reads == reads_ahead
    assert offset_of(newest(back, 9)) == 8
    assert counted.reads == 1
    assert offset_of(newest(back, 7)) == 7
    assert offset_of(newest(back, 9)) == 8
    assert counted.reads == 3, "what was read ahead is not kept"


def test_a_damaged_snapshot_that_was_read_ahead_is_passed_over(store: SnapshotStore, tmp_path: Path) -> None:
    save(store, snapshot(7), snapshot(8))
    files(tmp_path)[-1].write_bytes(files(tmp_path)[-1].read_bytes()[:-1])
    store.read_ahead()
    assert offset_of(newest(store, 9)) == 7


def test_the_newest_that_is_not_ahead_of_the_committed_offset_is_taken(store: SnapshotStore) -> None:
    save(store, snapshot(10), snapshot(20), snapshot(30))
    assert [offset_of(newest(store, committed)) for committed in (9, 10, 25, 30, 99)] == [None, 10, 20, 30, 30]


def test_only_the_newest_few_stay(store: SnapshotStore, tmp_path: Path) -> None:
    save(store, *(snapshot(offset) for offset in range(1, 7)))
    assert len(files(tmp_path)) == 3
    assert offset_of(newest(store, 4)) == 4
    assert offset_of(newest(store, 3)) is None


def test_each_partition_is_restored_from_a_snapshot_that_has_it(store: SnapshotStore) -> None:
    save(store, snapshot(5, 0, 0, 1), snapshot(8, 0, 1), snapshot(9, 0, 2))
    names = store.candidates({("transactions", number): 99 for number in range(4)}, {})
    offsets = {
        number: [found.transactions["transactions", number] for found in map(store.load, files) if found is not None]
        for (_, number), files in names.items()
    }
    assert offsets == {0: [5], 1: [8, 5], 2: [9], 3: []}


def test_a_file_goes_only_when_all_its_partitions_have_newer_ones(store: SnapshotStore, tmp_path: Path) -> None:
    save(store, snapshot(1, 0, 0, 1), *(snapshot(offset, 0, 0) for offset in range(2, 7)))
    assert len(files(tmp_path)) == 4, "the only snapshot of partition 1 was removed"
    save(store, *(snapshot(offset, 0, 1) for offset in range(2, 5)))
    assert len(files(tmp_path)) == 6


def test_what_is_ahead_of_the_commit_does_not_push_out_what_can_be_used(store: SnapshotStore, tmp_path: Path) -> None:
    save(store, *(replace(snapshot(offset), committed={PARTITION: min(offset, 4)}) for offset in range(1, 20)))
    assert len(files(tmp_path)) == 6
    assert offset_of(newest(store, 4)) == 4
    assert offset_of(newest(store, 99)) == 19
    with pytest.raises(StateError, match="are lost"):
        newest(store, 1, transactions=1)


def test_no_file_is_overwritten_when_the_clock_stops_or_goes_back(tmp_path: Path) -> None:
    for offsets in ((1, 2), (3, 4)):
        place = FsspecFiles(str(tmp_path / "state"))
        save(SnapshotStore(place, 9, "mark", "one", SetClock(), at_once), *map(snapshot, offsets))
    assert len(files(tmp_path)) == 4
    assert offset_of(newest(open_store(str(tmp_path / "state")), 99)) == 4


def test_workers_that_write_at_once_write_files_of_their_own(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(open_store(str(tmp_path / "state"), name=name), snapshot(3))
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign", "header", "unfinished"])
def test_a_damaged_snapshot_is_passed_over_and_the_one_before_is_used(
    store: SnapshotStore, tmp_path: Path, damage: str
) -> None:
    save(store, snapshot(10), snapshot(20))
    path = files(tmp_path)[-1]
    octets = path.read_bytes()
    flipped = bytearray(octets)
    flipped[-40] ^= 1
    path.write_bytes({
        "truncated": octets[: len(octets) // 2], "flipped": bytes(flipped), "empty": b"", "foreign": b"PK\x03\x04",
        "header": octets.replace(b'"labels"', b'"babels"'), "unfinished": octets[:30],
    }[damage])  # fmt: skip
    assert offset_of(newest(store, 99)) == 10


@pytest.mark.parametrize("length", range(0, 700, 23))
def test_a_snapshot_torn_anywhere_is_never_loaded(store: SnapshotStore, tmp_path: Path, length: int) -> None:
    save(store, snapshot(10))
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    assert newest(store, 99) is None


def test_other_features_make_another_state(store: SnapshotStore, tmp_path: Path) -> None:
    save(store, snapshot(10))
    assert newest(open_store(str(tmp_path / "state"), mark="other features"), 99) is None


def test_a_log_that_was_cut_behind_every_snapshot_stops_with_the_choice(store: SnapshotStore) -> None:
    save(store, snapshot(10, labels=4), snapshot(20, labels=6))
    assert offset_of(newest(store, 99, transactions=20, labels=6)) == 20
    for cut in ({"transactions": 21}, {"labels": 7}):
        with pytest.raises(StateError, match=r"Delete the snapshots .* or restore the log") as caught:
            newest(store, 99, **cut)
        assert "\n" not in str(caught.value)


def test_where_only_damaged_snapshots_reach_the_log_the_operator_chooses(store: SnapshotStore, tmp_path: Path) -> None:
    save(store, snapshot(10), snapshot(20))
    older, newer = files(tmp_path)
    newer.write_bytes(newer.read_bytes()[:-40])
    # 10 and what comes after it is there: the newer one is not missed
    assert offset_of(newest(store, 99, transactions=5)) == 10
    with pytest.raises(StateError, match="are lost"):
        newest(store, 99, transactions=15)
    older.unlink()
    with pytest.raises(StateError, match="cannot be used, and the log"):
        newest(store, 99, transactions=5)
    assert newest(store, 99) is None


def test_a_store_that_cannot_be_written_to_goes_on(store: SnapshotStore, tmp_path: Path) -> None:
    (tmp_path / "state").rmdir()
    (tmp_path / "state").write_text("a file in the way")
    save(store, snapshot(10))
    (tmp_path / "state").unlink()
    (tmp_path / "state").mkdir()
    save(store, snapshot(20))
    assert offset_of(newest(store, 99)) == 20
    assert [path.suffix for path in files(tmp_path)] == [SUFFIX]


def test_any_file_system_of_fsspec_will_do() -> None:
    store = open_store("memory://cascade/state", keep=2)
    save(store, snapshot(1), snapshot(2), snapshot(3))
    assert offset_of(newest(store, 99)) == 3
    assert offset_of(newest(store, 1)) is None


def test_a_place_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (str(tmp_path / "file" / "below"), "nosuch://bucket/x"):
        with pytest.raises(SettingError, match=r"state\.snapshots") as caught:
            FsspecFiles(place)
        assert "\n" not in str(caught.value)


def test_a_write_that_hangs_is_not_waited_for_beyond_the_time_that_is_given(tmp_path: Path) -> None:
    hanging: Future[None] = Future()
    store = SnapshotStore(FsspecFiles(str(tmp_path / "state")), 3, "mark", "one", TickingClock(), lambda work: hanging)
    assert store.finish(0.0), "nothing is being written"
    store.save(snapshot(1))
    assert not store.finish(0.05)
    hanging.set_result(None)
    assert store.finish(0.05)
