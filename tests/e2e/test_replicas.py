"""The worker with three real Tritons and a real broker, while one Triton is killed and comes back under load."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.cluster import escalating_bundle, read_topic, simulated
from bench.embedded import EmbeddedParts, ServiceProcess, new_names, play_file, wait_for_decisions
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.config import Config, load_config
from cascade.frames import LabelledData
from cascade.ledger import LedgerSummary
from stages.assembly import deep_signature
from stages.deep.local_triton import LocalTriton
from stages.deep.repository import write_repository
from streaming.kafka import FetchedBatch
from streaming.pipeline.decisions import Decision, decode_decision
from tests.conftest import Broker
from tests.e2e.asking import ask, health
from tests.timing import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.triton]

ROWS, ROWS_PER_S = 3_000, 300
KILLED_AFTER_S = 3.0
ESCALATED_SHARE = 0.2
# Far above the time of a call: only the loss of a replica makes one late, and not the machine's other load.
BUDGET_MS = 1_500


@dataclass(frozen=True)
class Run:
    """A run of the service: its decisions, its ledger, and what it reported while a replica was gone and later."""

    decisions: list[Decision]
    ledger: LedgerSummary
    gone_ready: tuple[int, dict[str, Any]]
    gone_metrics: dict[str, float]
    gone_doctor: dict[str, Any]
    killed: str


@pytest.fixture(scope="module")
def data() -> LabelledData:
    schema = load_bundle(SHIPPED_BUNDLE).schema
    return simulated(schema, cards=250, terminals=200, days=21, seed=3, fraud_share=0.02)


@pytest.fixture(scope="module")
def run(
    broker: Broker, triton_parts: Path, data: LabelledData, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    directory = tmp_path_factory.mktemp("replicas")
    bundle = escalating_bundle(directory / "bundle", ESCALATED_SHARE, data)
    repository = write_repository(bundle.directory / "deep.onnx", deep_signature(bundle), directory / "models", "cpu")
    parts = EmbeddedParts(directory, bundle, with_triton=False)
    parts.bootstrap = broker.bootstrap
    with ExitStack() as stack:
        tritons = []
        for number in range(3):
            log_dir = directory / f"triton-{number}"
            log_dir.mkdir()
            tritons.append(stack.enter_context(LocalTriton(repository, parts_dir=triton_parts, log_dir=log_dir)))
        settings = {
            "kafka": new_names(),
            "deep": {"backend": "triton", "url": ",".join(triton.grpc_url for triton in tritons)},
            "deadline": {"budget_ms": BUDGET_MS},
            "worker": {"batch_rows_max": 20},
        }
        path = parts.write_config("cascade.toml", settings)
        yield killed_under_load(path, tritons, data)


def killed_under_load(path: Path, tritons: list[LocalTriton], data: LabelledData) -> Run:
    config, killed = load_config(path), tritons[0]
    with ServiceProcess(path) as service:
        service.wait_ready()
        wait_until(lambda: "replicas ready: 3 of 3" in deep_text(config), "all three are ready")
        kill = threading.Timer(KILLED_AFTER_S, killed.kill)
        kill.start()
        play_file(config, data, slice(0, ROWS), ROWS_PER_S, lambda _: None)
        kill.join()
        wait_until(lambda: "replicas ready: 2 of 3" in deep_text(config), "health reports the loss")
        wait_for_decisions(service, ROWS, lambda _: None)
        gone_ready, gone_metrics = health(config, "/readyz"), metrics(config)
        gone_doctor = doctor(path)
        killed.start()
        wait_until(lambda: "replicas ready: 3 of 3" in deep_text(config), "it is used again")
        before = metrics(config)
        play_file(config, data, slice(ROWS, ROWS + 300), ROWS_PER_S, lambda _: None)
        wait_for_decisions(service, ROWS + 300, lambda _: None)
        sample = f"cascade_deep_replica_calls_total {killed.grpc_url}"
        assert metrics(config)[sample] > before[sample]
        ledger = service.stop()
    return Run(decisions_in(config), ledger, gone_ready, gone_metrics, gone_doctor, killed.grpc_url)


def deep_text(config: Config) -> str:
    return str(health(config, "/readyz")[1].get("components", {}).get("deep model", {}).get("text"))


def metrics(config: Config) -> dict[str, float]:
    """The values of the replicas' samples; keys are their names, and the replica if there is one."""
    families = text_string_to_metric_families(ask(config, "/metrics")[1])
    samples = [sample for family in families for sample in family.samples if "_deep_replica" in sample.name]
    return {f"{sample.name} {sample.labels.get('replica', '')}".strip(): sample.value for sample in samples}


def doctor(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "cascade", "doctor", "--json", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return next(finding for finding in found if finding["check"] == "deep model")


def decisions_in(config: Config) -> list[Decision]:
    values: list[bytes | None] = []

    def take(batch: FetchedBatch) -> None:
        values.extend(batch.values)

    read_topic(config, config.kafka.topics.decisions, take)
    return [decode_decision(value or b"", config.kafka.codec) for value in values]


def test_no_transaction_is_lost_and_none_is_decided_twice(run: Run) -> None:
    assert sorted(int(decision.transaction_id) for decision in run.decisions) == list(range(ROWS + 300))


def test_decisions_of_the_deep_model_go_on_and_the_degraded_share_is_reported(run: Run) -> None:
    causes = Counter(decision.degraded_cause for decision in run.decisions if decision.degraded)
    escalated = sum(decision.stage == "deep" or decision.degraded for decision in run.decisions)
    print(f"{escalated} escalated, degraded: {dict(causes)}, the ledger's share {run.ledger.degraded_share:.3%}")
    assert escalated > 0.5 * ESCALATED_SHARE * ROWS
    # a call to the killed replica is sent to another one
    assert causes.total() < 0.02 * escalated
    assert run.ledger.degraded_share == pytest.approx(causes.total() / len(run.decisions))
    assert run.ledger.transactions == len(run.decisions)


def test_health_metrics_and_doctor_report_the_replica_that_is_gone(run: Run) -> None:
    status, report = run.gone_ready
    assert status == 200
    assert run.killed in report["components"]["deep model"]["text"]
    assert run.gone_metrics["cascade_deep_replicas_ready"] == 2
    ups = {name: value for name, value in run.gone_metrics.items() if name.startswith("cascade_deep_replica_up ")}
    assert len(ups) == 3
    assert [name.split()[1] for name, value in ups.items() if not value] == [run.killed]
    assert run.gone_doctor["status"] == "warning"
    assert f"replicas ready: 2 of 3; {run.killed}: " in run.gone_doctor["text"]
