"""A service that starts before its topics exist, on a real broker: it waits, says so, and goes on."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.cluster import read_decisions, simulated
from bench.embedded import ServiceProcess, new_names, play_file, wait_for_decisions
from cascade import cli
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.config import Config, load_config
from cascade.frames import LabelledData
from cascade.ledger import LedgerSummary
from cascade.local_parts import free_ports
from tests.conftest import Broker
from tests.e2e.asking import health
from tests.timing import wait_until

pytestmark = [pytest.mark.kafka]


@pytest.fixture(scope="module")
def data() -> LabelledData:
    return simulated(load_bundle(SHIPPED_BUNDLE).schema, cards=30, terminals=30, days=3, seed=2)


def written(path: Path, broker: Broker, processes: int) -> Path:
    settings: dict[str, Any] = {
        "bundle": {"path": str(SHIPPED_BUNDLE)},
        "kafka": new_names() | {"bootstrap": broker.bootstrap},
        "deep": {"backend": "onnxruntime"},
        "deadline": {"start": "fetch", "budget_ms": 60_000},
        "health": {"port": free_ports(1)[0]},
        "worker": {"processes": processes},
    }
    path.write_bytes(msgspec.toml.encode(settings))
    return path


def waiting_for_topics(config: Config) -> str:
    components = health(config, "/readyz")[1].get("components", {})
    topics = components.get("topics", {"status": "ok", "text": ""})
    return topics["text"] if topics["status"] == "waiting" else ""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_service_waits_for_its_topics_and_decides_once_they_are_created(
    broker: Broker, data: LabelledData, tmp_path: Path, processes: int
) -> None:
    path = written(tmp_path / "cascade.toml", broker, processes)
    with ServiceProcess(path) as service:
        wait_until(lambda: "no topic" in waiting_for_topics(service.config), "waiting for the topics")
        text = waiting_for_topics(service.config)
        topics = service.config.kafka.topics
        assert all(name in text for name in (topics.transactions, topics.labels, topics.decisions))
        assert "`cascade topics --partitions N`" in text
        time.sleep(5.0)  # it asks some more times
        assert health(service.config, "/readyz")[0] == 503
        assert health(service.config, "/healthz")[0] == 200
        assert cli.main(["topics", "--config", str(path), "--partitions", "2"]) == 0
        service.wait_ready()
        play_file(service.config, data, slice(None), None, lambda _: None)
        wait_for_decisions(service, data.batch.rows, lambda _: None)
        service.stop()
    assert sorted(read_decisions(service.config).transaction_id.tolist()) == list(range(data.batch.rows))
    logged = path.with_suffix(".log").read_text()
    assert 1 <= logged.count("waiting for topics: ") <= 3
    assert "Traceback" not in logged


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_ends_the_wait_for_topics_at_once_and_with_status_0(
    broker: Broker, tmp_path: Path, processes: int
) -> None:
    path = written(tmp_path / "cascade.toml", broker, processes)
    config, ledger = load_config(path), tmp_path / "ledger.json"
    command = [sys.executable, "-m", "cascade", "run", f"--config={path}", f"--ledger={ledger}"]
    with subprocess.Popen(command) as service:
        try:
            wait_until(lambda: "no topic" in waiting_for_topics(config), "waiting for the topics")
            began_s = time.monotonic()
            service.terminate()
            assert service.wait(timeout=20) == 0
            assert time.monotonic() - began_s < 5.0
            assert LedgerSummary.from_json_line(ledger.read_bytes()).transactions == 0
        finally:
            service.kill()
