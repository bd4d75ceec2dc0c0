"""The topics of a configuration: created, compared, and asked for again when a node is away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka import KafkaError, KafkaException

from bench.embedded import new_names
from cascade import cli
from cascade.config import Config, KafkaSettings, TerminalSettings, load_config
from cascade.errors import BrokerError
from streaming.kafka import TopicSpec, describe_topics, ensure_topics
from streaming.service.topics import check_topics, differences, topic_specs
from tests.conftest import Broker

SHARING = Config(terminals=TerminalSettings(share=True))


def test_a_node_that_goes_away_while_topics_are_asked_for_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def missing(kafka: KafkaSettings, names: list[str]) -> list[str]:
        asked.append(1)
        if len(asked) == 1:
            raise BrokerError("a node is gone") from KafkaException(KafkaError(KafkaError._TRANSPORT))
        return [names[0]]

    monkeypatch.setattr("streaming.service.topics.missing_topics", missing)
    monkeypatch.setattr("streaming.service.topics.TOPICS_PAUSE_S", 0.0)
    with pytest.raises(BrokerError, match="has no topic transactions"):
        check_topics(Config(), 0)
    assert len(asked) == 2


def found(**changes: TopicSpec) -> dict[str, TopicSpec]:
    """The topics of SHARING as `cascade topics --partitions 6 --replication 3` creates them, some of them changed."""
    return {spec.name: changes.get(spec.name.replace("-", "_"), spec) for spec in topic_specs(SHARING, 6, 3)}


def differing(**changes: TopicSpec) -> list[str]:
    return differences(SHARING, topic_specs(SHARING, 6, 3), found(**changes))


def test_topics_as_they_were_created_do_not_differ() -> None:
    assert differing() == []


@pytest.mark.parametrize(
    ("topic", "change", "words"),
    [
        ("transactions", {"partitions": 3}, ("has 3 partitions, not 6", "--alter", "while the topic is empty")),
        ("decisions", {"partitions": 12}, ("has 12 partitions, not 6", "pass --partitions 12")),
        ("labels", {"replication": 1}, ("has replication factor 1, not 3", "kafka-reassign-partitions.sh")),
        (
            "transactions",
            {"settings": {"message.timestamp.type": "CreateTime"}},
            ("message.timestamp.type is CreateTime, not LogAppendTime", "kafka-configs.sh --alter"),
        ),
        (
            "terminal_summaries",
            {"settings": {"cleanup.policy": "delete"}},
            ("cleanup.policy is delete, not compact,delete", "cleanup.policy=[compact,delete]"),
        ),
    ],
)
def test_a_topic_that_differs_is_named_with_what_differs_and_the_remedy(
    topic: str, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    name = topic.replace("_", "-")
    (line,) = differing(**{topic: replace(found()[name], **change)})
    assert line.startswith(f"{name}: ")
    assert all(word in line for word in words)


def test_labels_and_dead_letters_may_have_any_number_of_partitions_and_unreadable_settings_are_not_compared() -> None:
    topics = found()
    assert differing(
        labels=replace(topics["labels"], partitions=4),
        dead_letters=replace(topics["dead-letters"], partitions=9),
        transactions=replace(topics["transactions"], settings={}),
        # the same policies in another order
        terminal_summaries=replace(topics["terminal-summaries"], settings={"cleanup.policy": "delete,compact"}),
    ) == []  # fmt: skip


def configured(path: Path, **kafka: Any) -> Config:
    path.write_bytes(msgspec.toml.encode({"kafka": new_names() | kafka, "terminals": {"share": True}}))
    return load_config(path)


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], list[str]]:
    status = cli.main(["topics", *arguments])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


@pytest.mark.kafka
def test_the_command_creates_what_is_missing_once_and_reports_what_differs(
    broker: Broker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cascade.toml"
    config = configured(path, bootstrap=broker.bootstrap)
    names = config.kafka.topics
    ensure_topics(config.kafka, [TopicSpec(names.decisions, 2)])
    arguments = ("--config", str(path), "--partitions", "3", "--replication", "1")
    status, out, err = called(capsys, *arguments)
    assert status == 0
    assert out == [
        f"{names.transactions}: created, 3 partitions, replication factor 1",
        f"{names.labels}: created, 1 partition, replication factor 1",
        f"{names.decisions}: there, 2 partitions, replication factor 1",
        f"{names.dead_letters}: created, 1 partition, replication factor 1",
        f"{names.summaries}: created, 3 partitions, replication factor 1",
    ]
    partitions, stamps = err
    assert partitions.startswith(f"differs: {names.decisions}: has 2 partitions, not 3; ")
    assert stamps.startswith(f"differs: {names.decisions}: message.timestamp.type is CreateTime, not LogAppendTime; ")
    assert called(capsys, *arguments) == (0, [line.replace("created", "there") for line in out], err)
    described = describe_topics(config.kafka, [names.summaries])[names.summaries].settings
    assert described is not None
    assert set(described["cleanup.policy"].split(",")) == {"compact", "delete"}


def test_a_broker_that_does_not_answer_in_time_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cascade.toml"
    configured(path, bootstrap="127.0.0.1:1")
    status, out, err = called(capsys, "--config", str(path), "--partitions", "2", "--wait", "0.5")
    assert (status, out) == (1, [])
    assert err[0].startswith("waiting for Kafka at 127.0.0.1:1: ")
    assert err[-1].startswith("cascade topics: no Kafka broker at 127.0.0.1:1 after 0.5 s ")


@pytest.mark.kafka
def test_a_replication_factor_that_the_broker_refuses_is_one_line(
    broker: Broker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cascade.toml"
    configured(path, bootstrap=broker.bootstrap)
    status, out, err = called(capsys, "--config", str(path), "--partitions", "2", "--replication", "5")
    assert (status, out) == (1, [])
    (line,) = err
    assert "replication factor" in line.lower()
