from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from cascade.bundle import SHIPPED_BUNDLE
from cascade.config import load_config
from cascade.local_parts import free_ports
from streaming.kafka import TopicSpec, ensure_topics
from streaming.service.doctor import SCHEMA_NUMBER_MAX, Finding, app, examine
from streaming.service.topics import topic_specs
from tests.streaming.codecs.registry import Registry

ConfigMaker = Callable[..., Path]


@pytest.fixture
def new_config(tmp_path: Path) -> ConfigMaker:
    def make(**sections: Any) -> Path:
        name = uuid.uuid4().hex[:10]
        topics = {topic: f"{topic}-{name}" for topic in ("transactions", "labels", "decisions")}
        kafka = {"topics": topics | {"dead_letters": f"dead-letters-{name}"}} | sections.pop("kafka", {})
        settings = {
            "bundle": {"path": str(SHIPPED_BUNDLE)},
            "kafka": kafka,
            "deep": {"backend": "onnxruntime"},
        } | sections
        path = tmp_path / "cascade.toml"
        path.write_bytes(msgspec.toml.encode(settings))
        return path

    return make


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """For checks of a broker and a Triton that are not there."""
    monkeypatch.setattr("streaming.service.doctor.PROBE_TIMEOUT_S", 0.2)


def findings(path: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(path)}


@pytest.mark.kafka
def test_a_service_that_can_run(broker: Any, new_config: ConfigMaker, tmp_path: Path) -> None:
    state = {"snapshots": str(tmp_path / "state")}
    path = new_config(kafka={"bootstrap": broker.bootstrap, "instance": "only"}, delivery="exactly-once", state=state)
    config = load_config(path)
    ensure_topics(config.kafka, topic_specs(config, 2))
    found = findings(path)
    assert [finding for name, finding in found.items() if name != "energy" and finding.status != "ok"] == []
    assert f"{config.kafka.topics.transactions} (2)" in found["topics"].text
    assert "a record was produced and consumed" in found["clock"].text
    assert found["delivery"].text == "exactly-once as only: a transaction was begun and aborted"
    assert "written and read back; 0 snapshots" in found["state"].text
    assert "answers a probe" in found["deep model"].text
    assert ("modelled" in found["energy"].text) == (found["energy"].status == "warning")
    result = CliRunner().invoke(app, ["--config", str(path), "--json"])
    assert result.exit_code == 0
    assert [finding.check for finding in msgspec.json.decode(result.stdout, type=list[Finding])] == list(found)


@pytest.mark.kafka
def test_missing_topics_are_named_with_the_remedy(broker: Any, new_config: ConfigMaker) -> None:
    found = findings(new_config(kafka={"bootstrap": broker.bootstrap}))
    assert found["topics"].status == "failed"
    assert "dead-letters-" in found["topics"].text
    assert "`cascade topics --partitions N`" in found["topics"].text
    assert found["clock"] == Finding("clock", "warning", "not checked: the topics must exist first")


@pytest.mark.kafka
def test_a_topic_with_producer_timestamps_is_a_warning(broker: Any, new_config: ConfigMaker) -> None:
    path = new_config(kafka={"bootstrap": broker.bootstrap})
    config = load_config(path)
    ensure_topics(config.kafka, [TopicSpec(spec.name, 1) for spec in topic_specs(config, 1)])
    clock = findings(path)["clock"]
    assert clock.status == "warning"
    assert "LogAppendTime" in clock.text


@pytest.mark.usefixtures("no_wait")
def test_what_kafka_python_does_not_do_is_a_warning_that_names_it(new_config: ConfigMaker) -> None:
    client = findings(new_config(kafka={"bootstrap": "127.0.0.1:1", "client": "kafka-python"}))["client"]
    assert client.status == "warning"
    for lack in ("not UTF-8", "revokes all partitions", "fenced", "no exactly-once", 'kafka.client to "librdkafka"'):
        assert lack in client.text
    assert "\n" not in client.text
    assert findings(new_config(kafka={"bootstrap": "127.0.0.1:1"}))["client"].status == "ok"


@pytest.mark.usefixtures("no_wait")
def test_a_dead_broker_and_a_dead_triton_fail_by_name(new_config: ConfigMaker) -> None:
    kafka_port, triton_port = free_ports(2)
    path = new_config(
        kafka={"bootstrap": f"127.0.0.1:{kafka_port}"}, deep={"backend": "triton", "url": f"127.0.0.1:{triton_port}"}
    )
    found = findings(path)
    assert found["broker"].status == "failed"
    assert f"127.0.0.1:{kafka_port}" in found["broker"].text
    assert found["topics"].text == "not checked: the broker must answer first"
    assert found["deep model"].status == "failed"
    assert f"127.0.0.1:{triton_port}" in found["deep model"].text
    result = CliRunner().invoke(app, ["--config", str(path)])
    assert result.exit_code == 1
    assert "Traceback" not in result.output


@pytest.mark.usefixtures("no_wait")
def test_a_registry_that_is_away_or_refuses_fails_by_name(new_config: ConfigMaker) -> None:
    with closing(Registry()) as registry:
        path = new_config(kafka={"codec": "avro", "schema_registry": {"url": registry.url}})
        here = findings(path)["messages"]
        registry.answers[f"/schemas/ids/{SCHEMA_NUMBER_MAX}"] = lambda _: (401, b"{}")
        refused = findings(path)["messages"]
    away = findings(path)["messages"]
    assert here == Finding("messages", "ok", f"avro, the schema registry at {registry.url} answers")
    assert refused.status == away.status == "failed"
    assert "kafka.schema_registry" in refused.text
    assert registry.url in away.text


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize(
    ("check", "sections", "text"),
    [
        (
            "energy",
            {"energy": {"processor": "none such"}},
            "{directory}/cascade.toml: energy.processor = 'none such': not in the table; use one of ",
        ),
        ("bundle", {"bundle": {"path": "{directory}/none"}}, "{directory}/none"),
        ("state", {"state": {"snapshots": "{directory}/cascade.toml"}}, "{directory}/cascade.toml: "),
    ],
    ids=["a setting", "a missing bundle", "a place for snapshots that is a file"],
)
def test_a_mistake_fails_its_check_by_name(
    new_config: ConfigMaker, tmp_path: Path, check: str, sections: dict[str, dict[str, str]], text: str
) -> None:
    named = {
        section: {key: value.format(directory=tmp_path) for key, value in settings.items()}
        for section, settings in sections.items()
    }
    found = findings(new_config(kafka={"bootstrap": f"127.0.0.1:{free_ports(1)[0]}"}, **named))
    assert found["configuration"].status == "ok"
    assert found[check].status == "failed"
    assert text.format(directory=tmp_path) in found[check].text


def test_too_few_open_files_fail_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (64, 64))
    limits = findings(tmp_path / "none.toml")["limits"]
    assert limits.status == "failed"
    assert "ulimit -n" in limits.text
