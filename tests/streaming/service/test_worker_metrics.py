"""Metrics and health of several workers: valid exposition, nothing lost, every sample with its worker."""

from __future__ import annotations

from collections import Counter

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_text
from prometheus_client.parser import text_string_to_metric_families

from cascade.ledger import Ledger, ledger_registry
from streaming.health_state import HealthState
from streaming.pipeline.table import Records
from streaming.service.worker_memory import WorkerMemory
from streaming.service.worker_metrics import workers_registry
from streaming.service.worker_report import WorkerSlot, encode_report


def ledger_of(decisions: int) -> Ledger:
    ledger = Ledger(bundle_version="b-1", screener='a "quoted"\nname')
    ledger.record_decisions("screened", np.full(decisions, 0.003))
    ledger.record_decisions("degraded", np.full(1, 0.03), cause="deadline")
    return ledger


def text_of(ledger: Ledger) -> str:
    return generate_latest(ledger_registry(ledger)).decode()


def merged_text(texts: dict[str, str]) -> str:
    groups = {worker: list(text_string_to_metric_families(text)) for worker, text in texts.items()}
    return generate_latest(workers_registry(lambda: groups)).decode()


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_sample_of_every_worker_is_there_with_its_number_and_no_other() -> None:
    texts = {"0": text_of(ledger_of(3)), "1": text_of(ledger_of(5))}
    expected = {
        (name, labels | {("worker", worker)}): value
        for worker, text in texts.items()
        for (name, labels), value in samples(text).items()
    }
    assert samples(merged_text(texts)) == expected
    assert len(expected) > 100


def test_help_and_type_of_a_family_stand_once_and_before_its_samples() -> None:
    text = merged_text({"0": text_of(ledger_of(3)), "1": text_of(ledger_of(5))})
    comments = Counter(" ".join(line.split()[:3]) for line in text.splitlines() if line.startswith("#"))
    assert comments["# HELP cascade_decisions_total"] == comments["# TYPE cascade_decisions_total"] == 1
    assert set(comments.values()) == {1}
    alone = text_of(ledger_of(3)).splitlines()
    assert {line for line in alone if line.startswith("# TYPE")} <= set(text.splitlines())


def test_a_family_that_only_one_worker_has_stays() -> None:
    found = samples(merged_text({"0": text_of(ledger_of(3)), "1": "# TYPE lonely gauge\nlonely 4.0\n", "2": ""}))
    assert found["lonely", frozenset({("worker", "1")})] == 4.0


def test_a_workers_own_label_named_worker_stays() -> None:
    # none has one; if one ever does, its own meaning must not be lost silently
    found = samples(merged_text({"0": '# TYPE odd gauge\nodd{worker="mine"} 1.0\n'}))
    assert list(found) == [("odd", frozenset({("worker", "mine")}))]


class Reporting:
    """A worker's slot with its report."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.state, self.registry = HealthState(stall_s_max=30), registry or CollectorRegistry()
        self.slot = WorkerSlot(1, WorkerMemory.create())

    def report(self) -> WorkerSlot:
        self.slot.memory.write(encode_report(Ledger(), self.registry, self.state))
        return self.slot

    def health(self) -> HealthState:
        """What a supervisor then says."""
        health = HealthState(stall_s_max=30)
        health.waiting("worker 1", "not started yet")
        assert self.report().show_health("worker 1", health) == self.state.not_alive()
        return health


def test_a_workers_health_is_shown_with_its_number() -> None:
    worker = Reporting()
    assert worker.health().not_ready() == ["worker 1: starting"]
    worker.state.ok("partitions", "transactions-0")
    worker.state.waiting("broker", "connecting")
    worker.state.waiting("state", "")
    assert worker.health().not_ready() == ["worker 1: broker: connecting; state: waiting"]
    assert worker.health().not_alive() == []
    worker.state.ok("broker")
    worker.state.ok("state")
    assert worker.health().not_ready() == []
    assert worker.health().components()["worker 1"].text == "partitions: transactions-0"
    worker.state.failed("lag", "transactions-0 makes no progress")
    assert worker.health().not_alive() == ["worker 1: lag: transactions-0 makes no progress"]


def test_a_worker_that_has_not_reported_is_not_ready() -> None:
    slot, health = WorkerSlot(0, WorkerMemory.create()), HealthState(stall_s_max=30)
    assert slot.show_health("worker 0", health) == []
    assert health.not_ready() == ["worker 0: starting"]
    assert slot.metrics() == []


def test_metrics_are_reported() -> None:
    slot = Reporting(ledger_registry(ledger_of(2))).report()
    (family,) = [family for family in slot.metrics() if family.name == "cascade_decisions"]
    assert isinstance(family, Metric)
    assert sum(sample.value for sample in family.samples) == 3


def test_exemplars_of_workers_stay_and_the_classic_text_is_the_same() -> None:
    ledgers = {"0": ledger_of(3), "1": ledger_of(5)}
    for worker, ledger in ledgers.items():
        positions = Records("t", np.full(1, int(worker)), np.arange(1))
        ledger.record_decisions("escalated", np.array([0.015]), None, positions)
    slots = {worker: Reporting(ledger_registry(ledger)).report() for worker, ledger in ledgers.items()}
    registry = workers_registry(lambda: {worker: slot.metrics() for worker, slot in slots.items()})
    merged = openmetrics.text_string_to_metric_families(openmetrics_text(registry).decode())
    shown = {
        (sample.labels["worker"], sample.labels["le"]): sample.exemplar.labels["decision_id"]
        for family in merged
        for sample in family.samples
        if sample.exemplar
    }
    assert shown == {("0", "0.02"): "t-0-0", ("1", "0.02"): "t-1-0"}
    through_openmetrics = samples(generate_latest(registry).decode())
    through_text = {
        (name, labels | {("worker", worker)}): value
        for worker, ledger in ledgers.items()
        for (name, labels), value in samples(text_of(ledger)).items()
    }
    assert through_openmetrics.keys() == through_text.keys()
    changing = {"cascade_stage_cpu_seconds_total", "cascade_energy_joules_total"}
    same = {key: value for key, value in through_text.items() if key[0] not in changing}
    assert {key: through_openmetrics[key] for key in same} == same
