"""The standby: what it loads ahead, whom it becomes, and what happens where it is gone."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cascade.config import BundleSettings, Config, KafkaSettings
from cascade.local_parts import OwnedProcess
from streaming.service import standby as module
from streaming.service.standby import Standby, stand_by
from streaming.service.worker_memory import WorkerMemory
from streaming.service.worker_report import WorkerSlot, worker_environment
from tests.timing import wait_until

# As a standby does: shows that it is ready, and becomes the worker whose number it reads.
WAITING = """
import os, sys
sys.path.insert(0, sys.argv[3])
from streaming.service.worker_memory import WorkerMemory
WorkerMemory(int(sys.argv[2])).write(str(os.getpid()).encode())
open(sys.argv[1] + "/number", "w").write(sys.stdin.readline())
sys.stdin.readline()
"""
BROKEN = "import sys; sys.exit(1)"


class Made:
    """A Standby of these programs, one after the other."""

    def __init__(self, directory: Path, *programs: str) -> None:
        self.processes: list[OwnedProcess] = []
        self._directory, self._programs = directory, list(programs)
        self._memory = WorkerMemory.create()
        self.standby = Standby(self._make, self._memory)

    def _make(self) -> OwnedProcess:
        descriptor, root = self._memory.fd, str(Path(__file__).parents[3])
        command = [sys.executable, "-S", "-c", self._programs.pop(0), str(self._directory), str(descriptor), root]
        self.processes.append(OwnedProcess("standby", command, None, os.environ, [descriptor], reads=True))
        return self.processes[-1]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    found = Made(tmp_path, WAITING, WAITING)
    yield found
    for process in found.processes:
        process.kill()


def test_it_becomes_the_worker_that_is_needed_and_another_one_is_started(made: Made, tmp_path: Path) -> None:
    made.standby.start()
    made.standby.start()
    assert len(made.processes) == 1
    wait_until(lambda: made.standby.ready)
    process = made.standby.take(3)
    assert process is made.processes[0]
    number = tmp_path / "number"
    wait_until(lambda: number.exists() and number.read_text() == "3\n")
    assert not made.standby.ready
    assert made.standby.take(4) is None
    made.standby.start()
    assert len(made.processes) == 2
    assert process.running
    made.standby.stop()
    assert [process.running for process in made.processes] == [True, False]


def test_one_that_has_ended_is_not_taken_and_started_again_after_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(tmp_path, BROKEN, BROKEN)
    made.standby.start()
    wait_until(lambda: not made.processes[0].running)
    made.standby.start()
    assert len(made.processes) == 1
    monkeypatch.setattr(module, "RESTART_PAUSE_S", 0.0)
    made.standby.start()
    assert len(made.processes) == 2
    wait_until(lambda: not made.processes[1].running)
    assert made.standby.take(0) is None


class Process:
    """`stand_by` with a line on its standard input; notes what it loads and whom it runs."""

    def __init__(self, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Any] = []
        self.own, self.of_workers = WorkerMemory.create(), [WorkerMemory.create() for _ in range(6)]
        config = Config(kafka=KafkaSettings(instance="pair"), bundle=BundleSettings(path="here"))
        monkeypatch.setattr("os.environ", worker_environment(config))
        monkeypatch.setattr(module, "load", self._load)
        monkeypatch.setattr(module, "serve", self._serve)
        monkeypatch.setattr(module, "configure_log", lambda settings: None)
        monkeypatch.setattr("sys.stdin", io.StringIO(line))
        stand_by(self.own, self.of_workers)

    def _load(self, config: Config) -> str:
        assert self.own.number == 0, "it is not ready before"
        self.events.append(("load", config.bundle.path))
        return "loaded"

    def _serve(self, config: Config, slot: WorkerSlot, loaded: Any) -> None:
        assert slot.memory is self.of_workers[slot.number]
        self.events.append(("serve", config.kafka.instance, slot.number, loaded))


def test_it_loads_first_and_then_waits_for_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process("5\n", monkeypatch)
    assert process.events == [("load", "here"), ("serve", "pair-5", 5, "loaded")]
    assert process.own.read() == str(os.getpid()).encode()


def test_it_ends_with_a_supervisor_that_sends_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Process("", monkeypatch).events == [("load", "here")]
