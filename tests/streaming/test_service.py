"""The service's start."""

from __future__ import annotations

import pytest
from kafka.errors import KafkaConnectionError

from cascade.config import Config, KafkaSettings
from cascade.errors import BrokerError
from streaming.service import check_topics


def test_a_node_that_goes_away_while_topics_are_asked_for_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def missing(kafka: KafkaSettings, names: list[str]) -> list[str]:
        asked.append(1)
        if len(asked) == 1:
            raise BrokerError("a node is gone") from KafkaConnectionError("refused")
        return [names[0]]

    monkeypatch.setattr("streaming.service.missing_topics", missing)
    monkeypatch.setattr("streaming.service.TOPICS_PAUSE_S", 0.0)
    with pytest.raises(BrokerError, match="has no topic transactions"):
        check_topics(Config(), 0)
    assert len(asked) == 2
