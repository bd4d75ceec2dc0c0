"""Exemplars: a recent decision for each bucket, in OpenMetrics only, and at most as many as there are buckets."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from cascade.decision_ids import decision_id
from cascade.ledger import Ledger, ledger_registry
from cascade.ledger.buckets import BUCKETS_S
from cascade.ledger.exemplars import ID_CHARACTERS_MAX
from tests.cascade.ledger.helpers import Records, records

NAME = "cascade_decision_latency_seconds"


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
        topic, partition_ids, offsets = records(500)
        ledger.record_decisions("screened", latency_s[part], None, Records(topic, partition_ids[part], offsets[part]))
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
    ledger = Ledger()
    ledger.record_decisions("screened", np.array([0.003]), None, Records("t-1", np.array([12]), np.array([2**53 + 1])))
    (exemplar,) = [exemplar for exemplar in ledger.exemplars("screened") if exemplar]
    assert exemplar.decision_id == decision_id("t-1", 12, 2**53 + 1)


def test_each_path_has_its_own_exemplars_and_decisions_without_ids_have_none() -> None:
    ledger = Ledger()
    ledger.record_decisions("screened", np.array([0.003]), None, records(1))
    ledger.record_decisions("degraded", np.array([0.003]), "deadline", records(1, "other"))
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
    with_ids.record_decisions("screened", np.array([0.003, 2.0]), None, records(2))
    without.record_decisions("screened", np.array([0.003, 2.0]))
    assert generate_latest(ledger_registry(with_ids)) == generate_latest(ledger_registry(without))
    assert b"decision_id" not in generate_latest(ledger_registry(with_ids))


def test_an_id_longer_than_openmetrics_allows_is_left_out() -> None:
    ledger, longest = Ledger(), "t" * (ID_CHARACTERS_MAX - len("-3-1000"))
    ledger.record_decisions("screened", np.array([0.003]), None, records(1, longest))
    ledger.record_decisions("screened", np.array([0.3]), None, records(1, longest + "t"))
    (exemplar,) = [exemplar for exemplar in ledger.exemplars("screened") if exemplar]
    assert exemplar.decision_id == f"{longest}-3-1000"
    assert [sample.exemplar.labels["decision_id"] for sample in buckets_of(ledger) if sample.exemplar] == [
        exemplar.decision_id
    ]


def test_the_last_of_equal_buckets_wins_and_a_limit_belongs_to_the_bucket_below_it() -> None:
    ledger = Ledger()
    latency_s = np.array([*BUCKETS_S, 1e9, *np.nextafter(BUCKETS_S, 0.0), BUCKETS_S[3]])
    ledger.record_decisions("screened", latency_s, None, records(len(latency_s)))
    offsets = [int(exemplar.decision_id.split("-")[2]) - 1_000 for exemplar in ledger.exemplars("screened") if exemplar]
    count = len(BUCKETS_S)
    expected = [*range(count + 1, 2 * count + 1), count]
    expected[3] = len(latency_s) - 1
    assert offsets == expected


def test_refused_decisions_leave_counts_and_exemplars_as_they_were() -> None:
    ledger = Ledger()
    ledger.record_decisions("screened", np.array([0.003]), None, records(1))
    before = ledger.exemplars("screened")
    with pytest.raises(ValueError, match="NaN"):
        ledger.record_decisions("screened", np.array([0.003, math.nan]), None, records(2))
    with pytest.raises(ValueError, match="differ in number"):
        ledger.record_decisions("screened", np.array([0.003, 0.3]), None, records(1))
    assert ledger.exemplars("screened") == before
    assert ledger.counters().decisions == 1
