"""A service of two workers on a real broker and a real Triton, seen from outside: a worker dies, a worker hangs."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from bench.cluster import committed_offsets, end_offsets, escalating_bundle, read_decisions, simulated
from bench.embedded import EmbeddedParts, ServiceProcess, new_names, play_file, wait_for_decisions
from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle
from cascade.config import Config
from cascade.errors import DataError
from cascade.frames import LabelledData
from cascade.ledger import read_journal, summarise
from stages.deep.local_triton import LocalTriton
from streaming.service.health import OPENMETRICS
from tests.conftest import Broker
from tests.e2e.asking import ask
from tests.e2e.test_worker import ends_with_one_line, triton_server  # the fixture is used by name
from tests.otlp_receiver import OtlpReceiver, attributes
from tests.timing import wait_until

__all__ = ["triton_server"]
pytestmark = [pytest.mark.kafka, pytest.mark.triton]

PARTITIONS = 4
DRAIN_MS = 20_000
STALL_S_MAX = 20.0


@pytest.fixture(scope="module")
def data() -> LabelledData:
    return simulated(load_bundle(SHIPPED_BUNDLE).schema, cards=120, terminals=100, days=12, seed=5)


@pytest.fixture(scope="module")
def bundle(data: LabelledData, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return escalating_bundle(tmp_path_factory.mktemp("bundle") / "bundle", 0.05, data)


def partitions_of(config: Config) -> dict[str, set[int]]:
    """The partitions that each worker reports, by `worker N`."""
    components = json.loads(ask(config, "/readyz")[1])["components"]
    return {
        name: {int(number) for number in found[1].split(", ")}
        if (found := re.search(r"partitions: ([\d, ]+)", part["text"]))
        else set()
        for name, part in components.items()
    }


def shared_out(config: Config, shares: dict[str, set[int]]) -> bool:
    shares.update(partitions_of(config))
    return sorted(map(len, shares.values())) == [2, 2]


def decided_by(metrics: str) -> Counter[str]:
    """Decisions by worker."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(metrics):
        if family.name == "cascade_decisions":
            for sample in family.samples:
                found[sample.labels["worker"]] += int(sample.value)
    return found


def decided_by_collected(receiver: OtlpReceiver) -> dict[str, int]:
    """Decisions by worker, as the collector had them last."""
    found: Counter[str] = Counter()
    if receiver.taken and "cascade.decisions" in receiver.metrics:
        for point in receiver.metrics["cascade.decisions"].sum.data_points:
            found[attributes(point)["cascade.worker.id"]] += point.as_int
    return dict(found)


def exemplars_in(metrics: str) -> dict[str, str]:
    """Workers by the decision ids that they show."""
    return {
        sample.exemplar.labels["decision_id"]: sample.labels["worker"]
        for family in openmetrics.text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.exemplar
    }


def worker_pids(service: ServiceProcess) -> dict[int, int]:
    """The processes that run, by worker."""
    found: dict[int, int] = {}
    for child in psutil.Process(service.pid).children():
        with suppress(psutil.NoSuchProcess):
            command = child.cmdline()
            if "--worker" in command:
                found[int(command[command.index("--worker") + 1])] = child.pid
    return found


Observed = SimpleNamespace


@pytest.fixture(scope="module")
def observed(
    broker: Broker,
    bundle: Bundle,
    data: LabelledData,
    triton_server: LocalTriton,
    tmp_path_factory: pytest.TempPathFactory,
) -> Observed:
    """Two workers decide half of the file; one is killed and restarts, the other is frozen; the rest; SIGTERM."""
    parts = EmbeddedParts(tmp_path_factory.mktemp("service"), bundle, with_triton=False)
    parts.bootstrap, parts.triton_url = broker.bootstrap, triton_server.grpc_url
    receiver = OtlpReceiver()
    settings: dict[str, Any] = {
        "otel": {"endpoint": receiver.url, "interval_s": 1.0},
        "kafka": new_names() | {"instance": "pair"},
        "health": {"stall_s_max": STALL_S_MAX},
        "worker": {"processes": 2, "drain_timeout_ms": DRAIN_MS},
        "deadline": {"start": "fetch", "budget_ms": 60_000},
        "overload": {"factor_min": 1.0},
        "terminals": {"share": True, "interval_s": 0.2},
        "carbon": {"region": "DEU", "embodied_kg": 100.0},
        "ledger": {"directory": str(tmp_path_factory.mktemp("ledger")), "interval_s": 1.0},
    }
    path = parts.write_config("cascade.toml", settings, PARTITIONS)
    rows, half = data.batch.rows, data.batch.rows // 2
    with ServiceProcess(path) as service, closing(receiver):
        config = service.config
        service.wait_ready()
        shares: dict[str, set[int]] = {}
        wait_until(lambda: shared_out(config, shares), "shared", found=lambda: shares)
        play_file(config, data, slice(0, half), None, lambda _: None)
        wait_for_decisions(service, half, lambda _: None)
        # a decision is counted once the broker has confirmed it, which is after others can read it
        wait_until(lambda: sum(decided_by(ask(config, "/metrics")[1]).values()) >= half, "counted")
        metrics = ask(config, "/metrics")[1]
        exemplars = exemplars_in(ask(config, "/metrics", OPENMETRICS)[1])
        wait_until(lambda: sum(decided_by_collected(receiver).values()) >= half, "collected")
        collected = decided_by_collected(receiver)
        wait_until(
            lambda: committed_offsets(config) == end_offsets(config, config.kafka.topics.transactions), "committed"
        )
        # what is in no account yet dies with its worker
        wait_until(lambda: accounted_in(config) >= half, "accounted")
        pids = worker_pids(service)
        os.kill(pids[1], signal.SIGKILL)
        waiting: list[str] = []

        def noticed() -> bool:
            waiting[:] = json.loads(ask(config, "/readyz")[1])["waiting_for"]
            return bool(waiting)

        wait_until(noticed, "noticed")
        wait_until(lambda: ask(config, "/readyz")[0] == 200, "ready again")
        os.killpg(pids[0], signal.SIGSTOP)
        play_file(config, data, slice(half, rows), None, lambda _: None)
        wait_until(lambda: ask(config, "/healthz")[0] == 503, "the hang is seen")
        hung = json.loads(ask(config, "/healthz")[1])["waiting_for"]
        wait_for_decisions(service, rows, lambda _: None)
        wait_until(lambda: ask(config, "/readyz")[0] == 200, "ready once more")
        assert service.pid is not None
        family = psutil.Process(service.pid).children(recursive=True)
        ledger = service.stop()
        left = [process.pid for process in family if process.is_running()]
    return Observed(
        config=config,
        sent=rows,
        shares=shares,
        decided=decided_by(metrics),
        metrics=metrics,
        exemplars=exemplars,
        collected=collected,
        waiting=waiting,
        hung=hung,
        pids=pids,
        ledger=ledger,
        left=left,
        log=path.with_suffix(".log").read_text(),
        triton_pid=triton_server.pid,
    )


def accounted_in(config: Config) -> int:
    """Decisions in the last account that is on disk."""
    try:
        (life,) = read_journal([Path(config.ledger.directory)])
    except DataError:
        return 0
    return life.accounts[-1].counters.decisions


def test_every_transaction_is_decided_once(observed: Observed) -> None:
    found = read_decisions(observed.config)
    assert sorted(found.transaction_id.tolist()) == list(range(observed.sent))


def test_the_partitions_are_shared_and_both_workers_decide(observed: Observed) -> None:
    first, second = observed.shares["worker 0"], observed.shares["worker 1"]
    assert first | second == set(range(PARTITIONS))
    assert not first & second
    assert set(observed.decided) == {"0", "1"}
    assert min(observed.decided.values()) > observed.sent // 2 // 10


def test_metrics_are_of_both_and_of_what_they_share(observed: Observed) -> None:
    assert sum(observed.decided.values()) == observed.sent // 2
    families = {family.name: family for family in text_string_to_metric_families(observed.metrics)}
    assert observed.metrics.count("# TYPE cascade_decisions_total ") == 1
    meters = Counter(sample.labels["worker"] for sample in families["cascade_energy_joules"].samples)
    assert meters["0"] == meters["1"] == 1, "a worker meters its own CPU, and nothing else"
    assert meters["shared"] >= 1
    up = {sample.labels["worker"]: sample.value for sample in families["cascade_worker_up"].samples}
    assert up == {"0": 1.0, "1": 1.0}


def test_an_opentelemetry_collector_has_the_same_of_both(observed: Observed) -> None:
    assert observed.collected == dict(observed.decided)


def test_exemplars_name_transactions_that_their_worker_decided(observed: Observed) -> None:
    shares = {worker.removeprefix("worker "): numbers for worker, numbers in observed.shares.items()}
    assert set(observed.exemplars.values()) == {"0", "1"}
    ends = end_offsets(observed.config, observed.config.kafka.topics.transactions)
    for decision_id, worker in observed.exemplars.items():
        partition, offset = map(int, decision_id.rsplit("-", 2)[1:])
        assert partition in shares[worker]
        assert 0 <= offset < ends[partition]


def test_a_killed_worker_is_named_and_comes_back(observed: Observed) -> None:
    assert "worker 1 ended with signal 9" in observed.log
    assert observed.waiting
    assert all(line.startswith("worker 1: ") for line in observed.waiting)
    assert observed.ledger.restarts == 2
    assert "worker=1" in observed.log
    assert "worker=0" in observed.log


def test_a_worker_that_hangs_is_named_killed_and_replaced(observed: Observed) -> None:
    (line,) = observed.hung
    found = re.fullmatch(r"worker 0: no answer for (\d+) s; stopping it", line)
    assert found
    assert STALL_S_MAX <= int(found[1]) < STALL_S_MAX + 10
    assert not psutil.pid_exists(observed.pids[0])
    assert "worker 0 ended with signal 9" in observed.log


def test_the_ledger_is_of_all_and_counts_what_was_decided(observed: Observed) -> None:
    ledger = observed.ledger
    assert (ledger.transactions, ledger.processes) == (observed.sent, 2)
    assert ledger.degraded_share == 0
    assert ledger.escalation_share is not None
    assert 0.02 < ledger.escalation_share < 0.1
    assert ledger.sessions == 4
    all_of_them = ledger.paths["all"].latency
    assert all_of_them is not None
    assert all_of_them.count == observed.sent


def test_energy_counts_triton_once_and_every_worker(observed: Observed) -> None:
    (cpu,) = [figure for figure in observed.ledger.energy if figure.meter == "cpu-worker"]
    (deep,) = [figure for figure in observed.ledger.energy if figure.meter == "cpu-deep"]
    assert cpu.energy_j is not None
    assert deep.energy_j
    assert deep.source.count(f"process {observed.triton_pid} ") == 1
    carbon = observed.ledger.carbon
    assert carbon is not None
    assert len(carbon.bases) == 2
    assert carbon.sci_g_per_million is not None
    # the supervisor, and each worker twice
    assert cpu.source.count("this process") == 4
    assert cpu.source.endswith("; and 1 more")


def test_the_ledger_on_disk_is_of_all_of_them_too(observed: Observed) -> None:
    (life,) = read_journal([Path(observed.config.ledger.directory)])
    written = summarise(life.accounts[-1])
    assert written.paths == observed.ledger.paths
    assert written.sessions == observed.ledger.sessions
    counts = [account.counters.decisions for account in life.accounts]
    assert counts == sorted(counts), "an account of a worker that was killed was counted twice for a while"
    assert any(0 < count < observed.sent for count in counts)


def test_sigterm_ends_all_of_them_in_time(observed: Observed) -> None:
    assert "drain timed out" not in observed.log
    assert observed.left == []
    assert committed_offsets(observed.config) == end_offsets(observed.config, observed.config.kafka.topics.transactions)


@pytest.mark.parametrize(
    ("path", "processes", "message"),
    [
        ("nowhere", 2, "nowhere"),
        (str(SHIPPED_BUNDLE), PARTITIONS + 1, "{file}: worker.processes = 5: topic transactions-"),
    ],
)
def test_a_mistake_is_one_line_and_no_worker_starts(
    observed: Observed, tmp_path: Path, path: str, processes: int, message: str
) -> None:
    kafka = observed.config.kafka
    settings = {
        "bundle": {"path": path},
        "worker": {"processes": processes},
        "health": {"port": 0},
        "log": {"level": "error"},
        "kafka": {"bootstrap": kafka.bootstrap, "topics": msgspec.to_builtins(kafka.topics)},
    }
    file = tmp_path / "cascade.toml"
    file.write_bytes(msgspec.toml.encode(settings))
    assert ends_with_one_line(file).startswith(f"cascade run: {message.format(file=file)}")
