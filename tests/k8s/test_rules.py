"""Alert rules and dashboard: Prometheus' own tool takes and tests the rules; both ask for metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest

from cascade.config import CarbonSettings
from cascade.ledger import Ledger, energy_metrics, ledger_registry, make_carbon
from cascade.ledger.account import MeterState
from streaming.lag import LagCollector

RULES = Path(__file__).parents[2] / "k8s" / "prometheus" / "cascade-rules.yaml"
DASHBOARD = RULES.parents[1] / "grafana" / "cascade.json"
TESTS = Path(__file__).parent / "cascade-rules-test.yaml"
PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: apt install prometheus)")
def test_each_alert_fires_where_it_should_and_not_elsewhere(tmp_path: Path) -> None:
    for file in (RULES, TESTS):
        shutil.copy(file, tmp_path)
    for command in (["check", "rules", RULES.name], ["test", "rules", TESTS.name]):
        done = subprocess.run([str(PROMTOOL), *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def exported_names() -> set[str]:
    """The names of the metrics that a service exports."""
    ledger = Ledger(carbon=make_carbon(CarbonSettings(region="DEU")))
    ledger.record_decisions("degraded", np.array([0.1]), cause="deadline")
    ledger.record_stage("features", 0.1, 0.1, 1)
    ledger.add_deep_call(1, 0.1)
    ledger.count_dead_letters("syntax", 1)
    registry = ledger_registry(ledger)
    registry.register(LagCollector(lambda: {("transactions", 0): 3}))
    exported = set(re.findall(r"^(\w+)(?:{| )", generate_latest(registry).decode(), re.MULTILINE))
    meter = MeterState("nvml", "measured", ("counter",), 1.0, None, carbon_g=1.0)
    exported |= {sample.name for family in energy_metrics([meter]) for sample in family.samples}
    return exported | {"cascade_worker_up"}  # a supervisor's


def test_the_rules_ask_for_metrics_that_exist(exported_names: set[str]) -> None:
    text = re.sub("^#.*$", "", RULES.read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"\bcascade_\w+", text)) <= exported_names


def test_each_panel_of_the_dashboard_asks_for_metrics_that_exist(exported_names: set[str]) -> None:
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    assert len(panels) > 10
    for panel in panels:
        for target in panel["targets"]:
            asked = set(re.findall(r"\bcascade_\w+", target["expr"]))
            assert asked, panel["title"]
            assert asked <= exported_names, panel["title"]
