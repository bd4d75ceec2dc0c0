"""An engine that imports an export behaves like the exporting engine, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.errors import StateError
from cascade.features import FeatureEngine

from .streams import (
    KEY_KINDS,
    KeyKind,
    Move,
    assert_same_results,
    moves,
    play,
    random_moves,
    schema_of,
    spec_of,
    stream,
)


@pytest.mark.parametrize("kind", KEY_KINDS)
@settings(deadline=None, max_examples=60)
@given(drawn=moves(keys=6), keys_max=st.sampled_from((2, 5, 100)), data=st.data())
def test_an_engine_that_continues_from_an_export_gives_the_same_results(
    kind: KeyKind, drawn: list[Move], keys_max: int, data: st.DataObject
) -> None:
    items = stream(kind, drawn)
    cut = data.draw(st.integers(0, len(items)))
    spec = spec_of(keys_max=keys_max, events_per_key_mean=1)
    whole, first, second = (FeatureEngine(spec, schema_of(kind)) for _ in range(3))
    play(whole, items[:cut])
    play(first, items[:cut])
    play(second, stream(kind, random_moves(1, 40, keys=6)))
    exported = first.export_state()
    play(first, items[cut:])  # later rows must not affect the export
    second.import_state(exported)
    assert second.statistics() == whole.statistics()
    assert_same_results(second, whole, items[cut:])
    for name, array in second.export_state().items():
        assert np.array_equal(array, whole.export_state()[name]), name


def test_an_export_has_only_the_used_parts_of_the_arrays() -> None:
    engine = FeatureEngine(spec_of(keys_max=1_000), schema_of("int64"))
    play(engine, stream("int64", random_moves(3, 50, keys=5)))
    sizes = {name: len(array) for name, array in engine.export_state().items()}
    assert all(size <= 200 for name, size in sizes.items() if not name.endswith(".table"))


def test_an_export_into_buffers_equals_one_into_new_memory() -> None:
    engine = FeatureEngine(spec_of(keys_max=1_000), schema_of("int64"))
    play(engine, stream("int64", random_moves(3, 50, keys=5)))
    buffers = engine.export_buffers()
    assert engine.export_fits(buffers)
    plain, into = engine.export_state(), engine.export_state(buffers)
    for name, array in plain.items():
        assert np.array_equal(into[name], array)
        assert into[name].base is buffers[name]
    play(engine, stream("int64", random_moves(5, 400, keys=12)))
    assert not engine.export_fits(buffers)
    assert not engine.export_fits({})
    for name, array in engine.export_state(buffers).items():
        assert np.array_equal(array, engine.export_state()[name])


def test_arrays_that_do_not_fit_are_refused_and_leave_an_empty_state() -> None:
    large, small = (FeatureEngine(spec_of(keys_max=keys), schema_of("int64")) for keys in (100, 3))
    play(large, stream("int64", random_moves(3, 200, keys=12)))
    exported = large.export_state()
    for wrong in (exported, {}, exported | {next(iter(exported)): np.zeros(3)}):
        play(small, stream("int64", random_moves(4, 10, keys=3)))
        with pytest.raises(StateError, match="array"):
            small.import_state(wrong)
        assert small.statistics() == FeatureEngine(spec_of(keys_max=3), schema_of("int64")).statistics()
