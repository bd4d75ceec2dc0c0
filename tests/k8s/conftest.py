"""The names of the metrics that rules, dashboard and autoscaling may ask for."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import numpy as np
import pytest
from prometheus_client import generate_latest

from cascade.config import CarbonSettings
from cascade.ledger import CertifiedRecall, Ledger, energy_metrics, ledger_registry, make_carbon
from cascade.ledger.account import MeterState
from streaming.service.lag import LagCollector


@pytest.fixture(scope="session")
def exported_names() -> set[str]:
    """The names of the metrics that a service exports."""
    certified = CertifiedRecall(0.6, 0.01, datetime(2100, 1, 1, tzinfo=UTC))
    ledger = Ledger(carbon=make_carbon(CarbonSettings(region="DEU")), certified=certified)
    ledger.record_decisions("degraded", np.array([0.1]), cause="deadline")
    ledger.record_stage("features", 0.1, 0.1, 1)
    ledger.add_deep_call(1, 0.1)
    ledger.count_dead_letters("syntax", 1)
    registry = ledger_registry(ledger)
    registry.register(LagCollector(lambda: None, lambda: {("transactions", 0): 3}))
    exported = set(re.findall(r"^(\w+)(?:{| )", generate_latest(registry).decode(), re.MULTILINE))
    meter = MeterState("nvml", "measured", ("counter",), 1.0, None, carbon_g=1.0)
    exported |= {sample.name for family in energy_metrics([meter]) for sample in family.samples}
    return exported | {"cascade_worker_up"}  # a supervisor's
