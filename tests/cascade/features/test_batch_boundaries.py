"""The end of a batch affects neither features, nor sequences, nor the state."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.features import FeatureEngine

from .streams import (
    KEY_KINDS,
    KEY_VALUES,
    START_MS,
    Item,
    KeyKind,
    Move,
    assert_same_results,
    batch_of,
    moves,
    play,
    random_moves,
    row_of,
    schema_of,
    spec_of,
    stream,
)

DAY_MS = 86_400_000


def in_cents(items: Iterable[Item]) -> list[Item]:
    """The stream with amounts whose sums depend on the order in which they are added."""
    return [
        Item(kind, fields | {"paid": fields["paid"] / 3 + 0.01} if kind == "row" else fields) for kind, fields in items
    ]


def probe(kind: KeyKind) -> list[Item]:
    """Rows of every key, soon after the stream and long after it, whose features depend on the whole state."""
    keys = KEY_VALUES[kind]
    return [
        Item("row", row_of(kind, number, START_MS + time_ms, card, terminal))
        for time_ms in (20_000, 5_000, 60_000, DAY_MS)
        for number, (card, terminal) in enumerate(zip(keys, keys[::-1], strict=True))
    ]


@pytest.mark.parametrize("kind", KEY_KINDS)
@settings(deadline=None, max_examples=60)
@given(drawn=moves(keys=6), keys_max=st.sampled_from((2, 5, 100)), data=st.data())
def test_any_cuts_into_batches_give_the_same_results(
    kind: KeyKind, drawn: list[Move], keys_max: int, data: st.DataObject
) -> None:
    items = in_cents(stream(kind, drawn))
    cuts = data.draw(st.sets(st.integers(0, len(items))))
    spec = spec_of(keys_max=keys_max, events_per_key_mean=1)
    whole, cut = FeatureEngine(spec, schema_of(kind)), FeatureEngine(spec, schema_of(kind))
    assert_same_results(cut, whole, items, cuts)
    assert cut.statistics() == whole.statistics()
    assert_same_results(cut, whole, probe(kind))


def test_empty_batches_change_nothing() -> None:
    items = stream("int64", random_moves(1, 50, keys=4))
    engine, other = FeatureEngine(spec_of(), schema_of("int64")), FeatureEngine(spec_of(), schema_of("int64"))
    play(engine, items)
    play(other, items)
    nothing = engine.update(batch_of(engine.schema.fields, []))
    assert nothing.features.shape == (0, engine.width)
    assert {name: part.shape for name, part in nothing.sequences(np.arange(0)).items()} == {
        name: (0, *shape) for name, shape in engine.sequence_shapes.items()
    }
    engine.update_labels(batch_of(engine.schema.label_fields(), []))
    assert_same_results(engine, other, probe("int64"))


def test_a_reset_engine_equals_a_new_engine() -> None:
    items = stream("int64", random_moves(2, 200, keys=12))
    engine, new = (FeatureEngine(spec_of(keys_max=9), schema_of("int64")) for _ in range(2))
    play(engine, in_cents(items))
    engine.reset()
    assert engine.statistics() == new.statistics()
    assert_same_results(engine, new, items)
