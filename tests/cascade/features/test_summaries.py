"""What workers tell each other of terminals: exact totals, a bounded error in windows, and records that are checked."""

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

from .streams import START_MS, Item, Row, batch_of, label_of, play, random_moves, row_of, schema_of, spec_of, stream

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
[sequence]
key = "card"
length = 2
fields = ["amount"]
"""


def engine_of() -> FeatureEngine:
    return FeatureEngine(spec_of(OF_TERMINALS, events_per_key_max=4_096), SCHEMA)


def fold(engine: FeatureEngine, rows: list[Row], sources: list[int] | Int64) -> Float32:
    return engine.update(batch_of(SCHEMA.fields, rows), np.asarray(sources, np.int64)).features


def by_name(engine: FeatureEngine, features: Float32) -> dict[str, float]:
    return dict(zip(engine.names, features.tolist(), strict=True))


def some_rows(seed: int, count: int, span_ms: int, terminals: int = 3, cards: int = 40) -> list[Row]:
    rng = np.random.default_rng(seed)
    times = START_MS + np.sort(rng.integers(0, span_ms, count))
    return [row_of("int64", number, int(time_ms), int(rng.integers(cards)), int(rng.integers(terminals)),
                   float(np.round(rng.gamma(2, 30), 2))) for number, time_ms in enumerate(times)]  # fmt: skip


def told_by(engine: FeatureEngine, rows: list[Row], sources: list[int], length_ms: int) -> Summaries:
    """Summaries of the stretches that the rows lie in."""
    stretches = sorted({(row["shop"], source, row["at"] // length_ms * length_ms)
                        for row, source in zip(rows, sources, strict=True)})  # fmt: skip
    codes, of, starts = np.array(stretches, np.int64).reshape(-1, 3).T
    return engine.summarise("shop", key_codes(codes), of, starts, length_ms)


# --- telling ----------------------------------------------------------------------------------------------------


def test_summaries_are_exact_totals_of_own_events() -> None:
    engine = engine_of()
    rows = some_rows(1, 400, 5 * HOUR_MS)
    sources = [row["pan"] % 4 for row in rows]
    fold(engine, rows, sources)
    told = told_by(engine, rows, sources, HOUR_MS)
    assert len(told) > 40
    assert told.counts.sum() == 400
    for n in range(len(told)):
        mine = [row for row, source in zip(rows, sources, strict=True)
                if (row["shop"], source, row["at"] // HOUR_MS * HOUR_MS)
                == (told.codes[n], told.sources[n], told.starts[n])]  # fmt: skip
        # value fields in order of name: items, paid
        values = np.array([[row["items"], row["paid"]] for row in mine], np.float64)
        assert told.counts[n] == len(mine)
        assert told.newest[n] == max(row["at"] for row in mine)
        assert np.allclose(told.sums[n], values.sum(axis=0), rtol=1e-12)
        assert np.allclose(told.squares[n], values.var(axis=0) * len(mine), rtol=1e-9, atol=1e-9)
        assert np.array_equal(told.maxima[n], values.max(axis=0))


def test_nothing_is_told_of_what_is_not_there() -> None:
    engine = engine_of()
    fold(engine, [row_of("int64", 1, START_MS, 1, 1)], [2])
    start_ms = START_MS // HOUR_MS * HOUR_MS
    told = engine.summarise(
        "shop", np.array([1, 1, 9, 1]), np.array([2, 3, 2, 2]), np.array([start_ms] * 3 + [start_ms + HOUR_MS]), HOUR_MS
    )
    assert told.counts.tolist() == [1, 0, 0, 0]
    assert engine.statistics()["shop"].keys == 1, "asking made no key"


def test_equal_amounts_have_no_spread() -> None:
    engine = engine_of()
    rows = [row_of("int64", 5 * number, START_MS + number, 1, 1, 0.1) for number in range(50)]
    fold(engine, rows, [0] * 50)
    told = told_by(engine, rows, [0] * 50, 1 << 50)
    assert told.squares.tolist() == [[0.0, 0.0]]


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
        engine.fold_summaries("shop", summary(source=-1))


# --- counting ---------------------------------------------------------------------------------------------------


def summary(
    count: int = 3, newest_ms: int = 0, start_ms: int = 0, source: int = 5, code: int = 1, paid: float = 10.0,
    spread: float = 0.0, largest: float | None = None,
) -> Summaries:  # fmt: skip
    """One summary of terminal `code`: `count` rows of `paid` each on average; times from START_MS on."""
    return Summaries(
        *(np.array([n]) for n in (code, source, START_MS + start_ms, count, START_MS + newest_ms)),
        np.array([[0.0, paid * count]]),
        np.array([[0.0, spread]]),
        np.array([[0.0, paid if largest is None else largest]]),
    )


def probe(engine: FeatureEngine, time_ms: int, source: int = 0, paid: float = 10.0) -> dict[str, float]:
    row = row_of("int64", 5 * time_ms, START_MS + time_ms, 1, 1, paid)
    return by_name(engine, fold(engine, [row], [source])[0])


def test_a_summary_counts_as_its_rows_at_the_time_of_the_newest() -> None:
    """An engine that was told equals one that had the rows, all at the newest's time; but for what is distinct."""
    rows = some_rows(2, 300, 12 * HOUR_MS)
    sources = [row["pan"] % 3 for row in rows]
    teller = engine_of()
    fold(teller, rows, sources)
    told, having = engine_of(), engine_of()
    for source in (1, 2):
        told.hide(source)
    stretches = told_by(teller, rows, sources, HOUR_MS)
    told.fold_summaries("shop", stretches)
    newest = {(code, source, start_ms): newest_ms for code, source, start_ms, newest_ms in zip(
        stretches.codes, stretches.sources, stretches.starts, stretches.newest, strict=True)}  # fmt: skip
    moved = [row | {"at": int(newest[row["shop"], source, row["at"] // HOUR_MS * HOUR_MS])} if source else row
             for row, source in zip(rows, sources, strict=True)]  # fmt: skip
    fold(told, [row for row, source in zip(rows, sources, strict=True) if not source], [0] * sources.count(0))
    fold(having, moved, sources)
    for time_ms in (12 * HOUR_MS, 15 * HOUR_MS, 29 * HOUR_MS + 1_234):
        late = [row_of("int64", time_ms + shop, START_MS + time_ms, 1, shop, 33.3) for shop in range(3)]
        for row in late:
            play(told, [label_of(rows[-1], 1)])
            play(having, [label_of(rows[-1], 1)])
            found, expected = (by_name(engine, fold(engine, [row], [0])[0]) for engine in (told, having))
            for name in (name for name in told.names if name.startswith("terminal")):
                if "distinct" in name:
                    assert found[name] < expected[name] or expected[name] == 1
                else:
                    assert found[name] == pytest.approx(expected[name], rel=1e-6), (name, time_ms)


def test_a_summary_counts_while_its_source_is_hidden_and_events_while_it_is_shown() -> None:
    """Whoever holds a partition, its rows count once: before, while and after it changes hands."""
    engine = engine_of()
    engine.hide(5)
    engine.fold_summaries("shop", summary(count=3, newest_ms=1_000))
    assert probe(engine, 2_000)["terminal_count_1d"] == 4
    for time_ms in (800, 900, 1_000):  # the same three rows, rebuilt here
        assert probe(engine, time_ms, source=5)["terminal_count_1d"] <= 3, "own rows count, not what was told of them"
    assert probe(engine, 3_000)["terminal_count_1d"] == 5, "hidden: what was told"
    engine.show(5)
    assert probe(engine, 4_000)["terminal_count_1d"] == 6, "shown: the events"
    engine.hide(5)
    engine.forget(5)
    assert probe(engine, 5_000)["terminal_count_1d"] == 7, "gone: what was told"


def test_telling_again_replaces_and_nothing_takes_back() -> None:
    engine = engine_of()
    engine.hide(5)
    for count in (2, 3, 3):
        engine.fold_summaries("shop", summary(count=count, newest_ms=count, paid=float(count)))
    engine.fold_summaries("shop", summary(count=7, newest_ms=1, start_ms=-HOUR_MS))
    row = probe(engine, 1_000, paid=1.0)
    assert (row["terminal_count_1d"], row["terminal_amount_sum_1d"]) == (11, 80)
    engine.fold_summaries("shop", summary(count=1, newest_ms=0))
    assert probe(engine, 2_000)["terminal_count_1d"] == 10, "an earlier newest than before"
    engine.fold_summaries("shop", summary(count=0, start_ms=-HOUR_MS))
    assert probe(engine, 3_000)["terminal_count_1d"] == 4
    engine.fold_summaries("shop", summary(count=0))
    engine.fold_summaries("shop", summary(count=0, code=99))
    assert probe(engine, 4_000)["terminal_count_1d"] == 4
    assert engine.statistics()["shop"].keys == 1


def test_a_summary_enters_and_leaves_a_window_as_a_whole() -> None:
    engine = engine_of()
    engine.hide(5)
    engine.fold_summaries("shop", summary(count=3, newest_ms=1_000, start_ms=-9_000))
    counts = [probe(engine, time_ms)["terminal_count_10s"] for time_ms in (999, 1_000, 10_999, 11_000)]
    assert counts == [1, 5, 5, 2]
    assert probe(engine, 11_001)["terminal_seconds_since_last"] == np.float32(0.001)


def test_the_time_since_the_last_row_is_that_of_the_newest_summary() -> None:
    engine = engine_of()
    engine.hide(5)
    probe(engine, 0)
    engine.fold_summaries("shop", summary(newest_ms=7_000))
    assert probe(engine, 8_000)["terminal_seconds_since_last"] == 1
    engine.fold_summaries("shop", summary(newest_ms=7_500, start_ms=1))
    assert probe(engine, 8_001)["terminal_seconds_since_last"] == np.float32(0.001), "the own one is newer"


def test_spread_and_largest_are_of_all() -> None:
    engine = engine_of()
    engine.hide(5)
    values = np.array([4.0, 7.0, 19.0])
    engine.fold_summaries("shop", summary(3, 1_000, paid=10.0, spread=float(((values - 10) ** 2).sum()), largest=19.0))
    row = probe(engine, 2_000, paid=12.0)
    assert row["terminal_amount_std_1d"] == pytest.approx(np.std([*values, 12.0]), rel=1e-6)
    assert row["terminal_amount_max_1d"] == 19
    assert row["terminal_amount_ratio_to_mean_1d"] == pytest.approx(1.2)


def test_frauds_of_others_count_from_their_stretch_on() -> None:
    """Without the summary a fraud would be older than any row that is known, and not count."""
    engine = engine_of()
    engine.hide(5)
    early = row_of("int64", 1, START_MS + 500, 9, 1)
    play(engine, [label_of(early, 1)])
    assert probe(engine, 10_000)["terminal_fraud_count_1d"] == 0
    engine.fold_summaries("shop", summary(count=4, newest_ms=2_000, start_ms=400))
    row = probe(engine, 10_001)
    assert (row["terminal_labelled_count_1d"], row["terminal_fraud_count_1d"]) == (4, 1)
    assert row["terminal_fraud_rate_1d"] == 0.25
    engine.show(5)
    assert probe(engine, 10_002)["terminal_fraud_count_1d"] == 0


def test_summaries_travel_with_an_export_and_stay_when_a_partition_is_forgotten() -> None:
    engine, other = engine_of(), engine_of()
    engine.fold_summaries("shop", summary())
    engine.forget(5)
    other.hide(5)
    other.import_state(engine.export_state())
    assert probe(other, 1_000)["terminal_count_1d"] == 4, "what is hidden is the owner's business"
    assert probe(engine, 1_000)["terminal_count_1d"] == 1
    absorbed = engine_of()
    absorbed.hide(5)
    absorbed.absorb(engine.export_state(), [0, 5], labels=True)
    assert probe(absorbed, 2_000)["terminal_count_1d"] == 2, "absorbed are rows and labels"


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
    assert own[own[:, KEY] == 1, REMOTES + COUNT].tolist() == [2], "one of before is younger than the horizon"
    assert probe(engine, horizon_ms + 2_018)["terminal_seconds_since_last"] == 0


# --- several workers --------------------------------------------------------------------------------------------


def shared_counts(rows: list[Row], length_ms: int, rows_a_round: int) -> tuple[Array, Array, list[Row]]:
    """Features of four workers, a quarter of the cards each, that tell each other after each round; and of one."""
    single, workers = engine_of(), [engine_of() for _ in range(4)]
    for number, worker in enumerate(workers):
        for source in {0, 1, 2, 3} - {number}:
            worker.hide(source)
    found = np.zeros((len(rows), single.width), np.float32)
    expected = np.zeros_like(found)
    for first in range(0, len(rows), rows_a_round):
        now = np.arange(first, min(first + rows_a_round, len(rows)))
        sources = np.array([rows[n]["pan"] % 4 for n in now])
        expected[now] = fold(single, [rows[n] for n in now], sources)
        for number, worker in enumerate(workers):
            mine = now[sources == number]
            found[mine] = fold(worker, [rows[n] for n in mine], [number] * len(mine))
        for number, worker in enumerate(workers):
            mine = [rows[n] for n in now[sources == number]]
            if not mine:
                continue
            records = encode(0, told_by(worker, mine, [number] * len(mine), length_ms))
            (told,), rejected = decode(*records, worker.shared_values)
            assert rejected == 0
            for other in workers:
                if other is not worker:
                    other.fold_summaries("shop", told)
    return found, expected, rows


@pytest.mark.parametrize("length_ms", [HOUR_MS, 5 * 60_000])
def test_the_error_of_four_workers_is_bounded_by_a_stretch_and_a_round(length_ms: int) -> None:
    rows = some_rows(3, 3_000, 60 * HOUR_MS)
    a_round = 30
    found, expected, _ = shared_counts(rows, length_ms, a_round)
    names = engine_of().names
    count = names.index("terminal_count_6h")
    times, shops, cards = (np.array([row[name] for row in rows]) for name in ("at", "shop", "pan"))
    for n in range(len(rows)):
        others = (shops[:n] == shops[n]) & (cards[:n] % 4 != cards[n] % 4)
        not_told = np.count_nonzero(others[n // a_round * a_round :])
        age_ms = times[n] - times[:n] - 6 * HOUR_MS
        left_late = np.count_nonzero(others & (age_ms >= 0) & (age_ms < length_ms))
        assert -not_told <= found[n, count] - expected[n, count] <= left_late, n
    settled = times > START_MS + 30 * HOUR_MS
    error = np.abs(found - expected)[settled].mean(axis=0) / expected[settled].mean(axis=0)
    assert error[count] < (0.09 if length_ms == HOUR_MS else 0.05)
    assert error[names.index("terminal_amount_mean_1d")] < 0.03
    of_card = [column for column, name in enumerate(names) if not name.startswith("terminal")]
    assert np.array_equal(found[:, of_card], expected[:, of_card])


# --- on the wire ------------------------------------------------------------------------------------------------


def one_record() -> tuple[bytes, bytes]:
    keys, values = encode(0, summary())
    return keys[0], values[0]


def test_records_say_again_what_was_written() -> None:
    engine = engine_of()
    rows = some_rows(5, 200, 3 * HOUR_MS)
    sources = [row["pan"] % 3 + 65_533 for row in rows]
    fold(engine, rows, sources)
    told = told_by(engine, rows, sources, HOUR_MS)
    keys, values = encode(1, told)
    assert {len(key) for key in keys} == {20}
    assert {len(value) for value in values} == {17 + 2 * 24}
    (nothing, found), rejected = decode(keys, values, [1, 2])
    assert (len(nothing), rejected) == (0, 0)
    for name in Summaries.__slots__:
        assert np.array_equal(getattr(found, name), getattr(told, name)), name
        assert getattr(found, name).dtype == getattr(told, name).dtype


def test_the_wire_form_is_little_endian_and_packed() -> None:
    keys, values = encode(3, replace(summary(count=2, code=-5, source=258), starts=np.array([7]), newest=np.array([9])))
    assert keys[0] == bytes.fromhex("0300fbffffffffffffff02010700000000000000")
    assert values[0][:17] == bytes.fromhex("0102000000000000000900000000000000")


@pytest.mark.parametrize(("key", "value"), [
    (b"", one_record()[1]),
    (None, one_record()[1]),
    (one_record()[0], None),
    (one_record()[0], b""),
    (one_record()[0] + b"\0", one_record()[1]),
    (one_record()[0], one_record()[1][:-1]),
    (b"\x07\x00" + one_record()[0][2:], one_record()[1]),
    (one_record()[0], b"\x02" + one_record()[1][1:]),
    *(zip(*encode(0, summary(count=-1)), strict=True)),
    *(zip(*encode(0, summary(count=COUNT_MAX + 1)), strict=True)),
    *(zip(*encode(0, summary(paid=np.nan)), strict=True)),
    *(zip(*encode(0, summary(largest=np.inf)), strict=True)),
    *(zip(*encode(0, summary(spread=-1.0)), strict=True)),
    *(zip(*encode(0, summary(newest_ms=-1)), strict=True)),
])  # fmt: skip
def test_a_record_that_is_no_summary_is_counted_and_the_rest_is_read(key: bytes | None, value: bytes | None) -> None:
    good_key, good_value = one_record()
    (found,), rejected = decode([key, good_key], [value, good_value], [2])
    assert (len(found), rejected) == (1, 1)
    assert found.counts.tolist() == [3]


@settings(deadline=None, max_examples=200)
@given(
    records=st.lists(st.tuples(st.binary(min_size=18, max_size=21), st.binary(min_size=40, max_size=66)), max_size=5)
)
def test_no_bytes_make_the_reader_fail(records: list[tuple[bytes, bytes]]) -> None:
    keys = [b"\0\0" + key[2:] for key, _ in records]
    values = [(b"\x01" + value[1:])[: 65 if len(value) % 2 else None] for _, value in records]
    (found,), rejected = decode(keys, values, [2])
    assert len(found) + rejected == len(records)
    engine = engine_of()
    engine.hide(0)
    engine.fold_summaries("shop", found)
    play(engine, stream("int64", random_moves(1, 5, keys=2)))


def test_a_row_told_and_probed_by_item() -> None:
    """Guards `probe`: its rows lie on terminal 1."""
    engine = engine_of()
    play(engine, [Item("row", row_of("int64", 1, START_MS, 1, 1))])
    assert probe(engine, 1)["terminal_count_1d"] == 2
