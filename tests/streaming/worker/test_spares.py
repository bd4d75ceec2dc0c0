"""A worker without partitions is a spare. The worker is real; broker, clock and model are the fault simulator's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import msgspec
import pytest
from structlog.testing import capture_logs

from bench.faults.broker import SimBroker
from bench.faults.disk import DiskFaults, SimDisk
from bench.faults.model import ModelFaults
from bench.faults.network import NetworkFaults
from bench.faults.process import SimProcess
from bench.faults.schedule import Options, ProcessFaults, derive
from bench.faults.world import World
from cascade.config import WorkerSettings
from streaming.worker.loop import SPARE_S_MIN

SPARE = "spare: no partitions assigned"
REVOKE_S = 2.0


def faultless(partitions: int) -> Options:
    """A topic with so many partitions, and neither traffic nor faults."""
    options = derive(1)
    config = msgspec.structs.replace(
        options.config, worker=WorkerSettings(revoke_timeout_ms=int(REVOKE_S * 1e3), poll_timeout_ms=20)
    )
    topics = dict(options.broker.topics) | {options.broker.shared_topic: partitions}
    return replace(
        options,
        static_members=False,
        config=config,
        broker=replace(options.broker, topics=topics, faults=NetworkFaults()),
        processes=ProcessFaults(),
        disk=DiskFaults(),
        model=ModelFaults(),
    )


class Scene:
    """Two workers that start one after the other."""

    def __init__(self, partitions: int) -> None:
        self.options = faultless(partitions)
        self.world = World(seed=1)
        self.broker, self.disk = SimBroker(self.world, self.options.broker), SimDisk(self.world, self.options.disk)
        self.processes: list[SimProcess] = []
        # (seconds, status, text) at each change
        self.states: dict[int, list[tuple[float, str, str]]] = {}

    def start(self) -> SimProcess:
        number = len(self.processes)
        process = SimProcess(self.world, self.broker, self.disk, self.options, number, number)
        self.processes.append(process)
        self.world.processes.append(process)
        self.states[number] = []
        self._look(process)
        return process

    def _look(self, process: SimProcess) -> None:
        part = process.health.components().get("partitions")
        seen = self.states[process.slot]
        if part is not None and (not seen or seen[-1][1:] != (part.status, part.text)):
            seen.append((self.world.now_s, part.status, part.text))
        self.world.at(0.01, partial(self._look, process))

    def wait(self, seconds: float) -> None:
        self.world.wait(self.world.now_s + seconds)
        assert [problem for process in self.processes for problem in process.problems] == []


def test_a_worker_without_partitions_is_a_spare_once_a_rebalance_could_have_ended() -> None:
    scene = Scene(partitions=1)
    scene.start()
    scene.wait(2.0)
    spare = scene.start()
    started_s = scene.world.now_s
    with capture_logs() as logged:
        scene.wait(SPARE_S_MIN + REVOKE_S - 1.0)
        assert [state[1] for state in scene.states[1]] == ["waiting", "waiting"]
        scene.wait(30.0)
    assert scene.states[0][-1][1:] == ("ok", "0")
    assert [state[1:] for state in scene.states[1]] == [
        ("waiting", "joining the group"),
        ("waiting", "joined the group, none assigned yet"),
        ("ok", SPARE),
    ]
    assert spare.health.not_ready() == []
    assert scene.states[1][-1][0] - started_s > SPARE_S_MIN + REVOKE_S
    assert [line["event"] for line in logged if "spare" in line["event"]] == [
        "spare: no partitions assigned; takes over when another worker of the group ends"
    ]


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_the_spare_takes_over_when_the_owner_is_gone(how: str) -> None:
    scene = Scene(partitions=1)
    owner = scene.start()
    scene.wait(2.0)
    spare = scene.start()
    scene.wait(20.0)
    if how == "stopped":
        owner.stopping = True
    else:
        owner.kill()
    scene.wait(5.0)
    assert owner.ended
    assert scene.states[1][-1][1:] == ("ok", "0")
    assert spare.health.not_ready() == []


def test_a_new_worker_is_not_a_spare_while_others_revoke_its_partitions() -> None:
    scene = Scene(partitions=4)
    scene.start()
    scene.wait(2.0)
    scene.start()
    scene.wait(30.0)
    assert all(text != SPARE for states in scene.states.values() for _, _, text in states)
    assert [states[-1][1:] for states in scene.states.values()] == [("ok", "0, 1"), ("ok", "2, 3")]


def test_an_owner_that_loses_its_last_partition_becomes_a_spare_in_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(partitions=1)
    first = scene.start()
    scene.wait(2.0)
    scene.start()
    scene.wait(20.0)
    group = scene.broker.group
    partitions = scene.broker.partitions(scene.options.broker.shared_topic)
    former, other = group.members
    monkeypatch.setattr(group, "_target", lambda: {former.number: [], other.number: partitions})
    group.rebalance()
    scene.wait(20.0)
    assert [states[-1][1:] for states in scene.states.values()] == [("ok", SPARE), ("ok", "0")]
    assert first.health.not_ready() == []
