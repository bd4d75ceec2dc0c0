"""Alert rules and dashboard: Prometheus' own tool takes and tests the rules; both ask for metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

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
