from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from confluent_kafka import KafkaError, KafkaException
from structlog.testing import capture_logs

from cascade.config import Config, KafkaSettings
from cascade.errors import BrokerError, MissingTopicsError, ModelServerError
from streaming.health_state import HealthState
from streaming.service.waiting import Stopping, await_broker, await_model, await_topics
from tests.timing import SetClock


def test_health_shows_every_attempt_and_the_log_fewer_and_fewer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("streaming.service.waiting.WAIT_ATTEMPT_S", 1.0)
    monkeypatch.setattr("streaming.service.waiting.LOG_PAUSE_FIRST_S", 60.0)
    health, texts = HealthState(60.0), list[str]()
    monkeypatch.setattr(health, "waiting", lambda part, text: texts.append(text))
    config = msgspec.convert({"bundle": {"path": str(tmp_path)}, "kafka": {}}, Config)
    config = msgspec.structs.replace(config, kafka=KafkaSettings(bootstrap="127.0.0.1:1"))
    with capture_logs() as logs, pytest.raises(BrokerError):
        await_broker(config, health, Stopping(), wait_s_max=0.5)
    assert len(texts) > 1
    assert [line["event"] for line in logs] == texts[:1]
    assert "connection refused" in texts[0]


class Topics:
    """Answers of the broker, one after the other; then all topics are there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: BrokerError) -> None:
        self.answers, self.health, self.stopping = list(answers), HealthState(60.0), Stopping()
        self.not_ready: list[list[str]] = []
        self.leaders: list[str] = []
        monkeypatch.setattr("streaming.service.waiting.TOPICS_PAUSE_S", 0.0)
        monkeypatch.setattr(
            "streaming.service.waiting.await_broker", lambda *_: self.not_ready.append(self.health.not_ready())
        )
        monkeypatch.setattr("streaming.service.waiting.check_topics_once", self.answer)
        monkeypatch.setattr("streaming.service.waiting.wait_for_leaders", lambda _, names: self.leaders.extend(names))

    def answer(self, config: Config, create_partitions: int) -> None:
        if self.answers:
            raise self.answers.pop(0)

    def run(self) -> list[str]:
        """The lines of the log."""
        with capture_logs() as logs:
            await_topics(Config(), 0, self.health, self.stopping)
        return [line["event"] for line in logs]


def missing() -> MissingTopicsError:
    return MissingTopicsError("Kafka has no topic labels; create it")


def test_missing_topics_are_waited_for_with_a_line_in_health_and_few_in_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    topics = Topics(monkeypatch, *(missing() for _ in range(50)))
    logged = topics.run()
    assert topics.not_ready[1] == ["topics: Kafka has no topic labels; create it"]
    assert logged == ["waiting for topics: Kafka has no topic labels; create it", "the topics are there"]
    assert topics.health.not_ready() == []
    assert "labels" in topics.leaders, "a topic without a leader cannot be read yet"


def test_topics_that_are_there_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    topics = Topics(monkeypatch)
    assert topics.run() == []
    assert topics.leaders == []


def test_a_broker_that_is_lost_meanwhile_is_waited_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = BrokerError("no answer")
    lost.__cause__ = KafkaException(KafkaError(KafkaError._TRANSPORT))
    topics = Topics(monkeypatch, missing(), lost, missing())
    topics.run()
    assert "broker: no answer" in topics.not_ready[2]
    assert topics.health.not_ready() == []


def test_a_refusal_ends_the_wait_for_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = BrokerError("not allowed")
    refused.__cause__ = KafkaException(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED))
    with pytest.raises(BrokerError, match="not allowed"):
        Topics(monkeypatch, missing(), refused).run()


def test_a_stop_ends_the_wait_for_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    topics = Topics(monkeypatch, *(missing() for _ in range(50)))
    monkeypatch.setattr("streaming.service.waiting.TOPICS_PAUSE_S", 60.0)
    topics.health.waiting = lambda name, text: topics.stopping.set()  # type: ignore[method-assign]
    topics.run()
    assert len(topics.answers) == 49


@pytest.mark.parametrize(
    ("wait_s_max", "attempts_s"), [(0.0, {1.0}), (1.0, {1.0}), (60.0, {5.0})], ids=["none", "a standby", "a start"]
)
def test_no_attempt_to_reach_the_model_is_longer_than_the_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, wait_s_max: float, attempts_s: set[float]
) -> None:
    clock, asked_s = SetClock(), list[float]()
    monkeypatch.setattr("streaming.service.waiting.time", clock)
    stopping: Any = SimpleNamespace(is_set=lambda: False, wait=clock.sleep)

    def wait_ready(timeout_s: float) -> None:
        asked_s.append(timeout_s)
        clock.sleep(timeout_s)
        raise ModelServerError("no answer")

    deep: Any = SimpleNamespace(wait_ready=wait_ready)
    health = HealthState(60.0)
    await_model(deep, health, stopping, wait_s_max)
    assert set(asked_s) == attempts_s
    assert wait_s_max <= clock.now_s <= max(3 * wait_s_max, 1.0)
    assert health.not_ready() == ["deep model: no answer"]
