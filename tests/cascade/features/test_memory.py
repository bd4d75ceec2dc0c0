"""The state of a million keys stays within its bounds, and is right for the keys that remain."""

from __future__ import annotations

import numpy as np
import psutil

from cascade.columns import ColumnBatch, Float32, Int64
from cascade.features import FeatureEngine

from .streams import CARD_COUNTS, START_MS, schema_of, spec_of

KEYS_MAX = 1_000_000
MORE_KEYS = 200_000
BATCH = 50_000
# A key takes 96 bytes for its slot, up to 16 in the index, 56 for its running totals, and 176 for its first block of
# events. The rest is for partly used pages and for the arrays of a batch.
GROWTH_BYTES_MAX = KEYS_MAX * (96 + 16 + 56 + 176) + 64 * 2**20


def fold(engine: FeatureEngine, cards: Int64, time_ms: int) -> Float32:
    """Fold a transaction of 10.00 for each card, all at `time_ms`; features float32 [cards, width]."""
    found = []
    for start in range(0, len(cards), BATCH):
        batch = cards[start : start + BATCH]
        zeros = np.zeros(len(batch), np.int64)
        columns = {"id": batch, "pan": batch, "shop": zeros, "at": zeros + time_ms, "mode": zeros, "items": batch}
        found.append(engine.update(ColumnBatch({**columns, "paid": zeros + 10.0}, len(batch))).features)
    return np.concatenate(found)


def test_a_million_cards_and_more_stay_within_the_bounds() -> None:
    fold(FeatureEngine(spec_of(CARD_COUNTS), schema_of("int64")), np.arange(10), START_MS)  # compiles
    cards = np.random.default_rng(1).permutation(KEYS_MAX + MORE_KEYS).astype(np.int64) * 1_000_003 - 5_000_000_000
    process = psutil.Process()
    before = process.memory_info().rss
    engine = FeatureEngine(spec_of(CARD_COUNTS, keys_max=KEYS_MAX), schema_of("int64"))

    features = fold(engine, cards, START_MS)
    growth = process.memory_info().rss - before
    assert growth < GROWTH_BYTES_MAX
    assert growth < engine.state_bytes_max() + 64 * 2**20
    figures = engine.statistics()["pan"]
    assert (figures.keys, figures.evictions) == (KEYS_MAX, MORE_KEYS)
    assert (features == (1.0, 10.0)).all()

    # what is not used now is least recently used afterwards
    used, idle = cards[-MORE_KEYS:], cards[MORE_KEYS : 2 * MORE_KEYS]
    assert (fold(engine, used, START_MS + 1) == (2.0, 20.0)).all()
    assert engine.statistics()["pan"].evictions == MORE_KEYS
    assert (fold(engine, cards[:MORE_KEYS], START_MS + 2) == (1.0, 10.0)).all(), "the first keys were forgotten"
    assert engine.statistics()["pan"].evictions == 2 * MORE_KEYS
    assert (fold(engine, used, START_MS + 3) == (3.0, 30.0)).all()
    assert (fold(engine, idle, START_MS + 4) == (1.0, 10.0)).all(), "and then the least recently used"


def test_a_million_events_of_few_cards_stay_within_the_bounds() -> None:
    engine = FeatureEngine(spec_of(CARD_COUNTS, keys_max=500, events_per_key_max=64), schema_of("int64"))
    engine.warm_up()  # compiling takes memory too
    cards = np.random.default_rng(1).integers(0, 250, 1_000_000)
    process = psutil.Process()
    before = process.memory_info().rss
    features = fold(engine, cards, START_MS)
    assert features[:, 0].max() == 65
    assert engine.statistics()["pan"].keys == 250
    assert engine.state_bytes_max() < 2**20
    assert process.memory_info().rss - before < features.nbytes + 64 * 2**20
