"""The engine gains and loses partitions one at a time: each is right by itself, and does not affect the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.errors import StateError
from cascade.features import (
    PARTITIONS_MAX,
    FeatureEngine,
    FeatureSpec,
    Summaries,
    kernels,
    sequences,
    sharing,
    transfer,
)
from cascade.features.layout import COUNT, EVENTS
from cascade.schema import key_codes

from .reference import Reference, SummarisedRows
from .streams import (
    EVERYTHING,
    KEY_VALUES,
    QUICK,
    START_MS,
    Item,
    Move,
    assert_same_results,
    batch_of,
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
from .test_batch_boundaries import in_cents, probe

SCHEMA = schema_of("int64")
# the steps contain features of the card alone, which do not depend on other partitions
OF_THE_CARD = EVERYTHING.replace('"card_count_10s", "terminal_fraud_rate_10s"', '"card_count_10s"').replace(
    '"terminal_count_10s", "mode_category"', '"mode_category"'
)
STRETCH_MS = 2_000
KERNELS = (
    kernels.update,
    kernels.update_labels,
    sequences.read_sequences,
    transfer.forget,
    transfer.absorb,
    transfer.state_fits,
    sharing.summarise,
    sharing.fold_summaries,
)


def engine_of(spec: FeatureSpec | None = None) -> FeatureEngine:
    return FeatureEngine(spec or spec_of(OF_THE_CARD), SCHEMA)


def folded(items: Iterable[Item], spec: FeatureSpec | None = None) -> FeatureEngine:
    engine = engine_of(spec)
    play(engine, list(items), partition=partition_of)
    return engine


def digests(engine: FeatureEngine) -> list[str]:
    return [engine.digest(partition_id) for partition_id in range(3)]


def absorb_all(
    engine: FeatureEngine, exported: FeatureEngine, partition_ids: set[int], labels: bool, count: int
) -> int:
    """Absorb slice by slice; return the number of slices."""
    arrays = exported.export_state()
    position: int | None = 0
    slices = 0
    while position is not None:
        position = engine.absorb(arrays, partition_ids, labels=labels, first=position, count=count)
        slices += 1
    return slices


# --- everything against the reference ---------------------------------------------------------------------------


def summarised(
    rows: list[dict[str, object]], partition_id: int, count: int
) -> list[tuple[object, int, SummarisedRows]]:
    """(terminal, newest time, summary) of the last rows, by terminal and stretch, as if they were of `partition_id`."""
    groups: dict[tuple[object, int], list[dict[str, object]]] = {}
    for row in rows[-count:]:
        groups.setdefault((row["shop"], int(str(row["at"])) // STRETCH_MS * STRETCH_MS), []).append(row)
    return [
        (shop, max(int(str(row["at"])) for row in group), SummarisedRows(partition_id, start_ms, group))
        for (shop, start_ms), group in groups.items()
    ]


def summaries_of(found: list[tuple[object, int, SummarisedRows]]) -> Summaries:
    paid = [np.array([row["paid"] for row in summary.rows], np.float64) for _, _, summary in found]
    return Summaries(
        codes=key_codes(np.array([shop for shop, _, _ in found], np.int64)),
        partition_ids=np.array([summary.partition_id for _, _, summary in found], np.int64),
        starts=np.array([summary.start_ms for _, _, summary in found], np.int64),
        counts=np.array([len(summary.rows) for _, _, summary in found], np.int64),
        newest=np.array([newest_ms for _, newest_ms, _ in found], np.int64),
        sums=np.array([values.sum() for values in paid]).reshape(-1, 1),
        squares=np.array([values.var() * len(values) if len(values) else 0.0 for values in paid]).reshape(-1, 1),
        maxima=np.array([values.max(initial=0.0) for values in paid]).reshape(-1, 1),
    )


def drive(spec: FeatureSpec, items: list[Item], calls: list[tuple[int, str, int, int]]) -> FeatureEngine:
    """Fold rows one by one into engine and reference, with calls (position, name, partition id, rows) between them."""
    engine, reference = FeatureEngine(spec, SCHEMA), Reference(spec, SCHEMA)
    seen: list[dict[str, object]] = []
    for position, item in enumerate(items):
        for _, name, partition_id, count in (call for call in calls if call[0] == position):
            if name == "summarise":
                found = summarised(seen, partition_id, count)
                if count % 5 == 0:
                    found = [(shop, newest_ms, replace(summary, rows=[])) for shop, newest_ms, summary in found]
                if found:
                    engine.fold_summaries("shop", summaries_of(found))
                for shop, newest_ms, summary in found:
                    reference.parts["shop"].fold_summary(shop, newest_ms, summary)
            elif name == "forget":
                engine.forget(partition_id)
                reference.forget(partition_id)
            else:
                getattr(engine, name)(partition_id)
                reference.show(partition_id, name == "show")
        features, found_sequences = play(engine, [item], partition=partition_of)
        if item.kind == "label":
            reference.update_label(item.fields)
            continue
        seen.append(item.fields)
        expected, expected_sequence = reference.update(item.fields, partition_of(item.fields))
        different = np.flatnonzero(features[0] != expected)
        assert not len(different), (position, engine.names[different[0]], features[0][different[0]], expected)
        assert np.array_equal(found_sequences[0], expected_sequence), position
    assert engine.statistics() == reference.statistics()
    return engine


CALLS = st.lists(
    st.tuples(
        st.integers(0, 60),
        st.sampled_from(("hide", "hide", "show", "forget", "summarise", "summarise")),
        st.integers(0, 2),
        st.integers(1, 30),
    ),
    max_size=12,
)


@QUICK
@given(drawn=moves(keys=6), calls=CALLS)
def test_hidden_forgotten_and_summarised_partitions_give_what_the_reference_gives(
    drawn: list[Move], calls: list[tuple[int, str, int, int]]
) -> None:
    drive(spec_of(), stream("int64", drawn), calls)


@QUICK
@given(drawn=moves(keys=6), calls=CALLS, keys_max=st.integers(1, 6), events_max=st.sampled_from((1, 3, 8, 9, 40)))
def test_partitions_at_the_limits_give_what_the_reference_gives(
    drawn: list[Move], calls: list[tuple[int, str, int, int]], keys_max: int, events_max: int
) -> None:
    spec = spec_of(keys_max=keys_max, events_per_key_max=events_max, events_per_key_mean=1)
    drive(spec, stream("int64", drawn), calls)


@pytest.mark.parametrize("seed", range(6))
def test_long_streams_of_several_partitions_give_what_the_reference_gives(seed: int) -> None:
    """The pools run out, and blocks with events of several partitions lose some of them."""
    rng = np.random.default_rng(seed)
    items = stream("int64", random_moves(seed, 150, keys=12))
    names = ("hide", "show", "forget", "summarise", "summarise", "summarise")
    calls = [
        (int(rng.integers(len(items))), str(rng.choice(names)), int(rng.integers(3)), int(rng.integers(1, 60)))
        for _ in range(60)
    ]
    drive(spec_of(keys_max=(100, 5)[seed % 2], events_per_key_mean=1), items, calls)


# --- visibility -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_with_all_partitions_shown_features_do_not_depend_on_them(seed: int) -> None:
    items = in_cents(stream("int64", random_moves(seed, 300, keys=12)))
    spec = spec_of(keys_max=9, events_per_key_max=20)
    with_partitions, without = engine_of(spec), engine_of(spec)
    assert_same_results(with_partitions, without, items, range(0, len(items), 7), partition_of)
    with_partitions.hide(1)
    with_partitions.show(1)
    assert_same_results(with_partitions, without, probe("int64"), partition=partition_of)


@pytest.mark.parametrize("partition_id", [-1, PARTITIONS_MAX])
def test_partition_ids_out_of_range_are_refused(partition_id: int) -> None:
    engine = engine_of()
    batch = batch_of(SCHEMA.fields, [row_of("int64", 1, START_MS)] * 2)
    for call in (engine.show, engine.hide, engine.forget, engine.digest):
        with pytest.raises(ValueError, match="use 0 to 65535"):
            call(partition_id)
    with pytest.raises(ValueError, match="use 0 to 65535"):
        engine.update(batch, np.array([0, partition_id]))
    with pytest.raises(ValueError, match="give each row its own"):
        engine.update(batch, np.array([0]))
    with pytest.raises(ValueError, match="use 0 to 65535"):
        engine.absorb(engine.export_state(), [partition_id], labels=False)
    assert engine.statistics()["pan"].keys == 0
    engine.update(batch, np.array([0, PARTITIONS_MAX - 1]))
    assert engine.digest(PARTITIONS_MAX - 1) != engine.digest(1)


# --- leaving and joining ----------------------------------------------------------------------------------------


def apart(items: Iterable[Item]) -> list[Item]:
    """The stream with no two partitions at the same millisecond.

    A state does not know in which order rows of the same millisecond came, once their partitions have left and come
    back one after the other. That affects sequences of several partitions, and nothing else.
    """
    return [
        Item(item.kind, item.fields | {"at": item.fields["at"] // 3 * 3 + partition_of(item.fields)}) for item in items
    ]


@QUICK
@given(drawn=moves(keys=6), count=st.sampled_from((1, 2, 100)))
def test_a_partition_that_left_and_came_back_equals_one_that_stayed(drawn: list[Move], count: int) -> None:
    items = apart(stream("int64", drawn))
    stayed, left = folded(items), folded(items)
    for partition_id in range(3):
        snapshot = folded(items)
        left.forget(partition_id)
        assert left.digest(partition_id) == engine_of().digest(partition_id)
        absorb_all(left, snapshot, {partition_id}, False, count)
    assert digests(left) == digests(stayed)
    assert left.digest_labels() == stayed.digest_labels()
    assert_same_results(left, stayed, probe("int64"))


@QUICK
@given(drawn=moves(keys=6))
def test_a_partition_of_a_snapshot_equals_a_fold_of_its_rows_alone(drawn: list[Move]) -> None:
    items = stream("int64", drawn)
    if not rows_of(items):
        return
    everything = folded(items)
    # no state has dropped a later event for its age
    after_ms = max(row["at"] for row in rows_of(items)) - everything.horizon_ms
    for partition_id in range(3):
        own = [item for item in items if item.kind == "label" or partition_of(item.fields) == partition_id]
        joined, alone = engine_of(), folded(own)
        absorb_all(joined, everything, {partition_id}, True, 2)
        assert joined.digest(partition_id, after_ms) == alone.digest(partition_id, after_ms)
        assert everything.digest(partition_id, after_ms) == alone.digest(partition_id, after_ms)
        assert joined.digest_labels() == everything.digest_labels()
        assert joined.digest((partition_id + 1) % 3) == engine_of().digest(0)


def test_keys_with_nothing_left_make_room_for_others() -> None:
    spec = spec_of(OF_THE_CARD, keys_max=4)
    engine = engine_of(spec)
    rows = [Item("row", row_of("int64", card, START_MS, card, card)) for card in range(4)]
    play(engine, rows, partition=partition_of)
    partition_ids = [partition_of(row.fields) for row in rows]
    gone = partition_ids.count(1)
    assert 0 < gone < 4
    engine.forget(1)
    assert engine.statistics()["pan"].keys == 4 - gone
    play(engine, [Item("row", row_of("int64", 9, START_MS, 9, 9))], partition=partition_of)
    assert engine.statistics()["pan"].evictions == 0, "a slot was free"
    engine.import_state(engine.export_state())


def test_a_key_with_labels_stays_when_its_partition_leaves() -> None:
    engine = engine_of()
    row = row_of("int64", 1, START_MS)
    play(engine, [Item("row", row), label_of(row, 1)])
    labels = engine.digest_labels()
    engine.forget(0)
    assert engine.digest_labels() == labels != engine_of().digest_labels()
    assert engine.statistics()["shop"].keys == 1


def test_absorbing_takes_slice_after_slice_and_returns_none_after_the_last() -> None:
    items = stream("int64", random_moves(3, 400, keys=12))
    everything, engine = folded(items), engine_of()
    assert absorb_all(engine, everything, {0, 1, 2}, True, 5) == 3, "twelve cards"
    assert digests(engine) == digests(everything)
    assert engine.absorb(everything.export_state(), [0], labels=False, first=1_000) is None
    with pytest.raises(ValueError, match="positive number"):
        engine.absorb(everything.export_state(), [0], labels=False, count=0)


def test_absorbing_into_a_smaller_state_respects_its_limits() -> None:
    items = stream("int64", random_moves(3, 400, keys=12))
    everything = folded(items, spec_of(OF_THE_CARD))
    small = engine_of(spec_of(OF_THE_CARD, keys_max=5, events_per_key_max=9, events_per_key_mean=1))
    arrays = everything.export_state()
    assert small.absorb(arrays, [0, 1, 2], labels=True) is None
    assert small.statistics()["pan"].keys <= 5
    small.import_state(small.export_state())
    features, _ = play(small, probe("int64"), partition=partition_of)
    assert features[:, small.names.index("card_count_10s")].max() <= 10


def test_an_absorbed_event_is_inserted_by_its_time() -> None:
    engine, other = engine_of(), engine_of()
    for updated, partition_id, time_ms in ((engine, 1, 5_000), (other, 2, 4_000)):
        updated.update(batch_of(SCHEMA.fields, [row_of("int64", 1, START_MS + time_ms)]), np.array([partition_id]))
    engine.absorb(other.export_state(), [2], labels=False)
    late = batch_of(SCHEMA.fields, [row_of("int64", 3, START_MS + 4_500)])
    row = dict(zip(engine.names, engine.update(late).features[0].tolist(), strict=True))
    assert (row["card_count_10s"], row["card_seconds_since_last"]) == (2, 0.5)


@pytest.mark.parametrize(
    ("age_ms", "steps", "taken"), [(16_999, 1, True), (17_000, 1, False), (16_999, 3, True), (17_000, 3, True)]
)
def test_events_past_the_horizon_of_their_key_are_absorbed_as_steps_only(age_ms: int, steps: int, taken: bool) -> None:
    spec = spec_of(OF_THE_CARD.replace("length = 3", f"length = {steps}"))
    engine, other = engine_of(spec), engine_of(spec)
    for updated, partition_id, time_ms in ((engine, 1, START_MS), (other, 2, START_MS - age_ms)):
        updated.update(batch_of(SCHEMA.fields, [row_of("int64", 1, time_ms)]), np.array([partition_id]))
    engine.absorb(other.export_state(), [2], labels=False)
    assert engine.export_state()["pan.slots"][1, EVENTS + COUNT] == 1 + taken
    found = engine.update(batch_of(SCHEMA.fields, [row_of("int64", 2, START_MS)]), np.array([1]))
    assert found.sequences(np.array([0]))["card_sequence"][0, :, 0].sum() == min(steps, 2 + taken)
    assert found.features[0, engine.names.index("card_count_10s")] == 2


def test_a_fraud_that_both_states_have_is_absorbed_once() -> None:
    engine, other = engine_of(), engine_of()
    rows = [row_of("int64", number, START_MS + number) for number in range(3)]
    play(engine, [label_of(row, 1) for row in rows[:2]])
    play(other, [label_of(row, 1) for row in rows[1:]])
    engine.absorb(other.export_state(), [], labels=False)
    assert engine.digest_labels() != folded([label_of(row, 1) for row in rows]).digest_labels()
    engine.absorb(other.export_state(), [], labels=True)
    assert engine.digest_labels() == folded([label_of(row, 1) for row in rows]).digest_labels()


# --- digests ----------------------------------------------------------------------------------------------------


def test_a_digest_does_not_depend_on_slots_and_blocks() -> None:
    cards = [0, 1, 2, 5, 16, 32, 48, 0, 1, 2] * 3
    rows = [
        Item("row", row_of("int64", number, START_MS + number, card, card % 3)) for number, card in enumerate(cards)
    ]
    other_order = [row for card in (48, 5, 2, 0, 1, 16, 32) for row in rows if row.fields["pan"] == card]
    engine, other = engine_of(), engine_of()
    play(engine, rows)
    play(other, stream("int64", random_moves(1, 60, keys=12)), partition=lambda _: 5)
    other.forget(5)
    play(other, other_order)
    assert engine.digest(0) == other.digest(0)
    assert engine.digest(0) != engine.digest(1) == engine_of().digest(1)


@pytest.mark.parametrize("change", [{"paid": 10.25}, {"at": START_MS + 1}, {"pan": 2}, {"shop": 2}, {"mode": 1}])
def test_a_digest_changes_with_any_value(change: dict[str, object]) -> None:
    row = row_of("int64", 1, START_MS, 1, 1)
    engine, other = folded([Item("row", row)]), engine_of()
    play(other, [Item("row", row | change)], partition=lambda _: partition_of(row))
    assert engine.digest(partition_of(row)) != other.digest(partition_of(row))


def test_a_digest_of_labels_depends_on_keys_and_times_but_not_on_the_order_of_arrival() -> None:
    rows = [row_of("int64", number, START_MS + number * 100) for number in range(12)]
    engine, other = engine_of(), engine_of()
    play(engine, [label_of(row, 1) for row in rows])
    play(other, [label_of(row, 1) for row in reversed(rows)])
    assert engine.digest_labels() == other.digest_labels()
    assert engine.digest_labels(START_MS + 500) == other.digest_labels(START_MS + 500) != engine.digest_labels()
    play(other, [label_of(rows[3], 0)])
    assert engine.digest_labels() != other.digest_labels()


# --- arrays that may be corrupted -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_corrupted_arrays_are_refused_or_harmless(seed: int) -> None:
    """A wrong number anywhere leads to a StateError or to a state that works, never to a crash or an endless loop."""
    rng = np.random.default_rng(seed)
    items = stream("int64", random_moves(seed, 150, keys=12))
    exported = folded(items, spec_of(keys_max=9)).export_state()
    wrong = (-1, 0, 1, 2, 3, 7, 8, 9, 2**31, -(2**63), 2**63 - 1)
    refused = {"import": 0, "absorb": 0}
    for _ in range(150):
        arrays = {name: array.copy() for name, array in exported.items()}
        name = str(rng.choice(list(arrays)))
        flat = arrays[name].reshape(-1)
        if not len(flat):
            continue
        for place in rng.integers(len(flat), size=int(rng.integers(1, 4))):
            flat[place] = np.int64(rng.choice(np.array(wrong, np.int64))).astype(flat.dtype)
        for call in ("import", "absorb"):
            engine = engine_of(spec_of(keys_max=9))
            try:
                if call == "import":
                    engine.import_state(arrays)
                else:
                    engine.absorb(arrays, [0, 1, 2], labels=True)
            except StateError as error:
                assert "\n" not in str(error)  # noqa: PT017
                refused[call] += 1
            play(engine, probe("int64"), partition=partition_of)
            engine.forget(1)
            engine.digest(0)
    assert min(refused.values()) > 10


def test_a_chain_with_a_loop_is_refused() -> None:
    engine = engine_of()
    rows = [Item("row", row_of("int64", number, START_MS + number)) for number in range(40)]
    play(engine, rows)
    exported = engine.export_state()
    for column in (0, 1):
        arrays = {name: array.copy() for name, array in exported.items()}
        blocks = arrays["pan.events"]
        blocks[3, column] = 3
        with pytest.raises(StateError, match="not in order"):
            engine_of().absorb(arrays, [0], labels=False)
        with pytest.raises(StateError, match="not in order"):
            engine_of().import_state(arrays)


@pytest.mark.parametrize("name", ["pan.slots", "shop.events", "shop.remotes"])
def test_arrays_of_another_shape_are_refused(name: str) -> None:
    exported = folded(stream("int64", random_moves(3, 50, keys=5))).export_state()
    for wrong in (
        {other: array for other, array in exported.items() if other != name},
        exported | {name: exported[name][:0]},
        exported | {name: exported[name].astype(np.float64)},
        exported | {name: exported[name][:, 1:]},
    ):
        with pytest.raises(StateError, match=f"array {name}"):
            engine_of().absorb(wrong, [0], labels=False)


def test_string_keys_are_absorbed_by_their_codes() -> None:
    engine = FeatureEngine(spec_of(), schema_of("string"))
    cards = KEY_VALUES["string"]
    items = [Item("row", row_of("string", number, START_MS + number, card)) for number, card in enumerate(cards)]
    play(engine, items, partition=partition_of)
    other = FeatureEngine(spec_of(), schema_of("string"))
    other.absorb(engine.export_state(), [0, 1, 2], labels=True)
    assert digests(other) == digests(engine)


# --- warm-up ----------------------------------------------------------------------------------------------------


def test_warming_up_changes_nothing_and_leaves_nothing_to_compile() -> None:
    engine = folded(stream("int64", random_moves(3, 200, keys=12)), spec_of())
    engine.hide(1)
    before = engine.export_state()
    engine.warm_up()
    for name, array in engine.export_state().items():
        assert np.array_equal(array, before[name]), name
    compiled = [len(kernel.signatures) for kernel in KERNELS]
    calls = [(5, "hide", 1, 1), (9, "summarise", 1, 5), (20, "forget", 2, 1), (30, "show", 1, 1)]
    drive(spec_of(), stream("int64", random_moves(4, 40, keys=6)), calls)
    other = engine_of(spec_of())
    absorb_all(other, engine, {0, 1}, True, 3)
    other.import_state(before)
    assert [len(kernel.signatures) for kernel in KERNELS] == compiled
