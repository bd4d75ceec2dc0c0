from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from cascade.config import Config, KafkaSettings
from cascade.errors import BrokerError
from streaming.health import HealthState
from streaming.waiting import Stopping, await_broker


def test_health_shows_every_attempt_and_the_log_fewer_and_fewer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("streaming.waiting.WAIT_ATTEMPT_S", 1.0)
    monkeypatch.setattr("streaming.waiting.LOG_PAUSE_FIRST_S", 60.0)
    health, texts = HealthState(60.0), list[str]()
    monkeypatch.setattr(health, "waiting", lambda part, text: texts.append(text))
    config = msgspec.convert({"bundle": {"path": str(tmp_path)}, "kafka": {}}, Config)
    config = msgspec.structs.replace(config, kafka=KafkaSettings(bootstrap="127.0.0.1:1"))
    with capture_logs() as logs, pytest.raises(BrokerError):
        await_broker(config, health, Stopping(), wait_s_max=0.5)
    assert len(texts) > 1
    assert [line["event"] for line in logs] == texts[:1]
    assert "connection refused" in texts[0]
