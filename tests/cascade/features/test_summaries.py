"""Summaries that workers share of terminals: exact totals, a bounded error in windows, and checked records."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.columns import Array, Float32, Int64
from cascade.features import FeatureEngine, Summaries
from cascade.features.layout import COUNT, KEY, REMOTES
from cascade.features.summaries import COUNT_MAX, decode, encode
from cascade.schema import key_codes

from .streams import START_MS, Row, batch_of, label_of, play, random_moves, row_of, schema_of, spec_of, stream

SCHEMA = schema_of("int64")
HOUR_MS = 3_600_000
OF_TERMINALS = """
[[transaction]]
functions = ["value"]
[[window]]
key = "card"
functions = ["count"]
windows = ["6h"]
[[window]]
key = "terminal"
functions = ["seconds_since_last", "count", "sum", "mean", "max", "std", "ratio_to_mean", "distinct"]
windows = ["10s", "6h", "1d"]
distinct_field = "card"
[[window]]
key = "terminal"
field = "items"
functions = ["max", "std"]
windows = ["1d"]
[[label_window]]
key = "terminal"
functions = ["count", "fraud_count", "fraud_rate"]
windows = ["1d"]
[[sequence]]
key = "card"
length = 2
fields = ["amount"]
"""


def engine_of() -> FeatureEngine:
    return FeatureEngine(spec_of(OF_TERMINALS, events_per_key_max=4_096), SCHEMA)


def fold(engine: FeatureEngine, rows: list[Row], partition_ids: list[int] | Int64) -> Float32:
    return engine.update(batch_of(SCHEMA.fields, rows), np.asarray(partition_ids, np.int64)).features


def by_name(engine: FeatureEngine, features: Float32) -> dict[str, float]:
    return dict(zip(engine.names, features.tolist(), strict=True))


def some_rows(seed: int, count: int, span_ms: int, terminals: int = 3, cards: int = 40) -> list[Row]:
    rng = np.random.default_rng(seed)
    times = START_MS + np.sort(rng.integers(0, span_ms, count))
    return [
        row_of(
            "int64",
            number,
            int(time_ms),
            int(rng.integers(cards)),
            int(rng.integers(terminals)),
            float(np.round(rng.gamma(2, 30), 2)),
        )
        for number, time_ms in enumerate(times)
    ]


def summaries_of(engine: FeatureEngine, rows: list[Row], partition_ids: list[int], length_ms: int) -> Summaries:
    """Summaries of the stretches of event time that contain the rows."""
    stretches = sorted(
        {(row["shop"], id_, row["at"] // length_ms * length_ms) for row, id_ in zip(rows, partition_ids, strict=True)}
    )
    codes, ids, starts = np.array(stretches, np.int64).reshape(-1, 3).T
    return engine.summarise("shop", key_codes(codes), ids, starts, length_ms)


# --- totals -----------------------------------------------------------------------------------------------------


def test_summaries_are_exact_totals_of_own_events() -> None:
    engine = engine_of()
    rows = some_rows(1, 400, 5 * HOUR_MS)
    partition_ids = [row["pan"] % 4 for row in rows]
    fold(engine, rows, partition_ids)
    summaries = summaries_of(engine, rows, partition_ids, HOUR_MS)
    assert len(summaries) > 40
    assert summaries.counts.sum() == 400
    by_stretch: dict[tuple[int, int, int], list[Row]] = {}
    for row, partition_id in zip(rows, partition_ids, strict=True):
        by_stretch.setdefault((row["shop"], partition_id, row["at"] // HOUR_MS * HOUR_MS), []).append(row)
    for n in range(len(summaries)):
        summed = by_stretch[summaries.codes[n], summaries.partition_ids[n], summaries.starts[n]]
        # value fields in order of name: items, paid
        values = np.array([[row["items"], row["paid"]] for row in summed], np.float64)
        assert summaries.counts[n] == len(summed)
        assert summaries.newest[n] == max(row["at"] for row in summed)
        assert np.allclose(summaries.sums[n], values.sum(axis=0), rtol=1e-12)
        assert np.allclose(summaries.squares[n], values.var(axis=0) * len(summed), rtol=1e-9, atol=1e-9)
        assert np.array_equal(summaries.maxima[n], values.max(axis=0))


def test_a_summary_of_no_rows_has_a_count_of_zero_and_makes_no_key() -> None:
    engine = engine_of()
    fold(engine, [row_of("int64", 1, START_MS, 1, 1)], [2])
    start_ms = START_MS // HOUR_MS * HOUR_MS
    starts = np.array([start_ms] * 3 + [start_ms + HOUR_MS])
    summaries = engine.summarise("shop", np.array([1, 1, 9, 1]), np.array([2, 3, 2, 2]), starts, HOUR_MS)
    assert summaries.counts.tolist() == [1, 0, 0, 0]
    assert engine.statistics()["shop"].keys == 1


def test_equal_amounts_have_no_spread() -> None:
    engine = engine_of()
    rows = [row_of("int64", 5 * number, START_MS + number, 1, 1, 0.1) for number in range(50)]
    fold(engine, rows, [0] * 50)
    assert summaries_of(engine, rows, [0] * 50, 1 << 50).squares.tolist() == [[0.0, 0.0]]


def test_only_keys_with_windows_are_shared() -> None:
    engine = engine_of()
    assert (engine.shared_keys, engine.shared_values) == (("shop",), (2,))
    nothing = engine.summarise("shop", *(np.zeros(0, np.int64) for _ in range(3)), HOUR_MS)
    engine.fold_summaries("shop", nothing)
    for key in ("pan", "id"):
        with pytest.raises(ValueError, match="use one of shop"):
            engine.fold_summaries(key, nothing)
    with pytest.raises(ValueError, match="not positive"):
        engine.summarise("shop", *(np.zeros(0, np.int64) for _ in range(3)), 0)
    with pytest.raises(ValueError, match="out of range"):
        engine.fold_summaries("shop", summary(partition_id=-1))


# --- counting ---------------------------------------------------------------------------------------------------


def summary(
    count: int = 3,
    newest_ms: int = 0,
    start_ms: int = 0,
    partition_id: int = 5,
    code: int = 1,
    paid: float = 10.0,
    spread: float = 0.0,
    largest: float | None = None,
) -> Summaries:
    """A summary of terminal `code` with `count` rows of `paid` on average; times count from START_MS."""
    return Summaries(
        *(np.array([n]) for n in (code, partition_id, START_MS + start_ms, count, START_MS + newest_ms)),
        np.array([[0.0, paid * count]]),
        np.array([[0.0, spread]]),
        np.array([[0.0, paid if largest is None else largest]]),
    )


def probe(engine: FeatureEngine, time_ms: int, partition_id: int = 0, paid: float = 10.0) -> dict[str, float]:
    row = row_of("int64", 5 * time_ms, START_MS + time_ms, 1, 1, paid)
    return by_name(engine, fold(engine, [row], [partition_id])[0])


def test_a_summary_counts_as_its_rows_at_the_time_of_the_newest() -> None:
    """An engine with summaries equals one with their rows, all at the time of the newest, except for `distinct`."""
    rows = some_rows(2, 300, 12 * HOUR_MS)
    partition_ids = [row["pan"] % 3 for row in rows]
    everything = engine_of()
    fold(everything, rows, partition_ids)
    with_summaries, with_rows = engine_of(), engine_of()
    for partition_id in (1, 2):
        with_summaries.hide(partition_id)
    summaries = summaries_of(everything, rows, partition_ids, HOUR_MS)
    with_summaries.fold_summaries("shop", summaries)
    stretches = zip(summaries.codes, summaries.partition_ids, summaries.starts, strict=True)
    newest = dict(zip(stretches, summaries.newest.tolist(), strict=True))
    of_partitions = list(zip(rows, partition_ids, strict=True))
    moved = [
        row | {"at": newest[row["shop"], partition_id, row["at"] // HOUR_MS * HOUR_MS]} if partition_id else row
        for row, partition_id in of_partitions
    ]
    fold(with_summaries, [row for row, partition_id in of_partitions if not partition_id], [0] * partition_ids.count(0))
    fold(with_rows, moved, partition_ids)
    for time_ms in (12 * HOUR_MS, 15 * HOUR_MS, 29 * HOUR_MS + 1_234):
        late = [row_of("int64", time_ms + shop, START_MS + time_ms, 1, shop, 33.3) for shop in range(3)]
        for row in late:
            play(with_summaries, [label_of(rows[-1], 1)])
            play(with_rows, [label_of(rows[-1], 1)])
            found, expected = (by_name(engine, fold(engine, [row], [0])[0]) for engine in (with_summaries, with_rows))
            for name in (name for name in with_rows.names if name.startswith("terminal")):
                if "distinct" in name:
                    assert found[name] < expected[name] or expected[name] == 1
                else:
                    assert found[name] == pytest.approx(expected[name], rel=1e-6), (name, time_ms)


def test_a_summary_counts_while_its_partition_is_hidden_and_events_while_it_is_shown() -> None:
    """Whichever worker owns a partition, its rows count once: before, during and after the change."""
    engine = engine_of()
    engine.hide(5)
    engine.fold_summaries("shop", summary(count=3, newest_ms=1_000))
    assert probe(engine, 2_000)["terminal_count_1d"] == 4
    for time_ms in (800, 900, 1_000):  # the rows of the summary, rebuilt here
        assert probe(engine, time_ms, partition_id=5)["terminal_count_1d"] <= 3, "its own rows, not their summary"
    assert probe(engine, 3_000)["terminal_count_1d"] == 5, "hidden: the summary"
    engine.show(5)
    assert probe(engine, 4_000)["terminal_count_1d"] == 6, "shown: the events"
    engine.hide(5)
    engine.forget(5)
    assert probe(engine, 5_000)["terminal_count_1d"] == 7, "forgotten: the summary"


def test_a_later_summary_replaces_the_earlier_and_a_count_of_zero_removes_it() -> None:
    engine = engine_of()
    engine.hide(5)
    for count in (2, 3, 3):
        engine.fold_summaries("shop", summary(count=count, newest_ms=count, paid=float(count)))
    engine.fold_summaries("shop", summary(count=7, newest_ms=1, start_ms=-HOUR_MS))
    row = probe(engine, 1_000, paid=1.0)
    assert (row["terminal_count_1d"], row["terminal_amount_sum_1d"]) == (11, 80)
    engine.fold_summaries("shop", summary(count=1, newest_ms=0))
    assert probe(engine, 2_000)["terminal_count_1d"] == 10, "the newest row is earlier than before"
    engine.fold_summaries("shop", summary(count=0, start_ms=-HOUR_MS))
    assert probe(engine, 3_000)["terminal_count_1d"] == 4
    engine.fold_summaries("shop", summary(count=0))
    engine.fold_summaries("shop", summary(count=0, code=99))
    assert probe(engine, 4_000)["terminal_count_1d"] == 4
    assert engine.statistics()["shop"].keys == 1


def test_an_export_contains_summaries_and_forgetting_a_partition_leaves_them() -> None:
    engine, other = engine_of(), engine_of()
    engine.fold_summaries("shop", summary())
    engine.forget(5)
    other.hide(5)
    other.import_state(engine.export_state())
    assert probe(other, 1_000)["terminal_count_1d"] == 4, "an export does not contain which partitions are hidden"
    assert probe(engine, 1_000)["terminal_count_1d"] == 1
    absorbed = engine_of()
    absorbed.hide(5)
    absorbed.absorb(engine.export_state(), [0, 5], labels=True)
    assert probe(absorbed, 2_000)["terminal_count_1d"] == 2, "absorb takes rows and labels, not summaries"


def test_summaries_are_bounded() -> None:
    spec = spec_of(OF_TERMINALS, keys_max=10, events_per_key_max=8)
    engine = FeatureEngine(spec, SCHEMA)
    engine.hide(5)
    size = engine.state_bytes_max()
    for number in range(1_000):
        engine.fold_summaries("shop", summary(1, newest_ms=number, start_ms=number, code=1 + number % 40))
    assert engine.state_bytes_max() == size
    assert engine.statistics()["shop"].keys == 10
    for number in range(20):
        engine.fold_summaries("shop", summary(1, newest_ms=2_000 + number, start_ms=2_000 + number))
    assert probe(engine, 3_000)["terminal_count_1d"] == 9
    assert len(engine.export_state()["shop.remotes"]) < 60
    horizon_ms = engine.horizon_ms
    engine.fold_summaries("shop", summary(1, newest_ms=horizon_ms + 2_018, start_ms=horizon_ms))
    engine.fold_summaries("shop", summary(1, newest_ms=2_018, start_ms=1))
    own = engine.export_state()["shop.slots"]
    assert own[own[:, KEY] == 1, REMOTES + COUNT].tolist() == [2], "one earlier summary is younger than the horizon"
    assert probe(engine, horizon_ms + 2_018)["terminal_seconds_since_last"] == 0


# --- several workers --------------------------------------------------------------------------------------------


def features_of_four_and_of_one(rows: list[Row], length_ms: int, rows_per_round: int) -> tuple[Array, Array]:
    """Features by four workers with a quarter of the cards each, which share summaries after each round, and by one."""
    single, workers = engine_of(), [engine_of() for _ in range(4)]
    for number, worker in enumerate(workers):
        for partition_id in {0, 1, 2, 3} - {number}:
            worker.hide(partition_id)
    found = np.zeros((len(rows), single.width), np.float32)
    expected = np.zeros_like(found)
    for first in range(0, len(rows), rows_per_round):
        now = np.arange(first, min(first + rows_per_round, len(rows)))
        partition_ids = np.array([rows[n]["pan"] % 4 for n in now])
        expected[now] = fold(single, [rows[n] for n in now], partition_ids)
        for number, worker in enumerate(workers):
            own = now[partition_ids == number]
            found[own] = fold(worker, [rows[n] for n in own], [number] * len(own))
        for number, worker in enumerate(workers):
            own_rows = [rows[n] for n in now[partition_ids == number]]
            if not own_rows:
                continue
            records = encode(0, summaries_of(worker, own_rows, [number] * len(own_rows), length_ms))
            (summaries,), rejected = decode(*records, worker.shared_values)
            assert rejected == 0
            for other in workers:
                if other is not worker:
                    other.fold_summaries("shop", summaries)
    return found, expected


@pytest.mark.parametrize("length_ms", [HOUR_MS, 5 * 60_000])
def test_the_error_of_four_workers_is_bounded_by_a_stretch_and_a_round(length_ms: int) -> None:
    rows = some_rows(3, 3_000, 60 * HOUR_MS)
    rows_per_round = 30
    found, expected = features_of_four_and_of_one(rows, length_ms, rows_per_round)
    names = engine_of().names
    count = names.index("terminal_count_6h")
    times, shops, cards = (np.array([row[name] for row in rows]) for name in ("at", "shop", "pan"))
    for n in range(len(rows)):
        others = (shops[:n] == shops[n]) & (cards[:n] % 4 != cards[n] % 4)
        not_shared_yet = np.count_nonzero(others[n // rows_per_round * rows_per_round :])
        age_ms = times[n] - times[:n] - 6 * HOUR_MS
        left_late = np.count_nonzero(others & (age_ms >= 0) & (age_ms < length_ms))
        assert -not_shared_yet <= found[n, count] - expected[n, count] <= left_late, n
    settled = times > START_MS + 30 * HOUR_MS
    mean = names.index("terminal_amount_mean_1d")
    for column, error_max in ((count, 0.09 if length_ms == HOUR_MS else 0.05), (mean, 0.03)):
        error = np.abs(found - expected)[settled, column].mean() / expected[settled, column].mean()
        assert error < error_max
    of_card = [column for column, name in enumerate(names) if not name.startswith("terminal")]
    assert np.array_equal(found[:, of_card], expected[:, of_card])


# --- records ----------------------------------------------------------------------------------------------------


def record() -> tuple[bytes, bytes]:
    keys, values = encode(0, summary())
    return keys[0], values[0]


def test_decoded_records_equal_the_encoded_summaries() -> None:
    engine = engine_of()
    rows = some_rows(5, 200, 3 * HOUR_MS)
    partition_ids = [row["pan"] % 3 + 65_533 for row in rows]
    fold(engine, rows, partition_ids)
    summaries = summaries_of(engine, rows, partition_ids, HOUR_MS)
    keys, values = encode(1, summaries)
    assert {len(key) for key in keys} == {20}
    assert {len(value) for value in values} == {17 + 2 * 24}
    (nothing, found), rejected = decode(keys, values, [1, 2])
    assert (len(nothing), rejected) == (0, 0)
    for name in Summaries.__slots__:
        assert np.array_equal(getattr(found, name), getattr(summaries, name)), name
        assert getattr(found, name).dtype == getattr(summaries, name).dtype


def test_records_are_little_endian_and_packed() -> None:
    keys, values = encode(
        3, replace(summary(count=2, code=-5, partition_id=258), starts=np.array([7]), newest=np.array([9]))
    )
    assert keys[0] == bytes.fromhex("0300fbffffffffffffff02010700000000000000")
    assert values[0][:17] == bytes.fromhex("0102000000000000000900000000000000")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"", record()[1]),
        (None, record()[1]),
        (record()[0], None),
        (record()[0], b""),
        (record()[0] + b"\0", record()[1]),
        (record()[0], record()[1][:-1]),
        (b"\x07\x00" + record()[0][2:], record()[1]),
        (record()[0], b"\x02" + record()[1][1:]),
        *(zip(*encode(0, summary(count=-1)), strict=True)),
        *(zip(*encode(0, summary(count=COUNT_MAX + 1)), strict=True)),
        *(zip(*encode(0, summary(paid=np.nan)), strict=True)),
        *(zip(*encode(0, summary(largest=np.inf)), strict=True)),
        *(zip(*encode(0, summary(spread=-1.0)), strict=True)),
        *(zip(*encode(0, summary(newest_ms=-1)), strict=True)),
    ],
)
def test_a_record_that_is_no_summary_is_counted_and_the_others_are_read(key: bytes | None, value: bytes | None) -> None:
    good_key, good_value = record()
    (found,), rejected = decode([key, good_key], [value, good_value], [2])
    assert (len(found), rejected) == (1, 1)
    assert found.counts.tolist() == [3]


@settings(deadline=None, max_examples=200)
@given(
    records=st.lists(st.tuples(st.binary(min_size=18, max_size=21), st.binary(min_size=40, max_size=66)), max_size=5)
)
def test_decode_raises_for_no_bytes(records: list[tuple[bytes, bytes]]) -> None:
    keys = [b"\0\0" + key[2:] for key, _ in records]
    values = [(b"\x01" + value[1:])[: 65 if len(value) % 2 else None] for _, value in records]
    (found,), rejected = decode(keys, values, [2])
    assert len(found) + rejected == len(records)
    engine = engine_of()
    engine.hide(0)
    engine.fold_summaries("shop", found)
    play(engine, stream("int64", random_moves(1, 5, keys=2)))
