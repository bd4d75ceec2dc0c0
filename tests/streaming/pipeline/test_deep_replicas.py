"""The replicas of the deep model's server in metrics, health and the energy's processes."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
from prometheus_client import CollectorRegistry

from cascade.config import Config, DeepSettings
from cascade.local_parts import free_ports
from cascade.protocols import ReplicaState
from streaming.pipeline.deep_replicas import ReplicaCollector, replica_states, replicas_text
from streaming.service.serve import energy_pids
from tests.streaming.pipeline.test_escalate import Rig, StuckStage

UP = ReplicaState("10.0.0.1:8001", True, "", 70, 2)
DOWN = ReplicaState("10.0.0.2:8001", False, "refused", 40, 3)


class Several(StuckStage):
    """A stage at fault with replicas that the test sets."""

    def __init__(self, *states: ReplicaState) -> None:
        super().__init__()
        self.states = list(states)

    def replicas(self) -> list[ReplicaState]:
        return self.states


def test_each_replica_has_its_counts_and_one_that_vanishes_has_none() -> None:
    stage = Several(UP, DOWN)
    registry = CollectorRegistry()
    registry.register(ReplicaCollector(stage))

    def samples() -> dict[tuple[str, str], float]:
        found = [sample for family in registry.collect() for sample in family.samples]
        return {(sample.name, sample.labels.get("replica", "")): sample.value for sample in found}

    assert samples() == {
        ("cascade_deep_replicas_ready", ""): 1,
        ("cascade_deep_replica_up", "10.0.0.1:8001"): 1,
        ("cascade_deep_replica_up", "10.0.0.2:8001"): 0,
        ("cascade_deep_replica_calls_total", "10.0.0.1:8001"): 70,
        ("cascade_deep_replica_calls_total", "10.0.0.2:8001"): 40,
        ("cascade_deep_replica_failures_total", "10.0.0.1:8001"): 2,
        ("cascade_deep_replica_failures_total", "10.0.0.2:8001"): 3,
    }
    stage.states = [UP]
    assert {replica for _, replica in samples()} == {"", "10.0.0.1:8001"}


def test_the_text_has_the_problem_of_a_replica() -> None:
    assert replicas_text([UP, DOWN, UP]) == "replicas ready: 2 of 3; 10.0.0.2:8001: refused"
    assert replicas_text([UP]) == "replicas ready: 1 of 1"


def test_a_stage_without_replicas_has_no_states() -> None:
    assert replica_states(Several(UP)) == [UP]
    assert replica_states(StuckStage()) is None


def test_health_shows_how_many_are_ready_and_waits_when_none_is() -> None:
    stage = Several(UP, UP)
    rig = Rig(stage)

    def component(states: list[ReplicaState]) -> tuple[str, str]:
        stage.states = states
        rig.clock.sleep(1.0)
        rig.escalations.collect()
        part = rig.health.components()["deep model"]
        return part.status, part.text

    assert component([UP, UP]) == ("ok", "replicas ready: 2 of 2")
    assert component([UP, DOWN]) == ("ok", "replicas ready: 1 of 2; 10.0.0.2:8001: refused")
    assert component([DOWN]) == ("waiting", "replicas ready: 0 of 1; 10.0.0.2:8001: refused")
    # a call or a probe shows that the model answers again
    assert component([UP])[0] == "waiting"
    stage.probes[-1].set_result(np.zeros(1))
    rig.escalations.collect()
    assert component([UP]) == ("ok", "replicas ready: 1 of 1")


def test_the_energy_of_each_local_triton_in_a_list_counts() -> None:
    ports = free_ports(3)
    code = (
        "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); print(1); time.sleep(60)"
    )
    command = [sys.executable, "-u", "-c", code]
    servers = [subprocess.Popen([*command, str(port)], stdout=subprocess.PIPE) for port in ports]
    try:
        for server in servers:
            assert server.stdout is not None
            server.stdout.readline()
        used = f"127.0.0.1:{ports[0]},localhost:{ports[2]},10.0.0.1:{ports[1]}"
        found = energy_pids(Config(deep=DeepSettings(url=used)))
        assert found == [os.getpid(), *sorted((servers[0].pid, servers[2].pid))]
        assert energy_pids(Config(deep=DeepSettings(url=f"10.0.0.1:{ports[0]}"))) == [os.getpid()]
        assert energy_pids(Config(deep=DeepSettings(url=used, backend="onnxruntime"))) == [os.getpid()]
    finally:
        for server in servers:
            server.kill()
            server.communicate()
