"""More workers than partitions, on a real broker: the spare is ready, and takes over when the other worker ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.cluster import read_decisions, simulated
from bench.embedded import EmbeddedParts, ServiceProcess, new_names, play_file, wait_for_decisions
from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle
from cascade.config import Config
from cascade.frames import LabelledData
from tests.conftest import Broker
from tests.e2e.asking import ask, health
from tests.timing import wait_until

pytestmark = [pytest.mark.kafka]

SPARE = "spare: no partitions assigned"


@pytest.fixture(scope="module")
def data() -> LabelledData:
    return simulated(load_bundle(SHIPPED_BUNDLE).schema, cards=60, terminals=50, days=6, seed=4)


def shown(config: Config) -> list[str]:
    """What the workers of a service show about their partitions."""
    components = health(config, "/readyz")[1].get("components", {})
    return [
        part["text"] if name == "partitions" else part["text"].partition("partitions: ")[2]
        for name, part in components.items()
        if name == "partitions" or name.startswith("worker ")
    ]


def assigned(config: Config) -> list[int]:
    """The number of partitions of each worker of a service."""
    return [
        int(sample.value)
        for family in text_string_to_metric_families(ask(config, "/metrics")[1])
        for sample in family.samples
        if sample.name == "cascade_assigned_partitions"
    ]


@pytest.mark.parametrize(
    ("client", "delivery", "workers"), [("kafka-python", "at-least-once", 1), ("librdkafka", "exactly-once", 2)]
)
def test_the_spare_is_ready_and_takes_over_when_the_first_service_stops(
    broker: Broker,
    bundle: Bundle,
    data: LabelledData,
    tmp_path: Path,
    client: str,
    delivery: str,
    workers: int,
) -> None:
    """Two services of so many workers each, on so many partitions."""
    parts = EmbeddedParts(tmp_path, bundle, with_triton=False)
    parts.bootstrap = broker.bootstrap
    settings: dict[str, Any] = {
        "delivery": delivery,
        "kafka": new_names() | {"client": client},
        "worker": {"processes": workers, "revoke_timeout_ms": 1_000},
        "deadline": {"start": "fetch", "budget_ms": 60_000},
        "overload": {"factor_min": 1.0},
    }
    rows, half = data.batch.rows, data.batch.rows // 2
    paths = [parts.write_config(f"{name}.toml", settings, partitions=workers) for name in ("first", "second")]
    with ServiceProcess(paths[0]) as first, ServiceProcess(paths[1]) as second:
        first.wait_ready()
        second.wait_ready()
        both = (first.config, second.config)
        wait_until(lambda: sum(SPARE in text for config in both for text in shown(config)) == workers, "spares")
        assert sorted(count for config in both for count in assigned(config)) == [0] * workers + [1] * workers
        assert [health(config, "/readyz")[0] for config in both] == [200, 200]
        play_file(first.config, data, slice(0, half), None, lambda _: None)
        wait_for_decisions(first, half, lambda _: None)
        first.stop()
        play_file(second.config, data, slice(half, rows), None, lambda _: None)
        wait_for_decisions(second, rows, lambda _: None)
        wait_until(lambda: not any(SPARE in text for text in shown(second.config)), "taken over")
        assert assigned(second.config) == [1] * workers
        # the group may still move a partition between its workers, which rebuild its state then
        wait_until(lambda: health(second.config, "/readyz")[0] == 200, "ready")
        second.stop()
    found = read_decisions(second.config).transaction_id.tolist()
    assert sorted(found) == list(range(rows))
    logged = "".join(path.with_suffix(".log").read_text() for path in paths)
    assert logged.count(SPARE) == workers
