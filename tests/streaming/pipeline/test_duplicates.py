"""The idempotency cache against a plain reading of its rule, and through export, forgetting and absorbing."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.columns import Array, ColumnBatch, Int64
from cascade.config import DuplicateSettings
from cascade.errors import StateError
from cascade.schema import Roles
from streaming.pipeline.duplicates import FirstDecisions, Verdicts
from streaming.pipeline.table import Table

ROLES = Roles("id", "time", "amount", "card", "terminal")
WINDOW_S, WINDOW_MS = 10.0, 10_000
SMALLEST = 1_024


@dataclass(frozen=True)
class Record:
    partition: int
    offset: int
    appended_ms: int
    id: int | bytes
    card: int = 1
    amount: float = 9.5


def made(window_s: float = WINDOW_S, ids_max: int = SMALLEST) -> FirstDecisions:
    return FirstDecisions(DuplicateSettings(window_s=window_s, ids_max=ids_max))


def column(values: list[int] | list[bytes]) -> Array:
    return np.array(values, "S16" if values and isinstance(values[0], bytes) else np.int64)


def look_up(cache: FirstDecisions, records: list[Record]) -> Int64:
    batch = ColumnBatch(
        {
            "id": column([r.id for r in records]),  # type: ignore[arg-type]
            "card": column([r.card for r in records]),
            "amount": np.array([r.amount for r in records], float),
        },
        len(records),
    )
    table = Table.of(
        "t", batch, ("v1",), partition_id=[r.partition for r in records], offset=[r.offset for r in records],
        appended_ms=[r.appended_ms for r in records],
    )  # fmt: skip
    found = cache.look_up(table, ROLES)
    entries = table.column("first")
    assert found == int((entries >= 0).sum())
    return entries


def repeated(cache: FirstDecisions, records: list[Record]) -> list[int | None]:
    """The offset of each record's first occurrence, None where it is itself a first one."""
    entries = look_up(cache, records)
    first = cache.first(entries)
    assert first.present[entries >= 0].all()
    for record, entry, partition in zip(records, entries, first.partitions, strict=True):
        assert entry < 0 or partition == record.partition
    return [int(o) if e >= 0 else None for e, o in zip(entries, first.offsets, strict=True)]


def by_the_rule(records: list[Record]) -> list[int | None]:
    """The rule as a dictionary reads it."""
    clocks: dict[int, int] = {}
    firsts: dict[tuple[object, ...], tuple[int, int]] = {}
    found: list[int | None] = []
    for record in records:
        now_ms = clocks[record.partition] = max(clocks.get(record.partition, 0), record.appended_ms)
        identity = (record.partition, record.id, record.card, record.amount)
        first_ms, offset = firsts.get(identity, (-WINDOW_MS - 1, 0))
        if now_ms - first_ms <= WINDOW_MS:
            found.append(offset)
        else:
            firsts[identity] = (now_ms, record.offset)
            found.append(None)
    return found


def settle(cache: FirstDecisions, partition: int, offsets: list[int], bundle: str = "v1", action: int = 2) -> None:
    count = len(offsets)
    numbers = np.array(offsets)
    codes = (np.full(count, code) for code in (action, 1, 3))
    cache.settle(partition, numbers, Verdicts(*codes, numbers / 1e5, numbers / 2e5, numbers + 5_000), bundle)


def through_a_file(arrays: dict[str, Array]) -> dict[str, Array]:
    """As a snapshot keeps them: npz without pickles."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    file.seek(0)
    with np.load(file, allow_pickle=False) as read:
        return {name: read[name] for name in read.files}


@st.composite
def logs(draw: st.DrawFn) -> list[Record]:
    """Records of three partitions, each with offsets with gaps and with append times that sometimes go back."""
    offsets, clocks = [0, 0, 0], [50_000, 0, 7]
    steps_ms = (0, 1, 5_000, -3_000, 2_000, WINDOW_MS, WINDOW_MS + 1)
    shape = (3, 3, len(steps_ms), 5, 2, 2)
    count = draw(st.integers(0, 120))
    # an integer for each record: six draws for each would take most of the time
    drawn = draw(st.lists(st.integers(0, math.prod(shape) - 1), min_size=count, max_size=count))
    records = []
    rows = np.transpose(np.unravel_index(np.array(drawn, np.int64), shape)).tolist()
    for partition, gap, step, id, card, amount in rows:
        offsets[partition] += 1 + gap
        clocks[partition] += steps_ms[step]
        records.append(Record(partition, offsets[partition], clocks[partition], id, card, (0.5, 2.0)[amount]))
    return records


@settings(max_examples=150, deadline=None)
@given(logs(), st.lists(st.integers(0, 120), max_size=4))
def test_what_is_found_follows_the_rule_whatever_the_batches(records: list[Record], cuts: list[int]) -> None:
    cache = made()
    edges = [0, *sorted(min(cut, len(records)) for cut in cuts), len(records)]
    batches = [records[start:stop] for start, stop in itertools.pairwise(edges)]
    assert [offset for batch in batches for offset in repeated(cache, batch)] == by_the_rule(records)


@settings(max_examples=100, deadline=None)
@given(logs(), st.integers(0, 120))
def test_it_goes_on_from_an_export_as_if_it_had_not_stopped(records: list[Record], cut: int) -> None:
    whole, before, after = made(), made(), made()
    repeated(whole, records)
    repeated(before, records[:cut])
    arrays = through_a_file(before.export())
    after.absorb(arrays, [0, 1, 2])
    assert repeated(after, records[cut:]) == by_the_rule(records)[cut:]
    for partition in range(3):
        assert after.digest(partition) == whole.digest(partition)
        alone = made()
        alone.absorb(arrays, [partition])
        repeated(alone, [record for record in records[cut:] if record.partition == partition])
        assert alone.digest(partition) == whole.digest(partition)


@settings(max_examples=100, deadline=None)
@given(logs())
def test_what_one_partition_remembers_does_not_depend_on_the_others(records: list[Record]) -> None:
    whole = made()
    repeated(whole, records)
    for partition in range(3):
        alone = made()
        repeated(alone, [record for record in records if record.partition == partition])
        assert alone.digest(partition) == whole.digest(partition)


@pytest.mark.parametrize("other", [
    {"id": 8}, {"card": 2}, {"amount": 9.50000001}, {"amount": -9.5}, {"partition": 1},
])  # fmt: skip
def test_another_id_card_amount_or_partition_is_another_transaction(other: dict[str, float]) -> None:
    first = {"partition": 0, "offset": 3, "appended_ms": 0, "id": 7}
    assert repeated(made(), [Record(**first), Record(**first | {"offset": 4} | other)]) == [None, None]  # type: ignore[arg-type]


def test_strings_are_distinguished_by_all_their_bytes() -> None:
    ids = [b"order-1", b"order-2", b"order-1", "größer".encode(), b"o", "größer".encode()]
    records = [Record(0, offset, 0, id) for offset, id in enumerate(ids)]
    assert repeated(made(), records) == [None, None, 0, None, None, 3]


def test_zero_and_minus_zero_are_one_amount() -> None:
    assert repeated(made(), [Record(0, 0, 0, 1, amount=0.0), Record(0, 1, 0, 1, amount=-0.0)]) == [None, 0]


def test_a_first_one_is_not_renewed_by_its_repeats() -> None:
    times_ms = [0, 6_000, 10_000, 10_001, 20_001, 20_002]
    records = [Record(0, offset, time_ms, 7) for offset, time_ms in enumerate(times_ms)]
    assert repeated(made(), records) == [None, 0, 0, None, 3, None]


def test_a_record_that_is_read_again_is_no_duplicate_of_itself() -> None:
    cache = made()
    records = [Record(0, 4, 0, 7), Record(0, 5, 0, 7)]
    assert repeated(cache, records) == [None, 4]
    assert repeated(cache, records) == [None, 4]
    assert len(cache) == 1


@pytest.mark.parametrize("time_ms", [-1, -(2**63), 2**63 - 1])
def test_impossible_times_do_no_harm(time_ms: int) -> None:
    cache = made()
    assert repeated(cache, [Record(0, 0, time_ms, 7), Record(0, 1, time_ms, 7)]) == [None, 0]
    made().absorb(cache.export(), [0])


def test_a_decision_is_known_once_it_is_settled_and_final_then() -> None:
    cache = made()
    look_up(cache, [Record(0, 10, 0, 7), Record(1, 10, 0, 7), Record(0, 11, 0, 8)])
    entries = look_up(cache, [Record(0, 12, 0, 7), Record(1, 12, 0, 7), Record(0, 13, 0, 8)])
    assert cache.first(entries).known.tolist() == [False, False, False]
    settle(cache, 0, [9, 10, 12], "v1")
    settle(cache, 1, [10], "v2", action=0)
    settle(cache, 0, [10], "v3", action=1)
    first = cache.first(entries)
    assert first.present.tolist() == [True, True, True]
    assert first.known.tolist() == [True, True, False]
    assert first.partitions.tolist() == [0, 1, 0]
    assert first.offsets.tolist() == [10, 10, 11]
    assert first.verdicts.actions[:2].tolist() == [2, 0]
    assert (first.verdicts.stages[:2].tolist(), first.verdicts.causes[:2].tolist()) == ([1, 1], [3, 3])
    assert first.verdicts.scores[:2].tolist() == [0.0001, 0.0001]
    assert first.verdicts.screener_scores[:2].tolist() == [0.00005, 0.00005]
    assert first.verdicts.times_ms[:2].tolist() == [5_010, 5_010]
    assert first.bundles[:2] == ["v1", "v2"]


def test_an_entry_that_takes_the_place_of_another_knows_nothing_of_its_decision() -> None:
    cache = made()
    look_up(cache, [Record(0, offset, 0, offset) for offset in range(SMALLEST)])
    settle(cache, 0, list(range(SMALLEST)))
    look_up(cache, [Record(0, SMALLEST, 0, -1)])
    assert not cache.first(look_up(cache, [Record(0, SMALLEST + 1, 0, -1)])).known.any()


def test_decisions_travel_in_an_export_with_their_bundles() -> None:
    cache = made()
    look_up(cache, [Record(partition, 5, 0, id) for partition in (0, 3) for id in (1,)])
    look_up(cache, [Record(0, 6, 0, 2), Record(0, 7, 0, 3)])
    settle(cache, 3, [5], "of-three")
    settle(cache, 0, [5], "old")
    settle(cache, 0, [6], "new")
    other = made()
    settle(other, 0, [5], "its-own")
    other.absorb(through_a_file(cache.export()), [0])
    first = other.first(look_up(other, [Record(0, 8, 0, id) for id in (1, 2, 3)]))
    assert first.known.tolist() == [True, True, False]
    assert first.bundles[:2] == ["old", "new"]
    assert first.verdicts.times_ms[:2].tolist() == [5_005, 5_006]
    assert repeated(other, [Record(3, 6, 0, 1)]) == [None]


def test_beyond_the_limit_the_oldest_are_forgotten_and_memory_does_not_grow() -> None:
    cache = made()
    entries = look_up(cache, [Record(0, 0, 0, 0), Record(0, 1, 0, 0)])
    for start in range(0, 20 * SMALLEST, 500):
        look_up(cache, [Record(offset % 3, offset, 0, offset) for offset in range(start + 2, start + 502)])
        assert len(cache) <= SMALLEST
    newest = 20 * SMALLEST
    assert repeated(cache, [Record(newest % 3, newest + 9, 0, newest)]) == [newest]
    assert cache.first(entries).present.tolist() == [False, False]
    assert repeated(cache, [Record(0, newest + 10, 0, 0)]) == [None]


def test_a_full_ring_finds_exactly_the_newest_after_much_coming_and_going() -> None:
    """Both indexes lose an entry for each that comes: a search that a gap breaks would miss an entry."""
    cache, chance = made(), np.random.default_rng(5)
    ring: dict[int, int] = {}
    for offset, id in enumerate(chance.integers(0, 3_000, 20_000).tolist()):
        assert repeated(cache, [Record(0, offset, 0, id)]) == [ring.get(id)]
        if id not in ring:
            ring[id] = offset
            if len(ring) > SMALLEST:
                del ring[next(iter(ring))]
    settle(cache, 0, list(ring.values()))
    assert cache._known.all()


def test_what_is_past_the_window_is_not_exported() -> None:
    cache = made()
    for second in range(50):
        look_up(cache, [Record(0, 10 * second + n, 1_000 * second, 10 * second + n) for n in range(10)])
    assert len(cache.export()["duplicates.entries"]) == 110


def test_a_repeat_gets_the_decision_that_is_made_after_the_window() -> None:
    cache = made()
    records = [Record(0, 0, 0, 7), Record(0, 1, 0, 7), Record(0, 2, 2 * WINDOW_MS, 7), Record(0, 3, 2 * WINDOW_MS, 7)]
    entries = look_up(cache, records)
    settle(cache, 0, [0, 2])
    first = cache.first(entries[[1, 3]])
    assert first.known.tolist() == [True, True]
    assert first.offsets.tolist() == [0, 2]
    look_up(cache, [Record(0, 4 + n, 2 * WINDOW_MS, 100 + n) for n in range(SMALLEST)])
    assert not cache.first(entries[[1, 3]]).present.any()
    assert len(cache) == SMALLEST


def test_a_partition_that_is_forgotten_leaves_the_others() -> None:
    cache = made()
    records = [Record(partition, 0, 0, id) for partition in (0, 1) for id in range(400)]
    entries = look_up(cache, records)
    assert (entries == -1).all()
    before = cache.digest(1)
    cache.forget(0)
    cache.forget(77)
    assert len(cache) == 400
    assert cache.digest(1) == before
    assert cache.digest(0) == made().digest(0)
    again = [Record(r.partition, r.offset + 1 + r.id, 0, r.id) for r in records]  # type: ignore[operator]
    assert repeated(cache, again) == [None] * 400 + [0] * 400


def test_absorbing_more_than_there_is_room_for_leaves_the_newest() -> None:
    cache = made(ids_max=4 * SMALLEST)
    look_up(cache, [Record(0, offset, 0, offset) for offset in range(2 * SMALLEST)])
    settle(cache, 0, list(range(2 * SMALLEST)))
    small = made()
    small.absorb(cache.export(), [0])
    assert len(small) == SMALLEST
    entries = look_up(small, [Record(0, 5_000 + id, 0, id) for id in (SMALLEST, 2 * SMALLEST - 1)])
    first = small.first(entries)
    assert first.offsets.tolist() == [SMALLEST, 2 * SMALLEST - 1]
    assert first.verdicts.times_ms.tolist() == [5_000 + SMALLEST, 4_999 + 2 * SMALLEST]


def test_disabled_it_finds_and_stores_nothing() -> None:
    cache = made(window_s=0.0)
    assert not cache.enabled
    records = [Record(0, offset, 0, 7) for offset in range(4)]
    assert repeated(cache, records) == [None] * 4
    settle(cache, 0, [0])
    cache.forget(0)
    cache.absorb({}, [0])
    assert (len(cache), cache.export()) == (0, {})
    assert sum(value.nbytes for value in vars(cache).values() if isinstance(value, np.ndarray)) < 1_000


def damaged(name: str, value: object, where: object = ...) -> dict[str, Array]:
    cache = made()
    look_up(cache, [Record(0, 5, 3, 1), Record(0, 6, 4, 2), Record(1, 5, 3, 1)])
    settle(cache, 0, [5, 6])
    arrays = cache.export()
    made().absorb(arrays, [0, 1])
    arrays["duplicates." + name] = arrays["duplicates." + name].copy()
    arrays["duplicates." + name][where] = value
    return arrays


@pytest.mark.parametrize(("name", "value", "where"), [
    ("entries", -4, (0, 3)), ("entries", 9, (0, 3)), ("entries", -1, (0, 5)), ("known", 2, 0), ("decided", 3, (0, 0)),
    ("decided", 2, (0, 1)), ("decided", 5, (0, 2)), ("scores", np.nan, (0, 0)), ("scores", 1.5, (0, 1)),
    ("bundle_numbers", 1, 0), ("clocks", -2, (0, 0)), ("clocks", 1 << 40, (0, 0)), ("clocks", 1, (0, 0)),
])  # fmt: skip
def test_an_export_with_impossible_content_is_refused(name: str, value: object, where: object) -> None:
    with pytest.raises(StateError, match=r"^array duplicates\.\w+ has values that no export has$"):
        made().absorb(damaged(name, value, where), [0, 1])


def test_an_export_with_a_transaction_twice_is_refused_whole() -> None:
    arrays = damaged("known", 1)
    arrays["duplicates.entries"][1] = arrays["duplicates.entries"][0]
    cache = made()
    with pytest.raises(StateError, match="twice"):
        cache.absorb(arrays, [0, 1])
    assert len(cache) == 0


@pytest.mark.parametrize("change", [
    lambda arrays: arrays.pop("duplicates.scores"),
    lambda arrays: arrays.update({"duplicates.known": arrays["duplicates.known"][:-1]}),
    lambda arrays: arrays.update({"duplicates.entries": arrays["duplicates.entries"][:, :-1]}),
    lambda arrays: arrays.update({"duplicates.entries": arrays["duplicates.entries"].astype(float)}),
    lambda arrays: arrays.update({"duplicates.bundles": np.array([1])}),
    lambda arrays: arrays.update({"duplicates.clocks": arrays["duplicates.clocks"][:, 0]}),
])  # fmt: skip
def test_arrays_of_another_shape_are_refused(change: object) -> None:
    arrays = damaged("known", 1)
    change(arrays)  # type: ignore[operator]
    with pytest.raises(StateError, match=r"^array duplicates\.\w+ is "):
        made().absorb(arrays, [0, 1])


def test_many_transactions_that_would_collide_without_the_secret_seed_take_no_longer() -> None:
    """Ids chosen so that the public part of the hash sends all of them to one place."""
    rows, high = 20_000, 1 << 20
    aimed_at = (np.arange(rows, dtype=np.uint64) * np.uint64(high)).view(np.int64)
    ids = unmixed(unmixed(unmixed(unmixed(aimed_at)) ^ np.float64(9.5).view(np.int64)) ^ 1)
    records = [Record(0, offset, 0, id) for offset, id in enumerate(ids.tolist())]
    cache = made(ids_max=65_536)
    look_up(cache, records)
    assert longest_run(cache._by_identity) < 200


def unmixed(values: Int64) -> Int64:
    """The inverse of the finaliser of splitmix64."""
    mixed = values.view(np.uint64).copy()
    for shift, factor in ((31, 0x319642B2D24D8EC3), (27, 0x96DE1B173F119089), (30, 1)):
        undone = mixed.copy()
        for _ in range(3):
            undone = mixed ^ (undone >> np.uint64(shift))
        mixed = undone * np.uint64(factor)
    return mixed.view(np.int64)


def longest_run(index: Array) -> int:
    gaps = np.concatenate([[-1], np.flatnonzero(index == 0), [len(index)]])
    return int(np.diff(gaps).max())
