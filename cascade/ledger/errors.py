"""The ledger's own errors: a meter that cannot be read, a comparison that would be a guess."""

from __future__ import annotations

from cascade.errors import CascadeError


class MeterError(CascadeError):
    """An energy counter is absent, forbidden or lost; the message names it and the remedy."""

    def __init__(self, meter: str, problem: str, remedy: str) -> None:
        self.meter, self.problem, self.remedy = meter, problem, remedy
        super().__init__(f"{meter}: {problem}; {remedy}")


class CounterfactualError(CascadeError):
    """What deep-only would have cost was not measured for this service; says why, and the remedy."""
