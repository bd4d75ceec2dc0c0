"""A service whose bundle has a certificate: what it decided, what labels say of it, and what it shows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.cluster import read_topic, simulated
from bench.embedded import EmbeddedParts, ServiceProcess, new_names, play_file, wait_for_decisions
from cascade.bundle import Bundle, add_certificate, load_bundle
from cascade.config import Config, load_config
from cascade.features.spec import DAY_MS
from cascade.frames import LabelledData
from cascade.schema import key_codes
from stages.certificate import first_frauds
from streaming.kafka import FetchedBatch
from streaming.pipeline.decisions import decode_decision
from tests.bundle_certificate import made_up_certificate
from tests.conftest import Broker
from tests.e2e.asking import ask, health

pytestmark = [pytest.mark.kafka]
BACKLOG = {"deadline": {"start": "fetch", "budget_ms": 60_000}}


@pytest.fixture(scope="module")
def data(bundle: Bundle) -> LabelledData:
    return simulated(bundle.schema, cards=300, terminals=300, days=21, seed=4, fraud_share=0.05)


@pytest.fixture
def new_config(broker: Broker, bundle: Bundle, tmp_path: Path) -> Callable[[float], Path]:
    """Writes the configuration of a service; its bundle states that at least such a recall is certified."""

    def make(at_least: float) -> Path:
        certified = load_bundle(Path(shutil.copytree(bundle.directory, tmp_path / "bundle")))
        add_certificate(certified, made_up_certificate(certified.version, at_least=at_least))
        parts = EmbeddedParts(tmp_path / "service", load_bundle(certified.directory), with_triton=False)
        parts.directory.mkdir()
        parts.bootstrap = broker.bootstrap
        return parts.write_config("cascade.toml", BACKLOG | {"kafka": new_names()})

    return make


def caught_by_decisions(config: Config, data: LabelledData, bundle: Bundle, until_the_end: bool) -> tuple[int, int]:
    """(first frauds, those of them that the decisions topic has as reviewed or declined).

    until_the_end: only those whose labels are due by the end of the data; the service may read some later ones too.
    """
    alarms: set[str] = set()

    def take(batch: FetchedBatch) -> None:
        for value in batch.values:
            decision = decode_decision(value or b"", config.kafka.codec)
            if decision.decision != "approve":
                alarms.add(str(decision.transaction_id))

    read_topic(config, config.kafka.topics.decisions, take)
    roles = bundle.schema.roles
    time_ms = data.batch[roles.event_time]
    due = time_ms + bundle.schema.label.delay_ms <= time_ms[-1]
    labelled = (data.fraud == 1) & (due | (not until_the_end))
    rows = first_frauds(labelled, key_codes(data.batch[roles.card]), time_ms // DAY_MS)
    ids = data.batch[roles.transaction_id][rows].tolist()
    return len(rows), int(np.sum([str(identity) in alarms for identity in ids]))


@pytest.mark.parametrize(("at_least", "state"), [(0.001, "holds"), (0.999, "no longer holds")])
def test_a_service_counts_the_first_frauds_and_says_whether_the_certificate_holds(
    new_config: Callable[[float], Path], data: LabelledData, bundle: Bundle, at_least: float, state: str
) -> None:
    config_path = new_config(at_least)
    config = load_config(config_path)
    play_file(config, data, slice(None), None, lambda _: None)
    with ServiceProcess(config_path) as service:
        service.wait_ready()
        wait_for_decisions(service, data.batch.rows, lambda _: None)
        _, report = health(config, "/readyz")
        _, metrics = ask(config, "/metrics")
        ledger = service.stop()
    first, caught = caught_by_decisions(config, data, bundle, until_the_end=True)
    first_max, caught_max = caught_by_decisions(config, data, bundle, until_the_end=False)
    watch = ledger.watch
    assert watch is not None
    # a few decisions, and cards, replace others in the tables
    assert 0.97 * first <= watch.first_frauds <= first_max
    assert 0.97 * caught <= watch.caught <= caught_max
    assert caught > 10
    assert watch.holds == (state == "holds")
    component = report["components"]["certificate"]
    assert component["status"] == "ok"
    assert component["text"].startswith(f"{state}: ")
    assert f"cascade_certificate_recall_ratio {at_least}" in metrics
