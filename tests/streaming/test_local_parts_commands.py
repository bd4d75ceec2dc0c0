"""`cascade local`: runs the parts in the foreground until a signal."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cascade.config import KafkaSettings
from stages.deep.repository import write_repository
from stages.deep.triton import TritonDeepStage
from streaming.kafka import TopicSpec, ensure_topics
from tests.conftest import TinyDeepModel

LOCAL = [sys.executable, "-c", "from streaming.local_parts_commands import app; app()"]


def started(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """The running command and the first line that it printed."""
    command = subprocess.Popen([*LOCAL, *arguments], stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    return command, command.stdout.readline()


@pytest.mark.kafka
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_broker_prints_its_address_and_stops_at_a_signal(
    kafka_parts: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command, line = started("broker", "--data", str(tmp_path / "data"), "--port", "0")
    address = line.split(" at ")[1].split(",")[0]
    assert ensure_topics(KafkaSettings(bootstrap=address), [TopicSpec("one", 1)]) == ["one"]
    command.send_signal(number)
    rest, _ = command.communicate(timeout=30)
    assert command.returncode == 0
    assert "stopped" in rest


@pytest.mark.triton
def test_triton_prints_its_addresses_and_stops_on_ctrl_c(
    triton_parts: Path, tiny_deep_model: TinyDeepModel, tmp_path: Path
) -> None:
    repository = write_repository(tiny_deep_model.path, tiny_deep_model.signature, tmp_path / "models", "cpu")
    command, line = started("triton", "--repository", str(repository), "--port", "0")
    stage = TritonDeepStage(line.split("gRPC ")[1].split(",")[0], tiny_deep_model.signature)
    stage.wait_ready(10)
    stage.close()
    command.send_signal(signal.SIGINT)
    rest, _ = command.communicate(timeout=30)
    assert command.returncode == 0
    assert "stopped" in rest


@pytest.mark.kafka
@pytest.mark.triton
def test_install_prints_what_is_present(kafka_parts: Path, triton_parts: Path) -> None:
    done = subprocess.run([*LOCAL, "install"], capture_output=True, text=True, timeout=60, check=True)
    assert [line.split(":")[1].split()[0] for line in done.stdout.splitlines()] == [
        "present", "present", "compiling", "ready",
    ]  # fmt: skip
