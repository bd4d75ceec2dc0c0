"""What several tests of the ledger use: a clock and a meter that the test sets, and the tables as text."""

from __future__ import annotations

import io
from dataclasses import dataclass
from datetime import UTC, datetime

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


def rendered(summary: LedgerSummary, width: int = 100) -> str:
    out = io.StringIO()
    render(summary, Console(file=out, width=width))
    return out.getvalue()
