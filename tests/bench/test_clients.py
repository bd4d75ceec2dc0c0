"""`cascade bench clients`: both clients do the same work, all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

import bench.clients
from bench.clients import CLIENTS, Make, Records, run_clients, show_clients
from tests.conftest import Broker

pytestmark = pytest.mark.kafka


@pytest.fixture(autouse=True)
def small(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP", broker.bootstrap)
    for name, value in {
        "RECORDS": 400,
        "RECORDS_ALONE": 20,
        "RATE_S": 0.3,
        "WARM_UP_S": 0.1,
        "BATCHES": (1, 100),
    }.items():
        monkeypatch.setattr(bench.clients, name, value)


@pytest.mark.parametrize("make", CLIENTS.values(), ids=CLIENTS)
def test_a_client_reads_sends_and_passes_on_all_records(broker: Broker, make: Make) -> None:
    records = Records(broker.bootstrap, 1)
    source = make(records, records.backlog, 0)
    rows = 0
    while rows < 400:
        rows += source.pass_on()
    assert source.send(0, 100) == 100
    source.flush()
    source.close()
    sent = make(records, records.target, 0)
    rows = 0
    while rows < 500:
        rows += sent.read(200)
    assert rows == 500
    sent.close()


def test_every_work_is_measured_in_both_clients_and_shown(tmp_path: Path) -> None:
    report = run_clients(1, 1, tmp_path)
    assert len(report.comparisons) == 5
    for found in report.comparisons:
        assert min(found.c_api.thread_us, found.binding.thread_us, found.c_api.process_us) > 0
        # of the only round
        assert found.thread.median == found.binding.thread_us / found.c_api.thread_us
    with Console(width=100, record=True) as console:
        show_clients(report, console)
    assert "poll and send" in console.export_text()
