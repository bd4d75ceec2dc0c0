"""Exemplars: a recent decision for each bucket, in OpenMetrics only, and at most as many as there are buckets."""

from __future__ import annotations

import math
import time

import numpy as np
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from cascade.ledger import Ledger, ledger_registry
from cascade.ledger.exemplars import BUCKETS_S, ID_CHARACTERS_MAX, Exemplars
from streaming.pipeline.decisions import RecordPositions, decision_ids

NAME = "cascade_decision_latency_seconds"


def places(rows: int, topic: str = "transactions") -> RecordPositions:
    partitions = [(topic, 3), (topic, 0)]
    return RecordPositions(partitions, np.arange(rows) % 2, 1_000 + np.arange(rows))


def buckets_of(ledger: Ledger, path: str = "screened") -> list[Sample]:
    text = generate_openmetrics(ledger_registry(ledger)).decode()
    (family,) = [family for family in text_string_to_metric_families(text) if family.name == NAME]
    return [sample for sample in family.samples if sample.name == f"{NAME}_bucket" and sample.labels["path"] == path]


def test_each_bucket_has_the_last_decision_in_it() -> None:
    rng, begun_s = np.random.default_rng(1), time.time()
    ledger = Ledger()
    latency_s = rng.lognormal(-5.0, 2.0, 500)
    for start in range(0, 500, 100):
        part = slice(start, start + 100)
        found = places(500)
        positions = RecordPositions(found.partitions, found.partition_index[part], found.offsets[part])
        ledger.record_decisions("screened", latency_s[part], None, positions.ids)
    last: dict[int, int] = {}
    for row, latency in enumerate(latency_s.tolist()):
        last[next((n for n, limit in enumerate(BUCKETS_S) if latency <= limit), len(BUCKETS_S))] = row
    assert len(last) > 8
    buckets = buckets_of(ledger)
    assert [float(sample.labels["le"]) for sample in buckets] == [*BUCKETS_S, math.inf]
    found = {number: sample.exemplar for number, sample in enumerate(buckets) if sample.exemplar is not None}
    assert found.keys() == last.keys()
    for number, exemplar in found.items():
        row = last[number]
        assert exemplar.labels == {"decision_id": f"transactions-{(3, 0)[row % 2]}-{1_000 + row}"}
        assert exemplar.value == latency_s[row]
        assert begun_s - 0.001 <= float(exemplar.timestamp or 0) <= time.time() + 0.001


def test_the_ids_of_exemplars_are_the_decision_ids() -> None:
    found = places(6)
    whole = [decision_ids(*found.partitions[row % 2], found.offsets[row : row + 1])[0] for row in range(6)]
    assert found.ids(np.array([4, 1])) == [whole[4], whole[1]]


def test_each_path_has_its_own_exemplars_and_decisions_without_ids_have_none() -> None:
    ledger = Ledger()
    ledger.record_decisions("screened", np.array([0.003]), None, places(1).ids)
    ledger.record_decisions("degraded", np.array([0.003]), "deadline", places(1, "other").ids)
    ledger.record_decisions("duplicate", np.array([0.003]))
    shown = {
        path: [sample.exemplar.labels["decision_id"] for sample in buckets_of(ledger, path) if sample.exemplar]
        for path in ("screened", "escalated", "degraded", "duplicate")
    }
    with_ids = {"screened": ["transactions-3-1000"], "degraded": ["other-3-1000"]}
    assert shown == {"escalated": [], "duplicate": []} | with_ids


def test_the_classic_text_format_has_no_exemplars() -> None:
    with_ids, without = Ledger(), Ledger()
    with_ids.started = without.started
    with_ids.record_decisions("screened", np.array([0.003, 2.0]), None, places(2).ids)
    without.record_decisions("screened", np.array([0.003, 2.0]))
    assert generate_latest(ledger_registry(with_ids)) == generate_latest(ledger_registry(without))
    assert b"decision_id" not in generate_latest(ledger_registry(with_ids))


def test_an_id_longer_than_openmetrics_allows_is_left_out() -> None:
    exemplars, names = Exemplars(), ["x" * ID_CHARACTERS_MAX, "x" * (ID_CHARACTERS_MAX + 1)]
    exemplars.record("screened", np.array([0.003, 0.3]), lambda rows: [names[row] for row in rows], 1.0)
    assert [exemplar.decision_id for exemplar in exemplars.of("screened") if exemplar] == names[:1]
    ledger = Ledger()
    ledger.record_decisions("screened", np.array([0.003]), None, places(1, "t" * 249).ids)
    assert all(sample.exemplar is None for sample in buckets_of(ledger))


def test_a_batch_of_any_size_makes_one_id_per_bucket() -> None:
    asked: list[int] = []

    def ids(rows: np.ndarray) -> list[str]:
        asked.append(len(rows))
        return [f"t-0-{row}" for row in rows]

    ledger = Ledger()
    for _ in range(50):
        ledger.record_decisions("screened", np.geomspace(1e-6, 100.0, 10_000), None, ids)
    assert asked == [len(BUCKETS_S) + 1] * 50
    assert len(ledger.exemplars("screened")) == len(BUCKETS_S) + 1
