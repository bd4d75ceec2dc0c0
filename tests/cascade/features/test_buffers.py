"""Batches share memory: a batch does not affect the next, and the engine allocates nothing for it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from bench.cluster import simulated
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.features import FeatureEngine
from stages.assembly import make_engine

from .streams import KEY_KINDS, KeyKind, batch_of, flat, pieces, random_moves, schema_of, spec_of, stream

ROWS = 1_000


@pytest.mark.parametrize("kind", KEY_KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_reused_buffer_gives_what_new_memory_gives(kind: KeyKind, seed: int) -> None:
    chance = np.random.default_rng(seed)
    items = stream(kind, random_moves(seed, 400, keys=9))
    reused, fresh = (FeatureEngine(spec_of(keys_max=7), schema_of(kind)) for _ in range(2))
    buffers = reused.buffers()
    for kind_of_piece, rows in pieces(items, set(chance.integers(0, len(items), 60).tolist())):
        if kind_of_piece == "label":
            for engine in (reused, fresh):
                engine.update_labels(batch_of(engine.schema.label_fields(), rows))
            continue
        batch = batch_of(fresh.schema.fields, rows)
        found, expected = reused.update(batch, None, buffers), fresh.update(batch)
        np.testing.assert_array_equal(found.features, expected.features)
        np.testing.assert_array_equal(flat(found), flat(expected))
        found.features.fill(np.nan)


def test_buffers_grow_for_a_larger_batch_and_do_not_shrink_for_a_smaller() -> None:
    buffers = FeatureEngine(spec_of(), schema_of("int64")).buffers()
    buffers.make_room(8)
    first = buffers.of(5)
    assert len(first) == 5
    assert np.shares_memory(buffers.of(8), first)
    larger = buffers.of(9)
    assert len(larger) == 9
    assert np.shares_memory(buffers.of(3), larger)


def test_a_warm_engine_allocates_no_memory_for_features_and_sequences() -> None:
    bundle = load_bundle(SHIPPED_BUNDLE)
    engine = make_engine(bundle)
    engine.warm_up(ROWS)
    data = simulated(bundle.schema, cards=500, terminals=500, days=5, seed=1).batch
    batches = [data.take(np.arange(ROWS) + ROWS * number) for number in range(3)]
    engine.screen(batches[0])
    tracemalloc.start()
    try:
        for batch in batches[1:]:
            engine.screen(batch)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # features take 120 bytes for a row, sequences 448
    assert peak_bytes < 100 * ROWS
