"""The errors of the ledger."""

from __future__ import annotations

from cascade.errors import CascadeError


class MeterError(CascadeError):
    """An energy counter is absent, not readable or lost. The message names the meter and the remedy."""

    def __init__(self, meter: str, problem: str, remedy: str) -> None:
        self.meter, self.problem, self.remedy = meter, problem, remedy
        super().__init__(f"{meter}: {problem}; {remedy}")


class CounterfactualError(CascadeError):
    """The energy of deep-only cannot be computed for this ledger. The message names the reason and the remedy."""
