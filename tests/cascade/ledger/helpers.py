"""What several tests of the ledger use: a clock and a meter that the test sets, records, and the tables as text."""

from __future__ import annotations

import io
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
from rich.console import Console

from cascade.ledger import LedgerSummary, MeterError, render
from cascade.protocols import EnergyKind, EnergyReading

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class ManualClock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class FixedMeter:
    """A meter that reads what the test sets, or fails."""

    name: str
    kind: EnergyKind
    energy_j: float = 0.0
    lost: bool = False

    def read(self) -> EnergyReading:
        if self.lost:
            raise MeterError(self.name, "gone", "restart")
        return EnergyReading(self.energy_j, self.kind, f"{self.name} counter")


class Records(NamedTuple):
    topic: str
    partition_ids: np.ndarray
    offsets: np.ndarray


def records(rows: int, topic: str = "transactions") -> Records:
    return Records(topic, np.array([3, 0])[np.arange(rows) % 2], 1_000 + np.arange(rows))


def rendered(summary: LedgerSummary, width: int = 100) -> str:
    out = io.StringIO()
    render(summary, Console(file=out, width=width))
    return out.getvalue()
