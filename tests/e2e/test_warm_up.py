"""`cascade warm-up`: the first decisions are those of a service that has read the same history from Kafka."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from bench.cluster import escalating_bundle, read_topic, separate_terminals
from bench.embedded import EmbeddedParts, ServiceProcess, new_names, play_file, wait_for_decisions
from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle
from cascade.columns import ColumnBatch
from cascade.config import Config, load_config
from cascade.errors import CascadeError
from cascade.frames import LabelledData, frame_to_batch
from cascade.ledger import LedgerSummary
from cascade.simulator import SimulatorSettings, simulate
from streaming.codecs import topic_codec
from streaming.data_commands import app
from streaming.kafka import FetchedBatch
from streaming.pipeline.decisions import Decision, decode_decision
from streaming.warm_up import WarmedUp, warm_up
from tests.conftest import Broker
from tests.e2e.asking import ask, health, producing

pytestmark = [pytest.mark.kafka]

# A record of the log is fetched, not met: its deadline counts from then.
BACKLOG: dict[str, Any] = {
    "deadline": {"start": "fetch", "budget_ms": 60_000},
    "labels": {"alignment": "exact"},
    "deep": {"backend": "onnxruntime"},
}
PARTITIONS = 2
FIRST = 400  # decisions to compare
SIMULATION = SimulatorSettings(cards=200, terminals=80, days=18, start=date(2024, 1, 1), seed=5, fraud_share=0.03)
ConfigMaker = Callable[..., Path]


@pytest.fixture(scope="module")
def data() -> LabelledData:
    # long enough for labels to act; the events of a terminal are in one partition, whose order Kafka keeps
    schema = load_bundle(SHIPPED_BUNDLE).schema
    frame = simulate(SIMULATION)
    fraud = frame[schema.label.field].to_numpy().astype(np.int64)
    whole = LabelledData(frame_to_batch(frame, schema, "simulated"), fraud)
    return separate_terminals(whole, schema, PARTITIONS)


@pytest.fixture(scope="module")
def history(data: LabelledData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All but the last rows, as a file."""
    terminal = load_bundle(SHIPPED_BUNDLE).schema.roles.terminal
    frame = simulate(SIMULATION).with_columns(pl.Series(terminal, data.batch[terminal]))
    path = tmp_path_factory.mktemp("history") / "history.parquet"
    frame.head(data.batch.rows - FIRST).write_parquet(path)
    return path


@pytest.fixture(scope="module")
def bundle(data: LabelledData, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return escalating_bundle(tmp_path_factory.mktemp("bundle") / "bundle", 0.2, data)


@pytest.fixture(scope="module")
def new_config(broker: Broker, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> ConfigMaker:
    """Writes a configuration with topics, a group and a place for snapshots of its own."""
    directory = tmp_path_factory.mktemp("service")
    parts = EmbeddedParts(directory, bundle, with_triton=False)
    parts.bootstrap = broker.bootstrap

    def make(**sections: Any) -> Path:
        name = uuid.uuid4().hex
        state = {"snapshots": str(directory / f"state-{name}")}
        settings = BACKLOG | {"state": state, "kafka": new_names()} | sections
        return parts.write_config(f"{name}.toml", settings, PARTITIONS)

    return make


@dataclass(frozen=True)
class Run:
    """Decisions by transaction id; the service's note on its state, and its metrics, before it ended; its ledger."""

    decisions: dict[str, Decision]
    note: str
    metrics: str
    ledger: LedgerSummary


def decide(path: Path, data: LabelledData, played: slice, decided: int) -> Run:
    """Plays rows, and runs the service until so many are decided."""
    config = load_config(path)
    found: list[Decision] = []

    def take(batch: FetchedBatch) -> None:
        found.extend(decode_decision(value or b"", config.kafka.codec) for value in batch.values)

    play_file(config, data, played, None, lambda _: None)
    with ServiceProcess(path) as service:
        service.wait_ready()
        wait_for_decisions(service, decided, lambda _: None)
        component = health(config, "/readyz")[1]["components"]["history"]
        metrics = ask(config, "/metrics")[1]
        ledger = service.stop()
    assert component["status"] == "ok", "a cold service is ready"
    read_topic(config, config.kafka.topics.decisions, take)
    decisions = {str(decision.transaction_id): decision for decision in found}
    return Run(decisions, component["text"], metrics, ledger)


def test_first_decisions_after_a_warm_up_equal_those_after_the_same_history_from_kafka(
    new_config: ConfigMaker, data: LabelledData, history: Path
) -> None:
    rows = data.batch.rows
    last = slice(rows - FIRST, rows)
    read = decide(new_config(), data, slice(None), rows).decisions
    path = new_config()
    ran = CliRunner().invoke(app, ["warm-up", "--data", str(history), "--config", str(path), "--json"])
    assert ran.exit_code == 0, ran.output
    done = msgspec.json.decode(ran.stdout.splitlines()[-1], type=WarmedUp)
    assert (done.rows, done.partitions, done.forgotten) == (rows - FIRST, PARTITIONS, 0)
    warm = decide(path, data, last, FIRST)
    assert "restoring a snapshot" in path.with_suffix(".log").read_text()
    identities = [str(number) for number in range(rows - FIRST, rows)]
    assert sorted(warm.decisions) == identities
    pairs = [(warm.decisions[identity], read[identity]) for identity in identities]
    assert [one.screener_score for one, _ in pairs] == [other.screener_score for _, other in pairs]
    deep = [(one.score, other.score) for one, other in pairs if one.stage == other.stage == "deep"]
    assert len(deep) > 10
    np.testing.assert_allclose(*zip(*deep, strict=True), atol=1e-6, rtol=0)
    times_ms = data.batch["event_time"]
    longer = (times_ms[-1] - times_ms[0]) / (times_ms[rows - FIRST - 1] - times_ms[0])
    assert warm.ledger.state_covered == pytest.approx(done.covered * longer, abs=0.01)
    with pytest.raises(CascadeError, match=r"has decided .* history comes before the first decision"):
        fold(path, data)


def test_a_service_without_the_history_says_so_and_scores_otherwise(
    new_config: ConfigMaker, data: LabelledData
) -> None:
    rows = data.batch.rows
    path, other = new_config(), new_config()
    cold = decide(path, data, slice(rows - FIRST, rows), FIRST)
    covered = cold.ledger.state_covered
    assert covered is not None
    assert 0.0 < covered < 0.1
    assert cold.note == f"cold: the state covers {covered:.0%} of its longest window, 37 days"
    assert (
        "cold: the state covers 0% of its longest window, 37 days: cards look" in path.with_suffix(".log").read_text()
    )
    assert "cascade_state_covered_ratio 0.0" in cold.metrics
    assert cold.ledger.state_covered_min == 0.0
    fold(other, data.take(np.arange(rows - FIRST)))
    warm = decide(other, data, slice(rows - FIRST, rows), FIRST)
    differ = [cold.decisions[n].screener_score != found.screener_score for n, found in warm.decisions.items()]
    assert np.mean(differ) > 0.5


def fold(path: Path, data: LabelledData) -> WarmedUp:
    config = load_config(path)
    return warm_up(config, load_bundle(Path(config.bundle.path)), data, lambda *_: None)


def test_a_second_history_is_refused(new_config: ConfigMaker, data: LabelledData) -> None:
    path = new_config()
    assert fold(path, data.take(np.arange(50))).rows == 50
    with pytest.raises(CascadeError, match="has a snapshot of these partitions already"):
        fold(path, data.take(np.arange(50, 60)))


def test_history_that_reaches_into_the_topic_is_refused_and_history_before_it_is_not(
    new_config: ConfigMaker, data: LabelledData
) -> None:
    path = new_config()
    play_file(load_config(path), data, slice(500, 600), None, lambda _: None)
    with pytest.raises(CascadeError, match=r"after the first record of .* cut the history with --to"):
        fold(path, data.take(np.arange(600)))
    assert fold(path, data.take(np.arange(500))).rows == 500


def test_a_topic_with_another_partitioner_is_refused(new_config: ConfigMaker, data: LabelledData) -> None:
    config: Config = load_config(path := new_config())
    schema = load_bundle(SHIPPED_BUNDLE).schema
    encoded = topic_codec(config.kafka, config.kafka.topics.transactions, schema.fields, 65_536).encode(
        data.batch.take(np.arange(500, 540))
    )
    # of the other cards
    keys: list[bytes | None] = [b"key-%d" % number for number in range(40)]
    with producing(config) as producer:
        producer.send_many(config.kafka.topics.transactions, keys, encoded)
    with pytest.raises(CascadeError, match="Kafka's default partitioner"):
        fold(path, data.take(np.arange(400)))


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"state": {"snapshots": ""}}, r"state\.snapshots.* has no place for the state"),
        ({"terminals": {"share": True}}, r"terminals\.share.* would not see each other's history"),
    ],
)
def test_a_configuration_that_cannot_use_it_is_refused(
    new_config: ConfigMaker, data: LabelledData, sections: dict[str, Any], problem: str
) -> None:
    with pytest.raises(CascadeError, match=problem):
        fold(new_config(**sections), data.take(np.arange(50)))


def test_no_history_is_refused(new_config: ConfigMaker, data: LabelledData) -> None:
    with pytest.raises(CascadeError, match="no rows"):
        fold(new_config(), LabelledData(ColumnBatch(data.batch.take(np.arange(0)).columns, 0), data.fraud[:0]))
