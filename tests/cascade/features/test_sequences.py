"""Sequences: of several keys, of any length, written when they are asked for, and right whatever comes between."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.features import FeatureEngine, Summaries

from .streams import (
    QUICK,
    START_MS,
    Item,
    Move,
    batch_of,
    flat,
    joined,
    label_of,
    moves,
    partition_of,
    play,
    random_moves,
    row_of,
    rows_of,
    schema_of,
    spec_of,
    stream,
)
from .test_partitions import CALLS, absorb_all, drive

SCHEMA = schema_of("int64")
YEAR_MS = 365 * 86_400_000


def two_sequences(card: int, terminal: int, windows: str = "") -> str:
    """A feature file with sequences of these lengths; the terminal has no window."""
    return f"""
        [[transaction]]
        functions = ["value", "hour"]
        [[window]]
        key = "card"
        functions = ["count", "seconds_since_last"]
        windows = ["10s"]
        {windows}
        [[sequence]]
        key = "terminal"
        length = {terminal}
        fields = ["amount", "card_seconds_since_last", "hour"]
        [[sequence]]
        key = "card"
        length = {card}
        fields = ["amount"]
        """


def engine_of(card: int = 3, terminal: int = 5, **limits: int) -> FeatureEngine:
    return FeatureEngine(spec_of(two_sequences(card, terminal), **limits), SCHEMA)


@pytest.mark.parametrize(("card", "terminal"), [(1, 256), (256, 1), (1, 1), (64, 200)])
@pytest.mark.parametrize("seed", range(2))
def test_short_and_long_sequences_give_what_the_reference_gives(card: int, terminal: int, seed: int) -> None:
    """Rows are late, and partitions are hidden, shown and forgotten between them."""
    rng = np.random.default_rng(seed)
    items = stream("int64", random_moves(seed, 250, keys=2))
    assert len(rows_of(items)) > 300
    calls = [
        (int(rng.integers(len(items))), str(rng.choice(("hide", "show", "show", "forget"))), int(rng.integers(3)), 0)
        for _ in range(12)
    ]
    engine = drive(spec_of(two_sequences(card, terminal), lateness="1h"), items, calls)
    assert engine.sequence_shapes == {"terminal_sequence": (terminal, 5), "card_sequence": (card, 3)}


@QUICK
@given(drawn=moves(keys=4), calls=CALLS.map(lambda calls: [call for call in calls if call[1] != "summarise"]))
def test_two_keys_without_windows_of_the_terminal_give_what_the_reference_gives(
    drawn: list[Move], calls: list[tuple[int, str, int, int]]
) -> None:
    drive(spec_of(two_sequences(2, 4), keys_max=5, events_per_key_mean=2), stream("int64", drawn), calls)


@QUICK
@given(drawn=moves(keys=4), keys_max=st.sampled_from((1, 2, 100)), data=st.data())
def test_some_rows_in_any_order_have_the_sequences_of_all(
    drawn: list[Move], keys_max: int, data: st.DataObject
) -> None:
    """Also where later rows of the batch change or evict their keys; the rows that are not wanted change nothing."""
    rows = rows_of(stream("int64", drawn))
    if not rows:
        return
    batch = batch_of(SCHEMA.fields, rows)
    one_by_one = engine_of(keys_max=keys_max)
    expected = np.concatenate([flat(one_by_one.update(batch_of(SCHEMA.fields, [row]))) for row in rows])
    chosen = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20)), np.int64)
    mask = np.zeros(len(rows), np.bool_)
    mask[chosen] = True
    every = engine_of(keys_max=keys_max).update(batch)
    wanted = engine_of(keys_max=keys_max).update(batch, wanted=mask)
    for found, positions in ((every, chosen), (wanted, chosen), (wanted, mask), (every, chosen - len(rows))):
        parts = found.sequences(positions)
        assert list(parts) == ["terminal_sequence", "card_sequence"]
        assert np.array_equal(joined(parts), expected[positions])
    if not mask.all():
        with pytest.raises(ValueError, match=f"row {np.flatnonzero(~mask)[0]} were not wanted"):
            wanted.sequences(~mask)


def test_positions_outside_the_batch_are_refused() -> None:
    found = engine_of().update(batch_of(SCHEMA.fields, [row_of("int64", 1, START_MS)]))
    for wrong in (np.array([1]), np.array([-2]), np.array([True, False])):
        with pytest.raises(IndexError):
            found.sequences(wrong)
    with pytest.raises(ValueError, match="2 wanted for 1 rows"):
        engine_of().update(batch_of(SCHEMA.fields, [row_of("int64", 1, START_MS)]), wanted=np.ones(2, np.bool_))


CHANGES: dict[str, Callable[[FeatureEngine], object]] = {
    "update": lambda engine: engine.update(batch_of(SCHEMA.fields, [])),
    "labels": lambda engine: play(engine, [label_of(row_of("int64", 1, START_MS), 1)]),
    "hide": lambda engine: engine.hide(1),
    "forget": lambda engine: engine.forget(0),
    "absorb": lambda engine: absorb_all(engine, engine_of(), {0}, False, 9),
    "import": lambda engine: engine.import_state(engine_of().export_state()),
    "reset": lambda engine: engine.reset(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_sequences_are_refused_once_the_state_has_changed(name: str) -> None:
    engine = engine_of()
    found = engine.update(batch_of(SCHEMA.fields, [row_of("int64", 1, START_MS)]))
    found.sequences(np.array([0]))
    CHANGES[name](engine)
    with pytest.raises(RuntimeError, match="ask for its sequences first"):
        found.sequences(np.array([0]))


def test_summaries_change_the_state_too() -> None:
    windows = '[[window]]\nkey = "terminal"\nfunctions = ["count"]\nwindows = ["10s"]'
    engine = FeatureEngine(spec_of(two_sequences(2, 2, windows)), SCHEMA)
    found = engine.update(batch_of(SCHEMA.fields, [row_of("int64", 1, START_MS)]))
    one = np.ones(1, np.int64)
    engine.fold_summaries("shop", Summaries(one, one, one, one, one, *np.ones((3, 1, 1))))
    with pytest.raises(RuntimeError, match="ask for its sequences first"):
        found.sequences(np.array([0]))


def test_steps_outlive_the_windows_and_count_for_no_window() -> None:
    """A card that was idle for years has its last rows as steps, but neither in its windows nor as its last row."""
    engine = engine_of(card=3)
    for number in range(5):
        play(engine, [Item("row", row_of("int64", number, START_MS + number * YEAR_MS, amount=float(number)))])
    found = engine.update(batch_of(SCHEMA.fields, [row_of("int64", 9, START_MS + 5 * YEAR_MS, amount=9.0)]))
    row = dict(zip(engine.names, found.features[0].tolist(), strict=True))
    assert (row["card_count_10s"], row["card_seconds_since_last"]) == (1.0, -1.0)
    sequence = found.sequences(np.array([0]))["card_sequence"][0]
    assert sequence[:, 2].tolist() == [3.0, 4.0, 9.0]
    assert sequence[:, 1].tolist() == [2 * YEAR_MS / 1e3, YEAR_MS / 1e3, 0.0]
    assert engine.statistics()["pan"].too_late == 0


def test_a_row_that_is_too_late_has_its_sequence_and_enters_no_other() -> None:
    engine = engine_of(card=3)
    play(engine, [Item("row", row_of("int64", 1, START_MS, amount=1.0))])
    play(engine, [Item("row", row_of("int64", 2, START_MS + 60_000, amount=2.0))])
    late, next_row = (row_of("int64", 3, START_MS + 1, amount=3.0), row_of("int64", 4, START_MS + 60_000, amount=4.0))
    sequence = engine.update(batch_of(SCHEMA.fields, [late, next_row])).sequences(np.array([0, 1]))["card_sequence"]
    assert sequence[0, :, 2].tolist() == [0.0, 1.0, 3.0]
    assert sequence[1, :, 2].tolist() == [1.0, 2.0, 4.0]
    assert engine.statistics()["pan"].too_late == 1


def test_a_step_may_have_features_of_any_key() -> None:
    engine = engine_of()
    for number, time_ms in enumerate((0, 2_000, 5_000)):
        row = row_of("int64", number, START_MS + time_ms)
        sequence = engine.update(batch_of(SCHEMA.fields, [row])).sequences(np.array([0]))["terminal_sequence"][0]
    assert sequence[:, 3].tolist() == [0.0, 0.0, -1.0, 2.0, 3.0], "card_seconds_since_last of each step"


@pytest.mark.parametrize(("hidden", "amounts"), [(False, [1.0, 2.0, 3.0, 4.0]), (True, [0.0, 1.0, 3.0, 4.0])])
def test_a_terminals_sequence_has_rows_of_shown_partitions_and_its_own(hidden: bool, amounts: list[float]) -> None:
    """Cards 1 and 4 are of partition 1, card 2 is of partition 2."""
    assert [partition_of({"pan": card}) for card in (1, 2, 4)] == [1, 2, 1]
    engine = engine_of(terminal=4)
    rows = [row_of("int64", card, START_MS + card, card=card, amount=float(card)) for card in (1, 2, 3, 4)]
    play(engine, [Item("row", row) for row in rows[:3]], partition=partition_of)
    if hidden:
        engine.hide(2)
    found = engine.update(batch_of(SCHEMA.fields, rows[3:]), np.array([1]))
    assert found.sequences(np.array([0]))["terminal_sequence"][0, :, 2].tolist() == amounts
