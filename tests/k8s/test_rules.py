"""The alert rules: Prometheus' own tool takes and tests them, and they ask for metrics that there are."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest

from cascade.ledger import Ledger, ledger_registry
from streaming.lag import LagCollector

RULES = Path(__file__).parents[2] / "k8s" / "prometheus" / "cascade-rules.yaml"
TESTS = Path(__file__).parent / "cascade-rules-test.yaml"
PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: apt install prometheus)")
def test_each_alert_fires_where_it_should_and_not_elsewhere(tmp_path: Path) -> None:
    for file in (RULES, TESTS):
        shutil.copy(file, tmp_path)
    for command in (["check", "rules", RULES.name], ["test", "rules", TESTS.name]):
        done = subprocess.run([str(PROMTOOL), *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_ask_for_metrics_that_there_are() -> None:
    ledger = Ledger()
    ledger.record_decisions("degraded", np.array([0.1]), cause="deadline")
    ledger.count_dead_letters("syntax", 1)
    registry = ledger_registry(ledger)
    registry.register(LagCollector(lambda: {("transactions", 0): 3}))
    there = set(re.findall(r"^(\w+)(?:{| )", generate_latest(registry).decode(), re.MULTILINE))
    there |= {"cascade_worker_up", "cascade_energy_meter_up"}  # of a supervisor, and of meters
    asked = set(re.findall(r"\bcascade_\w+", RULES.read_text())) - {"cascade_objective_"}
    assert asked <= there
